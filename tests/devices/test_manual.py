"""Sums without and averages with ``axis_name``, in ``shard_map`` and ``pmap``."""

from devices import manual
from devices.harness import make_tests

test_manual = make_tests(manual)
