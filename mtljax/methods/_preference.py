"""Vectors ``[T]`` of the user, such as preferences, for the present tasks."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from mtljax import stack
from mtljax.types import Mask, Weights

TaskVector: TypeAlias = Sequence[Any] | Float[Array, " tasks"] | np.ndarray
# A concrete vector is stored on the host in float64 and cast at use.
HostVector: TypeAlias = Float[np.ndarray, " tasks"]


def _as_array(values: Any) -> Array | np.ndarray:
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values)):
        array = jnp.asarray(values)
        return array.astype(stack.wide_dtype(array.dtype))
    return np.asarray(values, np.float64)


def task_vector(
    name: str, argument: str, num_tasks: int, values: Any
) -> Weights | HostVector:
    """Returns ``values`` as floats ``[num_tasks]``. One number applies to all tasks.

    Raises:
      ValueError: If the number of entries is not T.
    """
    array = _as_array(values)
    if array.shape not in ((), (num_tasks,)):
        raise ValueError(
            f"{name}: {argument} has shape {array.shape}; it must be ({num_tasks},), "
            "one number per task."
        )
    if isinstance(array, np.ndarray):
        return np.broadcast_to(array, (num_tasks,)).copy()
    return jnp.broadcast_to(array, (num_tasks,))


def constant_preference(
    name: str, num_tasks: int, preference: Any
) -> Weights | HostVector | None:
    """Returns the preference that was passed to the factory, or None.

    Raises:
      ValueError: If its shape is not ``[T]``, or a concrete preference has a negative
        or non-finite entry or no positive entry.
    """
    if preference is None:
        return None
    array = _as_array(preference)
    _check_shape(name, num_tasks, array)
    if isinstance(array, np.ndarray) and not (
        (np.isfinite(array) & (array >= 0)).all() and array.any()
    ):
        raise ValueError(
            f"{name}: preference must be finite, not negative and not all zero, "
            f"not {array.tolist()}."
        )
    return array


def _check_shape(name: str, num_tasks: int, array: Any) -> None:
    if array.shape != (num_tasks,):
        raise ValueError(
            f"{name}: preference has shape {array.shape}; it must be ({num_tasks},), "
            "one number per task."
        )


def present_preference(
    name: str,
    constant: Weights | HostVector | None,
    given: Any,
    mask: Mask,
    dtype: Any,
) -> Weights:
    """Returns the preference of this step, normalised over the present tasks.

    Args:
      name: Name of the method, for the error message.
      constant: Preference that was passed to the factory. None means equal preferences.
      given: Preference of this step, which overrides ``constant``. None if not given.
      mask: Present tasks, shape ``[T]``.
      dtype: Dtype of the result.

    Returns:
      The preference of shape ``[T]``, which sums to 1 and is zero for absent tasks. It
      is zero if the preferences of all present tasks are zero. A negative or non-finite
      entry of ``given`` becomes NaN, so that the step is not applied.
    """
    if given is not None:
        chosen = jnp.asarray(given).astype(dtype)
        _check_shape(name, mask.shape[0], chosen)
        chosen = jnp.where(chosen >= 0, chosen, jnp.nan)
    elif constant is not None:
        chosen = jnp.asarray(constant).astype(dtype)
    else:
        chosen = jnp.ones(mask.shape, dtype)
    chosen = jnp.where(mask, chosen, 0)
    total = chosen.sum()
    return chosen / jnp.where(total == 0, 1, total)
