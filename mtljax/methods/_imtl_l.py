"""IMTL-L: every loss is learned to be scaled to one."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtljax import per_task
from mtljax.balancer import Balancer, check_number, factory, from_weights
from mtljax.types import Losses, Number, Scale, Weights

# e^88 is the largest power of e in float32.
_MAX_LOG_SCALE = 80.0


class IMTLLState(NamedTuple):
    """State of :func:`imtl_l`."""

    log_scales: per_task.PerTask  # value: s_i, [T]
    task_weights: Weights


def imtl_l_weights(
    log_scales: Float[Array, " tasks"], losses: Losses
) -> tuple[Weights, Weights]:
    """Weights, and the gradient in s, of ``Σ_i e^{s_i} ℓ_i − s_i``."""
    weights = jnp.exp(jnp.minimum(log_scales, _MAX_LOG_SCALE))
    return weights, weights * losses - 1


@factory
def imtl_l(
    num_tasks: int,
    *,
    initial_log_scale: Number = 0.0,
    learning_rate: Number = 0.025,
    optimizer: optax.GradientTransformation | None = None,
    scale: Scale = "native",
) -> Balancer:
    """Impartial multi-task learning, loss part (IMTL-L).

    Descends ``Σ_i e^{s_i} ℓ_i − s_i`` in the parameters and in the ``s_i``. At its
    optimum ``e^{s_i} ℓ_i = 1``: all scaled losses are equal, whatever their units. As a
    rule it is :func:`mtljax.uncertainty` with ``s → −s`` and twice the weights. The
    paper's full IMTL is ``mtljax.compose(mtljax.imtl_l(T), mtljax.imtl_g(T))``.

    The ``s_i`` are learned here, by their own optimiser, and not by that of the model
    (as in LibMTL), so neither weight decay nor its schedule reaches them.

    Args:
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      initial_log_scale: s at the start; 0 in the paper.
      learning_rate: Of Adam on s. The paper has no rate of its own for s; this is that
        of :func:`mtljax.uncertainty`, inferred.
      optimizer: Replaces Adam (and ``learning_rate``).
      scale: ``"native"``, or weights normalised to the ``"sum"`` or ``"mean"`` scale
        (what s learns from is not changed by it).

    Returns:
      A balancer; needs ``losses`` that are not negative (s of a loss that stays at
      zero grows until its weight saturates). One backward pass; state: 4 T numbers
      with Adam.

    Raises:
      ValueError: If ``learning_rate`` is not positive.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.imtl_l(3)
      >>> grads = {"w": jnp.eye(3)}
      >>> state = balancer.init(grads)
      >>> _, state = balancer.update(grads, state, losses=jnp.array([0.5, 2.0, 4.0]))
      >>> state.task_weights.tolist(), state.log_scales.value.tolist()
      ([1.0, 1.0, 1.0], [0.025, -0.025, -0.025])

    References:
      Liu et al., `Towards Impartial Multi-Task Learning
      <https://openreview.net/forum?id=IMPnRXEWpvr>`_, ICLR 2021.
    """
    check_number("imtl_l", "learning_rate", learning_rate, above=0.0)
    check_number("imtl_l", "initial_log_scale", initial_log_scale)
    inner = optax.adam(learning_rate) if optimizer is None else optimizer

    def init():
        start = jnp.full(num_tasks, initial_log_scale, jnp.float32)
        return IMTLLState(per_task.init(inner, start), jnp.ones(num_tasks, jnp.float32))

    def weigh(state, *, losses, gramian, mask):
        del gramian
        weights, slope = imtl_l_weights(state.log_scales.value, losses)
        learned = per_task.step(inner, state.log_scales, slope, mask)
        return weights, state._replace(log_scales=learned)

    return from_weights(
        "imtl_l",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="losses",
        native="free",
        scale=scale,
        reads_losses=True,
        domain=lambda losses: losses >= 0,
    )
