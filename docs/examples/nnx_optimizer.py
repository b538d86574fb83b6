"""flax nnx: a balanced gradient with ``nnx.Optimizer``."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import mtljax


class Network(nnx.Module):
    """A network with a trunk and two heads."""

    def __init__(self, rngs: nnx.Rngs):
        self.trunk = nnx.Linear(4, 16, rngs=rngs)
        self.heads = nnx.List([nnx.Linear(16, 1, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        """Returns the outputs of both heads."""
        h = nnx.tanh(self.trunk(x))
        return [head(h)[:, 0] for head in self.heads]


def train(steps: int = 100) -> tuple[float, float]:
    """Returns the sum of the losses before and after training."""
    network = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(network, optax.adam(1e-2), wrt=nnx.Param)
    graph, params = nnx.split(network, nnx.Param)
    balancer = mtljax.cagrad(2)

    def task_losses(params, x, y):
        # copy=True is required, because this trace must own the variables it merges.
        outputs = nnx.merge(graph, params, copy=True)(x)
        return jnp.stack([jnp.mean((out - y[t]) ** 2) for t, out in enumerate(outputs)])

    labels = mtljax.label_params(params, own="heads")
    grad_fn = mtljax.value_and_balanced_grad(task_losses, balancer, labels=labels)
    state = balancer.init(params)

    @nnx.jit
    def step(network, optimizer, state, x, y):
        losses, grad, state = grad_fn(nnx.state(network, nnx.Param), state, x, y)
        optimizer.update(network, grad)
        return losses, state

    x = jax.random.normal(jax.random.key(0), (64, 4))
    y = jnp.stack([x.sum(1), x[:, 0] * x[:, 1]])
    found = []
    for _ in range(steps):
        losses, state = step(network, optimizer, state, x, y)
        found.append(float(losses.sum()))
    return found[0], found[-1]


if __name__ == "__main__":
    print(train())
