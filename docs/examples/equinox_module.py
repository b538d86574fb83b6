"""Equinox: separates the arrays of a module from its static parts."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import mtljax


def train(steps: int = 100) -> tuple[float, float]:
    """Returns the sum of the losses before and after training."""
    x = jax.random.normal(jax.random.key(0), (64, 4))
    y = jnp.stack([x.sum(1), x[:, 0] * x[:, 1]], axis=1)
    network = eqx.nn.MLP(4, 2, 16, 2, activation=jnp.tanh, key=jax.random.key(1))
    params, static = eqx.partition(network, eqx.is_inexact_array)
    balancer, optimizer = mtljax.imtl_g(2), optax.adam(1e-2)

    def task_losses(params, x, y):
        outputs = jax.vmap(eqx.combine(params, static))(x)
        return ((outputs - y) ** 2).mean(0)

    grad_fn = mtljax.value_and_balanced_grad(task_losses, balancer)

    @jax.jit
    def step(params, state, opt_state, x, y):
        losses, grad, state = grad_fn(params, state, x, y)
        updates, opt_state = optimizer.update(grad, opt_state, params)
        return eqx.apply_updates(params, updates), state, opt_state, losses.sum()

    state, opt_state, found = balancer.init(params), optimizer.init(params), []
    for _ in range(steps):
        params, state, opt_state, loss = step(params, state, opt_state, x, y)
        found.append(float(loss))
    return found[0], found[-1]


if __name__ == "__main__":
    print(train())
