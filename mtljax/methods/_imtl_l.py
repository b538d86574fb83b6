"""IMTL-L: learns scales such that all scaled losses are one."""

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
    """Computes the weights of ``Σ_i e^{s_i} ℓ_i − s_i``.

    The second value is the gradient with respect to s.
    """
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

    The method descends ``Σ_i e^{s_i} ℓ_i − s_i`` with respect to the parameters and the
    log-scales ``s_i``. At the optimum ``e^{s_i} ℓ_i = 1``, so all scaled losses are
    equal, independent of their units. The rule is that of :func:`mtljax.uncertainty`
    with ``s → −s`` and twice the weights. The complete IMTL of the paper is
    ``mtljax.compose(mtljax.imtl_l(T), mtljax.imtl_g(T))``.

    The balancer learns the ``s_i`` with its own optimizer. In LibMTL, the optimizer of
    the model learns them. Weight decay and the schedule of the model therefore do not
    apply to them here.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      initial_log_scale: Initial value of all ``s_i``. The paper uses 0.
      learning_rate: Learning rate of Adam for s. The paper has no separate rate for s.
        The default is that of :func:`mtljax.uncertainty` (inferred).
      optimizer: Optimizer of s, which replaces Adam and ``learning_rate``.
      scale: ``"native"``, or weights normalised to the ``"sum"`` or ``"mean"`` scale.
        The gradient of s does not depend on the scale.

    Returns:
      A :class:`mtljax.Balancer` that reads ``losses``, which must not be negative. If a
      loss remains zero, its log-scale increases until its weight saturates. A step
      costs one backward pass. The state has 4 T numbers with Adam.

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
