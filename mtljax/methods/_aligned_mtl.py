"""Aligned-MTL: the nearest gradients that are orthogonal and of one length."""

from typing import Literal, NamedTuple, TypeAlias

import jax.numpy as jnp

from mtljax.balancer import Balancer, check_choice, factory, from_weights
from mtljax.methods._preference import (
    TaskVector,
    constant_preference,
    present_preference,
)
from mtljax.solvers import SolverStatus, project_cone, unsolved
from mtljax.types import Gramian, Mask, Scale, Weights

Condition: TypeAlias = Literal["min", "median", "rmse"]


class AlignedMTLState(NamedTuple):
    """State of :func:`aligned_mtl`."""

    solver: SolverStatus
    task_weights: Weights


def aligned_mtl_weights(
    gramian: Gramian,
    preference: Weights,
    condition: Condition = "min",
    mask: Mask | None = None,
) -> tuple[Weights, SolverStatus]:
    """``√s V Λ^(-1/2) Vᵀ p`` over the eigenvalues that are not rounding."""
    num = gramian.shape[0]
    mask = jnp.ones(num, bool) if mask is None else mask
    count = mask.sum()
    preference = jnp.where(mask, preference, 0)
    largest = jnp.max(jnp.diagonal(gramian), where=mask, initial=0)
    gramian = gramian / jnp.where(largest > 0, largest, 1)
    values, vectors = jnp.linalg.eigh(gramian)  # ascending
    kept = values > values[-1] * count * jnp.finfo(gramian.dtype).eps
    rank = kept.sum()
    first = jnp.minimum(num - rank, num - 1)
    if condition == "rmse":
        size = jnp.where(kept, values, 0).sum() / jnp.maximum(rank, 1)
    else:
        step = (rank - 1) // 2 if condition == "median" else 0
        size = values[jnp.minimum(first + step, num - 1)]
    ratio = jnp.where(kept, size / jnp.where(kept, values, 1), 0)
    coefficients = jnp.matmul(vectors.T, preference, precision="highest")
    weights = jnp.matmul(vectors, jnp.sqrt(ratio) * coefficients, precision="highest")
    weights = jnp.where(rank > 0, weights, preference)
    lost = jnp.linalg.norm(jnp.where(kept, 0, coefficients))
    length = jnp.linalg.norm(preference)
    status = SolverStatus(
        lost / jnp.where(length > 0, length, 1), jnp.int32(1), rank == count
    )
    return weights, status


@factory
def aligned_mtl(
    num_tasks: int,
    *,
    condition: Condition = "min",
    preference: TaskVector | None = None,
    cone: bool = False,
    scale: Scale = "native",
) -> Balancer:
    """Independent component alignment (Aligned-MTL).

    The gradient matrix is replaced by the nearest one whose rows are orthogonal and of
    equal length (condition number 1), which are then summed: with ``G = VΛVᵀ`` the
    weights are ``w = √s V Λ^(-1/2) Vᵀ p``.

    Two warnings. Eigenvalues below ``T · eps`` of the largest are dropped, so the
    update *jumps* when one crosses that line; ``state.solver.converged`` is False while
    any is dropped, its residual the share of p that went with them. With all of them
    dropped, ``w = p``. And the update may make tasks of short gradient *worse*;
    ``cone=True`` prevents that.

    Args:
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      condition: Eigenvalue s that all others are replaced by: the smallest one kept
        (``"min"``, the paper's), the lower ``"median"``, or the mean of all (named
        ``"rmse"`` in every codebase).
      preference: p ``[T]``, not negative, normalised to sum to the number of present
        tasks: all ones by default (paper, LibMTL). TorchJD's is 1/T, which is
        ``scale="mean"``. ``update(..., preference=p)`` overrides it.
      cone: Projects the update on the cone of directions in which no task gets worse
        (one small QP). Ours, not the paper's; off.
      scale: ``"native"`` and ``"sum"``: the sum of gradients that are orthogonal and of
        equal length; ``"mean"`` divides by the number of present tasks.

    Returns:
      A balancer; needs the Gramian: T backward passes. State: the certificate.

    Raises:
      ValueError: If ``condition`` is unknown, or the preference has another length than
        T or a negative entry.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.aligned_mtl(2, scale="mean")
      >>> grads = {"w": jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])}
      >>> update, state = balancer.update(grads, balancer.init(grads))
      >>> update["w"].tolist()
      [0.2133, 0.9673, 0.9673]

    References:
      Senushkin et al., `Independent Component Alignment for Multi-Task Learning
      <https://arxiv.org/abs/2305.19000>`_, 2023.
    """
    check_choice("aligned_mtl", "condition", condition, Condition)
    constant = constant_preference("aligned_mtl", num_tasks, preference)

    def init():
        return AlignedMTLState(unsolved(), jnp.ones(num_tasks, jnp.float32))

    def weigh(state, *, losses, gramian, mask, preference):
        del losses
        dtype = gramian.dtype
        chosen = present_preference("aligned_mtl", constant, preference, mask, dtype)
        chosen = chosen * mask.sum()
        weights, status = aligned_mtl_weights(gramian, chosen, condition, mask)
        if cone:
            weights, projected = project_cone(gramian, weights, mask)
            status = SolverStatus(
                jnp.maximum(status.residual, projected.residual),
                projected.iterations,
                status.converged & projected.converged,
            )
        return weights, state._replace(solver=status)

    return from_weights(
        "aligned_mtl",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="gramian",
        native="sum",
        scale=scale,
        side_inputs=("preference",),
    )
