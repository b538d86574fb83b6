"""Every registered method on gradients that a mesh splits."""

from devices import methods
from devices.harness import make_tests

test_methods = make_tests(methods)
