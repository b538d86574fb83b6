"""IGBv1: the window, invariances, options, and what it is with a gradient method."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from methods.stepping import make, padded, step
from zoo import J2, J3

import mtljax
from mtljax import training

RNG = np.random.default_rng(0)
LOSSES = RNG.uniform(0.3, 2, size=(8, 3))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


class Reference:
    """The method on all tasks, float64."""

    def __init__(self, start, stop, temperature=1.0, ema=0.0, floors=0.0):
        self.start, self.stop, self.temperature = start, stop, temperature
        self.ema, self.floors = ema, floors
        self.seen, self.average, self.steps = [], None, 0

    def weights(self, losses):
        average = losses if self.average is None else self.average
        self.average = self.ema * average + (1 - self.ema) * losses
        share = np.ones(3)
        if self.steps >= self.stop:
            base = np.mean(self.seen, axis=0)
            gap = (self.average - self.floors) / (base - self.floors)
            share = 3 * softmax(gap / self.temperature)
        if self.start <= self.steps < self.stop:
            self.seen.append(losses)
        self.steps += 1
        return share / losses


@pytest.mark.parametrize(
    "options",
    [
        {"window": (2, 5)},
        {"window": (0, 1)},
        {"window": (1, 3), "temperature": 0.2, "ema": 0.6, "floors": (0.1, 0.2, 0.05)},
    ],
)
def test_a_run_equals_the_reference(options):
    start, stop = options["window"]
    extra = {k: np.array(v) for k, v in options.items() if k != "window"}
    reference = Reference(start, stop, **extra)
    if "floors" in options:
        options = options | {"floors": np.array(options["floors"])}
    balancer = mtljax.igb_v1(3, **options)
    state = None
    for losses in LOSSES:
        update, weights, state = step(balancer, J3, losses, state=state)
        wanted = reference.weights(losses)
        np.testing.assert_allclose(weights, wanted, rtol=1e-5)
        np.testing.assert_allclose(update, wanted @ J3, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.log_weights.sum(), 3, rtol=1e-6)


def test_until_the_window_is_over_it_is_scale_invariant():
    balancer = make(mtljax.igb_v1, 3, window=(1, 3))
    state = None
    for i, losses in enumerate(LOSSES[:5]):
        found = step(balancer, J3, losses, state=state)
        state = found.state
        same = np.allclose(found.weights, 1 / losses, rtol=1e-6)
        assert same == (i < 3)


def test_a_given_reference_needs_no_window():
    base = np.array([1.95, 0.85, 0.28])
    losses = np.array([1.5, 0.7, 0.22])
    balancer = mtljax.igb_v1(3, base=base)
    for _ in range(2):
        found = step(balancer, J3, losses)
        np.testing.assert_allclose(
            found.state.log_weights, [0.976429, 1.030914, 0.992657], atol=5e-7
        )
        np.testing.assert_allclose(found.weights, found.state.log_weights / losses)


def test_the_unit_of_a_loss_does_not_matter():
    """Losses and gradients of the tasks scaled by constants: λ and d are the same."""
    balancer = make(mtljax.igb_v1, 3, window=(1, 3))
    units = np.array([100.0, 1.0, 1e-3])
    plain = scaled = None
    for losses in LOSSES[:6]:
        one = step(balancer, J3, losses, state=plain)
        two = step(balancer, units[:, None] * J3, units * losses, state=scaled)
        plain, scaled = one.state, two.state
        np.testing.assert_allclose(plain.log_weights, scaled.log_weights, rtol=1e-5)
        np.testing.assert_allclose(one.update, two.update, rtol=1e-4, atol=1e-5)
    assert np.ptp(plain.log_weights) > 0.1


def test_the_range_of_the_weights():
    """With ratios in [0, 1] one weight lies in [n/(1+(n-1)e), n e/(n-1+e)]."""
    for n, low, high in ((3, 0.47, 1.73), (11, 0.39, 2.35)):
        balancer = mtljax.igb_v1(n, base=np.ones(n))
        one = np.full(n, 1e-6)
        one[0] = 1.0
        for losses, wanted in ((one, high), (1 + 1e-6 - one, low)):
            found = step(balancer, np.eye(n), losses).state.log_weights[0]
            np.testing.assert_allclose(found, wanted, atol=0.01)


def test_the_direction_is_the_gradient_of_the_weighted_log_losses():
    balancer = mtljax.igb_v1(3, base=np.array([2.0, 1.0, 0.5]))
    targets = jnp.asarray(J3, jnp.float32)

    def task_losses(w):
        return jnp.square(w[None] - targets).mean(1) + 0.1

    w = jnp.array([1.0, -2.0, 3.0, 0.5])
    losses, grad, state = jax.jit(
        mtljax.value_and_balanced_grad(task_losses, balancer)
    )(w, balancer.init(w))
    share = np.asarray(3 * softmax(np.asarray(losses) / np.array([2.0, 1.0, 0.5])))
    wanted = jax.grad(lambda w: (share * jnp.log(task_losses(w))).sum())(w)
    np.testing.assert_allclose(grad, wanted, rtol=1e-4)
    np.testing.assert_allclose(state.log_weights, share, rtol=1e-5)


def test_an_absent_task_keeps_its_window():
    """Its second batch is its second, however many the others have seen."""
    balancer = make(mtljax.igb_v1, 3, window=(1, 3))
    state, seen = None, []
    present = [[1, 1, 1], [1, 0, 1], [1, 1, 1], [1, 0, 1], [1, 1, 1], [1, 1, 1]]
    for i, flags in enumerate(np.array(present, bool)):
        losses = np.where(flags, LOSSES[i], np.nan)
        found = step(balancer, J3, losses, state=state, mask=flags)
        state = found.state
        assert np.isfinite(found.weights).all()
        if flags[1]:
            seen.append(losses[1])
        elif i == 3:  # the two that are present have their reference
            base = LOSSES[1:3, [0, 2]].mean(0)
            share = 2 * softmax(LOSSES[3, [0, 2]] / base)
            np.testing.assert_allclose(found.weights[[0, 2]] * losses[[0, 2]], share,
                                       rtol=1e-5)  # fmt: skip
            assert found.weights[1] == 0
            assert state.log_weights[1] == 1
        if i == 4:  # the third of task 1: not yet
            np.testing.assert_allclose(found.weights, 1 / losses, rtol=1e-6)
    np.testing.assert_allclose(state.base.mean[1], np.mean(seen[1:3]), rtol=1e-6)
    np.testing.assert_allclose(state.base.mean[0], LOSSES[1:3, 0].mean(), rtol=1e-6)
    np.testing.assert_array_equal(state.base.steps, [6, 4, 6])


@pytest.mark.parametrize("name", ["nash_mtl", "imtl_g"])
@pytest.mark.parametrize("tasks", [2, 3])
def test_it_changes_no_direction_of_a_method_that_ignores_scale(name, tasks):
    """Nash-MTL and IMTL-G keep theirs when a task's gradient is scaled."""
    matrix, mask = (padded(J2)) if tasks == 2 else (J3, np.ones(3, bool))
    second = make(mtljax.METHODS[name].factory, 3)
    first = mtljax.igb_v1(3, base=np.array([3.0, 0.3, 1.0]))
    losses = np.array([0.5, 2.0, 1.0])
    alone = step(second, matrix, losses, mask=mask).update
    both = step(mtljax.compose(first, second), matrix, losses, mask=mask)
    unit = lambda x: x / np.linalg.norm(x)
    np.testing.assert_allclose(unit(both.update), unit(alone), atol=2e-4)
    share = np.asarray(both.state.loss_balancer.log_weights)[mask]
    assert np.ptp(share) > 0.5  # it did weigh
    # MGDA is not of that kind: there the composition is another method.
    mgda = make(mtljax.mgda, 3)
    other = step(mtljax.compose(first, mgda), matrix, losses, mask=mask).update
    plain = step(mgda, matrix, losses, mask=mask).update
    assert np.abs(unit(other) - unit(plain)).max() > 0.05


LABELS = {"trunk": "shared", "heads": "own"}


def test_both_head_conventions_of_the_composition():
    """The authors' code for MGDA weighs heads too; Algorithm 3 does not."""
    params = {
        "trunk": jnp.asarray(RNG.normal(size=(4, 5)), jnp.float32),
        "heads": [jnp.asarray(RNG.normal(size=5), jnp.float32) for _ in range(3)],
    }
    x = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)

    def task_losses(params, x):
        h = jnp.tanh(x @ params["trunk"])
        return jnp.stack(
            [jnp.square(h @ v - t).mean() for t, v in enumerate(params["heads"])]
        )

    first = mtljax.igb_v1(3, base=np.array([1.0, 2.0, 3.0]))
    both = mtljax.compose(first, mtljax.mgda(3))
    rows = jax.jacrev(task_losses)(params, x)
    losses = np.asarray(task_losses(params, x))
    share = 3 * softmax(losses / np.array([1.0, 2.0, 3.0]))
    outer = share / losses
    scaled = outer[:, None] * np.asarray(rows["trunk"]).reshape(3, -1)
    inner = step(mtljax.mgda(3), scaled).weights
    own = [np.asarray(rows["heads"][t][t]) for t in range(3)]
    trunk = (inner @ scaled).reshape(4, 5)

    weighted = mtljax.value_and_balanced_grad(
        task_losses, both, labels=LABELS, heads="weighted"
    )
    _, grad, _ = jax.jit(weighted)(params, both.init(params), x)
    np.testing.assert_allclose(grad["trunk"], trunk, rtol=1e-3, atol=1e-5)
    for t in range(3):
        np.testing.assert_allclose(
            grad["heads"][t], inner[t] * outer[t] * own[t], rtol=1e-3, atol=1e-5
        )

    algorithm3 = optax.partition({"shared": both, "own": first}, LABELS)

    @jax.jit
    def update(params, state, x):
        losses, grads = mtljax.value_and_task_grads(task_losses)(params, x)
        return algorithm3.update(grads, state, params, losses=losses)[0]

    update_of = update(params, algorithm3.init(params), x)
    np.testing.assert_allclose(update_of["trunk"], trunk, rtol=1e-3, atol=1e-5)
    for t in range(3):
        np.testing.assert_allclose(
            update_of["heads"][t], outer[t] * own[t], rtol=1e-3, atol=1e-5
        )


def test_a_run_stops_at_a_loss_without_a_logarithm():
    balancer = mtljax.igb_v1(2, window=(1, 2))
    assert balancer.positive_losses

    def train_step(state, batch):
        w, inner = state
        losses = jnp.stack([w + 1.0, w])  # both fall; the second meets zero
        weights, inner = balancer.weigh(inner, losses=losses)
        return (w - 0.25, inner), {"losses": losses, "task_weights": weights}

    with pytest.raises(
        training.NonPositiveLossError, match=r"'b' became 0\.0"
    ) as error:
        training.fit(
            (jnp.float32(0.75), balancer.init({})),
            train_step,
            {"x": jnp.zeros(4)},
            num_steps=6,
            batch_size=2,
            order_key=jax.random.key(0),
            task_names=["a", "b"],
            logging=training.Logging(progress=False),
            execution=training.Execution(positive_losses=balancer.positive_losses),
        )
    assert error.value.step == 4


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": (3, 3)}, r"igb_v1: window=\(3, 3\) must be a range"),
        ({"window": (-1, 3)}, r"window=\(-1, 3\) must be a range"),
        ({"window": (5, 9), "num_steps": 9}, r"does not end inside .* num_steps=9"),
        ({"num_steps": 100}, r"window=\(398, 796\) does not end inside"),
        ({"base": [1.0]}, r"base has shape \(1,\); it must be \(2,\)"),
        ({"base": [1.0, 0.0]}, r"base must be positive, not \[1.0, 0.0\]"),
        ({"floors": [1.0]}, r"floors has shape \(1,\)"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0, not 0.0"),
        ({"ema": 1.0}, r"ema must be a finite number at least 0 and below 1, not 1.0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        mtljax.igb_v1(2, **options)
