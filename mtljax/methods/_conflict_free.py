"""ConFIG: a direction at the same angle to every task gradient."""

from typing import Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Scalar

from mtljax.balancer import Balancer, check_choice, check_num_tasks, from_weights
from mtljax.methods._preference import (
    TaskVector,
    constant_preference,
    present_preference,
)
from mtljax.solvers import SolverStatus, pinv_solve, unsolved
from mtljax.types import Gramian, Mask, Scale, Weights

Length: TypeAlias = Literal["projection", "min", "max", "mean", "harmonic", "geometric"]


class ConflictFreeState(NamedTuple):
    """State of :func:`conflict_free`."""

    solver: SolverStatus
    task_weights: Weights


def _length(norms: Weights, shares: Weights, active: Mask, length: Length) -> Scalar:
    """‖d‖ from ``‖g_i‖`` and the cosines of the direction with the gradients."""
    count = jnp.maximum(active.sum(), 1).astype(norms.dtype)

    def total(x):
        return jnp.where(active, x, 0).sum()

    match length:
        case "projection":
            return total(norms * shares)
        case "min":
            return jnp.min(norms, where=active, initial=jnp.inf)
        case "max":
            return jnp.max(norms, where=active, initial=0)
        case "mean":
            return total(norms) / count
        case "harmonic":
            return count / jnp.maximum(total(1 / norms), jnp.finfo(norms.dtype).tiny)
        case "geometric":
            return jnp.exp(total(jnp.log(norms)) / count)


def conflict_free_weights(
    gramian: Gramian,
    preference: Weights,
    length: Length = "projection",
    mask: Mask | None = None,
) -> tuple[Weights, SolverStatus]:
    """Weights of the direction ``U⁺p``, U the unit gradients, at the given length."""
    num = gramian.shape[0]
    eps, tiny = jnp.finfo(gramian.dtype).eps, jnp.finfo(gramian.dtype).tiny
    mask = jnp.ones(num, bool) if mask is None else mask
    norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))
    active = mask & (norms > tiny)
    norms = jnp.where(active, norms, 1)
    cosines = gramian / norms[:, None] / norms[None, :]
    target = jnp.where(active, preference, 0)
    # Only the direction of p matters.
    target = target / jnp.maximum(jnp.max(target, initial=0), tiny)
    solution, outside = pinv_solve(cosines, target)
    slope = jnp.matmul(cosines, solution, precision="highest")
    square = jnp.maximum(solution @ slope, 0)  # ‖U⁺p‖²
    degenerate = (square <= 8 * num * eps) | ~active.any()
    root = jnp.sqrt(jnp.where(degenerate, 1, square))
    reach = _length(norms, slope / root, active, length)
    reach = jnp.where(degenerate, 0, reach)
    weights = jnp.where(active, solution / norms * (reach / root), 0)
    status = SolverStatus(outside, jnp.int32(1), ~degenerate & (outside < 1e-2))
    return weights, status


def conflict_free(
    num_tasks: int,
    *,
    length: Length = "projection",
    preference: TaskVector | None = None,
    scale: Scale = "native",
) -> Balancer:
    """Conflict-free inverse gradients (ConFIG).

    With U the matrix of unit gradients and ``x = U⁺1``, whose cosine with every
    gradient is the same, the update is ``(Σ_i <g_i, x̂>) x̂``: the projection of the sum
    of gradients on that direction. No task conflicts with it as long as the gradients
    are linearly independent, and scaling a loss changes its length only.

    Where they are dependent the pseudo-inverse gives the best fit, which may hurt a
    task; ``state.solver.converged`` is then False, with the share of the equations that
    cannot be met as residual. Where nothing is left of x (gradients that cancel) the
    declared fallback is no update at all. A task with zero gradient takes no part, nor
    does it count in the lengths.

    Args:
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      length: ‖d‖: the sum of the ``"projection"`` of all gradients (the paper's), or
        the ``"min"``, ``"max"``, ``"mean"`` (arithmetic), ``"harmonic"`` or
        ``"geometric"`` mean of the lengths of the gradients, as in the authors' code.
      preference: p ``[T]``, not negative: the cosines are to each other as p (with
        ``x = U⁺p``), equal by default. ``update(..., preference=p)`` overrides it.
      scale: The native scale is that of the ``"sum"`` for ``length="projection"`` and
        of the ``"mean"`` for the others: d for gradients that are all equal. The other
        one differs by the number of present tasks.

    Returns:
      A balancer; needs the Gramian: T backward passes. State: the certificate.

    Raises:
      ValueError: If ``length`` is unknown, or the preference has another length than T
        or a negative entry.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.conflict_free(2)
      >>> grads = {"w": jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])}
      >>> update, state = balancer.update(grads, balancer.init(grads))
      >>> update["w"].tolist()
      [0.1588, 2.0706, 2.0706]

    References:
      Liu et al., `ConFIG: Towards Conflict-free Training of Physics Informed Neural
      Networks <https://arxiv.org/abs/2408.11104>`_, 2024.
    """
    check_num_tasks("conflict_free", num_tasks)
    check_choice("conflict_free", "length", length, Length)
    constant = constant_preference("conflict_free", num_tasks, preference)

    def init():
        return ConflictFreeState(unsolved(), jnp.ones(num_tasks, jnp.float32))

    def weigh(state, *, losses, gramian, mask, preference):
        del losses
        chosen = present_preference("conflict_free", constant, preference, mask)
        chosen = chosen.astype(gramian.dtype)
        weights, status = conflict_free_weights(gramian, chosen, length, mask)
        return weights, state._replace(solver=status)

    return from_weights(
        "conflict_free",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="gramian",
        native="sum" if length == "projection" else "mean",
        scale=scale,
        side_inputs=("preference",),
    )
