"""Runs that are saved on one mesh and resumed on another one."""

from devices import checkpoints
from devices.harness import make_tests

test_checkpoints = make_tests(checkpoints)
