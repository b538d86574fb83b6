"""Sharpness, alternating steps and auxiliary weights on several devices."""

from devices import subpackages
from devices.harness import make_tests

NORMAL = (
    "sam-dp8-explicit-small",
    "alternate-vma-small",
)

test_subpackages = make_tests(subpackages, normal=NORMAL)
