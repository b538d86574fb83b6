"""Every registered method on gradients that a mesh splits."""

from devices import methods
from devices.harness import make_tests

NORMAL = (
    "mgda-explicit-masked-float32",
    "trimmed_mean-explicit-all-float32",
    "excess_mtl-explicit-all-float32",
    "cagrad-traced",
    "uncertainty-context",
)

test_methods = make_tests(methods, normal=NORMAL)
