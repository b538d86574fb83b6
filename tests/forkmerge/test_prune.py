"""Which branches stay."""

import numpy as np
import pytest

from mtljax import forkmerge

NU = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]


def run(weights, scores=(0.1, 0.2, 0.3, 0.4), **options):
    return forkmerge.prune(list(weights), list(scores), NU, **options)


def test_the_largest_weights_stay():
    assert run([0.1, 0.2, 0.3, 0.4], keep=2, keep_target_only=False) == (2, 3)
    assert run([0.4, 0.3, 0.2, 0.1], keep=2) == (0, 1)
    # The paper drops zeros even where there is room.
    assert run([0.5, 0.5, 0, 0], keep=3) == (0, 1)
    assert run([0.5, 0.5, 0, 0], keep=3, drop_zeros=False) == (0, 1, 3)


def test_ties_are_broken_by_score_and_index():
    tied = {"keep": 2, "keep_target_only": False}
    assert run([0.25] * 4, **tied) == (2, 3)
    assert run([0.25] * 4, direction="min", **tied) == (0, 1)
    assert run([0.25] * 4, scores=[0.5] * 4, **tied) == (0, 1)
    nan = [0.1, float("nan"), 0.3, float("nan")]
    assert run([0.25] * 4, scores=nan, **tied) == (0, 2)


def test_the_safe_branch_stays():
    assert run([0, 0.2, 0.3, 0.5], keep=2) == (0, 3)
    assert run([0, 0.2, 0.3, 0.5], keep=1) == (0,)
    assert run([0, 0, 0.3, 0.7], keep=3) == (0, 2, 3)
    assert run([0, 0.2, 0.3, 0.5], keep=2, keep_target_only=False) == (2, 3)
    # Of another target: its own branch.
    nu = [[1, 1], [0, 1], [1, 0]]
    assert forkmerge.prune([0.5, 0.3, 0.2], [1, 1, 1], nu, keep=2, target=0) == (0, 2)
    # There is none.
    assert forkmerge.prune([0.9, 0.1], [1, 1], [[1, 1], [1, 2]], keep=1) == (0,)


def test_targets_keep_equally_many():
    nu = np.array([NU, NU])
    weights = [[1.0, 0, 0, 0], [0.2, 0.3, 0.5, 0]]
    found = forkmerge.prune_groups(
        weights, [[4, 3, 2, 1]] * 2, nu, targets=(0, 0), keep=3
    )
    assert found == [(0, 1, 2), (0, 1, 2)]
    weights[1] = [0.0, 0, 0.5, 0.5]
    found = forkmerge.prune_groups(
        weights, [[4, 1, 2, 3]] * 2, nu, targets=(0, 0), keep=2
    )
    assert found == [(0, 3), (0, 3)]


@pytest.mark.usefixtures("as_users")
def test_errors():
    with pytest.raises(ValueError, match="keep must be a positive integer, not 0"):
        run([0.25] * 4, keep=0)
    with pytest.raises(ValueError, match=r"shape \(3,\); there are 4 branches"):
        run([0.25] * 4, scores=[1, 2, 3], keep=1)
    with pytest.raises(ValueError, match="direction='best'"):
        run([0.25] * 4, keep=1, direction="best")
