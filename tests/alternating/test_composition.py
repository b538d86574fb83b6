"""Balancers inside a group, other gradients per inner step, smaller states, errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from alternating import problem
from alternating.problem import LABELS, LR, TASKS, XS, start, task_loss

import mtljax
from mtljax.alternating import Groups, StepOptions, alternate
from mtljax.alternating._states import round_randomly

KEY = jax.random.key(2)


def task_losses(params, x):
    rows = [{**params, "phi": params["phi"][t]} for t in range(TASKS)]
    return jnp.stack([task_loss(row, t, x) for t, row in enumerate(rows)])


def test_a_balancer_in_one_group_is_the_balancer():
    balancer, sgd = mtljax.mgda(TASKS), optax.sgd(LR)
    steps = alternate(sgd, TASKS, groups=1, balancer=balancer, labels=LABELS)
    params, _, _ = problem.run(steps, start(), XS)
    grad_fn = mtljax.value_and_balanced_grad(task_losses, balancer, labels=LABELS)

    @jax.jit
    def step(params, state, x):
        _, grad, state = grad_fn(params, state, x)
        return optax.apply_updates(params, sgd.update(grad, sgd.init(params))[0]), state

    want, state = start(), balancer.init(mtljax.shared_params(start(), LABELS))
    for x in XS:
        want, state = step(want, state, x)
    chex.assert_trees_all_close(params, want, rtol=1e-4)
    assert steps.cost == (1, TASKS, 1)


def test_equal_weights_within_random_groups_are_no_balancer():
    options = {"groups": 2, "key": KEY, "labels": LABELS}  # 3 + 2 tasks: a mask
    plain = alternate(optax.adam(LR), TASKS, **options)
    want, want_state, want_losses = problem.run(plain, start(), XS)
    for grad_fn in (None, jax.value_and_grad):
        linear = alternate(
            optax.adam(LR),
            TASKS,
            balancer=mtljax.linear(3),
            options=StepOptions(grad_fn=grad_fn),
            **options,
        )
        params, state, losses = problem.run(linear, start(), XS)
        chex.assert_trees_all_close(params, want, rtol=1e-5)
        chex.assert_trees_all_close(state.shared, want_state.shared, rtol=1e-4)
        np.testing.assert_allclose(losses, want_losses, rtol=1e-4)


def sam(rho):
    """Sharpness-aware gradients with the signature of jax.value_and_grad."""

    def value_and_grad(loss, *, has_aux):
        plain = jax.value_and_grad(loss, has_aux=has_aux)

        def function(params):
            value, grad = plain(params)
            norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grad)))
            worst = jax.tree.map(lambda p, g: p + rho * g / norm, params, grad)
            return value, plain(worst)[1]

        return function

    return value_and_grad


def test_sharpness_aware_inner_steps():
    """Alternating SGD with SAM, task by task, in plain numpy."""
    steps = alternate(
        optax.sgd(LR),
        TASKS,
        order="fixed",
        labels=LABELS,
        options=StepOptions(grad_fn=sam(0.1)),
    )
    params, _, losses = problem.run(steps, start(), XS[:3])
    theta, phi = (np.array(start()[k], np.float64) for k in ("theta", "phi"))
    for x in XS[:3]:
        for t in range(TASKS):
            g, q = problem.gradients(theta, phi[t], t, x)
            norm = np.sqrt(g @ g + q @ q)
            g, q = problem.gradients(
                theta + 0.1 * g / norm, phi[t] + 0.1 * q / norm, t, x
            )
            theta, phi[t] = theta - LR * g, phi[t] - LR * q
    np.testing.assert_allclose(params["theta"], theta, rtol=1e-4)
    np.testing.assert_allclose(params["phi"], phi, rtol=1e-4)
    assert np.isfinite(losses).all()


@pytest.mark.parametrize(
    "options",
    [
        {"state": "per_task"},
        pytest.param({"balancer": mtljax.upgrad(3)}, marks=pytest.mark.deep),
    ],
    ids=["per_task", "balancer"],
)
def test_grad_fn_per_member(options):
    """The default, given as a grad_fn: other code, the same numbers."""
    options = {"groups": 2, "key": KEY, "labels": LABELS, **options}
    by_pullback = alternate(optax.adam(LR), TASKS, **options)
    call = StepOptions(grad_fn=jax.value_and_grad)
    by_call = alternate(optax.adam(LR), TASKS, options=call, **options)
    got = problem.run(by_call, start(), XS[:3])
    want = problem.run(by_pullback, start(), XS[:3])
    chex.assert_trees_all_close(got[0], want[0], rtol=1e-4)
    np.testing.assert_allclose(got[2], want[2], rtol=1e-4)
    assert by_pullback.cost.forward == 2
    assert by_call.cost.forward == TASKS


def test_rounding_at_random_is_right_on_average():
    x = jnp.array([1.0, 1.001, -3.14159, 1e-30, 0.0, jnp.inf, jnp.nan])
    draws = jax.vmap(lambda k: round_randomly(x, k))(jax.random.split(KEY, 4000))
    assert draws.dtype == jnp.bfloat16
    mean = np.asarray(draws, np.float64).mean(0)
    np.testing.assert_allclose(mean[:5], x[:5], rtol=3e-4)
    assert np.isposinf(mean[5])
    assert np.isnan(mean[6])
    neighbours = np.unique(np.asarray(draws[:, 1], np.float64))
    assert neighbours.tolist() == [1.0, 1.0078125]


def test_16_bit_moments_go_on_moving():
    """Adam's second moment under a gradient that halves: to nearest it would stay."""

    def loss(params, task, batch):
        return params @ jnp.ones(256) * batch * (task + 1)

    steps = alternate(
        optax.scale_by_adam(),
        2,
        key=KEY,
        order="fixed",
        options=StepOptions(moments="bfloat16"),
    )
    params = jnp.zeros(256)
    full = alternate(optax.scale_by_adam(), 2, order="fixed")
    size = lambda s: sum(x.nbytes for x in jax.tree.leaves(s.shared) if x.ndim > 1)
    assert size(steps.init(params)) * 2 == size(full.init(params))

    def one(state, batch):
        _, _, state = steps.step(loss, params, state, batch)
        return state, None

    batches = jnp.where(jnp.arange(400) < 100, 1.0, 0.5)
    state = jax.jit(lambda s: jax.lax.scan(one, s, batches)[0])(steps.init(params))
    nu, mu = state.shared.nu, state.shared.mu
    assert nu.dtype == mu.dtype == jnp.bfloat16
    v = 0.0
    for batch in np.asarray(batches):
        v = 0.999 * v + 0.001 * batch**2
    means = np.asarray(nu, np.float64).mean(1)
    np.testing.assert_allclose(means, v * np.array([1.0, 4.0]), rtol=5e-3)
    np.testing.assert_allclose(
        np.asarray(mu, np.float64).mean(1), [0.5, 1.0], rtol=5e-3
    )


def test_factored_second_moments_are_smaller():
    params = {"w": jnp.ones((64, 128))}
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=8)

    def elements(optimizer):
        steps = alternate(optimizer, 8, order="fixed")
        state = jax.eval_shape(steps.init, params).shared
        return sum(x.size for x in jax.tree.leaves(state))

    assert elements(optax.scale_by_adam()) > 8 * 2 * 64 * 128
    assert elements(factored) < 8 * (64 + 128 + 8)


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "epoch"}, "schedule='epoch' is not one of 'same_batch'"),
        ({"order": "cyclic"}, "order='cyclic' is not one of 'random', 'fixed'"),
        ({"state": "none"}, "state='none' is not one of 'per_task', 'slot', 'shared'"),
        ({"groups": 4}, "groups=4 is more than num_tasks=3"),
        ({"groups": 0}, "groups must be a positive integer, not 0"),
        ({"groups": lambda: Groups(2, loss="max")}, "loss='max' is not one of 'sum'"),
        (
            {"groups": lambda: Groups(2, regroup_every="epoch")},
            "regroup_every='epoch' is not one of 'batch', 'never'",
        ),
        ({"groups": lambda: Groups(2, 0)}, "regroup_every must be .* at least 1"),
        (
            {"options": lambda: StepOptions(moments="int8")},
            "moments='int8' is not one of 'full', 'bfloat16'",
        ),
        (
            {"options": lambda: StepOptions(batch_norm="first")},
            "batch_norm='first' is not one of 'last'",
        ),
        (
            {"options": lambda: StepOptions(clip_norm=0.0)},
            "clip_norm must be a finite number above 0",
        ),
        (
            {"options": StepOptions(grad_fn=jax.value_and_grad), "axis_name": "d"},
            "a grad_fn sees the losses of this device only",
        ),
        ({"order": "random"}, r"pass key=jax.random.key\(...\)"),
        ({"groups": 2}, r"pass key=jax.random.key\(...\)"),
        ({"options": StepOptions(moments="bfloat16")}, r"pass key=jax.random.key"),
        ({"groups": 1, "balancer": mtljax.mgda(2)}, "num_tasks=2, but the .* has 3"),
        (
            {"groups": 1, "state": "per_task", "balancer": mtljax.mgda(3)},
            "use state='slot' or 'shared'",
        ),
        ({"groups": 1, "balancer": mtljax.famo(3)}, "famo needs the losses after"),
        ({"groups": 1, "balancer": optax.sgd(1.0)}, "balancer must be a mtljax.Balanc"),
    ],
)
def test_options_that_do_not_fit(options, message):
    options = {k: v() if callable(v) else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        alternate(optax.sgd(LR), 3, **{"order": "fixed", **options})


def text_state():
    return optax.GradientTransformation(
        lambda p: {"mode": "fast"}, lambda g, s, p: (g, s)
    )


def growing_state():
    return optax.GradientTransformation(
        lambda p: (jnp.zeros(1),), lambda g, s, p=None: (g, (*s, jnp.zeros(1)))
    )


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (text_state(), "cannot be stacked, one copy per task: 'mode' is a str"),
        (growing_state(), "cannot be stacked, one copy per task: an update turns"),
        (optax.lbfgs(), "cannot be called as update"),
        (LR, "must be an optax.GradientTransformation, not a float"),
    ],
)
def test_optimizers_that_cannot_be_kept_per_task(optimizer, message):
    with pytest.raises(ValueError, match=message):
        alternate(optimizer, 3, order="fixed").init(jnp.ones(2))


@pytest.mark.usefixtures("as_users")
def test_task_losses_that_do_not_fit():
    steps = alternate(optax.sgd(LR), 3, order="fixed")
    params = jnp.ones(2)
    state = steps.init(params)
    vector = lambda p, task, batch: p
    with pytest.raises(ValueError, match=r"shape \(2,\); .*indexed\(task_losses\)"):
        steps.step(vector, params, state, None)
    pair = lambda p, task, batch: (p.sum(), None)
    with pytest.raises(ValueError, match="returned a tuple"):
        steps.step(pair, params, state, None)
    with pytest.raises(ValueError, match="with_key=True needs a key"):
        steps.step(pair, params, state, None, with_key=True)
    with pytest.raises(ValueError, match=r"mask has shape \(2,\); it must be \(3,\)"):
        steps.step(pair, params, state, None, mask=jnp.ones(2, bool))
