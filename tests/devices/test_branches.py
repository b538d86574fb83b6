"""ForkMerge with sharded parameters."""

from devices import branches
from devices.harness import make_tests

NORMAL = (
    "merge-tp42-explicit",
    "fork-fsdp8-auto",
)

test_branches = make_tests(branches, normal=NORMAL)
