"""Sums and drawn tasks."""

import jax
import jax.numpy as jnp
import numpy as np

from mtljax import forkmerge

NU = jnp.array([[1.0, 0.0, 0.0], [1.0, 0.5, 0.5]])


def test_an_absent_task_does_not_enter():
    def objective(losses, weights):
        return forkmerge.weighted_sum(losses, weights)

    losses = jnp.array([2.0, jnp.nan, 3.0])
    value, grad = jax.value_and_grad(objective)(losses, jnp.array([1.0, 0.0, 0.5]))
    assert float(value) == 3.5
    np.testing.assert_array_equal(grad, [1.0, 0.0, 0.5])


def test_tasks_are_drawn_in_proportion_and_from_the_step_alone():
    run = jax.jit(
        lambda nu, start: forkmerge.task_orders(
            jax.random.key(0), nu, 2000, start_step=start
        )
    )
    orders = run(NU, 0)
    assert (orders[0] == 0).all()
    shares = np.bincount(orders[1], minlength=3) / 2000
    # Four standard deviations of a share of a half.
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.25], atol=4 * 0.5 / 2000**0.5)
    np.testing.assert_array_equal(run(NU, 25)[:, :-25], orders[:, 25:])
    again = forkmerge.draw_task(jax.random.key(0), 31, 1, NU[1])
    assert int(again) == int(orders[1, 31])
    # Branches and rounds differ: the order of the released codes repeats.
    both = run(jnp.ones((2, 3)), 0)
    assert (both[0] != both[1]).any()
    assert (both[0, :1000] != both[0, 1000:]).any()


def test_a_row_of_a_tree():
    tree = {"x": jnp.arange(6.0).reshape(3, 2), "y": jnp.arange(3)}
    found = jax.vmap(forkmerge.take_task, (None, 0))(tree, jnp.array([2, 0]))
    np.testing.assert_array_equal(found["x"], [[4, 5], [0, 1]])
    np.testing.assert_array_equal(found["y"], [2, 0])
