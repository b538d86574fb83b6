"""ConFIG: a direction at the same angle to every task gradient."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Scalar

from mtljax import stack
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


# Steps with residuals of the gradients; each gains the digits that the Gramian has.
_REFINEMENTS = 2


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
    products: Callable[[Weights], Weights] | None = None,
) -> tuple[Weights, SolverStatus]:
    """Weights of the direction ``U⁺p``, U the unit gradients, at the given length.

    Args:
      gramian: ``[T, T]``.
      preference: p ``[T]``.
      length: See :func:`conflict_free`.
      mask: Tasks that take part.
      products: ``w -> [<g_j, Σ_i w_i g_i>]_j`` from the gradients themselves. The
        residuals of the solution are taken from it, so that the error grows with the
        condition number of the gradients; with the Gramian alone it grows with its
        square.

    Returns:
      Weights ``[T]`` and the status; its residual is the share of p that no direction
      can meet.
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

    def gains(x):  # the cosines with the direction, times its length
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
    """``<g_j, Σ_i w_i g_i>`` in the accuracy of the gradients."""
    wide = jax.tree.map(
        lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), grads
    )
    total = jax.tree.map(lambda g: g[None], stack.combine(wide, weights))
    return stack.cross_gramian(wide, total)[:, 0]
