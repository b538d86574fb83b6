"""Random keys: each is used once, so that ``jax_debug_key_reuse`` finds no reuse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtljax
from mtljax.alternating import adatask, alternate
from mtljax.sharpness import value_and_flat_grad

T = 3
PARAMS = {"w": jnp.ones(4)}
GRADS = {"w": jnp.array([[1.0, 0, 2, 1], [-1, 1, 0.5, 0.3], [0.3, -2, 1, 2]])}
BROKEN = {"w": jnp.full((T, 4), jnp.nan)}
LOSSES = jnp.array([1.0, 2.0, 0.5])
RANDOM = [name for name, method in mtljax.METHODS.items() if method.random]
AGENT = mtljax.IGBAgent(hidden=(2,), updates=1, batch_size=2, capacity=4)
NOISY = optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(9)), optax.adam(0.1))


def build(name):
    options = {"agent": AGENT} if name == "igb_v2" else {}
    return mtljax.get_method(name).build(T, key=jax.random.key(0), **options)


def wrapped():
    pcgrad, other = build("pcgrad"), mtljax.pcgrad(T, key=jax.random.key(1))
    return {
        "compose": mtljax.compose(build("random_loss_weighting"), other),
        "smooth_weights": mtljax.smooth_weights(pcgrad),
        "reuse": mtljax.reuse(pcgrad, every=2),
        "per_layer": mtljax.per_layer(pcgrad),
        "inject_hyperparams": mtljax.inject_hyperparams(mtljax.gradvac)(
            T, key=jax.random.key(2), beta=0.1
        ),
    }


def task_losses(params, x, key=None):
    h = jnp.tanh(params["w"][None] * x)
    if key is not None:
        key = key[0] if key.ndim else key  # a micro-batch has one key
        h = h * jax.random.bernoulli(key, 0.5, h.shape)
    return jnp.stack([(h**2).mean() + 1, ((h - 1) ** 2).mean(), h.mean() + 2])


def check_steps(step, state):
    """Traces a loop over steps. A key that is used twice raises an error."""
    with jax.debug_key_reuse(True):
        loop = jax.jit(
            lambda s: jax.lax.scan(lambda s, x: (step(s, x), None), s, jnp.arange(2.0))
        )
        jax.eval_shape(loop, state)


SLOW = pytest.param("igb_v2", marks=pytest.mark.deep)


@pytest.mark.parametrize(
    "name", [*(SLOW if n == "igb_v2" else n for n in RANDOM), *wrapped()]
)
def test_no_balancer_reuses_a_key(name):
    balancer = build(name) if name in RANDOM else wrapped()[name]
    with jax.debug_key_reuse(True):
        states = [balancer.init(PARAMS) for _ in range(2)]  # init may be repeated
    mask = jnp.array([True, False, True])
    step = mtljax.value_and_balanced_grad(task_losses, balancer)
    check_steps(
        lambda s, x: balancer.update(GRADS, s, losses=LOSSES + x, mask=mask)[1],
        states[0],
    )
    check_steps(lambda s, x: step(PARAMS, s, x)[2], states[1])
    check_steps(lambda s, _: mtljax.observe(balancer, s, losses=LOSSES), states[1])


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_a_skipped_step_returns_the_key_unused(make):
    balancer = mtljax.pcgrad(T, key=make(3))
    expected, _ = jax.random.split(make(3))
    with jax.debug_key_reuse(True):
        first = balancer.init(PARAMS)
        kept = balancer.update(BROKEN, first)[1]
        again, _ = jax.random.split(kept.key)  # an unused key may be used
        kept = kept._replace(key=jax.random.clone(kept.key))
        update, state = balancer.update(GRADS, kept)
    raw = [jax.random.key_data(key) for key in (expected, again, state.key)]
    np.testing.assert_array_equal(raw[0], raw[1])
    np.testing.assert_array_equal(raw[0], raw[2])
    plain, _ = balancer.update(GRADS, balancer.init(PARAMS))
    np.testing.assert_array_equal(plain["w"], update["w"])


def test_a_state_that_is_used_twice_is_found():
    balancer = build("random_loss_weighting")
    with jax.debug_key_reuse(True):
        state = balancer.init(PARAMS)
        balancer.update(GRADS, state, losses=LOSSES)
        with pytest.raises(jax.errors.KeyReuseError):
            balancer.update(GRADS, state, losses=LOSSES)


def test_losses_are_evaluated_again_with_the_same_key():
    balancer, x = mtljax.cagrad(T), jnp.ones((4, 4))
    flat = value_and_flat_grad(task_losses, balancer, rho=0.1)
    check_steps(
        lambda s, i: flat(
            PARAMS, s, x, jax.random.fold_in(jax.random.key(0), i.astype(int))
        )[2],
        flat.init(PARAMS),
    )
    parts = mtljax.value_and_balanced_grad(task_losses, balancer, micro_batches=2)
    key = jax.random.key(4)
    check_steps(
        lambda s, i: parts(
            PARAMS, s, x, jax.random.split(jax.random.fold_in(key, i.astype(int)))
        )[2],
        balancer.init(PARAMS),
    )


def test_optimizer_states_with_keys_are_selected_per_task():
    mask = jnp.array([True, False, True])

    def task_loss(params, task, x, key):
        return task_losses(params, x, key)[task]

    for options in (
        {},
        {"groups": 2, "balancer": mtljax.pcgrad(2, key=jax.random.key(1))},
    ):
        method = alternate(NOISY, T, key=jax.random.key(0), **options)
        check_steps(
            lambda s, x, method=method: method.step(
                task_loss, PARAMS, s, x, with_key=True
            )[2],
            method.init(PARAMS),
        )
    each = adatask(NOISY, T)
    check_steps(
        lambda s, _: each.update(GRADS, s, PARAMS, mask=mask)[1], each.init(PARAMS)
    )
    skip = mtljax.skip_absent(NOISY, lambda _: 1)
    check_steps(
        lambda s, _: skip.update(PARAMS, s, PARAMS, mask=mask)[1], skip.init(PARAMS)
    )


def test_optax_wrappers_of_random_balancers():
    injected = optax.inject_hyperparams(
        mtljax.gradvac, static_args=("num_tasks", "key")
    )(num_tasks=T, key=jax.random.key(3), beta=0.1)
    chain = optax.chain(build("pcgrad"), optax.apply_if_finite(NOISY, 3))
    for optimizer in (injected, chain):
        check_steps(
            lambda s, _, o=optimizer: o.update(GRADS, s, PARAMS)[1],
            optimizer.init(PARAMS),
        )
