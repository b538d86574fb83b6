"""Scale-invariant scalarisation: the sum of the logarithms of the losses."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.core import Tracer

from mtljax.balancer import Balancer, check_number, factory, from_weights
from mtljax.types import Losses, Number, Scale, Weights


class ScaleInvariantState(NamedTuple):
    """State of :func:`scale_invariant`."""

    task_weights: Weights


def scale_invariant_weights(losses: Losses, offset: Number = 0.0) -> Weights:
    """``1 / (ℓ_i + offset)``: the gradient of ``Σ log(ℓ_i + offset)``."""
    return 1 / (losses + offset)


@factory
def scale_invariant(
    num_tasks: int, *, offset: Number = 0.0, scale: Scale = "native"
) -> Balancer:
    """Descends ``Σ_i log ℓ_i`` (SI): no task's unit of measure matters.

    ``d = Σ_i g_i / ℓ_i``. Multiplying a loss by a constant changes nothing.

    Args:
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      offset: Added to every loss under the logarithm. 0 is the rule of nash-mtl and
        IGB; 1 gives ``log(1 + ℓ)``, as SamsungLabs' code has it, which is no longer
        invariant.
      scale: ``"native"``, or weights normalised to the ``"sum"`` or ``"mean"`` scale.

    Returns:
      A balancer; needs ``losses``, all above ``-offset``. One backward pass; no state.

    Raises:
      ValueError: If ``offset`` is negative.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.scale_invariant(2)
      >>> grads = {"w": jnp.array([[1.0], [100.0]])}
      >>> losses = jnp.array([0.5, 50.0])
      >>> balancer.update(grads, balancer.init(grads), losses=losses)[0]["w"].tolist()
      [4.0]

    References:
      The baseline "SI" of Navon et al., `Multi-Task Learning as a Bargaining Game
      <https://arxiv.org/abs/2202.01017>`_, 2022.
    """
    check_number("scale_invariant", "offset", offset, at_least=0.0)

    def init():
        return ScaleInvariantState(jnp.ones(num_tasks, jnp.float32))

    def weigh(state, *, losses, gramian, mask):
        del gramian, mask
        return scale_invariant_weights(losses, offset), state

    return from_weights(
        "scale_invariant",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="losses",
        native="free",
        scale=scale,
        reads_losses=True,
        positive_losses=not isinstance(offset, Tracer) and bool(offset == 0),
        domain=lambda losses: losses + offset > 0,
    )
