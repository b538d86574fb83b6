"""Storing a value does not change it, and it saves a second computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtljax
from mtljax.gradients._rewrite import batch
from mtljax.gradients._rewrite.once import LARGE, once

SIZE = LARGE + 3


@pytest.mark.parametrize("entry", [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3e38])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_keeps_every_bit(entry, dtype):
    x = jax.random.normal(jax.random.key(0), (SIZE,)).astype(dtype)
    x = x.at[0].set(entry).at[-1].set(entry)
    bits = jnp.uint32 if dtype == jnp.float32 else jnp.uint16
    want = jax.lax.bitcast_convert_type(x, bits)
    got = jax.lax.bitcast_convert_type(jax.jit(once)(x), bits)
    np.testing.assert_array_equal(got, want)


def test_derivatives_and_vmap():
    x = jax.random.normal(jax.random.key(0), (2, SIZE))
    value, tangent = jax.jit(lambda x: jax.jvp(once, (x,), (2 * x,)))(x)
    np.testing.assert_array_equal(value, x)
    np.testing.assert_array_equal(tangent, 2 * x)
    grad = jax.jit(jax.grad(lambda x: (once(x) ** 2).sum()))(x)
    np.testing.assert_array_equal(grad, 2 * x)
    mapped = jax.jit(jax.vmap(once)).lower(x)
    assert "while" not in mapped.as_text()
    np.testing.assert_array_equal(mapped.compile()(x), x)


def test_small_and_integer_values_are_not_stored():
    for x in (jnp.ones(LARGE - 1), jnp.ones(SIZE, jnp.int32)):
        assert "while" not in jax.jit(once).lower(x).as_text()


def test_cotangents_of_all_tasks_are_computed_once(monkeypatch):
    num_tasks, width, examples = 3, 512, 128
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "trunk": [jax.random.normal(k, (width, width)) / width**0.5 for k in keys[:3]],
        "heads": jax.random.normal(keys[3], (num_tasks, width)) / width**0.5,
    }
    x = jax.random.normal(keys[4], (examples, width))

    def losses(params, x):
        for kernel in params["trunk"]:
            x = jax.nn.relu(x @ kernel)
        return jnp.stack([jnp.square(x @ h - 1).mean() for h in params["heads"]])

    balancer = mtljax.upgrad(num_tasks)
    state = balancer.init(params)

    def compiled():
        grad_fn = mtljax.value_and_balanced_grad(
            losses, balancer, engine="gramian", backward="rewritten"
        )
        return jax.jit(grad_fn).lower(params, state, x).compile()

    stored = compiled()
    monkeypatch.setattr(batch, "once", lambda x: x)
    plain = compiled()
    sizes = [p.memory_analysis().temp_size_in_bytes for p in (stored, plain)]
    # How much of the copies of [128, 3, 512] numbers is live at once depends on XLA.
    assert sizes[0] + 4 * examples * width <= sizes[1]
    got, want = stored(params, state, x), plain(params, state, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
