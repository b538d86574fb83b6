"""Uncertainty weighting (UW): a learned noise variance for each task."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtljax import per_task
from mtljax.balancer import Balancer, check_choice, check_number, factory, from_weights
from mtljax.types import Losses, Number, Scale, Weights

Kind: TypeAlias = Literal["regression", "classification"]


class UncertaintyState(NamedTuple):
    """State of :func:`uncertainty`."""

    log_variances: per_task.PerTask  # value: s_i = log σ_i², [T]
    task_weights: Weights


def uncertainty_weights(
    log_variances: Float[Array, " tasks"], losses: Losses, factors: Weights
) -> tuple[Weights, Weights]:
    """Computes the weights of ``Σ_i a_i e^{-s_i} ℓ_i + s_i/2``.

    The second value is the gradient with respect to s.
    """
    weights = factors * jnp.exp(-log_variances)
    return weights, 0.5 - weights * losses


@factory
def uncertainty(
    num_tasks: int,
    *,
    kinds: Kind | Sequence[Kind] = "regression",
    initial_log_variance: Number = 0.0,
    learning_rate: Number = 0.025,
    optimizer: optax.GradientTransformation | None = None,
    scale: Scale = "native",
) -> Balancer:
    """Homoscedastic uncertainty weighting (UW).

    The method descends ``Σ_i a_i e^{-s_i} ℓ_i + s_i/2`` with respect to the parameters
    and the log-variances ``s_i``. The factor ``a_i`` is 1/2 for regression (Gaussian
    likelihood) and 1 for classification. The balancer learns the log-variances with its
    own optimizer. Weight decay and the schedule of the model therefore do not apply to
    them.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      kinds: ``"regression"`` or ``"classification"`` for each task, or one of them for
        all tasks. nash-mtl and TorchJD use ``"regression"`` for all.
      initial_log_variance: Initial value of all ``s_i``. TorchJD and nash-mtl use 0,
        and LibMTL uses -0.5.
      learning_rate: Learning rate of Adam for s. The default is that of nash-mtl. The
        paper does not state a value.
      optimizer: Optimizer of s, which replaces Adam and ``learning_rate``.
      scale: ``"native"``, or weights normalised to the ``"sum"`` or ``"mean"`` scale.
        The gradient of s does not depend on the scale.

    Returns:
      A :class:`mtljax.Balancer` that reads ``losses``. They must not be negative, as in
      the paper, because the weight of a negative loss would increase without bound. A
      step costs one backward pass. The state has 4 T numbers with Adam.

    Raises:
      ValueError: If a kind is unknown, the number of kinds differs from T, or
        ``learning_rate`` is not positive.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.uncertainty(2, kinds=["classification", "regression"])
      >>> grads = {"w": jnp.ones((2, 1))}
      >>> state = balancer.init(grads)
      >>> _, state = balancer.update(grads, state, losses=jnp.array([2.0, 0.1]))
      >>> state.task_weights.tolist(), state.log_variances.value.tolist()
      ([1.0, 0.5], [0.025, -0.025])

    References:
      Kendall et al., `Multi-Task Learning Using Uncertainty to Weigh Losses
      <https://arxiv.org/abs/1705.07115>`_, 2018.
    """
    listed = [kinds] * num_tasks if isinstance(kinds, str) else list(kinds)
    for kind in listed:
        check_choice("uncertainty", "kinds", kind, Kind)
    if len(listed) != num_tasks:
        raise ValueError(
            f"uncertainty: kinds has {len(listed)} entries for num_tasks={num_tasks}. "
            "Pass one kind per task, or one string for all tasks."
        )
    factors = jnp.array(
        [0.5 if k == "regression" else 1.0 for k in listed], jnp.float32
    )
    check_number("uncertainty", "learning_rate", learning_rate, above=0.0)
    check_number("uncertainty", "initial_log_variance", initial_log_variance)
    inner = optax.adam(learning_rate) if optimizer is None else optimizer

    def init():
        start = jnp.full(num_tasks, initial_log_variance, jnp.float32)
        return UncertaintyState(
            per_task.init(inner, start), jnp.ones(num_tasks, jnp.float32)
        )

    def weigh(state, *, losses, gramian, mask):
        del gramian
        weights, slope = uncertainty_weights(state.log_variances.value, losses, factors)
        learned = per_task.step(inner, state.log_variances, slope, mask)
        return weights, state._replace(log_variances=learned)

    return from_weights(
        "uncertainty",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="losses",
        native="free",
        scale=scale,
        reads_losses=True,
        domain=lambda losses: losses >= 0,
    )
