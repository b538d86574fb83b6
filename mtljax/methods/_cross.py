"""The Gramian across two batches, for the methods of double sampling."""

import jax.numpy as jnp
from jaxtyping import Scalar

from mtljax.types import Gramian, Mask


def cross_or_own(
    name: str, gramian: Gramian, cross: Gramian | None, mask: Mask
) -> tuple[Gramian, Scalar]:
    """``J₁J₂ᵀ`` where the user gave it, else the batch's own Gramian.

    Rows and columns of absent tasks are zero. The second value says whether the
    matrix was finite; if not, the first is the identity.
    """
    if cross is None:
        return gramian, jnp.ones((), bool)
    cross = jnp.asarray(cross)
    if cross.shape != gramian.shape:
        raise ValueError(
            f"{name}: cross_gramian has shape {cross.shape}; it must be "
            f"{gramian.shape}, as mtljax.stack.cross_gramian(grads1, grads2) gives."
        )
    cross = jnp.where(mask[:, None] & mask[None, :], cross.astype(gramian.dtype), 0)
    finite = jnp.isfinite(cross).all()
    return jnp.where(finite, cross, jnp.eye(len(cross), dtype=cross.dtype)), finite
