"""flax linen: a ``TrainState`` that passes the losses to the optimizer."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

import mtljax


class MultiTaskState(TrainState):
    """A state with ``apply_gradients(grads=stacked, losses=losses, mask=mask)``."""

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> "MultiTaskState":
        """Passes extra arguments to the optimizer, and so to the balancer."""
        updates, opt_state = self.tx.update(
            grads, self.opt_state, self.params, **kwargs
        )
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state)


class Network(nn.Module):
    """A network with two outputs."""

    @nn.compact
    def __call__(self, x):
        """Returns the outputs ``[N, 2]``."""
        return nn.Dense(2)(nn.tanh(nn.Dense(16)(x)))


def train(steps: int = 100) -> tuple[float, float]:
    """Returns the sum of the losses before and after training."""
    x = jax.random.normal(jax.random.key(0), (64, 4))
    y = jnp.stack([x.sum(1), x[:, 0] * x[:, 1]], axis=1)
    network = Network()
    params = network.init(jax.random.key(1), x)
    tx = optax.chain(mtljax.uncertainty(2), optax.adam(1e-2))
    state = MultiTaskState.create(apply_fn=network.apply, params=params, tx=tx)

    @jax.jit
    def step(state, x, y):
        def task_losses(params):
            return ((state.apply_fn(params, x) - y) ** 2).mean(0)

        losses, grads = mtljax.value_and_task_grads(task_losses)(state.params)
        return state.apply_gradients(grads=grads, losses=losses), losses.sum()

    found = []
    for _ in range(steps):
        state, loss = step(state, x, y)
        found.append(float(loss))
    return found[0], found[-1]


if __name__ == "__main__":
    print(train())
