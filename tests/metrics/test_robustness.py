"""Scores under weight noise: distances, directions, and the three loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtljax.metrics.robustness import weight_noise, weight_noise_robustness

KEY = jax.random.key(0)
PARAMS = {
    "w": jnp.full((3, 4), 2.0),
    "half": jnp.ones(5, jnp.bfloat16),
    "step": jnp.int32(7),
}


MOVE = jax.jit(weight_noise)


def away(moved):
    steps = [
        np.asarray(moved[k], np.float64) - np.asarray(PARAMS[k], np.float64)
        for k in ("w", "half")
    ]
    return steps, np.sqrt(sum(np.square(s).sum() for s in steps))


@pytest.mark.parametrize("magnitude", [0.0, 2.5, 300.0])
def test_all_weights_together_move_by_the_distance(magnitude):
    moved = MOVE(PARAMS, KEY, magnitude)
    steps, distance = away(moved)
    np.testing.assert_allclose(distance, magnitude, rtol=2e-2)  # one leaf is bfloat16
    assert moved["step"] == 7
    assert moved["half"].dtype == jnp.bfloat16
    if magnitude:
        assert len(np.unique(steps[0])) == 12


def test_directions_are_uniform():
    """Mean zero, covariance 1/n, over many draws."""
    keys = jax.random.split(KEY, 4000)
    draws = jax.vmap(lambda k: weight_noise(jnp.zeros(4), k, 1.0))(keys)
    np.testing.assert_allclose(jnp.linalg.norm(draws, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(draws.mean(0), 0, atol=0.03)
    np.testing.assert_allclose(np.cov(draws.T), np.eye(4) / 4, atol=0.02)


def score(params):
    return {"sum": params["w"].sum(), "rows": params["w"].sum(1)}


@pytest.mark.parametrize(
    "loop", ["unrolled", "map", pytest.param("vmap", marks=pytest.mark.deep)]
)
def test_scores_are_those_of_the_moved_weights(loop):
    found = weight_noise_robustness(
        score, PARAMS, key=KEY, magnitudes=[0.0, 1.0], num_draws=3, loop=loop
    )
    assert found["sum"].shape == (2, 3)
    assert found["rows"].shape == (2, 3, 3)
    np.testing.assert_allclose(found["sum"][0], 24, rtol=1e-6)
    moved = [MOVE(PARAMS, key, 1.0)["w"] for key in jax.random.split(KEY, 3)]
    np.testing.assert_allclose(found["rows"][1], np.sum(moved, axis=2), rtol=1e-5)
    assert np.std(found["sum"][1]) > 0.1


@pytest.mark.usefixtures("as_users")
def test_errors():
    with pytest.raises(ValueError, match="no floating-point array"):
        weight_noise({"n": jnp.int32(1)}, KEY, 1.0)
    for options in ({"magnitudes": []}, {"magnitudes": [1.0], "num_draws": 0}):
        with pytest.raises(ValueError, match="at least one magnitude and one draw"):
            weight_noise_robustness(score, PARAMS, key=KEY, **options)
    with pytest.raises(ValueError, match="loop='scan' is not one of 'unrolled'"):
        weight_noise_robustness(score, PARAMS, key=KEY, magnitudes=[1], loop="scan")
