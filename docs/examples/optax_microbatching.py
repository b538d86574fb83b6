"""Gradient accumulation by ``micro_batches=`` or ``optax.microbatching``."""

import jax
import jax.numpy as jnp
import optax

import mtljax


def train(steps: int = 50) -> tuple[float, float]:
    """Returns the sum of the losses before and after training."""
    x = jax.random.normal(jax.random.key(0), (64, 4))
    y = jnp.stack([x.sum(1), x[:, 0] * x[:, 1]], axis=1)
    params = {
        "w": 0.5 * jax.random.normal(jax.random.key(1), (4, 16)),
        "v": 0.1 * jnp.ones((16, 2)),
    }

    def task_losses(params, x, y):
        return ((jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2).mean(0)

    balancer, optimizer = mtljax.cagrad(2), optax.adam(1e-2)
    grad_fn = mtljax.value_and_balanced_grad(task_losses, balancer, micro_batches=8)

    @jax.jit
    def step(params, state, opt_state):
        losses, grad, state = grad_fn(params, state, x, y)
        updates, opt_state = optimizer.update(grad, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state, losses.sum()

    state, opt_state, found = balancer.init(params), optimizer.init(params), []
    for _ in range(steps):
        params, state, opt_state, loss = step(params, state, opt_state)
        found.append(float(loss))
    _check_recipe(task_losses, params, x, y)
    return found[0], found[-1]


def _check_recipe(task_losses, params, x, y):
    """Checks the recipe for custom loops: average the gradients, then balance once."""
    rows_of = mtljax.value_and_task_grads(task_losses)
    microbatched = optax.microbatching.microbatch(
        rows_of,
        argnums=(1, 2),
        microbatch_size=8,
        accumulator=optax.microbatching.AccumulationType.MEAN,
    )
    for got, want in zip(
        jax.tree.leaves(microbatched(params, x, y)),
        jax.tree.leaves(rows_of(params, x, y)),
        strict=True,
    ):
        assert jnp.allclose(got, want, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    print(train())
