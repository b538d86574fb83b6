"""Auto-λ: the hypergradient against automatic and finite differences, and its rule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from forkmerge.problem import batches, initial, task_losses
from precision import enable_x64

from mtljax import forkmerge

WEIGHTS = np.array([0.7, 0.2, 1.3])
PRIMARY = np.array([1.0, 0.0, 0.5])


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.2, momentum=0.9)),
        optax.adam(0.05),
    ],
    ids=["sgd with momentum and decay", "adam"],
)
def test_the_hypergradient_is_exact(optimizer):
    with enable_x64():
        state, data = initial(optimizer, np.float64), batches(2, np.float64)
        train, val = (jax.tree.map(lambda x, i=i: x[i], data) for i in range(2))
        # Moments of a run under way, not the first step's.
        grad = jax.grad(lambda p: task_losses(p, val).sum())(state.params)
        _, opt_state = optimizer.update(grad, state.opt_state, state.params)

        def ahead(weights):
            objective = lambda p: weights @ task_losses(p, train)
            g = jax.grad(objective)(state.params)
            updates, _ = optimizer.update(g, opt_state, state.params)
            return PRIMARY @ task_losses(
                optax.apply_updates(state.params, updates), val
            )

        ahead = jax.jit(ahead)
        found = jax.jit(
            lambda w: forkmerge.hypergradient(
                task_losses,
                optimizer,
                state.params,
                opt_state,
                w,
                train=(train,),
                validation=(val,),
                primary=jnp.asarray(PRIMARY),
            )
        )(jnp.asarray(WEIGHTS))
        step = 1e-6
        by_hand = [
            (ahead(WEIGHTS + step * e) - ahead(WEIGHTS - step * e)) / (2 * step)
            for e in np.eye(3)
        ]
        np.testing.assert_allclose(found, by_hand, rtol=1e-6, atol=1e-9)
        assert np.abs(found).min() > 1e-5


def test_the_rule():
    """β times the gradient, first through Adam, whose first step is the sign."""
    losses = lambda w, x: jnp.stack([(w - 1) ** 2, (w + x) ** 2, 0 * w])
    sgd, w = optax.sgd(0.1), jnp.array(0.0)
    plain = forkmerge.auto_lambda(
        3, losses, sgd, weight_optimizer=optax.sgd(0.5), initial=1.0
    )
    assert plain.init().weights.tolist() == [1.0, 1.0, 1.0]
    ones = (jnp.array(1.0),)
    state = jax.jit(plain.update)(plain.init(), w, sgd.init(w), ones, ones)
    # w stays at 0: v = -2, gradients -2 and 2, times -η.
    np.testing.assert_allclose(state.hypergradient, [-0.4, 0.4, 0], atol=1e-6)
    np.testing.assert_allclose(state.weights, [1.2, 0.8, 1.0], atol=1e-6)
    default = forkmerge.auto_lambda(3, losses, sgd)
    state = jax.jit(default.update)(default.init(), w, sgd.init(w), ones, ones)
    np.testing.assert_allclose(state.weights, [0.1001, 0.0999, 0.1], atol=1e-6)
    both = forkmerge.auto_lambda(3, losses, sgd, primary=(0, 1), initial=1.0)
    state = jax.jit(both.update)(both.init(), w, sgd.init(w), ones, ones)
    np.testing.assert_allclose(state.hypergradient, [0, 0, 0], atol=1e-6)


@pytest.mark.usefixtures("as_users")
def test_errors():
    build = lambda **o: forkmerge.auto_lambda(2, lambda w: w, optax.sgd(0.1), **o)
    for primary in (2, -1, (0, 3)):
        with pytest.raises(ValueError, match="must name some of 2 tasks"):
            build(primary=primary)
    with pytest.raises(ValueError, match="names no task"):
        build(primary=())
    with pytest.raises(ValueError, match="learning_rate must be a finite number"):
        build(learning_rate=0)
    method = build()
    w = jnp.array(1.0)
    with pytest.raises(ValueError, match="must return a vector of T scalar losses"):
        method.update(method.init(), w, optax.sgd(0.1).init(w), (), ())
