"""One seam for all backward passes."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtljax
from mtljax import placement
from mtljax.gradients import pullback

W = jax.random.normal(jax.random.key(0), (5, 4))
X = jax.random.normal(jax.random.key(1), (6, 5))


def function(w, x):
    return jnp.tanh(x @ w).mean(0)


@pytest.mark.parametrize("backward", ["auto", "jax", "rewritten"])
def test_both_ways_are_the_vector_jacobian_product(backward):
    if backward == "rewritten" and not placement.rewrites("auto", (W, X)):
        pytest.skip("several devices or another backend")
    cotangent = jnp.arange(4.0)
    out, pull, aux = pullback(function, W, X, backward=backward)
    expected = jax.vjp(function, W, X)[1](cotangent)
    np.testing.assert_allclose(out, function(W, X), rtol=1e-6)
    assert aux is None
    for got, want in zip(pull(cotangent), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        pull(cotangent, lambda results: results[1]), expected[1], rtol=1e-5, atol=1e-6
    )
    assert pull.body.ops > 0


def test_auxiliary_outputs():
    out, pull, aux = pullback(lambda w: (w.sum(), w + 1), W, has_aux=True)
    np.testing.assert_allclose(aux, W + 1)
    np.testing.assert_allclose(pull(jnp.ones_like(out))[0], np.ones((5, 4)))


def test_the_rewriting_is_imported_only_if_it_is_used():
    code = """
import sys, jax, jax.numpy as jnp, mtljax
losses = lambda p: jnp.tanh(p[:2])
for backward in ("jax", "auto"):
    balancer = mtljax.mgda(2)
    step = mtljax.value_and_balanced_grad(losses, balancer, backward=backward)
    step(jnp.ones(3), balancer.init(jnp.ones(3)))
    print(any("_rewrite" in name for name in sys.modules))
"""
    for devices, expected in ((1, ["False", "True"]), (8, ["False", "False"])):
        flag = f"--xla_force_host_platform_device_count={devices}"
        root = str(pathlib.Path(__file__).parents[2])
        found = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root},
        )
        assert found.stdout.split() == expected


@pytest.mark.usefixtures("as_users")
def test_a_choice_is_checked():
    with pytest.raises(ValueError, match="backward='fast' is not one of"):
        mtljax.value_and_task_grads(lambda p: p, backward="fast")
