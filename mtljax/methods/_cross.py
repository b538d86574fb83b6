"""The Gramian of two batches, for methods with double sampling."""

import jax.numpy as jnp
from jaxtyping import Scalar

from mtljax.types import Gramian, Mask


def cross_or_own(
    name: str, gramian: Gramian, cross: Gramian | None, mask: Mask
) -> tuple[Gramian, Scalar]:
    """Returns ``J₁J₂ᵀ`` if the user passed it, else the Gramian of the batch.

    Rows and columns of absent tasks are zero. The second value states whether the
    matrix is finite. If it is not, the first value is the identity.
    """
    if cross is None:
        return gramian, jnp.ones((), bool)
    cross = jnp.asarray(cross)
    if cross.shape != gramian.shape:
        raise ValueError(
            f"{name}: cross_gramian has shape {cross.shape}, but shape "
            f"{gramian.shape} is required. Compute it with "
            "mtljax.stack.cross_gramian(grads1, grads2)."
        )
    cross = jnp.where(mask[:, None] & mask[None, :], cross.astype(gramian.dtype), 0)
    finite = jnp.isfinite(cross).all()
    return jnp.where(finite, cross, jnp.eye(len(cross), dtype=cross.dtype)), finite
