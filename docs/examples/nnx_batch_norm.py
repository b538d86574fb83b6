"""flax nnx: BatchNorm and dropout, with variables as auxiliary output."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import mtljax


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.trunk = nnx.Linear(4, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.heads = nnx.List([nnx.Linear(32, 1, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        h = self.dropout(nnx.relu(self.norm(self.trunk(x))))
        return [head(h)[:, 0] for head in self.heads]


def train(steps: int = 150) -> tuple[float, float]:
    """Returns the sum of the losses before and after training."""
    x = jax.random.normal(jax.random.key(0), (64, 4))
    y = jnp.stack([x.sum(1), x[:, 0] - x[:, 1]])
    network = Network(nnx.Rngs(0))
    graph, params, rest = nnx.split(network, nnx.Param, ...)
    balancer, optimizer = mtljax.cagrad(2), optax.adam(1e-2)

    def task_losses(params, rest):
        model = nnx.merge(graph, params, rest, copy=True)
        losses = [jnp.mean((out - y[t]) ** 2) for t, out in enumerate(model(x))]
        return jnp.stack(losses), nnx.state(model, nnx.Not(nnx.Param))

    labels = mtljax.label_params(params, own="heads")
    grad_fn = mtljax.value_and_balanced_grad(
        task_losses, balancer, labels=labels, has_aux=True
    )

    def step(carry, _):
        params, rest, state, opt_state = carry
        (losses, rest), grad, state = grad_fn(params, state, rest)
        updates, opt_state = optimizer.update(grad, opt_state, params)
        carry = optax.apply_updates(params, updates), rest, state, opt_state
        return carry, losses.sum()

    carry = params, rest, balancer.init(params), optimizer.init(params)
    (params, rest, *_), found = jax.lax.scan(step, carry, length=steps)
    nnx.update(network, params, rest)  # writes all variables back to the model
    network.eval()
    return float(found[0]), float(found[-1])


if __name__ == "__main__":
    print(train())
