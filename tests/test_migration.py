"""The migration page: updates of TorchJD 0.18, and calls that construct."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtljax

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "migration.md"
TEXT = PAGE.read_text(encoding="utf-8")
JACOBIAN = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
LOSSES = jnp.array([0.5, 2.0])
NAMES = {**mtljax.METHODS, "compose": None, "smooth_weights": None}

# What TorchJD 0.18 returns for this Jacobian.
TORCHJD = {
    "linear(T)": (2, 2, 2),
    'linear(T, scale="mean")': (1, 1, 1),
    "mgda(T)": (0, 1, 1),
    "pcgrad(T, key=key)": (0.5848, 3.8012, 3.8012),
    "gradvac(T, key=key, beta=0.5)": (0.5848, 3.8012, 3.8012),
    "imtl_g(T)": (0.0767, 1, 1),
    "cagrad(T, c=0.5)": (0.1835, 1.2041, 1.2041),
    "nash_mtl(T)": (0.0542, 0.7061, 0.7061),
    "fairgrad(T, alpha=1.0)": (0.0766, 0.9985, 0.9985),
    'aligned_mtl(T, scale="mean")': (0.2133, 0.9673, 0.9673),
    "upgrad(T)": (0.2929, 1.9004, 1.9004),
    "dualproj(T)": (0.5563, 1.1109, 1.1109),
    "conflict_free(T)": (0.1588, 2.0706, 2.0706),
    "linear(T, weights=weights)": (3, 1, 1),
    "pcd(T)": (-0.8200, 2.9434, 2.9434),
    "modo(T, gamma=0.1)": (-4, 1, 1),
    'sdmgrad(T, inner="reference")': (4.8462, 1, 1),
    "cosmos(T, lam=2.0)": (3.6633, 0.6368, 0.6368),
    "dwa(T, window=steps_per_epoch)": (2, 2, 2),
    "famo(T)": (-2, 1, 1),
    "geometric_mean(T)": (-2.5, 1.25, 1.25),
    "imtl_l(T)": (2, 2, 2),
    "pbi(T, theta=5.0)": (36.7696, 1.4142, 1.4142),
    "stch(T, mu=1.0)": (1.3959, 0.5, 0.5),
    "uncertainty(T)": (1, 1, 1),
}


def build(call, num_tasks=2):
    names = {name: getattr(mtljax, name) for name in NAMES}
    names |= {"T": num_tasks, "key": jax.random.key(0), "steps_per_epoch": 10}
    names |= {"balancer": mtljax.linear(num_tasks), "weights": (0.3, 0.7)}
    return eval(call.replace("normalize=...", 'normalize="l2"'), names)


def update(balancer, jacobian=JACOBIAN, losses=LOSSES):
    return balancer.update(jacobian, balancer.init(jacobian[0]), losses=losses)[0]


@pytest.mark.parametrize("call", TORCHJD)
def test_updates_of_torchjd(call):
    wanted = ", ".join(f"{x:g}" if x % 1 == 0 else f"{x:.4f}" for x in TORCHJD[call])
    assert f"`{call}` | {wanted} |" in TEXT
    found = update(build(call))
    if call == "nash_mtl(T)":  # TorchJD clips the norm of the update
        clip = optax.clip_by_global_norm(1.0)
        found, _ = clip.update(found, clip.init(found))
    np.testing.assert_allclose(found, TORCHJD[call], atol=1e-3)


def test_excess_mtl_differs_from_torchjd_in_the_first_step():
    call = 'excess_mtl(T, compat="torchjd")'
    assert f"`{call}` | 4.8080, 1, 1 | 1, 1, 1 |" in TEXT
    np.testing.assert_allclose(update(build(call)), (1, 1, 1), atol=1e-3)
    # The first excess risks are the sums of |g|. TorchJD does not divide them by
    # themselves, so its weights are their softmax.
    weights = jax.nn.softmax(jnp.abs(JACOBIAN).sum(1))
    np.testing.assert_allclose(weights @ JACOBIAN, (4.8080, 1, 1), atol=1e-3)


def calls():
    starts = r"`((?:" + "|".join(NAMES) + r")\(.*?\))`"
    return sorted(set(re.findall(starts, TEXT)) - set(TORCHJD))


def test_there_are_calls():
    assert len(calls()) > 15


@pytest.mark.parametrize("call", calls())
def test_calls_return_an_update(call):
    num_tasks = 5  # krum and trimmed_mean need more than two
    jacobian = jax.random.normal(jax.random.key(1), (num_tasks, 8)) + 0.5
    found = update(build(call, num_tasks), jacobian, jnp.arange(1.0, num_tasks + 1))
    assert found.shape == (8,)
    assert jnp.isfinite(found).all()
