"""ExcessMTL against the authors' recurrence written in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods.stepping import make
from zoo import J3

import mtljax
from mtljax.methods._excess_mtl import excess_mtl, excess_risks


class Reference:
    def __init__(self, tasks, dim, step_size=1.0):
        self.sums, self.weights = np.zeros((tasks, dim)), np.ones(tasks)
        self.initial, self.step_size = None, step_size

    def update(self, matrix):
        self.sums += matrix**2
        excess = (matrix**2 / np.sqrt(self.sums + 1e-7)).sum(1)
        if self.initial is None:
            self.initial = excess
        else:
            self.weights *= np.exp(self.step_size * excess / self.initial)
            self.weights *= len(matrix) / self.weights.sum()
        return self.weights @ matrix


def tree(matrix):
    matrix = jnp.asarray(matrix, jnp.float32)
    return {"a": matrix[:, :2].reshape(-1, 2, 1), "b": matrix[:, 2:]}


def start(balancer, dim=4):
    return balancer.init(jax.tree.map(lambda g: g[0], tree(np.zeros((1, dim)))))


@pytest.fixture(scope="module")
def update():
    return jax.jit(make(excess_mtl, 3).update)


def test_a_run_equals_the_reference(update):
    reference, state = Reference(3, 4), start(make(excess_mtl, 3))
    rng = np.random.default_rng(0)
    for _ in range(8):
        matrix = rng.normal(size=(3, 4)) * np.array([[1.0], [10.0], [0.1]])
        expected = reference.update(matrix)
        got, state = update(tree(matrix), state)
        np.testing.assert_allclose(state.task_weights, reference.weights, rtol=1e-3)
        flat = np.concatenate([np.ravel(got["a"]), np.ravel(got["b"])])
        np.testing.assert_allclose(flat, expected, rtol=1e-3, atol=1e-3)
    sums = reference.sums[:, :2].reshape(3, 2, 1)
    np.testing.assert_allclose(state.accumulator["a"], sums, rtol=1e-5)


def test_excess_risk_of_one_step():
    """After one step √S is |g|, so the excess is the l1 norm of the gradient."""
    grads = tree(J3)
    excess = excess_risks(grads, jax.tree.map(jnp.square, grads))
    np.testing.assert_allclose(excess, np.abs(J3).sum(1), rtol=1e-5)


def test_two_tasks_closed_form(update):
    """Constant gradients except one: e/e⁰ is 1/√2 against f²/√(1 + f²)."""
    balancer = make(excess_mtl, 2, step_size=0.5)
    state = balancer.init({"w": jnp.zeros(2)})
    run = jax.jit(balancer.update)
    _, state = run({"w": jnp.eye(2)}, state)
    np.testing.assert_allclose(state.task_weights, [1.0, 1.0], rtol=1e-6)
    _, state = run({"w": jnp.diag(jnp.array([1.0, 3.0]))}, state)
    odds = np.exp(0.5 * (9 / 10**0.5 - 0.5**0.5))
    np.testing.assert_allclose(state.task_weights[1], 2 * odds / (1 + odds), rtol=1e-5)


def test_constant_gradients_keep_equal_weights(update):
    state = start(make(excess_mtl, 3))
    for _ in range(6):
        _, state = update(tree(J3), state)
        np.testing.assert_allclose(state.task_weights, np.ones(3), rtol=1e-4)


def test_scales():
    rng = np.random.default_rng(1)
    matrices = rng.normal(size=(3, 3, 4))
    totals = {}
    for options in ({}, {"compat": "torchjd"}, {"scale": "mean"}, {"scale": "sum"}):
        balancer = excess_mtl(3, **options)
        state = start(balancer)
        for matrix in matrices:
            _, state = balancer.update(tree(matrix), state)
        totals[str(options)] = np.asarray(state.task_weights)
    plain, torchjd, mean, total = totals.values()
    np.testing.assert_allclose(plain.sum(), 3, rtol=1e-5)
    np.testing.assert_allclose(plain, total, rtol=1e-6)
    np.testing.assert_allclose(plain / 3, torchjd, rtol=1e-6)
    np.testing.assert_allclose(mean, torchjd, rtol=1e-6)


def test_an_absent_task_keeps_its_state_and_its_share(update):
    rng = np.random.default_rng(2)
    state = start(make(excess_mtl, 3))
    for _ in range(2):
        _, state = update(tree(rng.normal(size=(3, 4))), state)
    before, mask = state, jnp.array([True, False, True])
    for _ in range(5):
        bad = rng.normal(size=(3, 4))
        bad[1] = np.nan
        _, state = update(tree(bad), state, mask=mask)
    assert state.task_weights[1] == 0
    np.testing.assert_allclose(state.task_weights.sum(), 2, rtol=1e-5)
    one = lambda s: (s.accumulator["a"][1], s.initial[1], s.logits[1])
    for new, old in zip(one(state), one(before), strict=True):
        np.testing.assert_array_equal(new, old)
    shares = np.exp([before.logits, state.logits]).sum(1)
    np.testing.assert_allclose(shares, [3.0, 3.0], rtol=1e-4)


def test_a_task_without_a_gradient_is_at_its_first_step(update):
    still = J3.copy()
    still[2] = 0
    state = start(make(excess_mtl, 3))
    for _ in range(2):
        _, state = update(tree(still), state)
    assert state.initial[2] == 0
    assert np.isfinite(state.task_weights).all()
    _, state = update(tree(J3), state)
    np.testing.assert_allclose(state.initial[2], np.abs(J3[2]).sum(), rtol=1e-5)


def test_a_jump_of_many_decades_is_finite(update):
    state = start(make(excess_mtl, 3))
    for size in (1e-12, 1e15, 1e-12, 1.0):
        got, state = update(tree(J3 * np.array([[size], [1.0], [1.0]])), state)
        for leaf in (got["a"], got["b"], state.task_weights, state.logits):
            assert np.isfinite(leaf).all()


def test_through_value_and_balanced_grad():
    """The accumulators are those of the shared parameters."""

    def task_losses(params):
        pairs = zip((1.0, 3.0), params["heads"], strict=True)
        return jnp.stack([(params["trunk"] @ h - y) ** 2 for y, h in pairs])

    params = {"trunk": jnp.ones(2), "heads": [jnp.ones(2), -jnp.ones(2)]}
    labels = {"trunk": "shared", "heads": "own"}
    balancer = excess_mtl(2)
    state = balancer.init(mtljax.shared_params(params, labels))
    grad_fn = mtljax.value_and_balanced_grad(task_losses, balancer, labels=labels)
    _, grad, state = jax.jit(grad_fn)(params, state)
    # Residuals 1 and -5; the gradients of the trunk are 2·1·(1, 1) and 2·(-5)·(-1, -1).
    np.testing.assert_allclose(grad["trunk"], [12.0, 12.0], rtol=1e-5)
    np.testing.assert_allclose(state.initial, [4.0, 20.0], rtol=1e-5)


@pytest.mark.usefixtures("as_users")
def test_errors():
    with pytest.raises(
        ValueError, match="excess_mtl: step_size must be a finite number above 0"
    ):
        excess_mtl(2, step_size=0.0)
    with pytest.raises(ValueError, match="compat='libmtl' is not one of 'official'"):
        excess_mtl(2, compat="libmtl")
    balancer = excess_mtl(2)
    with pytest.raises(ValueError, match=r"'w' has shape \(2, 2\).*shape \(2, 3\)"):
        balancer.update({"w": jnp.eye(2)}, balancer.init({"w": jnp.zeros(3)}))
    with pytest.raises(
        ValueError, match=r"'w' has shape \(2, 2\).*None.*shared_params"
    ):
        balancer.update({"w": jnp.eye(2)}, balancer.init({}))
