"""Whole training steps on a mesh."""

from devices import loops
from devices.harness import make_tests

NORMAL = (
    "donate-tp42-auto-gramian",
    "scan-tp42-explicit-losses",
)

test_loops = make_tests(loops, normal=NORMAL)
