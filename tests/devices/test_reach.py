"""Set-ups on eight devices give the numbers of one."""

from devices import reach
from devices.harness import make_tests

NORMAL = ("separate-explicit", "representation-vma")

test_reach = make_tests(reach, normal=NORMAL)
