"""COSMOS: preference weights with a penalty on the angle to the losses."""

from typing import NamedTuple

import jax.numpy as jnp

from mtljax.balancer import Balancer, check_number, factory, from_weights
from mtljax.methods._preference import (
    TaskVector,
    constant_preference,
    present_preference,
)
from mtljax.types import Losses, Mask, Number, Scale, Weights


class COSMOSState(NamedTuple):
    """State of :func:`cosmos`."""

    task_weights: Weights


def cosmos_weights(
    losses: Losses, preference: Weights, lam: Number, mask: Mask | None = None
) -> Weights:
    """Computes the gradient of ``r·ℓ − λ cos(r, ℓ)`` with respect to the losses.

    The gradient of the penalty is zero if all losses are zero.
    """
    mask = jnp.ones(losses.shape, bool) if mask is None else mask
    losses = jnp.where(mask, losses, 0)
    length = jnp.sqrt((losses**2).sum())
    size = jnp.sqrt((preference**2).sum())
    some = (length > 0) & (size > 0)
    safe = jnp.where(length > 0, length, 1)
    unit, toward = losses / safe, preference / jnp.where(size > 0, size, 1)
    slope = jnp.where(some, (toward - (toward @ unit) * unit) / safe, 0)
    return preference - lam * slope


@factory
def cosmos(
    num_tasks: int,
    *,
    lam: Number = 2.0,
    preference: TaskVector | None = None,
    scale: Scale = "native",
) -> Balancer:
    """Linear scalarisation with a penalty on the angle to the preference (COSMOS).

    The objective is ``Σ_i r_i ℓ_i − λ cos(r, ℓ)`` for a preference r and the losses ℓ.

    The complete method approximates the Pareto front with one model. Each step samples
    r from a Dirichlet distribution, with all concentrations 1.2 in the authors' image
    experiments. The vector r is an input of the model and of the scalarisation. Pass it
    as ``update(..., preference=r)``, or as ``side={"preference": r}`` to the function
    of :func:`mtljax.value_and_balanced_grad`. A constant r gives one trade-off.

    Weights can be negative. The update then increases a loss that is small relative to
    its preference.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      lam: Weight λ of the penalty, at least 0. With 0 the method is linear
        scalarisation. The paper uses 0.01 (tabular data), 2 (Multi-MNIST, the authors'
        default) and 8 (Fashion-and-MNIST).
      preference: Preference r, shape ``[T]``, non-negative, equal by default. It is
        normalised to sum to 1 over the present tasks. It may be traced, for example as
        a ``vmap`` axis.
      scale: ``"native"`` and ``"mean"`` are the mean of the gradients for λ = 0 and
        equal preferences. ``"sum"`` multiplies the update by the number of present
        tasks.

    Returns:
      A :class:`mtljax.Balancer` that reads ``losses``, which must not be negative, and
      the side input ``preference``, which overrides the constant. A step costs one
      backward pass. The state contains the last task weights only.

    Raises:
      ValueError: If ``lam`` is negative, the number of preferences differs from T, a
        preference is negative, or all are zero.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.cosmos(2, lam=1.0)
      >>> grads, losses = {"w": jnp.eye(2)}, jnp.array([3.0, 4.0])
      >>> state = balancer.init(grads)
      >>> balancer.update(grads, state, losses=losses)[0]["w"].tolist()
      [0.477, 0.517]
      >>> r = jnp.array([0.3, 0.7])
      >>> update, _ = balancer.update(grads, state, losses=losses, preference=r)
      >>> update["w"].tolist()
      [0.338, 0.672]

    References:
      Ruchte and Grabocka, `Scalable Pareto Front Approximation for Deep Multi-Objective
      Learning <https://arxiv.org/abs/2103.13392>`_, 2021.
    """
    check_number("cosmos", "lam", lam, at_least=0.0)
    constant = constant_preference("cosmos", num_tasks, preference)

    def init():
        return COSMOSState(jnp.ones(num_tasks, jnp.float32))

    def weigh(state, *, losses, gramian, mask, preference):
        del gramian
        chosen = present_preference("cosmos", constant, preference, mask, losses.dtype)
        return cosmos_weights(losses, chosen, lam, mask), state

    return from_weights(
        "cosmos",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="losses",
        native="mean",
        scale=scale,
        reads_losses=True,
        domain=lambda losses: losses >= 0,
        side_inputs=("preference",),
    )
