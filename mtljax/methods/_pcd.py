"""PCD: the main gradient with constraints on the gains of other tasks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from mtljax.balancer import Balancer, check_number, factory, from_weights
from mtljax.methods._main_task import check_main
from mtljax.methods._preference import TaskVector, task_vector
from mtljax.solvers import SolverStatus, nonnegative_qp, unsolved
from mtljax.types import Gramian, Mask, Number, Scale, Weights


class PCDState(NamedTuple):
    """State of :func:`pcd`."""

    squares: Weights  # v: moving average of the squared norms, from zero
    steps: Int[Array, " tasks"]  # batches in which each task was present
    solver: SolverStatus
    task_weights: Weights


def pcd_weights(
    gramian: Gramian,
    scales: Weights,
    main: int,
    tau: Weights,
    mask: Mask | None = None,
) -> tuple[Weights, SolverStatus]:
    """Computes the weights of ``d̃ ‖g_m‖/‖d̃‖`` for the projection d̃ of ``g̃_m``.

    ``d̃ = argmin ½‖d − g̃_m‖²`` subject to ``<g̃_j, d> ≥ τ_j ‖g̃_j‖²`` for all other
    tasks, with ``g̃_i = s_i g_i``. If no d satisfies the constraints, ``d̃ = g̃_m``.
    """
    num, dtype = gramian.shape[0], gramian.dtype
    eps = jnp.finfo(dtype).eps
    mask = jnp.ones(num, bool) if mask is None else mask
    tasks = jnp.arange(num)
    scaled = gramian * scales[:, None] * scales[None, :]
    # The tolerance below is absolute, so scale the largest entry to one.
    size = jnp.max(jnp.abs(jnp.diagonal(scaled)), initial=0)
    scaled = scaled / jnp.where(size > 0, size, 1)
    squares = jnp.diagonal(scaled)
    others = mask & (tasks != main) & (squares > 0)
    wanted = tau * squares
    solution = nonnegative_qp(scaled, scaled[main] - wanted, mask=others)
    first = (tasks == main).astype(dtype)
    weights = first + jnp.where(others, solution.x, 0)
    slope = jnp.matmul(scaled, weights, precision="highest")
    short = jnp.where(others, wanted - slope, -jnp.inf)
    # If the constraints are infeasible, the dual problem is unbounded.
    tolerance = jnp.maximum(1e-6, 8 * eps) if dtype == jnp.float32 else 1e-9
    unmet = jnp.max(short, initial=-jnp.inf) > tolerance
    feasible = ~unmet & jnp.isfinite(weights).all()
    weights = jnp.where(feasible, weights, first)
    slope = jnp.where(feasible, slope, scaled[main])
    square = jnp.maximum(weights @ slope, 0)  # ‖d̃‖²
    terms = jnp.abs(weights) @ jnp.matmul(jnp.abs(scaled), jnp.abs(weights))
    nothing = square <= 8 * num * eps * terms
    length = jnp.sqrt(jnp.maximum(gramian[main, main], 0))
    unit = jnp.sqrt(jnp.where(nothing, 1, square) * jnp.where(size > 0, size, 1))
    weights = jnp.where(nothing, 0, weights * scales * (length / unit))
    status = solution.status
    return weights, status._replace(converged=status.converged & feasible)


@factory
def pcd(
    num_tasks: int,
    *,
    main: int = 0,
    tau: Number | TaskVector = 0.02,
    decay: Number = 0.999,
    eps: Number = 1e-8,
    scale: Scale = "native",
) -> Balancer:
    """Priority-constrained descent (PCD).

    The gradients are scaled to a norm of about 1, ``g̃_i = g_i/√(v̂_i + ε)``, where
    ``v̂_i`` is the bias-corrected moving average of ``‖g_i‖²``. The direction is the
    vector d nearest to the scaled main gradient ``g̃_m`` that satisfies
    ``<g̃_j, d> ≥ τ_j ‖g̃_j‖²`` for all other tasks j. The update has the norm of
    ``g_m``.

    If the constraints are infeasible, which is possible for T ≥ 3, the update is
    ``g_m`` and ``state.solver.converged`` is False, as in TorchJD. If ``g_m`` or the
    direction is zero, or if the main task is absent, the update is zero. A task with a
    zero gradient has no constraint.

    ε is added to a squared norm, so the scaling has no effect on gradients with a norm
    far below 1e-4. With the default decay, the average has a time constant of 1000
    steps. Use a smaller decay if the norms change faster.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      main: Index m of the main task.
      tau: Constraint level τ ≥ 0, one number or shape ``[T]``. The entry of the main
        task is not used. The defaults of ``tau``, ``decay`` and ``eps`` are those of
        TorchJD.
      decay: Decay β of the moving average, in [0, 1).
      eps: Constant ε > 0.
      scale: ``"native"`` is the norm of the main gradient. ``"sum"`` normalises the
        weights to sum to the number of present tasks, and ``"mean"`` to 1.

    Returns:
      A :class:`mtljax.Balancer` that reads the Gramian. A step costs T backward passes
      and one small QP. The state has 2 T numbers and the solver status.

    Raises:
      ValueError: If ``main`` is not the index of a task, or ``tau``, ``decay`` or
        ``eps`` is out of its range.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.pcd(2, tau=0.5)
      >>> grads = {"w": jnp.array([[3.0, 0.0], [-4.0, 4.0]])}
      >>> update, state = balancer.update(grads, balancer.init(grads))
      >>> update["w"].tolist()
      [0.507, 2.957]

    References:
      Priority-Constrained Descent, `arXiv 2606.29521
      <https://arxiv.org/abs/2606.29521>`_, 2026.
    """
    check_main("pcd", num_tasks, main)
    check_number("pcd", "decay", decay, at_least=0.0, below=1.0)
    check_number("pcd", "eps", eps, above=0.0)
    shares = task_vector("pcd", "tau", num_tasks, tau)
    if isinstance(shares, np.ndarray):
        for value in shares.tolist():
            check_number("pcd", "tau", value, at_least=0.0)

    def init():
        return PCDState(
            jnp.zeros(num_tasks, jnp.float32),
            jnp.zeros(num_tasks, jnp.int32),
            unsolved(),
            jnp.ones(num_tasks, jnp.float32),
        )

    def weigh(state, *, losses, gramian, mask):
        del losses
        dtype = gramian.dtype
        moved = decay * state.squares + (1 - decay) * jnp.diagonal(gramian)
        squares = jnp.where(mask, moved, state.squares)
        steps = state.steps + mask
        share = 1 - jnp.asarray(decay, dtype) ** jnp.maximum(steps, 1).astype(dtype)
        scales = jax.lax.rsqrt(squares.astype(dtype) / share + eps)
        tau = jnp.asarray(shares).astype(dtype)
        weights, status = pcd_weights(gramian, scales, main, tau, mask)
        weights = jnp.where(mask[main], weights, 0)
        return weights, PCDState(squares, steps, status, weights)

    return from_weights(
        "pcd",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="gramian",
        native="free",
        scale=scale,
    )
