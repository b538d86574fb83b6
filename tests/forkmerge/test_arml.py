"""ARML: its rule in float64, and the simplex its weights stay on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from zoo import J3

from mtljax import forkmerge

G = J3 @ J3.T


def project(v, total):
    """Nearest point of {x >= 0, sum x = total}, by bisection."""
    low, high = v.min() - total, v.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if np.maximum(v - middle, 0).sum() > total else (low, middle)
        )
    return np.maximum(v - low, 0)


def run(steps, main=0, mask=None, **options):
    balancer = forkmerge.arml(3, main=main, **options)
    grads = {"w": jnp.asarray(J3, jnp.float32)}
    update = jax.jit(balancer.update)
    state, found = balancer.init(grads), []
    for _ in range(steps):
        direction, state = update(grads, state, mask=mask)
        found.append((np.asarray(direction["w"]), np.asarray(state.learned)))
    return found, state


@pytest.mark.parametrize("projection", ["exact", "released"])
@pytest.mark.parametrize("main", [0, 2])
def test_the_rule(projection, main):
    rate = 0.02
    found, _ = run(6, main, learning_rate=rate, update_every=2, projection=projection)
    others = [t for t in range(3) if t != main]
    alpha = np.ones(2)
    for step, (direction, learned) in enumerate(found):
        used = J3[main] + alpha @ J3[others]  # a new weight serves from the next step
        np.testing.assert_allclose(direction, used, rtol=1e-4, atol=1e-5)
        if step % 2 == 1:
            gap = J3[main] - alpha @ J3[others]
            moved = alpha + rate * 2 * (J3[others] @ gap)
            if projection == "exact":
                alpha = project(moved, 2)
            else:
                alpha = np.maximum(moved + (2 - moved.sum()) / 2, 0)
        np.testing.assert_allclose(learned[others], alpha, rtol=1e-4, atol=1e-5)
        assert learned[main] == 1


def test_it_ends_at_the_nearest_mixture():
    found, _ = run(300, learning_rate=0.02, update_every=1)
    _, learned = found[-1]
    distances = [
        np.linalg.norm(J3[0] - a * J3[1] - (2 - a) * J3[2])
        for a in np.linspace(0, 2, 2001)
    ]
    best = np.linspace(0, 2, 2001)[np.argmin(distances)]
    np.testing.assert_allclose(learned[1:], [best, 2 - best], atol=2e-3)


def test_an_absent_task_teaches_nothing():
    mask = jnp.array([True, True, False])
    found, state = run(3, mask=mask, update_every=1, learning_rate=0.1)
    np.testing.assert_array_equal(state.learned, [1, 1, 1])
    np.testing.assert_allclose(found[-1][0], J3[0] + J3[1], rtol=1e-6)


def test_it_chains():
    balancer = forkmerge.arml(3)
    opt = optax.chain(balancer, optax.scale(-0.5))
    params = {"w": jnp.zeros(4)}
    grads = {"w": jnp.asarray(J3, jnp.float32)}
    updates, state = jax.jit(opt.update)(grads, opt.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.5 * J3.sum(0), rtol=1e-5)
    assert optax.tree.get(state, "task_weights").shape == (3,)
    assert balancer.needs == "gramian"


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"main": 3}, "target=3 is not the index"),
        ({"learning_rate": 0}, "learning_rate must be a finite number above 0"),
        ({"update_every": 0}, "update_every must be positive, not 0"),
        ({"projection": "none"}, "projection='none' is not one of"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        forkmerge.arml(3, **options)
    with pytest.raises(ValueError, match="no auxiliary task"):
        forkmerge.arml(1)
