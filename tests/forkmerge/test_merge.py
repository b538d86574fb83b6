"""Means of branches, and the leaves that are not averaged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtljax import forkmerge

RNG = np.random.default_rng(0)
NU = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]])
LAMBDA = np.array([0.5, 0.3, 0.2])
BRANCHES = {
    "params": {
        "trunk": RNG.normal(size=(3, 4, 2)).astype(np.float32),
        "heads": {
            "a": RNG.normal(size=(3, 2)).astype(np.float32),
            "b": RNG.normal(size=(3, 2)).astype(np.float32),
        },
        "stacked": RNG.normal(size=(3, 3, 2)).astype(np.float32),
    },
    "opt_state": RNG.normal(size=(3, 2)).astype(np.float32),
    "count": np.array([7, 7, 7]),
}
BRANCHES = jax.tree.map(jnp.asarray, BRANCHES)


def mean(leaf, weights=LAMBDA):
    return np.tensordot(weights, np.asarray(leaf, np.float64), 1)


def test_means_and_policies():
    merged = forkmerge.merge(BRANCHES, LAMBDA, policies={"opt_state": "keep"})
    np.testing.assert_allclose(
        merged["params"]["trunk"], mean(BRANCHES["params"]["trunk"]), rtol=1e-5
    )
    np.testing.assert_array_equal(merged["opt_state"], BRANCHES["opt_state"][0])
    assert merged["count"] == 7
    assert merged["count"].dtype == BRANCHES["count"].dtype
    again = forkmerge.refork(BRANCHES, merged, policies={"opt_state": "keep"})
    np.testing.assert_array_equal(again["opt_state"], BRANCHES["opt_state"])
    for row in again["params"]["trunk"]:
        np.testing.assert_array_equal(row, merged["params"]["trunk"])
    initial = jax.tree.map(lambda x: jnp.full_like(x[0], 9), BRANCHES)
    reset = {"opt_state": "reset", "count": "reset"}
    merged = forkmerge.merge(BRANCHES, LAMBDA, policies=reset, initial=initial)
    np.testing.assert_array_equal(merged["opt_state"], [9, 9])
    assert merged["count"] == 9
    again = forkmerge.refork(BRANCHES, merged, policies=reset)
    np.testing.assert_array_equal(again["opt_state"], np.full((3, 2), 9))


def test_a_vertex_is_the_branch_itself():
    for b, row in enumerate(np.eye(3)):
        merged = forkmerge.merge(BRANCHES, row)
        for got, want in zip(
            jax.tree.leaves(merged), jax.tree.leaves(BRANCHES), strict=True
        ):
            np.testing.assert_array_equal(got, want[b])


def test_a_branch_that_diverged_may_be_left_out():
    broken = jax.tree.map(
        lambda x: x.at[1].set(jnp.nan) if x.dtype == jnp.float32 else x, BRANCHES
    )
    weights = [0.75, 0.0, 0.25]
    merged = forkmerge.merge(broken, weights)
    trunk = np.asarray(BRANCHES["params"]["trunk"])
    want = 0.75 * trunk[0] + 0.25 * trunk[2]
    np.testing.assert_allclose(merged["params"]["trunk"], want, rtol=1e-5)
    assert np.isnan(forkmerge.merge(broken, LAMBDA)["params"]["trunk"]).all()


def test_heads_of_those_that_trained_them():
    heads = {
        "params/heads/a": 1,
        "*/heads/b": 0,
        "params/stacked": "stacked",
    }
    merged = forkmerge.merge(BRANCHES, LAMBDA, heads=heads, branch_weights=NU)
    params, source = merged["params"], BRANCHES["params"]
    # Only branch 1 trains task 1; all train the target.
    np.testing.assert_allclose(params["heads"]["a"], source["heads"]["a"][1], rtol=1e-6)
    np.testing.assert_allclose(
        params["heads"]["b"], mean(source["heads"]["b"]), rtol=1e-5
    )
    rows = np.asarray(source["stacked"])
    want = [mean(rows[:, 0]), rows[1, 1], rows[2, 2]]
    np.testing.assert_allclose(params["stacked"], want, rtol=1e-5)
    # Nobody with a weight trained task 1: the head is where it was.
    merged = forkmerge.merge(BRANCHES, [0.5, 0.0, 0.5], heads=heads, branch_weights=NU)
    np.testing.assert_allclose(
        merged["params"]["heads"]["a"],
        mean(source["heads"]["a"], [0.5, 0, 0.5]),
        rtol=1e-5,
    )


def test_half_precision_is_summed_in_float32():
    # In bfloat16, 256 + 1 is 256.
    leaf = jnp.array([256.0, 1.0, 1.0, 1.0], jnp.bfloat16)
    merged = forkmerge.merge(leaf, jnp.ones(4))
    assert merged.dtype == jnp.bfloat16
    assert float(merged) == 260.0  # of 259, the nearest there is


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [0.5, 0.5]}, r"shape \(2,\); there are 3 branches"),
        (
            {"policies": {"optimizer": "keep"}},
            "policies 'optimizer' matches no leaf .* count, opt_state, params/heads/a",
        ),
        ({"policies": {"count": "drop"}}, r"policies\['count'\]='drop' is not one of"),
        ({"policies": {"count": "reset"}}, "needs initial="),
        ({"heads": {"params/heads/a": 1}}, "needs branch_weights="),
        ({"heads": {"params/heads/a": "all"}}, "must be the index of a task, or"),
        (
            {"heads": {"params/heads/a": 3}, "branch_weights": NU},
            "of task 3, but branch_weights has 3 tasks",
        ),
        (
            {"heads": {"params/trunk": "stacked"}, "branch_weights": NU},
            r"'params/trunk' has shape \(3, 4, 2\); its second axis must be the 3",
        ),
        (
            {"heads": {"params/heads/a": 1}, "branch_weights": NU[:2]},
            r"shape \(2, 3\); with 3 branches",
        ),
    ],
)
def test_errors(options, message):
    given = {"branches": BRANCHES, "weights": LAMBDA, **options}
    with pytest.raises(ValueError, match=message):
        forkmerge.merge(**given)
