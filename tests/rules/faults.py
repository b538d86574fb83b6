"""The fault matrix: every balancer times every kind of bad batch.

One program per balancer takes all kinds at once. For each it makes the bad step and
then a good one, from a state that has seen good steps. The result of the bad step is
either finite, with a finite state, or NaN everywhere with the state unchanged bit by
bit; then the good step is the one that would have been made without the bad one.
"""

import operator
import warnings
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from programs import DIM
from rules.subjects import Subject, built, params, raw, vmapped

# What a kind of batch must lead to: a finite update; NaN; the same as the batch with
# sane numbers for absent tasks; an update of zero; NaN if a loss is outside of the
# domain; or any of the two outcomes of the policy.
Expected = Literal["finite", "nan", "same", "zero", "domain", "policy"]


class Batch(NamedTuple):
    """Gradients [T, DIM], losses [T] and mask [T], and what they must lead to."""

    name: str
    expected: Expected
    matrix: np.ndarray
    losses: np.ndarray
    mask: np.ndarray
    sane: tuple[np.ndarray, np.ndarray]  # the same with good numbers for absent tasks


def good(tasks: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(tasks, DIM)) + 0.3 * rng.normal(size=DIM)
    return matrix, rng.uniform(0.5, 2, size=tasks)


class Maker:
    """Collects batches that differ from a good one in a few entries."""

    def __init__(self, tasks: int):
        self.tasks = tasks
        self.found: list[Batch] = []
        self.everyone = np.ones(tasks, bool)
        self.row = (tasks // 2,)  # the task that is bad or absent
        self.one = (tasks // 2, 1)
        self.without = np.arange(tasks) != tasks // 2

    def __call__(self, name, expected, *, grad=(), loss=(), scale=(), mask=None):
        mask = self.everyone if mask is None else mask
        matrix, losses = good(self.tasks, 7)
        for index, value in scale:
            matrix[index] *= value
        for index, value in grad:
            matrix[index] = value
        for index, value in loss:
            losses[index] = value
        sane, sane_losses = good(self.tasks, 7)
        sane = (
            np.where(mask[:, None], matrix, sane),
            np.where(mask, losses, sane_losses),
        )
        self.found.append(Batch(name, expected, matrix, losses, mask, sane))


EVERY = (slice(None),)


def not_finite(add: Maker):
    row, without = add.row, add.without
    for label, bad in (("nan", np.nan), ("inf", np.inf), ("-inf", -np.inf)):
        both = {"grad": [(row, bad)], "loss": [(row, bad)]}
        add(f"{label}: entry of a gradient", "nan", grad=[(add.one, bad)])
        add(f"{label}: gradient of a task", "nan", grad=[(row, bad)])
        add(f"{label}: all gradients", "nan", grad=[(EVERY, bad)])
        add(f"{label}: loss of a task", "nan", loss=[(row, bad)])
        add(f"{label}: all losses", "nan", loss=[(EVERY, bad)])
        add(f"{label}: loss and gradient", "nan", **both)
        if add.tasks == 1:
            continue
        add(f"{label}: absent task", "same", mask=without, **both)
        others = {"grad": [(without, bad)], "loss": [(without, bad)]}
        add(f"{label}: all but one, absent", "same", mask=~without, **others)
        some = [((0, 0), bad), (row, bad)]
        add(f"{label}: present and absent", "nan", mask=without, grad=some)


def bad_losses(add: Maker):
    row = add.row
    for label, value in (("0", 0.0), ("-0", -0.0), ("-1", -1.0), ("-1e20", -1e20)):
        add(f"loss {label}: a task", "domain", loss=[(row, value)])
        add(f"loss {label}: all", "domain", loss=[(EVERY, value)])
        if add.tasks > 1:
            add(f"loss {label}: absent", "same", loss=[(row, value)], mask=add.without)
    for value in (1e-30, 1e-38, 1e-42, 1e8, 1e20, 1e30, 1e38):
        add(f"loss {value}: a task", "policy", loss=[(row, value)])
    add("loss 1e4: a task", "finite", loss=[(row, 1e4)])
    add("loss 1e30: all", "policy", loss=[(EVERY, 1e30)])


def bad_scales(add: Maker):
    row = add.row
    add("gradient x 1e4: a task", "finite", scale=[(row, 1e4)])
    for value in (1e8, 1e12, 1e16, 1e19, 1e20, 1e25, 1e30, 1e38):
        add(f"gradient x {value}: a task", "policy", scale=[(row, value)])
    for value in (1e8, 1e20, 1e37):
        add(f"gradient x {value}: all", "policy", scale=[(EVERY, value)])
    for value in (1e-8, 1e-20, 1e-30, 1e-42):
        add(f"gradient x {value}: a task", "policy", scale=[(row, value)])
        add(f"gradient x {value}: all", "policy", scale=[(EVERY, value)])
    add("gradient 0: a task", "finite", grad=[(row, 0)])
    add("gradient 0: all", "finite", grad=[(EVERY, 0)])
    add("equal gradients x 1e15", "policy", grad=[(EVERY, 1e15)])
    if add.tasks > 1:
        add("opposed x 1e37", "policy", grad=[((0,), 3e37), ((1,), -3e37)])
        add("absent x 1e38", "same", scale=[(row, 1e38)], mask=add.without)
        add("absent loss 1e38", "same", loss=[(row, 1e38)], mask=add.without)


def combined(add: Maker):
    row, alone = add.row, ~add.without
    add("solved task", "domain", grad=[(row, 0)], loss=[(row, 0)])
    add("nearly solved task", "policy", scale=[(row, 1e-30)], loss=[(row, 1e-30)])
    add("loss and gradient x 1e20", "policy", scale=[(row, 1e20)], loss=[(row, 1e20)])
    add("negative loss, nan gradient", "nan", loss=[(row, -1)], grad=[(row, np.nan)])
    none = ~add.everyone
    lost = {"grad": [(EVERY, np.nan)], "loss": [(EVERY, np.nan)]}
    add("all absent", "zero", mask=none)
    add("all absent, nan", "zero", mask=none, **lost)
    add("one present", "finite", mask=alone)
    add("one present x 1e20", "policy", mask=alone, scale=[(row, 1e20)])
    add("one present, nan", "nan", mask=alone, grad=[(row, np.nan)])


def batches(tasks: int) -> list[Batch]:
    """All kinds of batch of so many tasks."""
    add = Maker(tasks)
    add("good", "finite")
    for group in (not_finite, bad_losses, bad_scales, combined):
        group(add)
    return add.found


# Half precision, one task and many: fewer kinds, as each is one more program.
FEW = ("good", "nan: entry", "nan: loss of", "inf: all grad", "nan: absent", "loss 0",
       "gradient x 1e4", "gradient x 1e38: a", "gradient x 1e-8", "gradient 0",
       "all absent", "one present")  # fmt: skip


class Report(NamedTuple):
    cases: int
    violations: list[str]


def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def run_matrix(
    subject: Subject, tasks: int = 3, dtype: str = "float32", few: bool = False
) -> Report:
    """The row of a balancer: every kind of batch, judged."""
    kinds = [b for b in batches(tasks) if not few or b.name.startswith(FEW)]
    if tasks < subject.fewest:
        return Report(0, [])
    balancer = built(subject.id, tasks)
    update = vmapped(subject.id, tasks)

    def inputs(pairs, masks):
        with warnings.catch_warnings():  # 1e38 is inf in float16, which is meant
            warnings.simplefilter("ignore")
            grads = _stack([subject.grads(matrix, dtype) for matrix, _ in pairs])
            losses = jnp.asarray(np.stack([losses for _, losses in pairs]), dtype)
        return grads, losses, jnp.asarray(np.stack(masks))

    def step(state, pairs, masks=None):
        masks = [np.ones(tasks, bool)] * len(kinds) if masks is None else masks
        grads, losses, mask = inputs(pairs, masks)
        return update(grads, state, losses, mask)

    init = balancer.init(params(dtype))
    state = _stack([init] * len(kinds))
    for seed in (1, 2):
        _, state = step(state, [good(tasks, seed)] * len(kinds))
    masks = [b.mask for b in kinds]
    after = [good(tasks, 3)] * len(kinds)
    bad = step(state, [(b.matrix, b.losses) for b in kinds], masks)
    sane = step(state, [b.sane for b in kinds], masks)
    later = step(bad[1], after)
    usual = step(state, after)
    table = [[raw(part) for part in both] for both in (bad, sane, later, usual)]
    before = raw(state)
    violations = []
    for i, batch in enumerate(kinds):
        rows = [[[leaf[i] for leaf in part] for part in both] for both in table]
        start = [leaf[i] for leaf in before]
        expected = batch.expected
        if expected == "domain":
            within = True
            if balancer.domain is not None:
                present = np.asarray(batch.losses, np.float32)[batch.mask]
                padded = np.resize(present, tasks)
                within = bool(np.asarray(balancer.domain(jnp.asarray(padded))).all())
            expected = "policy" if within else "nan"
        if dtype != "float32" and expected == "finite" and "1e4" in batch.name:
            expected = "policy"
        violations += [
            f"{subject.id}, T={tasks}, {dtype}, {batch.name}: {problem}"
            for problem in judge(expected, start, rows)
        ]
    return Report(len(kinds), violations)


def finite(leaves) -> bool:
    return all(
        np.isfinite(leaf.astype(np.float64)).all()
        for leaf in leaves
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    )


def same(left, right) -> bool:
    return all(map(operator.eq, map(_bits, left), map(_bits, right)))


def _bits(leaf) -> bytes:
    return np.ascontiguousarray(leaf).tobytes()


def judge(expected, start, steps):
    """Yields a sentence for each way in which a case breaks the policy."""
    bad, sane, later, usual = steps
    update, state = bad
    nan = all(np.isnan(leaf.astype(np.float64)).all() for leaf in update)
    if not nan and not finite(update):
        yield "the update is neither finite nor NaN"
    if nan and not same(state, start):
        yield "the update is NaN, but the state moved"
    if not nan and not finite(state):
        yield "the state is not finite"
    if expected == "nan" and not nan:
        yield "the update must be NaN"
    if expected == "finite" and nan:
        yield "the update must be finite"
    if expected == "zero":
        if any(leaf.any() for leaf in update):
            yield "the update must be zero"
        if not same(state, start):
            yield "the state must not move"
    if expected == "same" and not (same(update, sane[0]) and same(state, sane[1])):
        yield "an absent task shows"
    if nan and not (same(later[0], usual[0]) and same(later[1], usual[1])):
        yield "the next good step is another one"
    if not nan and not (finite(later[0]) and finite(later[1])):
        yield "the next good step is not finite"
