"""What IGBv1 and IGBv2 share: reference losses, gaps, weights of the log losses."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from mtljax.balancer import check_number
from mtljax.types import Losses, Mask, Number, Weights

EPOCH = 398  # steps of an epoch in the paper's NYUv2 runs (795 images in batches of 2)


class ReferenceLosses(NamedTuple):
    """The losses that gaps are measured against, and the batches seen so far."""

    mean: Losses  # over the batches of the window so far; then L_base
    steps: Int[Array, " tasks"]  # batches in which each task was present


class Window(NamedTuple):
    """Batches ``start, …, stop - 1`` of a task make its reference loss.

    With ``given`` the window is empty and the reference is that.
    """

    start: int
    stop: int
    given: Losses | None

    def init(self, num_tasks: int) -> ReferenceLosses:
        """Before the first batch."""
        steps = jnp.zeros(num_tasks, jnp.int32)
        if self.given is not None:
            return ReferenceLosses(self.given, steps)
        return ReferenceLosses(jnp.zeros(num_tasks, jnp.float32), steps)

    def ready(self, base: ReferenceLosses) -> Mask:
        """Tasks whose window lies in the past."""
        return base.steps >= (0 if self.given is not None else self.stop)

    def update(
        self, base: ReferenceLosses, losses: Losses, mask: Mask
    ) -> ReferenceLosses:
        """Takes the losses of the present tasks into the mean, inside the window."""
        mean = base.mean
        if self.given is None:
            inside = mask & (base.steps >= self.start) & (base.steps < self.stop)
            seen = jnp.maximum(base.steps - self.start + 1, 1).astype(mean.dtype)
            mean = jnp.where(inside, mean + (losses - mean) / seen, mean)
        return ReferenceLosses(mean, base.steps + mask)


def make_window(
    name: str,
    num_tasks: int,
    window: tuple[int, int],
    base: ArrayLike | None,
    num_steps: int | None,
) -> Window:
    """Checks what the user gave; see :func:`mtljax.igb_v1` for its meaning."""
    start, stop = window
    if not 0 <= start < stop:
        raise ValueError(
            f"{name}: window=({start}, {stop}) must be a range of steps "
            "(start, stop) with 0 <= start < stop."
        )
    if base is not None:
        given = jnp.asarray(base, jnp.float32)
        if given.shape != (num_tasks,):
            raise ValueError(
                f"{name}: base has shape {given.shape}; it must be ({num_tasks},), "
                "one reference loss per task."
            )
        if not isinstance(given, Tracer) and not (jax.device_get(given) > 0).all():
            raise ValueError(
                f"{name}: base must be positive, not {given.tolist()}: gaps are "
                "losses divided by it."
            )
        return Window(start, stop, given)
    if num_steps is not None and stop >= num_steps:
        raise ValueError(
            f"{name}: window=({start}, {stop}) does not end inside the run of "
            f"num_steps={num_steps}, so no gap would ever be measured."
        )
    return Window(start, stop, None)


def gaps(losses: Losses, base: Losses, floors: Any = 0.0) -> Losses:
    """Improvable gaps ``(L_i - ℓ*_i) / (L_base,i - ℓ*_i)``; ``ℓ* = 0`` in the paper."""
    span = base - floors
    usable = span > 0
    gap = (losses - floors) / jnp.where(usable, span, 1)
    # A floor above the reference says nothing about what is left: neutral.
    return jnp.where(usable, gap, 1)


def smoothed(old: Losses, losses: Losses, first: Mask, mask: Mask, decay: Number):
    """Exponential moving average of the losses of the present tasks."""
    mixed = decay * old + (1 - decay) * losses
    return jnp.where(mask, jnp.where(first, losses, mixed), old)


def effective_weights(log_weights: Weights, losses: Losses) -> Weights:
    """``λ_i / L_i``: weights of the raw gradients that descend ``Σ_i λ_i log L_i``."""
    return log_weights / losses


def check_decay(name: str, ema: Number) -> None:
    """Raises unless the decay of a moving average lies in [0, 1)."""
    check_number(name, "ema", ema, at_least=0.0, below=1.0)
