"""Tasks with their own batches, and an optimizer with ``task_losses=``.

Multi-task reinforcement learning has one batch per environment. metaworld-algorithms
passes the keyword ``task_losses`` to ``optimizer.update``. The adapter renames it.
"""

import jax
import jax.numpy as jnp
import optax

import mtljax

TASKS = 5


def with_task_losses(balancer):
    """Wraps a balancer to take the keyword ``task_losses`` in place of ``losses``."""

    def update(updates, state, params=None, *, task_losses=None, **extra):
        return balancer.update(updates, state, params, losses=task_losses, **extra)

    return optax.GradientTransformationExtraArgs(balancer.init, update)


def train(steps: int = 100) -> tuple[float, float]:
    """Returns the sum of the losses before and after training."""
    x = jax.random.normal(jax.random.key(0), (TASKS, 32, 4))
    y = jnp.sin(x.sum(-1) + jnp.arange(TASKS)[:, None])
    params = {
        "trunk": 0.5 * jax.random.normal(jax.random.key(1), (4, 16)),
        "heads": 0.1 * jnp.ones((TASKS, 16)),
    }

    def loss(params, x, y):  # the loss of one task, with its slice of the heads
        return jnp.mean((jnp.tanh(x @ params["trunk"]) @ params["heads"] - y) ** 2)

    losses = mtljax.separate(loss, in_axes=({"trunk": None, "heads": 0}, 0, 0))
    labels = {"trunk": "shared", "heads": "own"}
    shared = optax.chain(with_task_losses(mtljax.famo(TASKS)), optax.adam(1e-2))
    own = optax.with_extra_args_support(optax.adam(1e-2))
    optimizer = optax.partition({"shared": shared, "own": own}, labels)

    @jax.jit
    def step(params, state):
        values, grads = mtljax.value_and_task_grads(losses)(params, x, y)
        updates, state = optimizer.update(grads, state, params, task_losses=values)
        return optax.apply_updates(params, updates), state, values.sum()

    state, found = optimizer.init(params), []
    for _ in range(steps):
        params, state, value = step(params, state)
        found.append(float(value))
    return found[0], found[-1]


if __name__ == "__main__":
    print(train())
