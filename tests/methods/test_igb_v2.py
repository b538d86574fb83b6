"""IGBv2: masks, options, composition, and what its users are told.

The phases of a run, its rewards and its ring are checked in test_igb.py.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from zoo import J3

import mtljax
from mtljax.methods import _igb_v2

WINDOW, TRAIN, USE = (1, 3), 4, 7
LOSSES = np.random.default_rng(0).uniform(0.3, 2, size=(12, 3)).astype(np.float32)
KEY = jax.random.key(0)
ALL = np.ones(3, bool)


PHASES = mtljax.IGBPhases(WINDOW, TRAIN, USE)
AGENT = mtljax.IGBAgent(
    capacity=6, period=2, updates=1, batch_size=3, hidden=(5,), optimizer=0.1
)


def make(**options):
    return mtljax.igb_v2(3, key=KEY, **({"phases": PHASES, "agent": AGENT} | options))


def agent(**fields):
    return dataclasses.replace(AGENT, **fields)


@functools.cache
def program(names=(), values=()):
    """A balancer and its jitted ``weigh`` of a state, losses and a mask."""
    balancer = make(**dict(zip(names, values, strict=True)))

    def weigh(state, losses, mask):
        return balancer.weigh(state, losses=losses, mask=mask)

    return balancer, jax.jit(weigh)


def run(rows=LOSSES, masks=None, **options):
    """States and weights after every batch."""
    balancer, weigh = program(tuple(options), tuple(options.values()))
    state, found = balancer.init({}), []
    for i, losses in enumerate(rows):
        mask = ALL if masks is None else masks[i]
        weights, state = weigh(state, jnp.asarray(losses), jnp.asarray(mask))
        found.append((state, np.asarray(weights)))
    return found


def test_absent_tasks():
    masks = np.ones((12, 3), bool)
    masks[[2, 5, 8, 9], 1] = False
    losses = np.where(masks, LOSSES, np.nan)
    found = run(losses, masks)
    last = None
    for i, (state, weights) in enumerate(found):
        mask = masks[i]
        assert np.isfinite(weights).all()
        assert (weights > 0).tolist() == mask.tolist()
        share = weights * np.where(mask, losses[i], 1)
        np.testing.assert_allclose(share.sum(), mask.sum(), rtol=1e-5)
        if not mask[1]:  # what is its own stays
            for name in ("previous", "average", "log_weights"):
                assert getattr(state, name)[1] == getattr(last, name)[1]
            assert state.base.mean[1] == last.base.mean[1]
            assert state.base.steps[1] == last.base.steps[1]
        last = state
    # Its window is its own second and third batch: steps 1 and 3.
    np.testing.assert_allclose(last.base.mean[1], LOSSES[[1, 3], 1].mean(), rtol=1e-6)
    base = np.asarray(last.base.mean)
    # At step 8 it is absent: the reward is that of the others.
    drops = (LOSSES[7] - LOSSES[8]) / base
    np.testing.assert_allclose(found[8][0].reward, drops[[0, 2]].min(), rtol=1e-4)
    # At step 10 it is back, and is compared with its own last loss, of step 7.
    drops = np.append((LOSSES[9] - LOSSES[10])[[0, 2]] / base[[0, 2]],
                      (LOSSES[7, 1] - LOSSES[10, 1]) / base[1])  # fmt: skip
    np.testing.assert_allclose(found[10][0].reward, drops.min(), rtol=1e-4)
    row = (int(found[10][0].memory.written) - 1) % 6
    stored = jax.tree.map(lambda ring: np.asarray(ring[row]), found[10][0].memory.rows)
    np.testing.assert_array_equal(stored.present, masks[9])
    np.testing.assert_array_equal(stored.next_present, masks[10])
    assert stored.weights[1] == 0
    np.testing.assert_allclose(stored.losses[1], LOSSES[7, 1])


def test_an_empty_batch_and_a_broken_one_leave_no_trace():
    found = run()
    rows = np.insert(LOSSES, [6, 9], [[1.0] * 3, [np.nan, 1.0, 1.0]], axis=0)
    masks = np.ones((14, 3), bool)
    masks[6] = False
    other = run(rows, masks)
    assert (other[6][1] == 0).all()
    assert np.isnan(other[10][1]).all()
    plain = found[-1][0], other[-1][0]
    keys = [jax.random.key_data(s.key) for s in plain]
    np.testing.assert_array_equal(*keys)
    chex.assert_trees_all_equal(*(s._replace(key=0) for s in plain))


def test_rewards_of_the_same_batch():
    after = 0.9 * LOSSES - 0.01 * np.arange(3)
    balancer, weigh = program(("reward_batch",), ("same",))
    look = jax.jit(lambda s, l: mtljax.observe(balancer, s, losses=l))
    state = balancer.init({})
    for i in range(8):
        before = state
        _, state = weigh(state, jnp.asarray(LOSSES[i]), jnp.asarray(ALL))
        if i >= 3:
            base = LOSSES[1:3].mean(0)
            row = (int(state.memory.written) - 1) % 6
            reward = state.memory.rows.reward[row]
            if i == 6:  # nobody looked after step 5: the next batch stands in
                wanted = ((LOSSES[5] - LOSSES[6]) / base).min()
            elif i == 3:  # when step 2 was looked at there was no reference yet
                wanted = ((LOSSES[2] - LOSSES[3]) / base).min()
            else:
                wanted = ((LOSSES[i - 1] - after[i - 1]) / base).min()
                assert reward == before.reward
            np.testing.assert_allclose(reward, wanted, rtol=1e-4, atol=1e-6)
        # The window ends with step 2; its reference is known from step 3 on.
        if i not in (2, 5):
            state = look(state, jnp.asarray(after[i]))
    assert make().observe is None


def test_rewards_of_averaged_losses_and_of_the_mean():
    average, averages = LOSSES[0], [LOSSES[0]]
    for losses in LOSSES[1:]:
        average = 0.5 * average + 0.5 * losses
        averages.append(average)
    base = LOSSES[1:3].mean(0)
    drops = -np.diff(averages, axis=0) / base
    for i, (state, _) in enumerate(run(ema=0.5, reward="mean")):
        if i >= 3:
            np.testing.assert_allclose(state.reward, drops[i - 1].mean(), rtol=1e-3,
                                       atol=1e-6)  # fmt: skip


def test_the_density_decides_what_the_agent_learns():
    one, two = run(), run(agent=agent(density="logistic_normal"))
    np.testing.assert_allclose(two[-1][0].log_weights.sum(), 3, rtol=1e-5)
    assert np.isfinite(two[-1][0].temperature)
    # Both start alike, and are trained for the first time at step 4.
    for i, ((a, u), (b, v)) in enumerate(zip(one, two, strict=True)):
        weights = [state.agent.actor[0]["kernel"] for state in (a, b)]
        assert np.array_equal(*weights) == (i < TRAIN)
        assert np.array_equal(u, v) == (i < USE)


def test_it_reads_raw_losses():
    """Unlike IGBv1, the agent sees the unit of a loss (and λ follows)."""
    plain, scaled = run(), run(LOSSES * np.array([100.0, 1, 1], np.float32))
    for i, ((a, _), (b, _)) in enumerate(zip(plain, scaled, strict=True)):
        same = np.allclose(a.log_weights, b.log_weights, rtol=1e-4)
        assert same == (i < USE)
        np.testing.assert_allclose(a.reward, b.reward, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["nash_mtl", "imtl_g"])
def test_it_changes_no_direction_of_a_method_that_ignores_scale(name):
    second = mtljax.METHODS[name].factory(3)
    both = mtljax.compose(make(), second)
    grads = {"w": jnp.asarray(J3, jnp.float32)}
    alone, _ = jax.jit(second.update)(grads, second.init({}), losses=LOSSES[0])
    update = jax.jit(both.update)
    state = both.init({})
    shares = []
    for losses in LOSSES:
        direction, state = update(grads, state, losses=losses)
        shares.append(state.loss_balancer.log_weights)
        a, b = (np.asarray(x["w"], np.float64) for x in (alone, direction))
        np.testing.assert_allclose(
            a / np.linalg.norm(a), b / np.linalg.norm(b), atol=2e-4
        )
    assert np.ptp(shares) > 0.5


def test_the_multiplier_is_read_from_the_schedule():
    schedule = optax.piecewise_constant_schedule(0.1, {5: 0.5, 8: 0.5})
    plain, found = run(), run(schedule=schedule)
    for i in range(3, 12):
        alpha = float(schedule(0) / schedule(i))
        assert alpha == pytest.approx({0: 1, 1: 2, 2: 4}[(i >= 5) + (i >= 8)])
        np.testing.assert_allclose(
            found[i][0].reward, alpha * plain[i][0].reward, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("schedule", "wanted", "alpha"),
    [
        (None, None, 1.0),
        (None, False, 1.0),
        (0.5, True, 1.0),
        (lambda step: 0.1 / (1 + step), None, 8.0),
        (lambda step: 0.1 / (1 + step), False, 1.0),
        # A step of rate zero moves nothing and earns nothing.
        (optax.linear_schedule(0.1, 0.0, 7), None, 0.0),
    ],
)
def test_the_multiplier(schedule, wanted, alpha):
    multiplier = _igb_v2._make_multiplier("igb_v2", schedule, wanted)
    np.testing.assert_allclose(multiplier(jnp.int32(7)), alpha, rtol=1e-6)


def test_the_state_can_be_donated_from_the_start():
    balancer = make()
    update = jax.jit(balancer.update, donate_argnums=1)
    grads, state = {"w": jnp.eye(3)}, balancer.init({})
    for losses in LOSSES[:2]:
        _, state = update(grads, state, losses=jnp.asarray(losses))
    assert state.step == 2


def test_a_batched_period_trains_only_when_a_run_is_due():
    """The branch stays a branch under vmap; runs out of step keep their own."""
    balancer = make()
    states = jax.vmap(lambda _: balancer.init({}))(jnp.arange(2))
    states = states._replace(step=jnp.array([0, 1], jnp.int32))

    def weigh(state, losses):
        return balancer.weigh(state, losses=losses)

    together = jax.jit(jax.vmap(weigh, (0, None)))
    text = str(jax.make_jaxpr(jax.vmap(weigh, (0, None)))(states, LOSSES[0]))
    assert text.count("cond[") == 1
    _, alone = program()
    singles = [jax.tree.map(lambda x, i=i: x[i], states) for i in range(2)]
    for losses in LOSSES:
        _, states = together(states, jnp.asarray(losses))
        for i in range(2):
            _, singles[i] = alone(singles[i], jnp.asarray(losses), jnp.asarray(ALL))
            found = states.agent.log_temperature[i]
            np.testing.assert_allclose(
                found, singles[i].agent.log_temperature, rtol=1e-4
            )


SCHEDULE = optax.linear_schedule(0.0, 1.0, 5)


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phases": (398, 796)}, "phases must be an instance of mtljax.IGBPhases"),
        ({"agent": {"tau": 0.1}}, "agent must be an instance of mtljax.IGBAgent"),
        ({"lr_multiplier": True}, "lr_multiplier=True .* needs schedule="),
        ({"schedule": SCHEDULE}, r"schedule\(0\) is 0"),
        ({"base": [1.0, -1.0]}, "base must be positive"),
        ({"reward": "max"}, "reward='max' is not one of"),
        ({"reward_batch": "last"}, "reward_batch='last' is not one of"),
        (
            {"ema": -0.1},
            r"ema must be a finite number at least 0 and below 1, not -0.1",
        ),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        mtljax.igb_v2(2, key=KEY, **options)


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": (4, 2)}, r"igb_v2: window=\(4, 2\) must be a range"),
        ({"num_steps": 796}, r"window=\(398, 796\) does not end inside"),
        ({"num_steps": 1500}, "use_from=1990 does not lie inside .* num_steps=1500"),
        ({"train_from": 700}, "train_from=700 lies before step 796"),
        ({"use_from": 1000}, "use_from=1000 lies before train_from=1194"),
    ],
)
def test_errors_of_phases(fields, message):
    with pytest.raises(ValueError, match=message):
        mtljax.igb_v2(2, key=KEY, phases=mtljax.IGBPhases(**fields))


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"density": "gauss"}, "density='gauss' is not one of"),
        ({"capacity": 0}, "capacity must be a finite number above 0, not 0"),
        ({"period": 0}, "period must be a finite number above 0, not 0"),
        ({"updates": -1}, "updates must be a finite number above 0, not -1"),
        ({"batch_size": 0}, "batch_size must be a finite number above 0, not 0"),
        ({"hidden": (8, 0)}, r"hidden\[1\] must be a finite number above 0, not 0"),
        ({"optimizer": 0.0}, "agent.optimizer must be a finite number above 0, not 0"),
        (
            {"initial_temperature": 0.0},
            "initial_temperature must be a finite number above 0",
        ),
        ({"tau": 0.0}, "tau must be a finite number above 0"),
        (
            {"discount": 1.5},
            r"discount must be a finite number at least 0 and at most 1, not 1.5",
        ),
    ],
)
def test_errors_of_the_agent(fields, message):
    with pytest.raises(ValueError, match=message):
        mtljax.igb_v2(2, key=KEY, agent=mtljax.IGBAgent(**fields))


def test_repr_shows_the_fields_and_a_traced_one_by_its_shape():
    shown = []

    def build(tau):
        shown.append(repr(make(agent=agent(tau=tau))))

    jax.eval_shape(build, jnp.float32(0.1))
    assert (
        "phases=IGBPhases(window=(1, 3), train_from=4, use_from=7, num_steps=None)"
        in (shown[0])
    )
    assert "agent=IGBAgent(density='tanh_compat', capacity=6," in shown[0]
    assert "tau=float32[])" in shown[0]


def test_a_scheduled_field_gives_the_steps_of_its_values():
    """A factory of one's own makes a field of the agent an injected number."""

    def rule(num_tasks, *, key, discount=0.99):
        options = {"phases": PHASES, "agent": agent(discount=discount)}
        return mtljax.igb_v2(num_tasks, key=key, **options)

    schedule = optax.piecewise_constant_schedule(0.9, {6: 0.5})
    balancer = mtljax.inject_hyperparams(rule)(3, key=KEY, discount=schedule)
    state, alone = balancer.init({}), make().init({})
    update = jax.jit(lambda s, l: balancer.weigh(s, losses=l))
    for i, losses in enumerate(LOSSES):
        weights, state = update(state, jnp.asarray(losses))
        number = 0.9 if i < 6 else 0.45
        _, weigh = program(("agent",), (agent(discount=number),))
        expected, alone = weigh(alone, jnp.asarray(losses), jnp.asarray(ALL))
        np.testing.assert_allclose(weights, expected, rtol=1e-4)


@pytest.mark.usefixtures("as_users")
def test_losses_are_required():
    balancer = make()
    with pytest.raises(ValueError, match="igb_v2 reads the task losses"):
        balancer.update({"w": jnp.eye(3)}, balancer.init({}))


def test_before_its_use_the_agent_does_not_show_and_then_it_does():
    one, two = run(agent=agent(optimizer=0.2)), run()
    for i, ((_, a), (_, b)) in enumerate(zip(one, two, strict=True)):
        assert np.array_equal(a, b) == (i < USE)
