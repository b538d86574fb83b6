"""Post-training, and the grid of task weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forkmerge.problem import (
    ADAM,
    TASKS,
    VALIDATION,
    batches,
    initial,
    make_step,
    score,
)

from mtljax import forkmerge


def test_post_training_is_joint_then_alone():
    weights = forkmerge.post_train(3, joint_steps=4, target=1)
    found = jax.jit(jax.vmap(weights))(jnp.arange(6))
    np.testing.assert_array_equal(found[:4], np.ones((4, 3)))
    np.testing.assert_array_equal(found[4:], [[0, 1, 0]] * 2)


def test_the_grid_of_the_paper():
    grid = np.asarray(forkmerge.weight_grid(3))
    assert grid.shape == (27, 3)
    assert len(np.unique(grid, axis=0)) == 27
    np.testing.assert_allclose(np.unique(grid), [0.3, 1, 3])


def test_a_grid_search_is_as_many_trainings():
    candidates = [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 2.0]]
    found = forkmerge.grid_search(
        make_step(ADAM),
        initial(ADAM),
        candidates,
        batches(),
        score,
        validation=VALIDATION,
    )
    scores, step = [], jax.jit(make_step(ADAM))
    for row in candidates:
        state = initial(ADAM)
        for i in range(6):
            batch = jax.tree.map(lambda x, i=i: x[i], batches())
            state, _ = step(state, jnp.array(row), batch)
        scores.append(float(score(state, VALIDATION)))
    np.testing.assert_allclose(found.scores, scores, rtol=1e-4)
    assert int(found.best) == np.argmax(scores)
    np.testing.assert_array_equal(found.weights, candidates[np.argmax(scores)])
    np.testing.assert_allclose(score(found.state, VALIDATION), max(scores), rtol=1e-4)
    assert len(scores) == TASKS


@pytest.mark.usefixtures("as_users")
def test_errors():
    with pytest.raises(ValueError, match="target=2 is not the index of one of 2"):
        forkmerge.post_train(2, joint_steps=1, target=2)
    with pytest.raises(ValueError, match="joint_steps must not be negative, not -1"):
        forkmerge.post_train(2, joint_steps=-1)
    step = lambda s, w, b: (s, {})
    with pytest.raises(ValueError, match=r"candidates have shape \(2,\)"):
        forkmerge.grid_search(step, 0.0, [1.0, 2.0], jnp.ones(1), jnp.sin)
    with pytest.raises(ValueError, match="validation set is empty"):
        forkmerge.grid_search(
            step, 0.0, [[1.0]], jnp.ones(1), jnp.sin, validation=jnp.ones((0, 2))
        )
