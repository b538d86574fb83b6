"""The numbers of one device in every layout, for every engine."""

from devices import matrix
from devices.harness import make_tests

NORMAL = (
    "dp8-explicit-none-mlp-small-gramian",
    "fsdp8-explicit-none-mlp-small-gramian",
    "tp42-auto-none-mlp-large-stacked",
    "three222-explicit-none-mlp-small-gramian",
)

test_matrix = make_tests(matrix, normal=NORMAL)
