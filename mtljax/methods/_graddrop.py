"""GradDrop: samples one gradient sign per coordinate."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from mtljax import stack
from mtljax.balancer import (
    Balancer,
    check_choice,
    check_number,
    factory,
    from_grads,
    rescale,
)
from mtljax.methods._preference import TaskVector, task_vector
from mtljax.types import Number, Scale, Weights


class GradDropState(NamedTuple):
    """State of :func:`graddrop`."""

    key: PRNGKeyArray  # consumed by the next update
    task_weights: Weights  # fraction of the absolute gradient of each task that is kept


def graddrop_factors(
    grads: Float[Array, "tasks ..."], uniform: Float[Array, "..."], leak: Weights
) -> Float[Array, "tasks ..."]:
    """Computes the factor ``leak_i + (1 − leak_i) M_i`` of every gradient entry."""
    total = jnp.abs(grads).sum(0)
    positive = (1 + grads.sum(0) / jnp.where(total > 0, total, 1)) / 2
    up = (uniform < positive)[None]
    kept = jnp.where(up, grads > 0, grads < 0)
    leak = leak.astype(grads.dtype).reshape((-1,) + (1,) * (grads.ndim - 1))
    return leak + (1 - leak) * kept


@factory
def graddrop(
    num_tasks: int,
    *,
    key: PRNGKeyArray,
    leak: Number | TaskVector = 0.0,
    scale: Scale = "native",
) -> Balancer:
    """Gradient sign dropout (GradDrop).

    For each coordinate, one sign is sampled. It is positive with probability
    ``P = ½ (1 + Σ g_i / Σ |g_i|)``. Entries with the other sign are multiplied by
    ``leak_i``, and the entries are summed. With equal leaks, the expected update is the
    sum of the gradients.

    This implementation acts on parameter gradients, with the identity as the function f
    of the paper, as in the FAMO code and TorchJD. The paper and LibMTL apply the mask
    to the gradients of a shared representation, with the sign of the activation. For
    this variant, pass such gradients to ``update``.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      key: Key of ``jax.random``, stored in the state. Each leaf uses a different key.
      leak: Fraction in [0, 1] of a dropped entry that is kept, one number or shape
        ``[T]``. The main form in the paper uses 0, and the SamsungLabs code uses 0.5.
      scale: ``"native"`` and ``"sum"`` sum the remaining entries. ``"mean"`` divides
        the sum by the number of present tasks, as in the CAGrad code.

    Returns:
      A :class:`mtljax.Balancer` that reads the stacked gradients. A step costs T
      backward passes. The state contains the key, and the fraction of the absolute
      gradient of each task that was kept, as its task weights.

    Raises:
      ValueError: If a leak is outside [0, 1], or the number of leaks differs from T.

    Examples:
      >>> import jax, jax.numpy as jnp, mtljax
      >>> balancer = mtljax.graddrop(2, key=jax.random.key(0))
      >>> grads = {"w": jnp.array([[1.0, 2.0], [3.0, 0.0]])}
      >>> balancer.update(grads, balancer.init(grads))[0]["w"].tolist()
      [4.0, 2.0]

    References:
      Chen et al., `Just Pick a Sign: Optimizing Deep Multitask Models with Gradient
      Sign Dropout <https://arxiv.org/abs/2010.06808>`_, 2020.
    """
    check_choice("graddrop", "scale", scale, Scale)
    each = task_vector("graddrop", "leak", num_tasks, leak)
    if isinstance(each, np.ndarray):
        for value in each.tolist():
            check_number("graddrop", "leak", value, at_least=0.0, at_most=1.0)

    def init(params):
        del params
        return GradDropState(key, jnp.ones(num_tasks, jnp.float32))

    def combine(state, grads, *, losses, mask):
        del losses
        next_key, draw = jax.random.split(state.key)
        leaks = jnp.asarray(each, jnp.float32)
        units = jnp.where(mask, rescale(jnp.ones(num_tasks), mask, scale, "sum"), 0)
        leaves, treedef = jax.tree.flatten(grads)
        passed = given = jnp.zeros(num_tasks, jnp.float32)
        combined = []
        for i, leaf in enumerate(leaves):
            wide = leaf.astype(stack.wide_dtype(leaf.dtype))
            uniform = jax.random.uniform(
                jax.random.fold_in(draw, i), wide.shape[1:], wide.dtype
            )
            left = graddrop_factors(wide, uniform, leaks) * wide
            combined.append(left.sum(0) * jnp.max(units).astype(wide.dtype))
            entries = tuple(range(1, leaf.ndim))
            passed += jnp.abs(left).sum(entries)
            given += jnp.abs(wide).sum(entries)
        share = jnp.where(given > 0, passed / jnp.where(given > 0, given, 1), 1)
        weights = (units * share).astype(jnp.float32)
        return jax.tree.unflatten(treedef, combined), GradDropState(next_key, weights)

    return from_grads("graddrop", num_tasks, init=init, combine=combine)
