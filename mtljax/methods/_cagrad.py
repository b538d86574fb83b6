"""CAGrad: near the mean gradient, the step that helps the worst task most."""

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
    """Weights of ``argmax_d min_i <g_i, d>`` over ``‖d − g_0‖ ≤ c ‖g_0‖``."""
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

    With ``g_0`` the mean gradient, ``d`` maximises ``min_i <g_i, d>`` subject to
    ``‖d − g_0‖ ≤ c ‖g_0‖``: the mean for ``c = 0``, the direction of MGDA for large c.
    Equivalently ``d = g_0 + c ‖g_0‖ g_w/‖g_w‖`` with w minimising
    ``<g_w, g_0> + c ‖g_0‖ ‖g_w‖`` over the simplex. Solved exactly; at points where
    ``g_w = 0`` is optimal, ``d`` is the projection of ``g_0`` on the cone of directions
    that hurt no task, instead of 0/0.

    Args:
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      c: Radius of the ball relative to ``‖g_0‖``, not negative. 0.4 in the paper's
        NYUv2 and Cityscapes runs, 0.5 in its toy problem and LibMTL.
      rescale: Divides d by ``1+c^2`` (LibMTL, nash-mtl) or ``1+c`` (the authors' toy
        script); ``"none"`` is the paper's algorithm, and TorchJD's.
      scale: ``"native"`` and ``"mean"``: the mean of the gradients for c = 0; ``"sum"``
        multiplies by the number of tasks, as nash-mtl and its descendants do.

    Returns:
      A balancer; needs the Gramian: T backward passes. State: the solver's certificate.

    Raises:
      ValueError: If c is negative or ``rescale`` unknown.

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
