"""The numbers of one device in every layout, for every engine."""

from devices import matrix
from devices.harness import make_tests

test_matrix = make_tests(matrix)
