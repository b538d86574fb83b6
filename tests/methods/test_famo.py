"""FAMO against the golden step and Adam with L2 written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods.stepping import make, step
from zoo import J3, LOSSES3

import mtljax
from mtljax.methods._famo import famo_slope

AFTER = np.array([0.4, 1.9, 1.05])
ALL = np.ones(3, bool)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


class Reference:
    """The method on all tasks, float64, with PyTorch's Adam."""

    def __init__(self, lr=0.025, decay=1e-3, bound=0.0):
        self.lr, self.decay, self.bound = lr, decay, bound
        self.logits, self.m, self.v = np.zeros(3), np.zeros(3), np.zeros(3)
        self.count = 0

    def weights(self, losses):
        raw = softmax(self.logits) / (losses - self.bound + 1e-8)
        return raw / raw.sum()

    def learn(self, before, after):
        z = softmax(self.logits)
        delta = np.log(before - self.bound) - np.log(after - self.bound)
        grad = (np.diag(z) - np.outer(z, z)) @ delta + self.decay * self.logits
        self.count += 1
        self.m = 0.9 * self.m + 0.1 * grad
        self.v = 0.999 * self.v + 0.001 * grad**2
        m, v = self.m / (1 - 0.9**self.count), self.v / (1 - 0.999**self.count)
        self.logits = self.logits - self.lr * m / (np.sqrt(v) + 1e-8)


def observe(balancer, state, losses, mask=ALL):
    losses = jnp.asarray(losses, jnp.float32)
    return mtljax.observe(balancer, state, losses=losses, mask=jnp.asarray(mask))


def test_golden_step_with_observe():
    balancer = make(mtljax.famo, 3)
    first = step(balancer, J3)
    np.testing.assert_allclose(first.weights, [0.571429, 0.142857, 0.285714], atol=1e-6)
    np.testing.assert_allclose(first.update, first.weights @ J3, rtol=1e-5)
    np.testing.assert_array_equal(first.state.logits, np.zeros(3))
    state = observe(balancer, first.state, AFTER)
    np.testing.assert_allclose(state.logits, [-0.025, 0.025, 0.025], atol=1e-6)
    z = [0.322316, 0.338842, 0.338842]
    np.testing.assert_allclose(softmax(np.asarray(state.logits)), z, atol=1e-5)


def test_golden_slope():
    slope = famo_slope(
        jnp.zeros(3), jnp.asarray(LOSSES3), jnp.asarray(AFTER), jnp.ones(3, bool)
    )
    np.testing.assert_allclose(slope, [0.049309, -0.007974, -0.041335], atol=2e-6)


def test_without_observe_the_next_batch_stands_in():
    balancer = make(mtljax.famo, 3)
    observed = observe(balancer, step(balancer, J3).state, AFTER)
    silent = step(balancer, J3).state
    with_observe = step(balancer, J3, AFTER, state=observed)
    without = step(balancer, J3, AFTER, state=silent)
    np.testing.assert_allclose(without.state.logits, [-0.025, 0.025, 0.025], atol=1e-6)
    # A change is learned from once: the second call has nothing new to say.
    np.testing.assert_array_equal(with_observe.state.logits, observed.logits)
    np.testing.assert_allclose(without.weights, with_observe.weights, rtol=1e-6)


@pytest.mark.parametrize("bound", [0.0, 0.3])
def test_a_run_equals_the_reference(bound):
    options = {"learning_rate": 0.1, "weight_decay": 0.05, "min_losses": bound}
    balancer, reference = mtljax.famo(3, **options), Reference(0.1, 0.05, bound)
    rng = np.random.default_rng(0)
    state = None
    for _ in range(8):
        before, after = rng.uniform(0.5, 2, 3), rng.uniform(0.4, 1.8, 3)
        _, weights, state = step(balancer, J3, before, state=state)
        np.testing.assert_allclose(weights, reference.weights(before), rtol=1e-4)
        state = observe(balancer, state, after)
        reference.learn(before, after)
        np.testing.assert_allclose(state.logits, reference.logits, rtol=1e-3, atol=1e-5)


def test_a_task_that_falls_less_gains_weight():
    balancer = make(mtljax.famo, 3)
    state = None
    for _ in range(5):
        state = step(balancer, J3, np.ones(3), state=state).state
        state = observe(balancer, state, [0.5, 1.0, 0.5])
    _, weights, _ = step(balancer, J3, np.ones(3), state=state)
    assert weights[1] > weights[0]
    np.testing.assert_allclose(weights[0], weights[2], rtol=1e-5)


def test_an_absent_task_waits_for_its_next_batch():
    balancer = mtljax.famo(3, weight_decay=0.0)
    without = np.array([True, False, True])
    state = step(balancer, J3).state
    gone = [0.4, np.nan, 1.05]
    state = step(balancer, J3, gone, state=state, mask=without).state
    assert state.logits[1] == 0
    assert state.pending.all()
    np.testing.assert_allclose(state.previous, [0.4, 2.0, 1.05], rtol=1e-6)
    # Two present tasks: z = (1/2, 1/2), slope = ±(δ0 - δ2)/4, Adam's first step is ±lr.
    np.testing.assert_allclose(state.logits, [-0.025, 0.0, 0.025], atol=1e-6)
    # Back again, it is measured against its own last loss; its Adam starts only now.
    back = step(balancer, J3, [0.4, 4.0, 1.05], state=state).state
    np.testing.assert_allclose(back.logits[1], 0.025, atol=1e-6)
    before = observe(balancer, state, [9.0, 9.0, 9.0], mask=np.zeros(3, bool))
    np.testing.assert_array_equal(before.logits, state.logits)


def test_a_loss_below_its_bound_is_outside_of_the_domain():
    balancer = mtljax.famo(3, min_losses=1.0)
    before = balancer.init({})
    update, state = balancer.update({"w": J3}, before, losses=jnp.full(3, 0.5))
    assert np.isnan(update["w"]).all()
    jax.tree.map(np.testing.assert_array_equal, state, before)


@pytest.mark.usefixtures("as_users")
def test_errors():
    with pytest.raises(
        ValueError, match="learning_rate must be a finite number above 0, not 0"
    ):
        mtljax.famo(2, learning_rate=0.0)
    with pytest.raises(
        ValueError, match="weight_decay must be a finite number at least 0, not -1"
    ):
        mtljax.famo(2, weight_decay=-1.0)
    balancer = mtljax.famo(2)
    with pytest.raises(ValueError, match=r"losses has shape \(3,\)"):
        mtljax.observe(balancer, balancer.init({}), losses=jnp.ones(3))
