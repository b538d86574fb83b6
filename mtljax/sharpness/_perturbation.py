"""The ascent step of SAM: radius, norm and direction of a perturbation."""

import dataclasses
import functools
import math
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Scalar

from mtljax import placement, stack
from mtljax.balancer import check_choice, check_number

Norm: TypeAlias = Literal["separate", "joint"]
Compat: TypeAlias = Literal["spsa"]

Leaves: TypeAlias = list[Any]
Splits: TypeAlias = list[placement.Axes]


@dataclasses.dataclass(frozen=True)
class Ball:
    """The ball around the parameters in which the losses are maximised.

    Attributes:
      rho: ρ ≥ 0, radius around the shared parameters. It is in the units of the
        parameters, or relative to them if ``adaptive`` is True. May be a traced scalar.
      rho_own: Radius around the own parameters. None means ``rho``. Requires
        ``labels``.
      adaptive: Whether to use ASAM, ``ε = ρ w²⊙g/‖|w|⊙g‖``. It covers all parameters,
        including biases and normalisation. The reference code of FS-MTL uses it for
        its experiments (ρ = 2 on Multi-MNIST), but the paper does not mention it.
      norm: ``"separate"`` uses one norm over the trunk and one over the head of the
        task, as in the paper. ``"joint"`` uses one norm over both with one radius, as
        in the reference code for Multi-MNIST.
    """

    rho: Any
    rho_own: Any = None
    adaptive: bool = False
    norm: Norm = "separate"

    @property
    def radii(self) -> tuple[Any, Any]:
        """Radii around the shared and the own parameters."""
        return self.rho, self.rho if self.rho_own is None else self.rho_own


@dataclasses.dataclass(frozen=True)
class Samo:
    """Perturbations along ``α g_0 + (1 − α) ĝ_i`` (SAMO).

    ``g_0`` is the mean gradient and ``ĝ_i = <∇L_i, z> z`` with a standard normal z.
    Each leaf of ``ĝ_i`` is scaled to the norm of the same leaf of ``g_0``. Heads follow
    their own loss.

    Attributes:
      alpha: α in [0, 1].
      step: μ, the step of the finite differences of ``compat="spsa"``.
      compat: ``"spsa"`` uses central differences ``(L_i(θ + μz) − L_i(θ − μz))/2μ``
        and one z per task, as in the code of SAMO (there in evaluation mode). By
        default, one forward-mode pass computes the exact derivatives along one z for
        all tasks.
    """

    alpha: Any = 0.5
    step: Any = 0.01
    compat: Compat | None = None


Perturb: TypeAlias = Literal["local", "global", "samo"] | Samo


def check_radius(name: str, argument: str, value: Any) -> bool:
    """Raises an error unless the radius is a finite number that is not negative.

    Returns:
      Whether the radius is known to be zero. A traced radius is not known.
    """
    if isinstance(value, Tracer):
        if value.ndim:
            raise ValueError(f"{name}: {argument} must be a scalar, not {value.shape}.")
        return False
    try:
        number = math.nan if isinstance(value, str) else float(jax.device_get(value))
    except (TypeError, ValueError):
        raise ValueError(
            f"{name}: {argument} must be a finite number >= 0, not {value!r}."
        ) from None
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(
            f"{name}: {argument} must be a finite number >= 0, not {number}."
        )
    return number == 0


def make_ball(name: str, rho: Any, labels: Any) -> tuple[Ball, bool]:
    """Returns the validated ball, and whether its radius is known to be zero."""
    ball = rho if isinstance(rho, Ball) else Ball(rho)
    check_choice(name, "norm", ball.norm, Norm)
    zero = check_radius(name, "rho", ball.rho)
    if ball.rho_own is not None:
        zero &= check_radius(name, "rho_own", ball.rho_own)
        if labels is None:
            raise ValueError(
                f"{name}: rho_own={ball.rho_own} perturbs own parameters, but without "
                "labels all parameters are shared; pass labels or leave rho_own out."
            )
        if ball.norm == "joint":
            raise ValueError(
                f"{name}: norm='joint' gives shared and own parameters one radius; "
                f"leave rho_own={ball.rho_own} out or use norm='separate'."
            )
    return ball, zero


def make_perturb(name: str, perturb: Any) -> Any:
    """Returns ``"local"``, ``"global"`` or the validated options of SAMO."""
    if not isinstance(perturb, Samo):
        check_choice(name, "perturb", perturb, ("local", "global", "samo"))
        return Samo() if perturb == "samo" else perturb
    check_number(name, "alpha of Samo", perturb.alpha, at_least=0, at_most=1)
    check_number(name, "step of Samo", perturb.step, above=0)
    if perturb.compat is not None:
        check_choice(name, "compat", perturb.compat, Compat)
    return perturb


def widen(x: Array) -> Array:
    """Converts to at least float32, because small differences need the precision."""
    return x.astype(stack.wide_dtype(x.dtype))


def length(leaves: Leaves, splits: Splits) -> Scalar:
    """Returns the norm over all leaves, scaled so that no square over- or underflows.

    ``splits`` contains, for each leaf, the mapped axes over which the leaf is split. A
    device then stores a part of the leaf only.
    """
    if not leaves:
        return jnp.zeros((), jnp.float32)
    pairs = list(zip(leaves, splits, strict=True))
    top = functools.reduce(
        jnp.maximum,
        [placement.largest(jnp.max(jnp.abs(x), initial=0.0), a) for x, a in pairs],
    )
    unit = jnp.where(top > 0, top, 1)
    squares = [placement.total(jnp.square(x / unit).sum(), a) for x, a in pairs]
    return top * jnp.sqrt(sum(squares))


def ascend(
    points: tuple[Leaves, Leaves],
    directions: tuple[Leaves, Leaves],
    ball: Ball,
    splits: tuple[Splits, Splits],
) -> tuple[Leaves, Leaves, Scalar]:
    """Computes the perturbation along the directions, and whether it is nonzero.

    ``ε = ρ u/‖u‖``, or ``ε = ρ w²⊙u/‖|w|⊙u‖`` if adaptive, so that ``‖ε/|w|‖ = ρ``.
    A zero ``u`` gives a zero ε.

    Args:
      points: Shared and own leaves.
      directions: The directions u with the same structure.
      ball: The ball.
      splits: See :func:`length`.

    Returns:
      Perturbations of shared and of own leaves, at least float32, and a flag.
    """

    def scaled(u, w):
        return widen(u) * jnp.abs(widen(w)) if ball.adaptive else widen(u)

    parts = [
        [scaled(u, w) for u, w in zip(us, ws, strict=True)]
        for us, ws in zip(directions, points, strict=True)
    ]
    if ball.norm == "joint":
        lengths = [length(parts[0] + parts[1], splits[0] + splits[1])] * 2
    else:
        lengths = [length(part, axes) for part, axes in zip(parts, splits, strict=True)]
    steps, moved = [], jnp.zeros((), bool)
    for part, ws, size, rho in zip(parts, points, lengths, ball.radii, strict=True):
        safe = jnp.where(size == 0, 1, size)
        unit = [a / safe.astype(a.dtype) for a in part]
        if ball.adaptive:
            unit = [a * jnp.abs(widen(w)) for a, w in zip(unit, ws, strict=True)]
        steps.append([jnp.asarray(rho).astype(a.dtype) * a for a in unit])
        if ws:
            moved |= (size != 0) & (jnp.asarray(rho) != 0)
    return steps[0], steps[1], moved


def shifted(leaves: Leaves, steps: Leaves) -> Leaves:
    """Adds perturbations ``[...]``, or stacked perturbations ``[c, ...]``, to leaves.

    The sum is computed in float32 and rounded once to the dtype of the leaf.
    """
    return [
        (widen(w) + s).astype(w.dtype) if s.ndim == w.ndim
        else (widen(w)[None] + s).astype(w.dtype)
        for w, s in zip(leaves, steps, strict=True)
    ]  # fmt: skip


def lean(
    mean: Leaves, noise: Leaves, splits: Splits, sign: Scalar, alpha: float
) -> Leaves:
    """Returns ``α g_0 + (1 − α) ĝ``, where ĝ has the norm of ``g_0`` in every leaf.

    The one-sample estimate ``ĝ = <∇L_i, z> z`` is rescaled leaf by leaf. Therefore
    only the sign of the directional derivative remains.
    """

    def leaf(g, z, axes):
        g, z = widen(g), widen(z)
        size = length([z], [axes])
        unit = z / jnp.where(size == 0, 1, size).astype(z.dtype)
        guess = sign.astype(g.dtype) * length([g], [axes]).astype(g.dtype) * unit
        return alpha * g + (1 - alpha) * guess

    return [leaf(*each) for each in zip(mean, noise, splits, strict=True)]


def draw_like(key: Array, leaves: Leaves, splits: Splits) -> Leaves:
    """Samples standard normal numbers for the leaves, with one key per leaf."""

    def leaf(i, x, axes):
        own = jax.random.fold_in(key, i)
        if axes:  # every device samples its own part
            own = jax.random.fold_in(own, jax.lax.axis_index(axes))
        return placement.like(jax.random.normal(own, x.shape, widen(x).dtype), x)

    pairs = zip(leaves, splits, strict=True)
    return [leaf(i, x, axes) for i, (x, axes) in enumerate(pairs)]
