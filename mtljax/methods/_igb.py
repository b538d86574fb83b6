"""Common parts of IGBv1 and IGBv2: reference losses, gaps and weights."""

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
    """Reference losses of the gaps, and the number of batches of each task."""

    mean: Losses  # mean over the batches of the window until now, finally L_base
    steps: Int[Array, " tasks"]  # batches in which each task was present


class Window(NamedTuple):
    """The batches ``start, …, stop - 1`` whose mean loss is the reference loss.

    If ``given`` is not None, it is the reference loss and the window is not used.
    """

    start: int
    stop: int
    given: Losses | None

    def init(self, num_tasks: int) -> ReferenceLosses:
        """Returns the state before the first batch."""
        steps = jnp.zeros(num_tasks, jnp.int32)
        if self.given is not None:
            return ReferenceLosses(self.given, steps)
        return ReferenceLosses(jnp.zeros(num_tasks, jnp.float32), steps)

    def ready(self, base: ReferenceLosses) -> Mask:
        """Returns the tasks whose window is complete."""
        return base.steps >= (0 if self.given is not None else self.stop)

    def update(
        self, base: ReferenceLosses, losses: Losses, mask: Mask
    ) -> ReferenceLosses:
        """Adds the losses of the present tasks to the mean, inside the window."""
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
    """Checks the arguments of :func:`mtljax.igb_v1` and builds the window."""
    start, stop = window
    if not 0 <= start < stop:
        raise ValueError(
            f"{name}: window=({start}, {stop}) must be a range of steps (start, stop) "
            "with 0 <= start < stop."
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
                f"{name}: base must be positive, not {given.tolist()}. A gap is a loss "
                "divided by base."
            )
        return Window(start, stop, given)
    if num_steps is not None and stop >= num_steps:
        raise ValueError(
            f"{name}: window=({start}, {stop}) does not end inside the run of "
            f"num_steps={num_steps}, so no gap would be measured. Pass a window that "
            "ends before num_steps."
        )
    return Window(start, stop, None)


def gaps(losses: Losses, base: Losses, floors: Any = 0.0) -> Losses:
    """Computes the improvable gaps ``(L_i − ℓ*_i) / (L_base,i − ℓ*_i)``.

    The paper uses ``ℓ* = 0``.
    """
    span = base - floors
    usable = span > 0
    gap = (losses - floors) / jnp.where(usable, span, 1)
    # If the floor is above the reference, the gap is undefined and is set to 1.
    return jnp.where(usable, gap, 1)


def smoothed(old: Losses, losses: Losses, first: Mask, mask: Mask, decay: Number):
    """Updates the exponential moving average of the losses of present tasks."""
    mixed = decay * old + (1 - decay) * losses
    return jnp.where(mask, jnp.where(first, losses, mixed), old)


def effective_weights(log_weights: Weights, losses: Losses) -> Weights:
    """Computes ``λ_i / L_i``, the gradient weights of ``Σ_i λ_i log L_i``."""
    return log_weights / losses


def check_decay(name: str, ema: Number) -> None:
    """Raises if the decay of a moving average is outside [0, 1)."""
    check_number(name, "ema", ema, at_least=0.0, below=1.0)
