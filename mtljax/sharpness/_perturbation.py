"""The ascent step of SAM: how far, in which norm, towards what."""

import dataclasses
import functools
import math
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Scalar

from mtljax import placement
from mtljax.balancer import check_choice, check_number

Norm: TypeAlias = Literal["separate", "joint"]
Compat: TypeAlias = Literal["spsa"]

Leaves: TypeAlias = list[Any]
Splits: TypeAlias = list[placement.Axes]


@dataclasses.dataclass(frozen=True)
class Ball:
    """The ball around the parameters in which the losses are maximised.

    Attributes:
      rho: ρ ≥ 0, radius around the shared parameters: in the units of the parameters,
        or relative to them if adaptive. May be a traced scalar.
      rho_own: Radius for own parameters; None is ``rho``. Needs ``labels``.
      adaptive: ASAM: ``ε = ρ w²⊙g/‖|w|⊙g‖`` over all parameters, biases and
        normalisation included. The reference code of FS-MTL uses it for its
        experiments (ρ = 2 on Multi-MNIST); the paper does not mention it.
      norm: ``"separate"``: one norm over the whole trunk and one over the task's head,
        as in the paper; ``"joint"``: one over both with one radius, as in the
        reference code for Multi-MNIST.
    """

    rho: Any
    rho_own: Any = None
    adaptive: bool = False
    norm: Norm = "separate"

    @property
    def radii(self) -> tuple[Any, Any]:
        """Those of the shared and of the own parameters."""
        return self.rho, self.rho if self.rho_own is None else self.rho_own


@dataclasses.dataclass(frozen=True)
class Samo:
    """Perturbations along ``α g_0 + (1 − α) ĝ_i``, as SAMO has them.

    ``g_0`` is the mean gradient and ``ĝ_i = <∇L_i, z> z`` for normal z, scaled leaf by
    leaf to the length of ``g_0``; heads follow their own loss.

    Attributes:
      alpha: α in [0, 1].
      step: μ, the step of the finite differences of ``compat="spsa"``.
      compat: ``"spsa"``: central differences ``(L_i(θ + μz) − L_i(θ − μz))/2μ`` with a
        z for every task, as the code of SAMO (there in evaluation mode); by default the
        exact derivatives along one z for all tasks, from one forward-mode pass.
    """

    alpha: Any = 0.5
    step: Any = 0.01
    compat: Compat | None = None


Perturb: TypeAlias = Literal["local", "global", "samo"] | Samo


def check_radius(name: str, argument: str, value: Any) -> bool:
    """Raises unless the radius is a finite number that is not negative.

    Returns:
      Whether it is known to be zero; a traced radius is not known.
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
    """The checked ball, and whether it is known to be a point while tracing."""
    ball = rho if isinstance(rho, Ball) else Ball(rho)
    check_choice(name, "norm", ball.norm, Norm)
    zero = check_radius(name, "rho", ball.rho)
    if ball.rho_own is not None:
        zero &= check_radius(name, "rho_own", ball.rho_own)
        if labels is None:
            raise ValueError(
                f"{name}: rho_own={ball.rho_own} perturbs own parameters, but without "
                "labels all are shared; pass labels or leave rho_own out."
            )
        if ball.norm == "joint":
            raise ValueError(
                f"{name}: norm='joint' gives shared and own parameters one radius; "
                f"leave rho_own={ball.rho_own} out or use norm='separate'."
            )
    return ball, zero


def make_perturb(name: str, perturb: Any) -> Any:
    """``"local"``, ``"global"`` or checked options of SAMO."""
    if not isinstance(perturb, Samo):
        check_choice(name, "perturb", perturb, ("local", "global", "samo"))
        return Samo() if perturb == "samo" else perturb
    check_number(name, "alpha of Samo", perturb.alpha, at_least=0, at_most=1)
    check_number(name, "step of Samo", perturb.step, above=0)
    if perturb.compat is not None:
        check_choice(name, "compat", perturb.compat, Compat)
    return perturb


def widen(x: Array) -> Array:
    """At least float32: a perturbation and a difference need the digits."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def length(leaves: Leaves, splits: Splits) -> Scalar:
    """Euclidean norm over all leaves; scaled, so that no square over- or underflows.

    ``splits`` has the mapped axes over which each leaf is split, as a device then holds
    a part of it.
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
    """The point of the ball that the directions lead to, and whether it is another.

    ``ε = ρ u/‖u‖``; adaptive ``ε = ρ w²⊙u/‖|w|⊙u‖``, so that ``‖ε/|w|‖ = ρ``. No
    direction, no step: a zero ``u`` gives a zero ε instead of 0/0.

    Args:
      points: Shared and own leaves.
      directions: Likewise.
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
    """Leaves moved by steps ``[...]``, or by stacks ``[c, ...]`` of them, as they are.

    The sum is taken in float32 and rounded to the dtype of the leaf once.
    """
    return [
        (widen(w) + s).astype(w.dtype) if s.ndim == w.ndim
        else (widen(w)[None] + s).astype(w.dtype)
        for w, s in zip(leaves, steps, strict=True)
    ]  # fmt: skip


def lean(
    mean: Leaves, noise: Leaves, splits: Splits, sign: Scalar, alpha: float
) -> Leaves:
    """SAMO's direction: ``α g_0 + (1 − α) ĝ``, ĝ as long as ``g_0`` in every leaf.

    The one-sample estimate ``ĝ = <∇L_i, z> z`` is rescaled leaf by leaf, so all that
    is left of the directional derivative is its sign.
    """

    def leaf(g, z, axes):
        g, z = widen(g), widen(z)
        size = length([z], [axes])
        unit = z / jnp.where(size == 0, 1, size).astype(z.dtype)
        guess = sign.astype(g.dtype) * length([g], [axes]).astype(g.dtype) * unit
        return alpha * g + (1 - alpha) * guess

    return [leaf(*each) for each in zip(mean, noise, splits, strict=True)]


def draw_like(key: Array, leaves: Leaves, splits: Splits) -> Leaves:
    """Standard normal numbers like the leaves, each from a key of its own."""

    def leaf(i, x, axes):
        own = jax.random.fold_in(key, i)
        if axes:  # every device draws for its part
            own = jax.random.fold_in(own, jax.lax.axis_index(axes))
        return placement.like(jax.random.normal(own, x.shape, widen(x).dtype), x)

    pairs = zip(leaves, splits, strict=True)
    return [leaf(i, x, axes) for i, (x, axes) in enumerate(pairs)]
