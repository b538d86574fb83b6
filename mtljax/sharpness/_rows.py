"""Gradients of every task at the parameters and at the perturbed point."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mtljax.gradients.linearized import Linearized, Options, make_options
from mtljax.sharpness._passes import Passes, add, only, over_tasks
from mtljax.sharpness._perturbation import (
    Ball,
    Leaves,
    Perturb,
    Samo,
    draw_like,
    lean,
    make_ball,
    make_perturb,
    shifted,
    widen,
)


class Rows(NamedTuple):
    """Stacked shared gradients of both parts, and own gradients summed over tasks."""

    loss: Leaves
    flat: Leaves | None
    own: Leaves


def plain_rows(passes: Passes, *, split: bool, at: Linearized | None = None) -> Rows:
    """Returns gradients at one point without a second pass, and a zero flat part."""

    def single(row, task):
        del task
        return passes.gradients(row, at)[0], []

    def many(rows, tasks):
        del tasks
        return jax.vmap(lambda row: passes.gradients(row, at)[0])(rows), []

    loss, _ = over_tasks(single, many, passes, [])
    own = passes.gradients(passes.present, at)[1]
    flat = [jnp.zeros_like(widen(g)) for g in loss] if split else None
    return Rows(loss, flat, own)


def local_rows(
    passes: Passes,
    ball: Ball,
    *,
    split: bool,
    direction: Callable[[Array, Array], Leaves] | None = None,
) -> Rows:
    """Computes one perturbation per task.

    Args:
      passes: The first pass.
      ball: The ball.
      split: Whether to compute the loss gradients in addition to the SAM gradients.
      direction: A function ``direction(row, task)`` that returns the direction of the
        perturbation of the shared parameters. The default is the gradient of the task.
    """

    def climb(row, task):
        g, q = passes.gradients(row)
        towards = g if direction is None else direction(row, task)
        eps, delta, moved = passes.climb((towards, q), ball)
        return g, q, eps, delta, moved & (row != 0).any()

    def difference(g, sam, moved):
        """Returns exactly zero without a perturbation, independently of rounding."""

        def leaf(a, b):
            at = moved.reshape(moved.shape + (1,) * (a.ndim - moved.ndim))
            return jnp.where(at, widen(b) - widen(a), 0)

        return [leaf(a, b) for a, b in zip(g, sam, strict=True)]

    def result(g, sam, moved):
        return (g, difference(g, sam, moved)) if split else sam

    def single(row, task):
        g, q, eps, delta, moved = climb(row, task)
        point = passes.again(*passes.moved(eps, delta))
        sam, sam_own = passes.gradients(row, point)
        own = [jnp.where(moved, b, a) for a, b in zip(q, sam_own, strict=True)]
        return result(g, sam, moved), own

    def many(rows, tasks):
        g, _, eps, delta, moved = jax.vmap(climb)(rows, tasks)
        # A head belongs to one task, so all heads may be perturbed at once: each task
        # reads its own head, and the gradients of heads are never stacked.
        point = passes.moved(eps, [d.sum(0) for d in delta])
        sam, sam_own = passes.together(rows, *point)
        return result(g, sam, moved), sam_own

    rows, own = over_tasks(single, many, passes, passes.own)
    loss, flat = rows if split else (rows, None)
    return Rows(loss, flat, own)


def common_point(passes: Passes, ball: Ball) -> tuple[Linearized, Any]:
    """Computes the second pass at one ε for all tasks, and whether ε is not zero.

    ε follows the gradient of the mean loss of the present tasks. With separate norms
    each head follows the loss of its own task. With a joint norm one ball contains all
    parameters, which is SAM of the mean loss.
    """
    present = passes.present
    mean, mean_own = passes.gradients(present / jnp.maximum(present.sum(), 1))
    if ball.norm == "joint" or not passes.own:
        eps, delta, moved = passes.climb((mean, mean_own), ball)
    else:
        still = [jnp.zeros_like(q) for q in passes.own]
        eps, _, moved = passes.climb((mean, still), ball)
        nothing = [jnp.zeros_like(w) for w in passes.shared]

        def heads(row):
            _, delta, far = passes.climb((nothing, passes.gradients(row)[1]), ball)
            return delta, far

        # These backward passes need the heads only. The trunk's part is not computed.
        found = [heads(row) for row in passes.basis]
        delta = functools.reduce(add, [d for d, _ in found])
        moved = functools.reduce(jnp.logical_or, [far for _, far in found], moved)
    point = passes.again(*passes.moved(eps, delta))
    return point, moved & (present != 0).any()


def global_rows(passes: Passes, ball: Ball, *, split: bool) -> Rows:
    """Computes one perturbation for all tasks with a single second forward pass."""
    point, moved = common_point(passes, ball)
    sam = plain_rows(passes, split=False, at=point)
    if not split:
        return sam
    loss = plain_rows(passes, split=True)
    flat = [
        jnp.where(moved, widen(b) - widen(a), 0)
        for a, b in zip(loss.loss, sam.loss, strict=True)
    ]
    own = [jnp.where(moved, b, a) for a, b in zip(loss.own, sam.own, strict=True)]
    return Rows(loss.loss, flat, own)


def samo_direction(
    passes: Passes, key: Array, samo: Samo
) -> Callable[[Array, Array], Leaves]:
    """Returns the function ``direction(row, task)`` of SAMO for :func:`local_rows`."""
    present, splits = passes.present, passes.splits[0]
    mean, _ = passes.gradients(present / jnp.maximum(present.sum(), 1))

    def losses(shared):
        return passes.losses_at(shared, passes.own)

    if samo.compat is None:
        noise = draw_like(key, passes.shared, splits)
        pairs = zip(noise, passes.shared, strict=True)
        tangent = [z.astype(w.dtype) for z, w in pairs]
        _, slopes = jax.jvp(losses, (passes.shared,), (tangent,))

        def exact(row, task):
            del task
            sign = jnp.sign(only(slopes, row))
            return lean(mean, noise, splits, sign, samo.alpha)

        return exact

    def sampled(row, task):
        noise = draw_like(jax.random.fold_in(key, task), passes.shared, splits)
        ahead = losses(shifted(passes.shared, [samo.step * z for z in noise]))
        behind = losses(shifted(passes.shared, [-samo.step * z for z in noise]))
        sign = jnp.sign(only(ahead - behind, row))
        return lean(mean, noise, splits, sign, samo.alpha)

    return sampled


class Engine(NamedTuple):
    """The validated options of :func:`sam_task_grads`."""

    ball: Ball
    zero: bool  # whether the radius is known to be zero while tracing
    perturb: Any  # "local", "global" or Samo
    options: Options

    @property
    def draws(self) -> bool:
        """Whether random directions are sampled."""
        return isinstance(self.perturb, Samo)

    def rows(self, passes: Passes, key: Any, active: Any, *, split: bool) -> Rows:
        """Returns both parts, or the plain gradients if SAM is not active."""

        def plain():
            return plain_rows(passes, split=split)

        def perturbed():
            if self.perturb == "global":
                return global_rows(passes, self.ball, split=split)
            direction = None
            if self.draws:
                direction = samo_direction(passes, key, self.perturb)
            return local_rows(passes, self.ball, split=split, direction=direction)

        if self.zero:
            return plain()
        if active is None:
            return perturbed()
        return jax.lax.cond(jnp.asarray(active, bool), perturbed, plain)


def make_engine(name: str, rho: Any, perturb: Perturb, **options: Any) -> Engine:
    """Validates the options; ``name`` is the public function in error messages."""
    found = make_options(name, **options)
    if found.exchange != "all":
        raise ValueError(
            f"{name}: exchange={found.exchange!r} is only supported by "
            "value_and_balanced_grad. Perturbations are computed from averaged "
            "gradients, so use exchange='all'."
        )
    ball, zero = make_ball(name, rho, found.labels)
    return Engine(ball, zero, make_perturb(name, perturb), found)


def check_key(name: str, engine: Engine, key: Any, how: str) -> None:
    """Raises an error if SAMO has no random key."""
    if engine.draws and key is None:
        raise ValueError(f"{name}: perturb='samo' draws random directions; {how}.")
