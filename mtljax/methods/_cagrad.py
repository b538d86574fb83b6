"""CAGrad: maximises the smallest gain in a ball around the mean gradient."""

from typing import Literal, NamedTuple, TypeAlias

import jax.numpy as jnp

from mtljax.balancer import Balancer, check_choice, check_number, factory, from_weights
from mtljax.solvers import SolverStatus, max_min_in_ball, unsolved
from mtljax.types import Gramian, Mask, Number, Scale, Weights

Rescale: TypeAlias = Literal["none", "1+c", "1+c^2"]


class CAGradState(NamedTuple):
    """State of :func:`cagrad`."""

    solver: SolverStatus
    task_weights: Weights


def cagrad_weights(
    gramian: Gramian, c: Number, mask: Mask | None = None
) -> tuple[Weights, SolverStatus]:
    """Computes the weights of ``argmax min_i <g_i, d>`` for ``‖d − g_0‖ ≤ c ‖g_0‖``."""
    mask = jnp.ones(gramian.shape[0], bool) if mask is None else mask
    mean = mask.astype(gramian.dtype) / jnp.maximum(mask.sum(), 1)
    square = mean @ jnp.matmul(gramian, mean, precision="highest")
    radius = jnp.asarray(c, gramian.dtype) * jnp.sqrt(jnp.maximum(square, 0))
    extra, status = max_min_in_ball(gramian, mean, radius, mask)
    return mean + extra, status


@factory
def cagrad(
    num_tasks: int,
    *,
    c: Number = 0.4,
    rescale: Rescale = "none",
    scale: Scale = "native",
) -> Balancer:
    """Conflict-averse gradient descent (CAGrad).

    The update d maximises ``min_i <g_i, d>`` subject to ``‖d − g_0‖ ≤ c ‖g_0‖``, where
    ``g_0`` is the mean gradient. It is the mean for ``c = 0`` and has the direction of
    MGDA for large c. Equivalently ``d = g_0 + c ‖g_0‖ g_w/‖g_w‖``, where w minimises
    ``<g_w, g_0> + c ‖g_0‖ ‖g_w‖`` over the simplex and ``g_w = Σ_i w_i g_i``.

    The problem is solved exactly. If ``g_w = 0`` is optimal, the formula is 0/0. The
    update is then the projection of ``g_0`` onto the cone of directions in which no
    task gets worse.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      c: Radius of the ball relative to ``‖g_0‖``, at least 0. The paper uses 0.4 on
        NYUv2 and Cityscapes and 0.5 in its toy problem. LibMTL uses 0.5.
      rescale: Divisor of d. ``"1+c^2"`` is that of LibMTL and nash-mtl, and ``"1+c"``
        that of the authors' toy script. ``"none"`` is the algorithm of the paper and of
        TorchJD.
      scale: ``"native"`` and ``"mean"`` are the mean of the gradients for c = 0.
        ``"sum"`` multiplies the update by the number of present tasks, as in nash-mtl
        and codebases derived from it.

    Returns:
      A :class:`mtljax.Balancer` that reads the Gramian. A step costs T backward passes.
      The state contains the solver status.

    Raises:
      ValueError: If ``c`` is negative or ``rescale`` is unknown.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.cagrad(2, c=0.5)
      >>> grads = {"w": jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])}
      >>> update, state = balancer.update(grads, balancer.init(grads))
      >>> update["w"].tolist()
      [0.18, 1.20, 1.20]

    References:
      Liu et al., `Conflict-Averse Gradient Descent for Multi-task Learning
      <https://arxiv.org/abs/2110.14048>`_, 2021.
    """
    check_number("cagrad", "c", c, at_least=0.0)
    check_choice("cagrad", "rescale", rescale, Rescale)
    divisor = {"none": 1.0, "1+c": 1.0 + c, "1+c^2": 1.0 + c**2}[rescale]

    def init():
        return CAGradState(unsolved(), jnp.ones(num_tasks, jnp.float32))

    def weigh(state, *, losses, gramian, mask):
        del losses
        weights, status = cagrad_weights(gramian, c, mask)
        return weights / divisor, state._replace(solver=status)

    return from_weights(
        "cagrad",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="gramian",
        native="mean",
        scale=scale,
    )
