"""GCS: the released rule of its paper, both forms."""

import numpy as np
import pytest
from methods.stepping import step
from zoo import J3

from mtljax.methods._gcs import gcs

COSINES = (J3 @ J3.T)[0] / np.linalg.norm(J3, axis=1) / np.linalg.norm(J3[0])


def test_gates_by_the_sign_of_the_cosine():
    assert (COSINES > 0).tolist() == [True, False, True]
    found = step(gcs(3), J3)
    np.testing.assert_array_equal(found.weights, [1, 0, 1])
    np.testing.assert_allclose(found.update, J3[0] + J3[2], rtol=1e-6)


def test_weighted_by_the_cosine():
    found = step(gcs(3, weighted=True), J3)
    np.testing.assert_allclose(found.weights, [1, 0, COSINES[2]], rtol=1e-6)


def test_the_main_task_can_be_any():
    np.testing.assert_array_equal(step(gcs(3, main=1), J3).weights, [0, 1, 1])


def test_the_main_task_never_gets_worse():
    rng = np.random.default_rng(0)
    for _ in range(20):
        matrix = rng.normal(size=(5, 8))
        assert step(gcs(5), matrix).update @ matrix[0] >= matrix[0] @ matrix[0] - 1e-4


def test_without_the_main_task_nothing_is_known_to_help():
    found = step(gcs(3), J3, mask=np.array([False, True, True]))
    np.testing.assert_array_equal(found.update, np.zeros(4))


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize("main", [3, -1, 1.0, True])
def test_main_must_be_a_task(main):
    with pytest.raises(ValueError, match=r"gcs: main=.* of 3 tasks"):
        gcs(3, main=main)
