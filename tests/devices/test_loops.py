"""Whole training steps on a mesh."""

from devices import loops
from devices.harness import make_tests

test_loops = make_tests(loops)
