"""Vectors ``[T]`` of the user, such as preferences, restricted to a batch."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from mtljax.types import Mask, Weights

TaskVector: TypeAlias = Sequence[Any] | Float[Array, " tasks"] | np.ndarray
# A concrete vector is kept on the host in float64, and cast where it is used.
HostVector: TypeAlias = Float[np.ndarray, " tasks"]


def _as_array(values: Any) -> Array | np.ndarray:
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values)):
        array = jnp.asarray(values)
        return array.astype(jnp.promote_types(array.dtype, jnp.float32))
    return np.asarray(values, np.float64)


def task_vector(
    name: str, argument: str, num_tasks: int, values: Any
) -> Weights | HostVector:
    """``values`` as floats ``[num_tasks]``; a single number stands for all tasks.

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
    """The preference of the construction, None where there is none.

    Raises:
      ValueError: If its shape is not ``[T]``, or a concrete preference has an entry
        that is negative or not finite, or no positive entry.
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
    """The preference of this step over the present tasks, summing to 1.

    Args:
      name: Method on whose behalf it is checked.
      constant: Preference of the construction, None for equal preferences.
      given: Preference of this step, which replaces it; None when there is none.
      mask: Tasks present.
      dtype: Of the result.

    Returns:
      ``[T]``, zero for absent tasks, and zero throughout if none that is present is
      preferred. An entry of ``given`` that is negative or not finite gives NaN, and so
      a step that is not applied.
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
