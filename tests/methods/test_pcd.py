"""PCD: golden sequences, the closed form for two tasks, a float64 reference."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from methods.stepping import make, step
from precision import enable_x64

import mtljax

# Rows are tasks; the expected updates are those of TorchJD 0.18 in float64.
SEQUENCE = np.array(
    [
        [[3, -1, 0.5, 2], [0.2, 0.1, -0.1, 0], [-0.05, 0.02, 0, 0.04]],
        [[2, -2, 1, 1], [0.1, 0.3, -0.2, 0.1], [-0.02, 0.05, 0.01, 0.03]],
        [[1, 1.5, -0.5, -1], [-0.3, 0.2, 0.1, 0.2], [0.04, -0.01, 0.02, -0.06]],
        [[0.5, -0.5, 1, 0.25], [0.05, -0.1, 0.2, 0.1], [0.03, 0.02, -0.05, 0.01]],
    ]
)
DEFAULT = [
    [2.079019735, -0.6176869246, 0.5348024239, 3.043045542],
    [2.042252133, -0.5558132231, 1.049178816, 2.102261091],
    [0.5532688795, 1.885143287, -0.357806745, -0.7156134899],
    [1.013970977, -0.3163150052, 0.4930988161, 0.4372198912],
]
STRONG = [
    [1.188095029, 0.8691231813, -0.2807860195, 3.464709845],
    [1.763338513, 1.194823973, 0.1856824683, 2.329925961],
    [-0.2706873966, 1.568190808, 1.024338716, -0.9582463756],
    [1.066420473, -0.09670730376, -0.03023533913, 0.6441901097],
]


def run(balancer, sequence, dtype):
    state, updates = balancer.init({}), []
    for matrix in sequence:
        update, state = balancer.update({"w": jnp.asarray(matrix, dtype)}, state)
        updates.append(np.asarray(update["w"], np.float64))
    return updates, state


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, DEFAULT), ({"tau": 0.5, "decay": 0.9}, STRONG)],
)
def test_golden_sequences(options, expected):
    updates, _ = run(mtljax.pcd(3, **options), SEQUENCE, jnp.float32)
    np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=2e-5)
    with enable_x64():
        # The moving averages are float32, also under x64.
        updates, _ = run(mtljax.pcd(3, **options), SEQUENCE, jnp.float64)
    np.testing.assert_allclose(updates, expected, rtol=2e-6)


def test_golden_weights():
    got = step(make(mtljax.pcd, 3), SEQUENCE[0])
    expected = [1.069604848, 0, 22.59589616]
    np.testing.assert_allclose(got.weights, expected, rtol=1e-4)


def reference(matrix, scales, main, tau):
    """The projection by SLSQP, in the space of the parameters."""
    rows = matrix * scales[:, None]
    others = [j for j in range(len(rows)) if j != main]
    result = scipy.optimize.minimize(
        lambda d: ((d - rows[main]) ** 2).sum() / 2,
        rows[main],
        jac=lambda d: d - rows[main],
        constraints=[
            {
                "type": "ineq",
                "fun": lambda d, r=rows[j]: r @ d - tau * r @ r,
                "jac": lambda d, r=rows[j]: r,
            }
            for j in others
        ],
        options={"ftol": 1e-15, "maxiter": 500},
    )
    return result.x * np.linalg.norm(matrix[main]) / np.linalg.norm(result.x)


@pytest.mark.parametrize("main", [0, 2])
def test_first_step_is_the_projection(main):
    rng = np.random.default_rng(main)
    for _ in range(10):
        matrix = rng.normal(size=(3, 5)) * 10.0 ** rng.uniform(-1, 1, (3, 1))
        scales = 1 / np.sqrt((matrix**2).sum(1) + 1e-8)
        expected = reference(matrix, scales, main, 0.3)
        got = step(make(mtljax.pcd, 3, main=main, tau=0.3), matrix)
        np.testing.assert_allclose(got.update, expected, rtol=1e-3, atol=1e-4)
        assert got.state.solver.converged


def test_two_tasks_in_closed_form():
    """``d̃ = g̃_m + max(0, τ ‖g̃_2‖² − <g̃_m, g̃_2>)/‖g̃_2‖² g̃_2``."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        matrix = rng.normal(size=(2, 4))
        rows = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
        expected = rows[0] + max(0, 0.1 - rows[0] @ rows[1]) * rows[1]
        expected *= np.linalg.norm(matrix[0]) / np.linalg.norm(expected)
        got = step(make(mtljax.pcd, 2, tau=0.1), matrix)
        np.testing.assert_allclose(got.update, expected, rtol=1e-4, atol=1e-5)


def test_constraints_that_exclude_each_other_leave_the_main_gradient():
    got = step(make(mtljax.pcd, 3), [[1.0, 0], [0, 1], [0, -1]])
    np.testing.assert_allclose(got.update, [1, 0], atol=1e-6)
    assert not got.state.solver.converged


def test_nothing_to_follow():
    zero = step(make(mtljax.pcd, 3), [[0.0, 0], [0, 1], [1, 1]])
    np.testing.assert_array_equal(zero.update, [0, 0])
    mask = np.array([False, True, True])
    absent = step(make(mtljax.pcd, 3), [[1.0, 0], [0, 1], [1, 1]], mask=mask)
    np.testing.assert_array_equal(absent.update, [0, 0])
    assert absent.state.steps.tolist() == [0, 1, 1]
    # A task without a gradient has no constraint.
    lone = step(make(mtljax.pcd, 3), [[1.0, 0], [0, 0], [0, 0]])
    np.testing.assert_allclose(lone.update, [1, 0], rtol=1e-6)


@pytest.mark.usefixtures("as_users")
def test_errors():
    with pytest.raises(ValueError, match="pcd: main=3 is not the index"):
        mtljax.pcd(3, main=3)
    with pytest.raises(ValueError, match=r"pcd: tau must be .* at least 0"):
        mtljax.pcd(3, tau=[0.1, -0.1, 0.1])
    with pytest.raises(ValueError, match=r"pcd: tau has shape \(2,\)"):
        mtljax.pcd(3, tau=[0.1, 0.1])
    with pytest.raises(ValueError, match="pcd: decay must be"):
        mtljax.pcd(3, decay=1.0)


def test_parity_with_torchjd():
    aggregation = pytest.importorskip("torchjd.aggregation")
    torch = pytest.importorskip("torch")
    if not hasattr(aggregation, "PCD"):
        pytest.skip("this TorchJD has no PCD")
    rng = np.random.default_rng(3)
    for _ in range(5):
        peer, balancer = aggregation.PCD(), mtljax.pcd(3)
        sequence = rng.normal(size=(4, 3, 6))
        updates, _ = run(balancer, sequence, jnp.float32)
        for got, matrix in zip(updates, sequence, strict=True):
            expected = peer(torch.tensor(matrix)).numpy()
            np.testing.assert_allclose(got, expected, rtol=2e-3, atol=1e-4)
