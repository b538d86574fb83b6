"""An identity, whatever is done to it; for one CPU device it is a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtljax
from mtljax.gradients._engine import _sweep
from mtljax.gradients._engine._settle import settle

LARGE = 2, 400, 512


def entries(first, shape=LARGE):
    return jax.random.normal(jax.random.key(0), shape).at[(0,) * len(shape)].set(first)


@pytest.mark.parametrize("jitted", [True, False])
@pytest.mark.parametrize("first", [1.5, -0.0, jnp.inf, -jnp.inf, jnp.nan])
def test_changes_nothing(first, jitted):
    x = entries(first)
    np.testing.assert_array_equal(jax.jit(settle)(x) if jitted else settle(x), x)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision(dtype):
    x = entries(2).astype(dtype)
    found = jax.jit(settle)(x)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, x)


def test_transformations():
    x, v = entries(1.0), entries(2.0)
    np.testing.assert_array_equal(jax.jit(jax.vmap(settle, 1, 1))(x), x)
    _, tangent = jax.jvp(jax.jit(settle), (x,), (v,))
    np.testing.assert_array_equal(tangent, v)
    _, pull = jax.vjp(jax.jit(settle), x)
    np.testing.assert_array_equal(pull(v)[0], v)


def lowered(shape, **options):
    x = jax.ShapeDtypeStruct(shape, jnp.float32, **options)
    return jax.jit(settle).trace(x).lower(lowering_platforms=("cpu",)).as_text()


def test_is_a_loop_for_large_values_of_one_device():
    assert "while" in lowered(LARGE)
    assert "while" not in lowered((100, 512))
    mesh = jax.sharding.AbstractMesh((2,), ("batch",))
    spec = jax.sharding.PartitionSpec(None, "batch")
    several = jax.sharding.NamedSharding(mesh, spec)
    assert "while" not in lowered(LARGE, sharding=several)


def test_shardings_that_are_part_of_types():
    kinds = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((1,), ("batch",), axis_types=kinds)
    set_mesh = getattr(jax, "set_mesh", None) or jax.sharding.use_mesh  # jax 0.7
    spec = jax.sharding.PartitionSpec("batch")
    with set_mesh(mesh):
        x = jax.device_put(entries(1.0), jax.sharding.NamedSharding(mesh, spec))
        np.testing.assert_array_equal(jax.jit(settle)(x), x)


@pytest.mark.deep  # programs are compiled without optimisation by default
def test_less_memory(monkeypatch):
    """Cotangents behind activations are read in two shapes, and made once."""
    shapes = (256, 512), (512, 512), (512, 512)
    params = {"trunk": [jnp.zeros(s) for s in shapes], "heads": jnp.zeros((4, 512))}
    x = jnp.zeros((128, 256))

    def task_losses(p):
        h = x
        for w in p["trunk"]:
            h = jax.nn.relu(h @ w)
        return jnp.stack([(h @ head).mean() for head in p["heads"]])

    def memory():
        gramian = mtljax.task_gramian(task_losses, engine="gramian")
        program = jax.jit(gramian).lower(params).compile()
        return program.memory_analysis().temp_size_in_bytes

    once = memory()
    monkeypatch.setattr(_sweep, "_to_settle", lambda program: set())
    of_one_layer = 4 * 4 * len(x) * 512
    assert once <= memory() - of_one_layer / 2


def test_only_what_is_contracted_and_multiplied():
    """Gradients alone do not need it, nor does a cotangent that nothing else reads."""
    x = jnp.ones((3, 4))

    def settled(loss, *args):
        value, pull = jax.vjp(loss, *args)
        return len(_sweep.sweep(pull, value).settled)

    def layer(w, nudge):
        return jnp.tanh(jnp.tanh(x @ w) @ w + nudge) @ w

    w, nudge = jnp.ones((4, 4)), jnp.zeros((3, 4))
    assert settled(layer, w, nudge) == 1
    assert settled(lambda w: layer(w, nudge), w) == 0
    assert settled(lambda nudge: jnp.tanh(x + nudge), nudge) == 0
