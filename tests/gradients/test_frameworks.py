"""One network in three frameworks, and a balancer among the parts of optax."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from gradients.problem import LABELS, batch, close, params, task_losses

import mtljax

STEPS = 5
X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).normal(size=(2, 16)), jnp.float32)


def weights():
    rng = np.random.default_rng(2)
    shapes = {"trunk": (4, 8), "head_0": (8, 1), "head_1": (8, 1)}
    return {
        name: (
            jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, jnp.float32),
            jnp.asarray(0.1 * rng.normal(size=shape[1]), jnp.float32),
        )
        for name, shape in shapes.items()
    }


def losses_of(predictions):
    return jnp.stack(
        [jnp.mean((p[:, 0] - y) ** 2) for p, y in zip(predictions, Y, strict=True)]
    )


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        h = jnp.tanh(linen.Dense(8, name="trunk")(x))
        return [linen.Dense(1, name=f"head_{i}")(h) for i in range(2)]


def in_linen():
    start = {k: {"kernel": w, "bias": b} for k, (w, b) in weights().items()}

    def task_losses(p):
        return losses_of(Linen().apply({"params": p}, X))

    def read(p):
        return {k: (v["kernel"], v["bias"]) for k, v in p.items()}

    return start, task_losses, read


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.trunk = nnx.Linear(4, 8, rngs=rngs)
        self.head_0 = nnx.Linear(8, 1, rngs=rngs)
        self.head_1 = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        h = jnp.tanh(self.trunk(x))
        return [self.head_0(h), self.head_1(h)]


def in_nnx():
    model = Nnx()
    for name, (w, b) in weights().items():
        layer = getattr(model, name)
        layer.kernel[...], layer.bias[...] = w, b
    graph, start = nnx.split(model, nnx.Param)

    def task_losses(p):
        return losses_of(nnx.merge(graph, p)(X))

    def read(p):
        layers = nnx.to_pure_dict(p)
        return {k: (v["kernel"], v["bias"]) for k, v in layers.items()}

    return start, task_losses, read


class Eqx(eqx.Module):
    trunk: eqx.nn.Linear
    head_0: eqx.nn.Linear
    head_1: eqx.nn.Linear
    activation: str = "tanh"  # not an array: partition must leave it out

    def __call__(self, x):
        h = jnp.tanh(self.trunk(x))
        return [self.head_0(h), self.head_1(h)]


def in_equinox():
    def layer(w, b):
        made = eqx.nn.Linear(w.shape[0], w.shape[1], key=jax.random.key(0))
        return eqx.tree_at(lambda m: (m.weight, m.bias), made, (w.T, b))

    model = Eqx(**{k: layer(w, b) for k, (w, b) in weights().items()})
    start, static = eqx.partition(model, eqx.is_inexact_array)

    def task_losses(p):
        return losses_of(jax.vmap(eqx.combine(p, static))(X))

    def read(p):
        names = ("trunk", "head_0", "head_1")
        return {k: (getattr(p, k).weight.T, getattr(p, k).bias) for k in names}

    return start, task_losses, read


def train(start, task_losses):
    opt = optax.chain(
        mtljax.cagrad(2), optax.clip_by_global_norm(1.0), optax.adamw(1e-3)
    )

    def step(carry):
        p, state = carry
        losses, grads = mtljax.value_and_task_grads(task_losses)(p)
        updates, state = opt.update(grads, state, p, losses=losses)
        return (optax.apply_updates(p, updates), state), losses

    step = jax.jit(step)
    carry, history = (start, opt.init(start)), []
    for _ in range(STEPS):
        carry, losses = step(carry)
        history.append(losses)
    return carry, history


def test_three_frameworks_train_to_the_same_numbers():
    results = {}
    for make in (in_linen, in_nnx, in_equinox):
        start, task_losses, read = make()
        close(read(start), weights())
        (end, _), losses = train(start, task_losses)
        assert (losses[-1] < losses[0]).any()
        results[make.__name__] = read(end)
    moved = np.abs(results["in_linen"]["trunk"][0] - weights()["trunk"][0])
    assert moved.min() > 1e-4
    close(results["in_nnx"], results["in_linen"])
    close(results["in_equinox"], results["in_linen"])


def run(opt, p, data, steps=4, labels=None):
    def step(carry, _):
        p, state = carry
        losses, grads = mtljax.value_and_task_grads(task_losses, labels=labels)(p, data)
        updates, state = opt.update(grads, state, p, losses=losses)
        return (optax.apply_updates(p, updates), state), losses.sum()

    return jax.lax.scan(step, (p, opt.init(p)), length=steps)


def test_partition_trains_trunk_and_heads():
    opt = optax.partition(
        {
            "shared": optax.chain(mtljax.mgda(3), optax.adam(1e-2)),
            "own": optax.adam(1e-2),
        },
        LABELS,
    )
    start, data = params(), batch()
    (end, _), losses = jax.jit(lambda: run(opt, start, data, 20, labels=LABELS))()
    assert losses[-1] < 0.9 * losses[0]
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), start, end)
    assert min(jax.tree.leaves(moved)) > 1e-3
    # Adam of the heads saw their own gradients only: it is the plain run on them.
    head = optax.adam(1e-2)
    grads = jax.grad(lambda h: task_losses({**start, "heads": h}, data).sum())(
        start["heads"]
    )
    updates, _ = head.update(grads, head.init(start["heads"]))
    (first, _), _ = jax.jit(lambda: run(opt, start, data, 1, labels=LABELS))()
    close(first["heads"], optax.apply_updates(start["heads"], updates))


def test_seeds_are_a_vmap_axis():
    def one(key):
        p = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), params())
        balancer = mtljax.random_loss_weighting(3, key=key)
        opt = optax.chain(balancer, optax.adam(1e-2))
        (end, _), losses = run(opt, p, batch(), 3)
        return end, losses

    keys = jax.random.split(jax.random.key(0), 8)
    together = jax.jit(jax.vmap(one))(keys)
    alone = jax.jit(one)
    for i in range(8):
        close(jax.tree.map(lambda x, i=i: x[i], together), alone(keys[i]), 1e-5)


def plain_average(p, batches):
    """Two batches, accumulated by hand, then one step of SGD."""

    def mean(p):
        return sum(task_losses(p, data).sum() for data in batches) / 2

    return jax.tree.map(lambda x, g: x - 0.1 * g, p, jax.grad(mean)(p))


def test_accumulation_after_the_balancer():
    accumulate = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    opt = optax.chain(mtljax.linear(3), accumulate)
    start, batches = params(), [batch(1), batch(2)]
    p, state = start, opt.init(start)
    for count, data in enumerate(batches):
        losses, grads = mtljax.value_and_task_grads(task_losses)(p, data)
        updates, state = opt.update(grads, state, p, losses=losses)
        p = optax.apply_updates(p, updates)
        if count == 0:
            close(p, start)
    close(p, plain_average(start, batches))


def test_skipping_non_finite_steps_after_the_balancer():
    opt = optax.chain(
        mtljax.pcgrad(3, key=jax.random.key(0)),
        optax.apply_if_finite(optax.sgd(0.1), max_consecutive_errors=3),
    )
    p = params()
    _, grads = mtljax.value_and_task_grads(task_losses)(p, batch())
    bad = jax.tree.map(lambda g: g.at[1].set(jnp.nan), grads)
    state = opt.init(p)
    updates, skipped = opt.update(bad, state, p)
    assert all((u == 0).all() for u in jax.tree.leaves(updates))
    assert skipped[1].total_notfinite == 1
    after, _ = opt.update(grads, skipped, p)
    fresh, _ = opt.update(grads, state, p)
    close(after, fresh)  # the balancer's key was not spent on the bad step


def test_wrapping_a_balancer_is_the_wrong_order():
    """These wrappers take updates to be shaped like the parameters."""
    p = params()
    _, grads = mtljax.value_and_task_grads(task_losses)(p, batch())
    inner = optax.chain(mtljax.linear(3), optax.sgd(0.1))
    accumulate = optax.MultiSteps(inner, 2).gradient_transformation()
    with pytest.raises((TypeError, ValueError)):
        accumulate.update(grads, accumulate.init(p), p)
    skip = optax.apply_if_finite(inner, 3)
    with pytest.raises(TypeError, match="cond"):
        skip.update(grads, skip.init(p), p)
