"""Which tasks the branches train on: the published recipes, by hand."""

import numpy as np
import pytest

from mtljax import forkmerge


def test_the_recipes_of_the_paper_and_the_codes():
    each = forkmerge.target_plus_each(4, target=2)
    expected = [[0, 0, 1, 0], [1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(each, expected)
    both = forkmerge.target_plus_each_and_all(4, target=2)
    rows = [[0, 0, 1, 0], [1, 1, 1, 1], *expected[1:]]
    np.testing.assert_array_equal(both, rows)
    # With one auxiliary task every recipe is Algorithm 1.
    for build in (
        forkmerge.target_vs_all,
        forkmerge.target_plus_each,
        forkmerge.target_plus_each_and_all,
    ):
        np.testing.assert_array_equal(build(2), [[1, 0], [1, 1]])
    # DomainNet: half of the samples are the target's, the others share the rest.
    shared = forkmerge.nested_topk(6, [3, 1, 2, 5, 4], share=True)
    np.testing.assert_allclose(shared.sum(1), [1, 2, 2], rtol=1e-6)
    np.testing.assert_allclose(shared[1], [1, 1 / 3, 1 / 3, 1 / 3, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(shared[2, 1:], 0.2, rtol=1e-6)


def test_ranking():
    rank = forkmerge.rank_auxiliaries
    assert rank([9, 0.2, 0.8, 0.5], 4, target=1) == (2, 3, 0)
    assert rank([9, 0.2, 0.8, 0.5], 4, target=1, direction="min") == (0, 3, 2)
    # Equal scores: the lower index; a branch that diverged: last.
    assert rank([0, 0.5, float("nan"), 0.5], 4) == (1, 3, 2)


def test_the_safe_branch():
    nu = [[1, 1, 0], [0, 2, 0], [0, 0, 1]]
    assert forkmerge.target_only(nu, 1) == 1
    assert forkmerge.target_only(nu, 2) == 2
    assert forkmerge.target_only(nu, 0) is None


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: forkmerge.target_vs_all(3, target=3),
            "target=3 is not the index of one of 3",
        ),
        (lambda: forkmerge.target_plus_each(1), "no auxiliary task with num_tasks=1"),
        (
            lambda: forkmerge.nested_topk(4, [1, 1, 2]),
            r"ranking=\[1, 1, 2\] must list different tasks out of \[1, 2, 3\]",
        ),
        (
            lambda: forkmerge.nested_topk(4, [1, 2], topk=(0, 3)),
            "topk holds 3, but the ranking has 2",
        ),
        (lambda: forkmerge.custom([1.0, 2.0]), r"shape \(2,\)"),
        (
            lambda: forkmerge.custom([[1, 0], [0, 0]]),
            r"branch 1 has the weights \[0.0, 0.0\]",
        ),
        (lambda: forkmerge.custom([[1, -1.0]]), "not negative"),
        (
            lambda: forkmerge.rank_auxiliaries([1, 2], 3),
            r"shape \(2,\); the branches of target_plus_each\(3\) give \(3,\)",
        ),
        (
            lambda: forkmerge.rank_auxiliaries([1, 2], 2, direction="up"),
            "direction='up' is not one of 'max', 'min'",
        ),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()
