"""Sums without and averages with ``axis_name``, in ``shard_map`` and ``pmap``."""

from devices import manual
from devices.harness import make_tests

NORMAL = (
    "local-mgda-gramian-small",
    "pmean-mlp-gramian-small",
    "axis-vma-mlp-gramian-small-all",
    "axis-unchecked-mlp-gramian-small-all",
    "axis-pmap-mlp-stacked-small-all",
    "explicit_axis-gramian-vma",
    "masks-vma-gramian-all",
    "scatter_refused-cagrad-gramian",
)

test_manual = make_tests(manual, normal=NORMAL)
