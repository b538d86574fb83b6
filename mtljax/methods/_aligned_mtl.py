"""Aligned-MTL: sums the nearest orthogonal gradients of equal norm."""

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
    """Computes ``√s V Λ^(-1/2) Vᵀ p`` over the eigenvalues above rounding."""
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

    The method replaces the matrix of task gradients by the nearest matrix with
    orthogonal rows of equal norm (condition number 1), and sums these rows. With the
    eigendecomposition ``G = VΛVᵀ`` of the Gramian the weights are
    ``w = √s V Λ^(-1/2) Vᵀ p``.

    Eigenvalues below ``T · eps`` times the largest are ignored. The update is therefore
    *discontinuous* where an eigenvalue crosses this threshold. While an eigenvalue is
    ignored, ``state.solver.converged`` is False, and the residual is the relative norm
    of the part of p that is lost. If all eigenvalues are ignored, ``w = p``.

    The update may make a task with a small gradient *worse*. ``cone=True`` prevents
    this.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      condition: Eigenvalue s that replaces all others. ``"min"``, as in the paper, is
        the smallest eigenvalue that is not ignored. ``"median"`` is the lower median.
        ``"rmse"`` is the mean, under its name in all codebases.
      preference: Preference p, shape ``[T]``, non-negative. It is normalised to sum to
        the number of present tasks. By default all entries are equal, as in the paper
        and LibMTL. TorchJD uses 1/T, which corresponds to ``scale="mean"``.
        ``update(..., preference=p)`` overrides it.
      cone: Whether to project the update onto the cone of directions in which no task
        gets worse, with one small QP. This is not in the paper.
      scale: ``"native"`` and ``"sum"`` are the sum of the orthogonal gradients of equal
        norm. ``"mean"`` divides it by the number of present tasks.

    Returns:
      A :class:`mtljax.Balancer` that reads the Gramian. A step costs T backward passes.
      The state contains the solver status.

    Raises:
      ValueError: If ``condition`` is unknown, the number of preferences differs from T,
        or a preference is negative.

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
