"""Scale-invariant scalarisation (SI): the sum of the log losses."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mtljax.balancer import Balancer, check_number, factory, from_weights
from mtljax.types import Losses, Number, Scale, Weights


class ScaleInvariantState(NamedTuple):
    """State of :func:`scale_invariant`."""

    task_weights: Weights


def scale_invariant_weights(losses: Losses, offset: Number = 0.0) -> Weights:
    """Computes ``1 / (ℓ_i + offset)``, the gradient of ``Σ log(ℓ_i + offset)``."""
    return 1 / (losses + offset)


@factory
def scale_invariant(
    num_tasks: int, *, offset: Number = 0.0, scale: Scale = "native"
) -> Balancer:
    """Scale-invariant scalarisation (SI): descends the sum of the log losses.

    The objective is ``Σ_i log ℓ_i``, so the update is ``d = Σ_i g_i / ℓ_i``. It does
    not change if a loss is multiplied by a constant.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      offset: Constant that is added to every loss before the logarithm, at least 0.
        nash-mtl and IGB use 0. SamsungLabs' code uses 1, ``log(1 + ℓ)``, which is not
        invariant.
      scale: ``"native"``, or weights normalised to the ``"sum"`` or ``"mean"`` scale.

    Returns:
      A :class:`mtljax.Balancer` that reads ``losses``, which must be above ``-offset``.
      A step costs one backward pass. The state contains the last task weights only.

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
        positive_losses=not isinstance(offset, Tracer)
        and bool(np.asarray(offset) == 0),
        domain=lambda losses: losses + offset > 0,
    )
