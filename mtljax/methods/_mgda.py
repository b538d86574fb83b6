"""MGDA: the min-norm point of the convex hull of the task gradients."""

from typing import Literal, NamedTuple, TypeAlias

import jax.numpy as jnp

from mtljax.balancer import Balancer, check_choice, factory, from_weights
from mtljax.solvers import SolverStatus, min_norm_point, unsolved
from mtljax.types import Gramian, Losses, Mask, Scale, Weights

Normalize: TypeAlias = Literal["none", "l2", "loss", "loss+"]
ApplyTo: TypeAlias = Literal["raw", "normalized"]


class MGDAState(NamedTuple):
    """State of :func:`mgda`."""

    solver: SolverStatus
    task_weights: Weights


def mgda_norms(
    gramian: Gramian, losses: Losses | None, normalize: Normalize
) -> Weights:
    """Computes the divisors of the gradients in the min-norm problem, shape ``[T]``."""
    norms = jnp.ones(gramian.shape[0], gramian.dtype)
    if normalize in ("l2", "loss+"):
        norms = norms * jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))
    if normalize in ("loss", "loss+") and losses is not None:
        norms = norms * losses.astype(norms.dtype)
    return jnp.where(norms > 0, norms, 1)


def mgda_weights(
    gramian: Gramian, norms: Weights, mask: Mask | None = None
) -> tuple[Weights, SolverStatus]:
    """Computes ``argmin_w ‖Σ w_i g_i/n_i‖²`` over the simplex."""
    return min_norm_point(gramian / norms[:, None] / norms[None, :], mask)


@factory
def mgda(
    num_tasks: int,
    *,
    normalize: Normalize = "none",
    apply_to: ApplyTo = "raw",
    scale: Scale = "native",
) -> Balancer:
    """Multiple-gradient descent algorithm, the min-norm point (MGDA).

    The update is ``d = Σ_i w_i g_i``, where w minimises ``‖Σ_i w_i g_i‖²`` over the
    simplex. It satisfies ``<g_i, d> ≥ ‖d‖²`` for every task, so no task gets worse to
    first order. It is zero exactly at Pareto-stationary points. The method favours the
    task with the smallest gradient.

    The problem is solved exactly. Reference codebases run 20 to 250 Frank-Wolfe steps.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      normalize: Divisor of the gradients in the min-norm problem. ``"l2"`` is the
        gradient norm, ``"loss"`` the loss, and ``"loss+"`` their product.
      apply_to: With a normalisation, the gradients that w multiplies. ``"raw"`` is the
        choice of the code of Sener and Koltun, and of LibMTL for representations.
        ``"normalized"`` is that of LibMTL for parameters, and of the FS-MTL code.
      scale: ``"native"`` and ``"mean"`` are weights on the simplex. ``"sum"``
        multiplies them by the number of present tasks, as in nash-mtl and codebases
        derived from it.

    Returns:
      A :class:`mtljax.Balancer` that reads the Gramian, and positive ``losses`` for
      ``normalize="loss"`` and ``"loss+"``. A step costs T backward passes. The state
      contains the solver status.

    Raises:
      ValueError: If ``normalize`` or ``apply_to`` is unknown.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.mgda(2)
      >>> grads = {"w": jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])}
      >>> update, state = balancer.update(grads, balancer.init(grads))
      >>> state.task_weights.tolist()
      [0.6000, 0.4000]

    References:
      Désidéri, Multiple-gradient descent algorithm, 2012; Sener and Koltun, `Multi-Task
      Learning as Multi-Objective Optimization <https://arxiv.org/abs/1810.04650>`_,
      2018.
    """
    check_choice("mgda", "normalize", normalize, Normalize)
    check_choice("mgda", "apply_to", apply_to, ApplyTo)
    reads_losses = normalize in ("loss", "loss+")

    def init():
        return MGDAState(unsolved(), jnp.ones(num_tasks, jnp.float32))

    def weigh(state, *, losses, gramian, mask):
        norms = mgda_norms(gramian, losses, normalize)
        weights, status = mgda_weights(gramian, norms, mask)
        if apply_to == "normalized":
            weights = weights / norms
        return weights, state._replace(solver=status)

    return from_weights(
        "mgda",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="gramian",
        native="mean",
        scale=scale,
        reads_losses=reads_losses,
        positive_losses=reads_losses,
    )
