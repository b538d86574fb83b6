"""COSMOS: losses weighted by a preference, drawn to its direction."""

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
    """Gradient of ``r·ℓ − λ cos(r, ℓ)`` in the losses; zero losses have no angle."""
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

    Descends ``Σ_i r_i ℓ_i − λ cos(r, ℓ)``. The whole method approximates the Pareto
    front with one model: at every step it draws r from a Dirichlet distribution (all
    concentrations 1.2 in the authors' image experiments) and gives it both to the model
    as an input and to the scalarisation, here through
    ``update(..., preference=r)`` (``side={"preference": r}`` with
    :func:`mtljax.value_and_balanced_grad`). With a constant r it is one trade-off.

    Weights can be negative: a loss too small for its preference is pushed up.

    Args:
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      lam: λ, not negative; 0 is linear scalarisation. From 0.01 (tabular data) over 2
        (Multi-MNIST, the authors' default) to 8 (Fashion-and-MNIST) in the paper.
      preference: r ``[T]``, not negative; equal by default. Normalised to sum to 1 over
        the tasks present. May be a traced array, so that it can be a ``vmap`` axis.
      scale: ``"native"`` and ``"mean"``: the mean of the gradients for λ = 0 and equal
        preferences; ``"sum"`` multiplies by the number of tasks.

    Returns:
      A balancer; needs ``losses`` that are not negative, and reads the side
      input ``preference``, which replaces the constant. One backward pass; no state.

    Raises:
      ValueError: If ``lam`` is negative, or the preference has another length, a
        negative entry or none above zero.

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
