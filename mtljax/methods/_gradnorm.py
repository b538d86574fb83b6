"""GradNorm: learns weights for gradient norms with equal training rates."""

from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Scalar

from mtljax import per_task
from mtljax.balancer import Balancer, check_choice, check_number, factory, from_weights
from mtljax.methods._preference import TaskVector, task_vector
from mtljax.types import Losses, Mask, Number, Scale, Weights

Compat: TypeAlias = Literal["paper", "libmtl"]

# A weight that is clipped to zero would remain zero in the renormalisation.
_LEAST_WEIGHT = 1e-6


class GradNormState(NamedTuple):
    """State of :func:`gradnorm`."""

    learned: per_task.PerTask  # value: w_i, or the logits of w with compat="libmtl"
    initial: Losses  # ℓ_i(0): mean loss over the reference steps until now
    steps: Int[Array, " tasks"]  # steps of each task, at most reference_steps
    task_weights: Weights


def gradnorm_slope(
    weights: Weights,
    norms: Float[Array, " tasks"],
    progress: Float[Array, " tasks"],
    alpha: Number,
    mask: Mask | None = None,
) -> tuple[Scalar, Weights]:
    """Computes ``Σ_i |w_i n_i − Ḡ r_i^α|`` and its gradient with respect to w.

    Here ``n_i = ‖g_i‖``, ``Ḡ`` is the mean of ``w_i n_i``, and ``r_i`` is ``progress``,
    ``ℓ_i / ℓ_i(0)``, divided by its mean over the tasks. The target ``Ḡ r_i^α`` is
    constant under differentiation.
    """
    mask = jnp.ones(weights.shape, bool) if mask is None else mask
    count = jnp.maximum(mask.sum(), 1)
    scaled = jnp.where(mask, weights * norms, 0)
    mean = jnp.where(mask, progress, 0).sum() / count
    rate = jnp.where(mean > 0, progress / jnp.where(mean > 0, mean, 1), 1)
    target = scaled.sum() / count * rate**alpha
    gap = jnp.where(mask, scaled - target, 0)
    # Adam removes the scale of a gap, so the sign of a rounding error must not be used.
    noise = 8 * jnp.finfo(gap.dtype).eps * (scaled + target)
    gap = jnp.where(jnp.abs(gap) > noise, gap, 0)
    return jnp.abs(gap).sum(), jnp.sign(gap) * norms


@factory
def gradnorm(
    num_tasks: int,
    *,
    alpha: Number = 1.5,
    learning_rate: Number = 0.025,
    optimizer: optax.GradientTransformation | None = None,
    initial_losses: TaskVector | None = None,
    reference_steps: int = 1,
    compat: Compat = "paper",
    scale: Scale = "native",
) -> Balancer:
    """Gradient normalisation (GradNorm).

    The weights w are learned such that the gradient norm ``w_i ‖g_i‖`` of each task
    approaches ``Ḡ r_i^α``. Here ``Ḡ`` is the mean of these norms, and ``r_i`` is the
    relative loss ``ℓ_i / ℓ_i(0)`` divided by its mean. The target is therefore larger
    for a task whose loss decreased less. After each step, w descends
    ``Σ_i |w_i ‖g_i‖ − Ḡ r_i^α|`` with constant targets, and is renormalised to
    ``Σ w = T``. The step of the model uses the weights *before* this update, as in
    Algorithm 1 of the paper.

    The paper does not define a weight that becomes negative. Here its lower bound is
    1e-6, from which it can increase again. The norms are those of all parameters that
    are balanced. The paper uses the last shared layer only.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      alpha: Exponent α, the strength of the restoring force, at least 0. The paper
        (NYUv2) and LibMTL use 1.5, and other work uses 0.12 to 2. With 0 all norms
        become equal.
      learning_rate: Learning rate of Adam for the weights. In LibMTL the optimizer of
        the model learns them. The gradient of a weight is ±‖g_i‖, whose scale Adam
        removes.
      optimizer: Optimizer of the weights, which replaces Adam and ``learning_rate``.
      initial_losses: Initial losses ℓ(0), shape ``[T]``, for example the logarithm of
        the number of classes if the first batch is not representative. By default they
        are measured.
      reference_steps: Number of steps of a task over which its loss is averaged to
        obtain ``ℓ_i(0)``. Steps count from the first positive loss. The weights are
        learned as soon as this average is complete for all present tasks. The paper
        uses 1. LibMTL averages over the first epoch, so pass the number of steps per
        epoch to reproduce it.
      compat: With ``"libmtl"`` the weights are ``w = T softmax(v)`` and v is learned.
        With ``"paper"`` w is learned and renormalised.
      scale: ``"native"`` and ``"sum"`` are weights that sum to the number of present
        tasks. ``"mean"`` divides them by this number.

    Returns:
      A :class:`mtljax.Balancer` that reads the diagonal of the Gramian and ``losses``,
      which must not be negative. A step costs T backward passes. The state has 6 T
      numbers with Adam.

    Raises:
      ValueError: If ``alpha`` is negative, ``learning_rate`` or ``reference_steps`` is
        not positive, an initial loss is not positive, or the number of
        ``initial_losses`` differs from T.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.gradnorm(2)
      >>> grads = {"w": jnp.array([[1.0, 0.0], [0.0, 10.0]])}
      >>> state = balancer.init(grads)
      >>> for _ in range(2):
      ...     _, state = balancer.update(grads, state, losses=jnp.array([1.0, 2.0]))
      >>> state.task_weights.tolist()
      [1.025, 0.975]

    References:
      Chen et al., `GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep
      Multitask Networks <https://arxiv.org/abs/1711.02257>`_, 2018.
    """
    check_choice("gradnorm", "compat", compat, Compat)
    check_number("gradnorm", "alpha", alpha, at_least=0.0)
    check_number("gradnorm", "learning_rate", learning_rate, above=0.0)
    if reference_steps < 1:
        raise ValueError(
            f"gradnorm: reference_steps must be at least 1, not {reference_steps}."
        )
    given = (
        None
        if initial_losses is None
        else task_vector("gradnorm", "initial_losses", num_tasks, initial_losses)
    )
    if isinstance(given, np.ndarray) and not (given > 0).all():
        raise ValueError(
            f"gradnorm: initial_losses must be positive, not {given.tolist()}."
        )
    inner = optax.adam(learning_rate) if optimizer is None else optimizer

    def init():
        ones = jnp.ones(num_tasks, jnp.float32)
        start = ones if compat == "paper" else jnp.zeros(num_tasks, jnp.float32)
        initial, steps = ones, 0
        if given is not None:
            initial, steps = jnp.asarray(given, jnp.float32), reference_steps
        return GradNormState(
            per_task.init(inner, start),
            initial,
            jnp.full(num_tasks, steps, jnp.int32),
            ones,
        )

    def weigh(state, *, losses, gramian, mask):
        recording = mask & (state.steps < reference_steps)
        initial = state.initial + (losses - state.initial) / (state.steps + 1)
        initial = jnp.where(recording, initial, state.initial)
        # A loss relative to zero is undefined, so wait for a positive loss.
        steps = jnp.minimum(state.steps + (mask & (initial > 0)), reference_steps)
        learn = mask & ((steps == reference_steps) | ~mask).all()
        learn &= mask.sum() > 1  # a single task is not balanced

        norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))
        progress = losses / jnp.where(initial > 0, initial, 1)
        step = _step_weights if compat == "paper" else _step_logits
        weights, learned = step(
            inner,
            state.learned,
            lambda w: gradnorm_slope(w, norms, progress, alpha, mask)[1],
            mask,
            learn,
        )
        return weights, GradNormState(learned, initial, steps, weights)

    return from_weights(
        "gradnorm",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="gramian",
        native="sum",
        scale=scale,
        reads_losses=True,
        domain=lambda losses: losses >= 0,
    )


def _step_weights(inner, learned, slope, mask, learn):
    """Returns weights that sum to n over the n present tasks, and learns w.

    The sum of the stored weights of the present tasks does not change.
    """
    total = jnp.where(mask, learned.value, 0).sum()
    weights = learned.value * (mask.sum() / jnp.where(total > 0, total, 1))
    moved = per_task.step(inner, learned._replace(value=weights), slope(weights), learn)
    value = jnp.where(mask, jnp.maximum(moved.value, _LEAST_WEIGHT), 0)
    value = value * (total / jnp.where(mask.any(), value.sum(), 1))
    return weights, moved._replace(value=jnp.where(learn, value, learned.value))


def _step_logits(inner, learned, slope, mask, learn):
    """Returns ``n softmax(v)`` over the n present tasks, and learns v."""
    share = jax.nn.softmax(learned.value, where=mask)
    weights = mask.sum() * share
    inward = jnp.where(mask, slope(weights), 0)
    inward = weights * (inward - share @ inward)
    return weights, per_task.step(inner, learned, inward, learn)
