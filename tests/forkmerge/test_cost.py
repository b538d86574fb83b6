"""Counts against those worked out for the published runs, and against a real search."""

import jax.numpy as jnp
import pytest

from mtljax import forkmerge

DOMAINNET = {"num_steps": 50_000, "interval": 12_500}


@pytest.mark.parametrize(
    ("branches", "options", "steps"),
    [
        (1, {}, 50_000),
        (2, {}, 100_000),
        (3, {"ranking_steps": 2500, "num_auxiliaries": 5}, 162_500),
        (6, {"pruned_to": 3}, 187_500),
        (7, {"pruned_to": 3}, 200_000),
        (2, {"num_targets": 6}, 600_000),
    ],
)
def test_steps_on_domainnet(branches, options, steps):
    found = forkmerge.forkmerge_cost(branches, **DOMAINNET, **options)
    targets = options.get("num_targets", 1)
    assert found.branch_steps == steps
    assert found.merges == 4 * targets
    assert found.states == (branches + 1) * targets


def test_a_last_round_may_be_short():
    found = forkmerge.forkmerge_cost(3, 25, 10)
    assert found.merges == 3
    assert found.validation_passes == 3 * 13


@pytest.mark.parametrize("method", ["auto", "greedy", "simplex"])
@pytest.mark.parametrize("count", [2, 3])
def test_passes_are_those_of_a_search(method, count):
    found = forkmerge.search_merge(jnp.arange(float(count)), jnp.sin, method=method)
    assert forkmerge.merge_passes(count, method=method) == len(found.scores)


@pytest.mark.usefixtures("as_users")
def test_errors():
    with pytest.raises(ValueError, match="interval must be a positive integer, not 0"):
        forkmerge.forkmerge_cost(2, 10, 0)
