"""Sharpness, alternating steps and auxiliary weights on several devices."""

from devices import subpackages
from devices.harness import make_tests

test_subpackages = make_tests(subpackages)
