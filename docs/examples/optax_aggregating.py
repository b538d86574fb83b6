"""``optax.experimental.aggregating`` with a balancer as the aggregator."""

import jax
import jax.numpy as jnp
import optax
from optax.experimental import aggregating

import mtljax


def train(steps: int = 100) -> tuple[float, float]:
    """Returns the sum of the losses before and after training."""
    x = jax.random.normal(jax.random.key(0), (64, 4))
    y = jnp.stack([x.sum(1), x[:, 0] * x[:, 1]], axis=1)
    params = {
        "w": 0.5 * jax.random.normal(jax.random.key(1), (4, 16)),
        "v": 0.1 * jnp.ones((16, 2)),
    }

    def task_losses(params):
        return ((jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2).mean(0)

    balancer = mtljax.upgrad(2)
    clip = jax.vmap(optax.projections.projection_l2_ball)
    optimizer = aggregating.process(
        optax.stateless(lambda rows, _: clip(rows)),  # clips each task's gradient
        aggregating.Aggregator(init=balancer.init, update=balancer.update),
        optax.adam(1e-2),
    )

    @jax.jit
    def step(params, state):
        losses, rows = mtljax.value_and_task_grads(task_losses)(params)
        updates, state = optimizer.update(rows, state, params)
        return optax.apply_updates(params, updates), state, losses.sum()

    state, found = optimizer.init(params), []
    for _ in range(steps):
        params, state, loss = step(params, state)
        found.append(float(loss))
    return found[0], found[-1]


if __name__ == "__main__":
    print(train())
