"""Physics-informed losses as a dictionary of terms with their own points.

The losses have the form of ``losses(params, batch)`` in jaxpi and of the loss terms in
jinns: one scalar per term, by name. The problem is u'' = -sin(x) with u(0) = 0 and
u(pi) = 0. Its solution is sin(x).
"""

import jax
import jax.numpy as jnp
import optax

import mtljax


def network(params, x):
    """Computes a scalar function of a scalar."""
    h = jnp.tanh(x * params["w"] + params["b"])
    return h @ params["v"]


def residual(params, x):
    """Computes the mean square of u'' + sin(x)."""
    u = jax.vmap(jax.grad(jax.grad(network, 1), 1), (None, 0))
    return jnp.mean((u(params, x) + jnp.sin(x)) ** 2)


def boundary(params, x):
    """Computes the mean square of u at the ends."""
    return jnp.mean(jax.vmap(network, (None, 0))(params, x) ** 2)


def train(steps: int = 300) -> tuple[float, float]:
    """Returns the sum of the losses before and after training."""
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "w": jax.random.normal(keys[0], (32,)),
        "b": jax.random.normal(keys[1], (32,)),
        "v": 0.1 * jnp.ones(32),
    }
    losses = mtljax.separate({"residual": residual, "boundary": boundary})
    ends = jnp.array([0, jnp.pi])
    batch = {"residual": jnp.linspace(0, jnp.pi, 33), "boundary": ends}
    balancer, optimizer = mtljax.upgrad(("residual", "boundary")), optax.adam(1e-2)
    grad_fn = mtljax.value_and_balanced_grad(losses, balancer)

    @jax.jit
    def step(carry, _):
        params, state, opt_state = carry
        terms, grad, state = grad_fn(params, state, batch)
        updates, opt_state = optimizer.update(grad, opt_state, params)
        carry = optax.apply_updates(params, updates), state, opt_state
        return carry, terms["residual"] + terms["boundary"]

    carry = params, balancer.init(params), optimizer.init(params)
    _, found = jax.lax.scan(step, carry, None, length=steps)
    return float(found[0]), float(found[-1])


if __name__ == "__main__":
    print(train())
