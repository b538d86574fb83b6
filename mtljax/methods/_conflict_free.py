"""ConFIG: a direction with equal angles to all task gradients."""

import functools
import operator
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Scalar

from mtljax import placement, stack
from mtljax.balancer import (
    Balancer,
    as_mask,
    check_choice,
    commit,
    factory,
    from_weights,
)
from mtljax.methods._preference import (
    TaskVector,
    constant_preference,
    present_preference,
)
from mtljax.solvers import SolverStatus, pinv_solve, unsolved
from mtljax.types import Grads, Gramian, Mask, Scale, Weights

Length: TypeAlias = Literal["projection", "min", "max", "mean", "harmonic", "geometric"]


# Refinement steps with residuals from the gradients. Each adds as many correct digits
# as a solution from the Gramian has.
_REFINEMENTS = 2


class ConflictFreeState(NamedTuple):
    """State of :func:`conflict_free`."""

    solver: SolverStatus
    task_weights: Weights


def _length(norms: Weights, shares: Weights, active: Mask, length: Length) -> Scalar:
    """Computes ‖d‖ from ``‖g_i‖`` and the cosines of d with the gradients."""
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
    products: Callable[[Weights], Weights] | None = None,
) -> tuple[Weights, SolverStatus]:
    """Computes the weights of the direction ``U⁺p`` for unit gradients U.

    Args:
      gramian: Gramian, shape ``[T, T]``.
      preference: Preference p, shape ``[T]``.
      length: Norm of the update, see :func:`conflict_free`.
      mask: Present tasks, shape ``[T]``.
      products: Function ``w -> [<g_j, Σ_i w_i g_i>]_j`` that is computed from the
        gradients. With it, the residuals are accurate, and the error of the solution is
        proportional to the condition number of the gradients. With the Gramian only, it
        is proportional to the square of this number.

    Returns:
      The weights of shape ``[T]`` and the :class:`mtljax.solvers.SolverStatus`. The
      residual is the relative norm of the part of p that no direction attains.
    """
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

    def gains(x):  # cosines with the direction, times the norm of the direction
        if products is None:
            return jnp.matmul(cosines, x, precision="highest")
        scale = jnp.where(active, 1 / norms, 0)
        return scale * products(scale * x)

    if products is not None:
        for _ in range(_REFINEMENTS):
            rest = jnp.where(active, target - gains(solution), 0)
            solution = solution + pinv_solve(cosines, rest)[0]
    slope = gains(solution)
    square = jnp.maximum(solution @ slope, 0)  # ‖U⁺p‖²
    degenerate = (square <= 8 * num * eps) | ~active.any()
    root = jnp.sqrt(jnp.where(degenerate, 1, square))
    reach = _length(norms, slope / root, active, length)
    reach = jnp.where(degenerate, 0, reach)
    weights = jnp.where(active, solution / norms * (reach / root), 0)
    status = SolverStatus(outside, jnp.int32(1), ~degenerate & (outside < 1e-2))
    return weights, status


@factory
def conflict_free(
    num_tasks: int,
    *,
    length: Length = "projection",
    preference: TaskVector | None = None,
    scale: Scale = "native",
) -> Balancer:
    """Conflict-free inverse gradients (ConFIG).

    Let U be the matrix of the unit gradients. The vector ``x = U⁺1`` has the same
    cosine with every gradient. The update is ``(Σ_i <g_i, x̂>) x̂`` with ``x̂ = x/‖x‖``,
    the projection of the sum of the gradients onto this direction. It conflicts with no
    task if the gradients are linearly independent. Scaling a loss changes only the norm
    of the update.

    If no direction has these cosines, because the gradients are linearly dependent, the
    pseudo-inverse gives the least-squares solution, which may make a task worse. The
    residual is the relative norm of the unsatisfied part of the equations.
    ``state.solver.converged`` is False if it is at least 0.01, or if x is zero. If x is
    zero because the gradients cancel, the update is zero. A task with a zero gradient
    has no effect.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      length: Norm of the update. ``"projection"``, as in the paper, is the sum of the
        projections of all gradients. ``"min"``, ``"max"``, ``"mean"`` (arithmetic),
        ``"harmonic"`` and ``"geometric"`` are statistics of the gradient norms, as in
        the authors' code.
      preference: Preference p, shape ``[T]``, non-negative, equal by default. The
        cosines are proportional to p, with ``x = U⁺p``. ``update(..., preference=p)``
        overrides it.
      scale: The native scale is ``"sum"`` for ``length="projection"`` and ``"mean"``
        otherwise, which is the scale of d if all gradients are equal. The other scale
        differs by the number of present tasks.

    Returns:
      A :class:`mtljax.Balancer` that reads the Gramian. A step costs T backward passes.
      The state contains the solver status.

    Raises:
      ValueError: If ``length`` is unknown, the number of preferences differs from T, or
        a preference is negative.

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
    check_choice("conflict_free", "length", length, Length)
    constant = constant_preference("conflict_free", num_tasks, preference)

    def init():
        return ConflictFreeState(unsolved(), jnp.ones(num_tasks, jnp.float32))

    def weigh(state, *, losses, gramian, mask, preference, products):
        del losses
        dtype = gramian.dtype
        chosen = present_preference("conflict_free", constant, preference, mask, dtype)
        weights, status = conflict_free_weights(gramian, chosen, length, mask, products)
        return weights, state._replace(solver=status)

    balancer = from_weights(
        "conflict_free",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="gramian",
        native="sum" if length == "projection" else "mean",
        scale=scale,
        side_inputs=("preference", "products"),
    )
    weigh_gramian = balancer.weigh
    assert weigh_gramian is not None

    def update(updates, state, params=None, *, losses=None, mask=None, **extra_args):
        stack.check(updates, num_tasks, "conflict_free", params)
        if mask is not None:
            updates = stack.select(updates, as_mask("conflict_free", num_tasks, mask))
        extra_args["products"] = functools.partial(_products, updates)
        weights, new = weigh_gramian(
            state,
            losses=losses,
            gramian=stack.gramian(updates),
            mask=mask,
            **extra_args,
        )
        return commit(True, stack.combine(updates, weights), new, state)

    return Balancer(
        balancer.init,
        update,
        name="conflict_free",
        num_tasks=num_tasks,
        needs="gramian",
        weigh=weigh_gramian,
    )


def _products(grads: Grads, weights: Weights) -> Weights:
    """Computes ``<g_j, Σ_i w_i g_i>`` with the accuracy of the gradients."""
    wide = jax.tree.map(lambda g: g.astype(stack.wide_dtype(g.dtype)), grads)

    def leaf(g, total):  # contracts every axis of the parameter, without a reshape
        axes = tuple(range(1, g.ndim)), tuple(range(total.ndim))
        return jax.lax.dot_general(
            g,
            total,
            (axes, ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            out_sharding=placement.replicated((g, total), 1),
        )

    terms = jax.tree.map(leaf, wide, stack.combine(wide, weights))
    return functools.reduce(operator.add, jax.tree.leaves(terms))
