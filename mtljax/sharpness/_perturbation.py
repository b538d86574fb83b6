"""The ascent step of SAM: how far, in which norm, towards what."""

import functools
import math
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Scalar

from mtljax.balancer import check_choice

Norm: TypeAlias = Literal["separate", "joint"]
Perturb: TypeAlias = Literal["local", "global", "samo"]
Compat: TypeAlias = Literal["spsa"]

Leaves: TypeAlias = list[Any]


class Radius(NamedTuple):
    """A ball around the weights: what every function of this room is told."""

    rho: Any
    rho_own: Any
    adaptive: bool
    norm: Norm
    zero: bool  # known to be the point itself while tracing


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


def make_radius(
    name: str,
    rho: Any,
    rho_own: Any,
    *,
    adaptive: bool,
    norm: Norm,
    labels: Any,
) -> Radius:
    """The checked ball of the arguments that users write."""
    check_choice(name, "norm", norm, Norm)
    zero = check_radius(name, "rho", rho)
    if rho_own is not None:
        zero &= check_radius(name, "rho_own", rho_own)
        if labels is None:
            raise ValueError(
                f"{name}: rho_own={rho_own} perturbs own parameters, but without "
                "labels all are shared; pass labels or leave rho_own out."
            )
        if norm == "joint":
            raise ValueError(
                f"{name}: norm='joint' gives shared and own parameters one radius; "
                f"leave rho_own={rho_own} out or use norm='separate'."
            )
    return Radius(rho, rho if rho_own is None else rho_own, adaptive, norm, zero)


def widen(x: Array) -> Array:
    """At least float32: a perturbation and a difference need the digits."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def length(leaves: Leaves) -> Scalar:
    """Euclidean norm over all leaves; scaled, so that no square over- or underflows."""
    if not leaves:
        return jnp.zeros((), jnp.float32)
    top = functools.reduce(
        jnp.maximum, [jnp.max(jnp.abs(x), initial=0.0) for x in leaves]
    )
    unit = jnp.where(top > 0, top, 1)
    return top * jnp.sqrt(sum(jnp.square(x / unit).sum() for x in leaves))


def ascend(
    shared: Leaves,
    own: Leaves,
    directions: tuple[Leaves, Leaves],
    radius: Radius,
) -> tuple[Leaves, Leaves, Scalar]:
    """The point of the ball that the directions lead to, and whether it is another.

    ``ε = ρ u/‖u‖``; adaptive ``ε = ρ w²⊙u/‖|w|⊙u‖``, so that ``‖ε/|w|‖ = ρ``. No
    direction, no step: a zero ``u`` gives a zero ε instead of 0/0.

    Returns:
      Perturbations of shared and of own leaves, at least float32, and a flag.
    """

    def scaled(u, w):
        return widen(u) * jnp.abs(widen(w)) if radius.adaptive else widen(u)

    parts = [
        [scaled(u, w) for u, w in zip(us, ws, strict=True)]
        for us, ws in zip(directions, (shared, own), strict=True)
    ]
    lengths = [length(part) for part in parts]
    if radius.norm == "joint":
        lengths = [length(parts[0] + parts[1])] * 2
    steps, moved = [], jnp.zeros((), bool)
    radii = (radius.rho, radius.rho_own)
    for part, ws, size, rho in zip(parts, (shared, own), lengths, radii, strict=True):
        safe = jnp.where(size == 0, 1, size)
        unit = [a / safe.astype(a.dtype) for a in part]
        if radius.adaptive:
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


def lean(mean: Leaves, noise: Leaves, sign: Scalar, alpha: float) -> Leaves:
    """SAMO's direction: ``α g_0 + (1 − α) ĝ``, ĝ as long as ``g_0`` in every leaf.

    The one-sample estimate ``ĝ = <∇L_i, z> z`` is rescaled leaf by leaf, so all that
    is left of the directional derivative is its sign.
    """

    def leaf(g, z):
        g, z = widen(g), widen(z)
        size = length([z])
        unit = z / jnp.where(size == 0, 1, size).astype(z.dtype)
        guess = sign.astype(g.dtype) * length([g]).astype(g.dtype) * unit
        return alpha * g + (1 - alpha) * guess

    return [leaf(g, z) for g, z in zip(mean, noise, strict=True)]


def draw_like(key: Array, leaves: Leaves) -> Leaves:
    """Standard normal numbers in the shapes of the leaves, each from its own key."""
    return [
        jax.random.normal(jax.random.fold_in(key, i), x.shape, widen(x).dtype)
        for i, x in enumerate(leaves)
    ]
