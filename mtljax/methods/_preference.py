"""What the user prefers: vectors ``[T]``, checked once, restricted to a batch."""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

from mtljax.types import Mask, Weights

TaskVector: TypeAlias = Sequence[float] | Float[Array, " tasks"]


def task_vector(name: str, argument: str, num_tasks: int, values: Any) -> Weights:
    """``values`` as float32 ``[num_tasks]``; a single number stands for all tasks.

    Raises:
      ValueError: If there is another number of entries.
    """
    array = jnp.asarray(values, jnp.float32)
    if array.shape not in ((), (num_tasks,)):
        raise ValueError(
            f"{name}: {argument} has shape {array.shape}; it must be ({num_tasks},), "
            "one number per task."
        )
    return jnp.broadcast_to(array, (num_tasks,))


def as_preference(name: str, num_tasks: int, preference: Any) -> Weights:
    """A preference as ``[num_tasks]``; concrete ones are checked for their signs.

    Raises:
      ValueError: If its shape is another, or an entry is negative or not finite, or
        all are zero.
    """
    array = jnp.asarray(preference, jnp.float32)
    if array.shape != (num_tasks,):
        raise ValueError(
            f"{name}: preference has shape {array.shape}; it must be ({num_tasks},), "
            "one number per task."
        )
    if not isinstance(array, Tracer):
        host = jax.device_get(array).tolist()
        if not (all(math.isfinite(x) and x >= 0 for x in host) and any(host)):
            raise ValueError(
                f"{name}: preference must be finite, not negative and not all zero, "
                f"not {host}."
            )
    return array


def constant_preference(name: str, num_tasks: int, preference: Any) -> Weights | None:
    """The preference of the construction, None where there is none.

    Raises:
      ValueError: As :func:`as_preference`.
    """
    return None if preference is None else as_preference(name, num_tasks, preference)


def present_preference(
    name: str, constant: Weights | None, given: Any, mask: Mask
) -> Weights:
    """The preference of this step over the present tasks, summing to 1.

    Args:
      name: Method on whose behalf it is checked.
      constant: Preference of the construction, None for equal preferences.
      given: Preference of this step, which replaces it; None when there is none.
      mask: Tasks present.

    Returns:
      ``[T]``, zero for absent tasks, and zero throughout if none that is present is
      preferred.
    """
    chosen = constant if given is None else as_preference(name, mask.shape[0], given)
    chosen = mask.astype(jnp.float32) if chosen is None else jnp.where(mask, chosen, 0)
    total = chosen.sum()
    return chosen / jnp.where(total == 0, 1, total)
