"""Gradients of every task at the parameters and at the worst point nearby."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mtljax.balancer import check_choice
from mtljax.gradients import Strategy
from mtljax.sharpness._passes import Passes, Point, add, only, over_tasks
from mtljax.sharpness._perturbation import (
    Compat,
    Leaves,
    Norm,
    Perturb,
    Radius,
    ascend,
    draw_like,
    lean,
    make_radius,
    shifted,
    widen,
)


class Rows(NamedTuple):
    """Stacked shared leaves of both parts, and the sum over tasks of own ones."""

    loss: Leaves
    flat: Leaves | None
    own: Leaves


def plain_rows(
    passes: Passes, strategy: Strategy, chunk_size: int, *, split: bool
) -> Rows:
    """Gradients without a second pass; the flat part is zero."""
    pull = passes.pull

    def single(row, task):
        del task
        return pull.gradients(row)[0], []

    def many(rows, tasks):
        del tasks
        return jax.vmap(lambda row: pull.gradients(row)[0])(rows), []

    loss, _ = over_tasks(single, many, passes, strategy, chunk_size)
    own = pull.gradients(passes.basis.sum(0))[1]
    flat = [jnp.zeros_like(widen(g)) for g in loss] if split else None
    return Rows(loss, flat, own)


def local_rows(
    passes: Passes,
    radius: Radius,
    strategy: Strategy,
    chunk_size: int,
    *,
    split: bool,
    direction: Callable[[Array, Array], Leaves] | None = None,
) -> Rows:
    """A perturbation of its own for every task.

    Args:
      passes: The first pass.
      radius: The ball.
      strategy: How the tasks run.
      chunk_size: Tasks in a chunk.
      split: Whether the loss gradients are wanted beside the SAM gradients.
      direction: ``direction(row, task)``, where the shared parameters are moved
        instead of along the task's gradient.
    """
    pull, parts = passes.pull, passes.parts

    def climb(row, task):
        g, q = pull.gradients(row)
        towards = g if direction is None else direction(row, task)
        eps, delta, moved = ascend(parts.shared, parts.own, (towards, q), radius)
        return g, q, eps, delta, moved & (row != 0).any()

    def difference(g, sam, moved):
        """Exactly zero where nothing was moved, whatever the rounding of the passes."""

        def leaf(a, b):
            at = moved.reshape(moved.shape + (1,) * (a.ndim - moved.ndim))
            return jnp.where(at, widen(b) - widen(a), 0)

        return [leaf(a, b) for a, b in zip(g, sam, strict=True)]

    def result(g, sam, moved):
        return (g, difference(g, sam, moved)) if split else sam

    def single(row, task):
        g, q, eps, delta, moved = climb(row, task)
        point = shifted(parts.shared, eps), shifted(parts.own, delta)
        sam, sam_own = passes.again(point).gradients(row)
        own = [jnp.where(moved, b, a) for a, b in zip(q, sam_own, strict=True)]
        return result(g, sam, moved), own

    def many(rows, tasks):
        g, _, eps, delta, moved = jax.vmap(climb)(rows, tasks)
        # A head serves one task, so all heads may be moved at once: each task reads
        # its own, and the gradients of heads are never stacked.
        own = shifted(parts.own, [d.sum(0) for d in delta])

        def losses(shared, own):
            def at(shared, row):
                return only(passes.losses_at((shared, own)), row)

            return jax.vmap(at)(shared, rows)

        found, vjp = jax.vjp(losses, shifted(parts.shared, eps), own)
        sam, sam_own = vjp(jnp.ones_like(found))
        return result(g, sam, moved), sam_own

    rows, own = over_tasks(single, many, passes, strategy, chunk_size)
    loss, flat = rows if split else (rows, None)
    return Rows(loss, flat, own)


def common_point(passes: Passes, radius: Radius) -> tuple[Point, Any]:
    """The second pass where one ε serves all tasks, and whether it is elsewhere.

    ε follows the gradient of the mean loss of the present tasks. With separate norms a
    head still follows its own task; with a joint norm it is one ball around everything,
    that is SAM of the mean loss.
    """
    pull, parts = passes.pull, passes.parts
    present = passes.basis.sum(0)
    mean, mean_own = pull.gradients(present / jnp.maximum(present.sum(), 1))
    if radius.norm == "joint" or not parts.own:
        eps, delta, moved = ascend(parts.shared, parts.own, (mean, mean_own), radius)
    else:
        nothing = [jnp.zeros_like(w) for w in parts.shared]
        eps, _, moved = ascend(parts.shared, [], (mean, []), radius)

        def heads(row):
            q = pull.gradients(row)[1]
            _, delta, far = ascend(parts.shared, parts.own, (nothing, q), radius)
            return delta, far

        # Backward passes through the heads alone: the trunk's half is never computed.
        found = [heads(row) for row in passes.basis]
        delta = functools.reduce(add, [d for d, _ in found])
        moved = functools.reduce(jnp.logical_or, [far for _, far in found], moved)
    point = shifted(parts.shared, eps), shifted(parts.own, delta)
    return passes.again(point), moved & (present != 0).any()


def global_rows(
    passes: Passes,
    radius: Radius,
    strategy: Strategy,
    chunk_size: int,
    *,
    split: bool,
) -> Rows:
    """One perturbation for all tasks: a single second forward pass."""
    pull, moved = common_point(passes, radius)
    sam = plain_rows(passes._replace(pull=pull), strategy, chunk_size, split=False)
    plain = functools.partial(plain_rows, passes, strategy, chunk_size)
    if not split:
        return sam
    loss = plain(split=True)
    flat = [
        jnp.where(moved, widen(b) - widen(a), 0)
        for a, b in zip(loss.loss, sam.loss, strict=True)
    ]
    own = [jnp.where(moved, b, a) for a, b in zip(loss.own, sam.own, strict=True)]
    return Rows(loss.loss, flat, own)


def samo_direction(
    passes: Passes, key: Array, alpha: float, step: float, compat: Compat | None
) -> Callable[[Array, Array], Leaves]:
    """SAMO's ``direction(row, task)`` for :func:`local_rows`."""
    pull, parts = passes.pull, passes.parts
    present = passes.basis.sum(0)
    mean, _ = pull.gradients(present / jnp.maximum(present.sum(), 1))

    def losses(shared):
        return passes.losses_at((shared, parts.own))

    if compat is None:
        noise = draw_like(key, parts.shared)
        tangent = [z.astype(w.dtype) for z, w in zip(noise, parts.shared, strict=True)]
        _, slopes = jax.jvp(losses, (parts.shared,), (tangent,))

        def exact(row, task):
            del task
            return lean(mean, noise, jnp.sign(only(slopes, row)), alpha)

        return exact

    def sampled(row, task):
        noise = draw_like(jax.random.fold_in(key, task), parts.shared)
        ahead = losses(shifted(parts.shared, [step * z for z in noise]))
        behind = losses(shifted(parts.shared, [-step * z for z in noise]))
        return lean(mean, noise, jnp.sign(only(ahead - behind, row)), alpha)

    return sampled


class Engine(NamedTuple):
    """The options of :func:`sam_task_grads`, checked."""

    radius: Radius
    perturb: Perturb
    has_aux: bool
    labels: Any
    strategy: Strategy
    chunk_size: int
    alpha: float
    step: float
    compat: Compat | None

    def rows(self, passes: Passes, key: Any, active: Any, *, split: bool) -> Rows:
        """Both parts, or the plain gradients where SAM is not active."""
        runs = self.strategy, self.chunk_size

        def plain():
            return plain_rows(passes, *runs, split=split)

        def perturbed():
            if self.perturb == "global":
                return global_rows(passes, self.radius, *runs, split=split)
            direction = None
            if self.perturb == "samo":
                direction = samo_direction(
                    passes, key, self.alpha, self.step, self.compat
                )
            return local_rows(
                passes, self.radius, *runs, split=split, direction=direction
            )

        if self.radius.zero:
            return plain()
        if active is None:
            return perturbed()
        return jax.lax.cond(jnp.asarray(active, bool), perturbed, plain)


def make_engine(
    name: str,
    *,
    rho: Any,
    rho_own: Any,
    adaptive: bool,
    norm: Norm,
    perturb: Perturb,
    has_aux: bool,
    labels: Any,
    strategy: Strategy,
    chunk_size: int,
    samo_alpha: float,
    samo_step: float,
    compat: Compat | None,
) -> Engine:
    """Checks the options on behalf of a public function."""
    check_choice(name, "perturb", perturb, Perturb)
    check_choice(name, "strategy", strategy, Strategy)
    radius = make_radius(
        name, rho, rho_own, adaptive=adaptive, norm=norm, labels=labels
    )
    if chunk_size < 1:
        raise ValueError(f"{name}: chunk_size must be at least 1, not {chunk_size}.")
    if not 0 <= samo_alpha <= 1:
        raise ValueError(f"{name}: samo_alpha must lie in [0, 1], not {samo_alpha}.")
    if not samo_step > 0:
        raise ValueError(f"{name}: samo_step must be positive, not {samo_step}.")
    if compat is not None:
        check_choice(name, "compat", compat, Compat)
        if perturb != "samo":
            raise ValueError(
                f"{name}: compat={compat!r} belongs to perturb='samo', not to "
                f"perturb={perturb!r}."
            )
    return Engine(
        radius,
        perturb,
        has_aux,
        labels,
        strategy,
        chunk_size,
        samo_alpha,
        samo_step,
        compat,
    )


def check_key(name: str, engine: Engine, key: Any, how: str) -> None:
    """Raises where SAMO has no key to draw from."""
    if engine.perturb == "samo" and key is None:
        raise ValueError(f"{name}: perturb='samo' draws random directions; {how}.")
