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


# --- the same rows, computed by TorchJD ---------------------------------------------


def rows():
    """Rows ``(calls of TorchJD, our calls, its update, our update)`` of the tables."""
    section = TEXT.split("## TorchJD 0.18")[1].split("\n## ")[0]
    for part, text in zip(PARTS, section.split("\n### ")[1:], strict=True):
        lines = re.findall(r"^\| (`.*) \|$", text, flags=re.MULTILINE)
        for line in lines:
            their, our, *numbers, _ = [cell.strip() for cell in f"{line} ".split("|")]
            names = [re.findall(r"`(.+?)`", cell) for cell in (their, our)]
            for pair in zip(*names, strict=True):
                row = (part, *pair, *numbers)
                yield pytest.param(row, id=f"{part}-{pair[0]}")


PARTS = ("aggregation", "scalarization")
ROWS = list(rows())
FIXED = [row for row in ROWS if row.values[0][3] not in ("", "random")]
RANDOM = [row for row in ROWS if row.values[0][3] == "random"]
# Rows without numbers. Two of the methods need more than two tasks.
OTHERS = {
    "Krum(...)": (
        "Krum(1, n_selected=2)",
        'krum(T, num_byzantine=1, num_selected=2, compat="torchjd")',
    ),
    "TrimmedMean(...)": ("TrimmedMean(1)", "trimmed_mean(T)"),
    "CRMOGMWeighting(w)": (
        "CRMOGMWeighting(UPGradWeighting())",
        "smooth_weights(upgrad(T))",
    ),
}


@pytest.fixture
def torchjd():
    """A function that returns the update of a call of TorchJD, or of an object."""
    reason = "the comparison needs the extra `bench`"
    torch = pytest.importorskip("torch", reason=reason)
    pytest.importorskip("torchjd", reason=reason, exc_type=ImportError)
    libraries = {part: pytest.importorskip(f"torchjd.{part}") for part in PARTS}

    def run(part, call, jacobian=JACOBIAN, losses=LOSSES):
        matrix = torch.tensor(np.asarray(jacobian), dtype=torch.float64)
        if isinstance(call, str):
            equal = part == "scalarization"
            weights = torch.tensor([0.5, 0.5] if equal else [0.3, 0.7]).double()
            names = {**vars(libraries[part]), "weights": weights, "T": len(matrix)}
            call = eval(call, names)
            if isinstance(call, torch.nn.Module):
                call = call.double()
        if part == "scalarization":
            values = torch.tensor(np.asarray(losses), dtype=torch.float64)
            values.requires_grad_()
            (found,) = torch.autograd.grad(call(values), values)
            return call, (found @ matrix).numpy()
        if isinstance(call, libraries[part].Weighting):
            return call, (call(matrix @ matrix.T) @ matrix).detach().numpy()
        return call, call(matrix).detach().numpy()

    torch.manual_seed(0)
    return run


cvxpy_warns = pytest.mark.filterwarnings("ignore")


def test_every_row_is_compared():
    named = [row.values[0][1] for row in ROWS]
    assert set(named) - {row.values[0][1] for row in FIXED + RANDOM} == OTHERS.keys()
    assert len(FIXED) == len(TORCHJD) + 1  # the row of excess_mtl
    assert len(RANDOM) == 3


@cvxpy_warns
@pytest.mark.parametrize("row", FIXED)
def test_torchjd_returns_the_numbers_of_its_row(torchjd, row):
    part, their, our, numbers, ours = row
    wanted = [float(x) for x in numbers.split(",")]
    np.testing.assert_allclose(torchjd(part, their)[1], wanted, atol=1e-3)
    same = ours.startswith("the same")
    wanted = wanted if same else [float(x) for x in ours.split(",")]
    np.testing.assert_allclose(update(build(our)), wanted, atol=1e-3)


@pytest.mark.parametrize("row", RANDOM)
def test_random_updates_have_the_distribution_of_torchjd(torchjd, row):
    part, their, our, *_ = row
    count = 2000
    wanted = np.array([torchjd(part, their)[1] for _ in range(count)])

    def one(key):
        names = {name: getattr(mtljax, name) for name in NAMES}
        return update(eval(our, {**names, "T": 2, "key": key}))

    found = jax.vmap(one)(jax.random.split(jax.random.key(1), count))
    if "GradDrop" in their:  # each coordinate has at most two values
        assert set(np.unique(found)) == set(np.unique(wanted)) == {-4.0, 2.0, 6.0}
    # The mean difference of the quantiles of each coordinate.
    error = np.abs(np.sort(found, axis=0) - np.sort(wanted, axis=0)).mean(0)
    assert (error <= 0.03 * np.ptp(wanted)).all()


@pytest.mark.parametrize("row", OTHERS)
def test_rows_without_numbers(torchjd, row):
    their, our = OTHERS[row]
    keys = jax.random.split(jax.random.key(2), 3)
    balancer = build(our, 5)
    state = balancer.init(jnp.zeros(8))
    for key in keys:  # the averages of weights depend on earlier steps
        jacobian = jax.random.normal(key, (5, 8)) + 0.3
        found, state = balancer.update(jacobian, state)
        their, wanted = torchjd("aggregation", their, jacobian)
        np.testing.assert_allclose(found, wanted, atol=1e-3)
