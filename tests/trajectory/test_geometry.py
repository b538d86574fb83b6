"""Paths, slices, distances and CKA against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from precision import enable_x64
from trajectory import lab

from mtljax import trajectory


def other():
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda p: p + rng.normal(size=p.shape), lab.params())


def value(params):
    with enable_x64(True):
        return float(lab.loss(lab.wide(params), lab.wide(lab.data())))


def test_distances():
    a, b = lab.params(), other()
    start = jax.tree.map(np.zeros_like, a)
    left, right = lab.ravel(a), lab.ravel(b)
    apart = np.linalg.norm(left - right)
    np.testing.assert_allclose(trajectory.parameter_distance(a, b), apart, rtol=1e-5)
    mean = (np.linalg.norm(left) + np.linalg.norm(right)) / 2
    np.testing.assert_allclose(
        trajectory.parameter_distance(a, b, start), apart / mean, rtol=1e-5
    )
    np.testing.assert_allclose(
        trajectory.displacement_cosine(a, b, start),
        left @ right / np.linalg.norm(left) / np.linalg.norm(right),
        rtol=1e-5,
    )
    assert np.isnan(trajectory.displacement_cosine(a, start, start))


def test_the_path_between_two_networks():
    with enable_x64(True):
        a, b = lab.wide(lab.params()), lab.wide(other())
        counter = lab.Counter(lab.loss)
        run = lambda: trajectory.linear_mode_connectivity(
            counter, a, b, lab.batches(8), num_points=5
        )
        path = jax.tree.map(np.asarray, jax.jit(run)())
        assert counter.during(run) == 5 * 3
    for alpha, found in zip(path.alphas, path.losses, strict=True):
        mixed = jax.tree.map(
            lambda x, y, t=alpha: (1 - t) * x + t * y, lab.params(), other()
        )
        np.testing.assert_allclose(found, value(mixed), rtol=1e-9)
    chord = (1 - path.alphas) * path.losses[0] + path.alphas * path.losses[-1]
    np.testing.assert_allclose(path.barrier, max(0, (path.losses - chord).max()))


def test_what_depends_on_the_point_can_be_prepared_anew():
    """As running averages must be: here, a shift that is refitted at every α."""
    path = trajectory.linear_mode_connectivity(
        lambda pair, x: jnp.square(pair[0] - pair[1] + 0 * x.sum()),
        jnp.array(0.0),
        jnp.array(4.0),
        jnp.ones((2, 1)),
        num_points=5,
        prepare=lambda p: (p, p),
    )
    np.testing.assert_allclose(path.losses, 0)


def test_filters_of_a_direction_have_the_length_of_the_weights():
    params = jax.tree.map(jnp.float32, lab.params())
    direction = trajectory.random_direction(jax.random.key(0), params)
    for layer in ("a", "c"):
        np.testing.assert_allclose(
            np.linalg.norm(direction[layer]["w"], axis=0),
            np.linalg.norm(params[layer]["w"], axis=0),
            rtol=1e-5,
        )
        assert not np.asarray(direction[layer]["b"]).any()
    conv = jnp.ones((3, 3, 2, 4))
    scaled = trajectory.filter_normalized(conv, 2 * conv)
    np.testing.assert_allclose(scaled, 2, rtol=1e-6)


@pytest.mark.deep
def test_slices_on_a_line_and_on_a_plane():
    params = jax.tree.map(jnp.float32, lab.params())
    one, two = (
        trajectory.random_direction(jax.random.key(i), params) for i in range(2)
    )
    run = lambda directions: trajectory.loss_slice(
        lab.loss, params, directions, lab.batches(8), num_points=3, radius=0.5
    )
    line, plane = jax.jit(lambda: (run((one,)), run((one, two))))()
    assert plane[1].shape == (3, 3)
    np.testing.assert_allclose(plane[1][:, 1], line[1], rtol=1e-5)
    for i, a in enumerate((-0.5, 0, 0.5)):
        for j, b in enumerate((-0.5, 0, 0.5)):
            at = jax.tree.map(
                lambda p, x, y, a=a, b=b: np.float64(p + a * x + b * y),
                params, one, two,
            )  # fmt: skip
            np.testing.assert_allclose(plane[1][i, j], value(at), rtol=1e-5)


@pytest.mark.deep
def test_cka_is_invariant_to_rotation_and_scale_and_unbiased_if_asked():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 5)).astype(np.float32)
    turn, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    copy = (3 * x @ turn + 7).astype(np.float32)
    for unbiased in (False, True):
        run = lambda a, b, u=unbiased: trajectory.cka(
            jnp.asarray(a), jnp.asarray(b), unbiased=u
        )
        np.testing.assert_allclose(run(x, copy), 1, rtol=1e-4)
    centred = [a - a.mean(0) for a in (x, x[:, :2] ** 2)]
    cross = np.square(centred[1].T @ centred[0]).sum()
    norms = [np.linalg.norm(a.T @ a) for a in centred]
    np.testing.assert_allclose(
        trajectory.cka(jnp.asarray(x), jnp.asarray(x[:, :2] ** 2)),
        cross / norms[0] / norms[1],
        rtol=1e-4,
    )
    # Independent features, p > n: the plain form is far above 0, the other is not.
    keys = jax.random.split(jax.random.key(0), 200)
    draw = lambda k: [jax.random.normal(s, (12, 30)) for s in jax.random.split(k)]
    plain, fair = jax.jit(
        lambda: jax.lax.map(
            lambda k: (
                trajectory.cka(*draw(k)),
                trajectory.cka(*draw(k), unbiased=True),
            ),
            keys,
        )
    )()
    assert plain.mean() > 0.5
    assert abs(float(fair.mean())) < 4 * float(fair.std()) / 200**0.5


def test_mistakes_are_named(as_users):
    batches = jnp.ones((1, 1))
    loss = lambda w, x: (w * x).sum()
    with pytest.raises(ValueError, match="num_points=2 must be at least 3"):
        trajectory.linear_mode_connectivity(
            loss, jnp.zeros(()), jnp.zeros(()), batches, num_points=2
        )
    with pytest.raises(ValueError, match="3 directions; give one or two"):
        trajectory.loss_slice(loss, jnp.zeros(()), (0.0, 0.0, 0.0), batches)
    with pytest.raises(ValueError, match="num_points=4 must be odd"):
        trajectory.loss_slice(loss, jnp.zeros(()), (0.0,), batches, num_points=4)
    with pytest.raises(ValueError, match="3 inputs are fewer than 4"):
        trajectory.cka(jnp.ones((3, 1)), jnp.ones((3, 1)), unbiased=True)
