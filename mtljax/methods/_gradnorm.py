"""GradNorm: weights that steer the gradient norms to equal training rates."""

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

# Under the clip at zero a weight could not share in the renormalisation any more.
_LEAST_WEIGHT = 1e-6


class GradNormState(NamedTuple):
    """State of :func:`gradnorm`."""

    learned: per_task.PerTask  # value: w_i, or the logits of w with compat="libmtl"
    initial: Losses  # ℓ_i(0): mean loss over the reference steps so far
    steps: Int[Array, " tasks"]  # of each task, counted up to reference_steps
    task_weights: Weights


def gradnorm_slope(
    weights: Weights,
    norms: Float[Array, " tasks"],
    progress: Float[Array, " tasks"],
    alpha: Number,
    mask: Mask | None = None,
) -> tuple[Scalar, Weights]:
    """``Σ_i |w_i n_i − Ḡ r_i^α|`` and its gradient in w, the target held constant.

    ``n_i = ‖g_i‖``, ``Ḡ`` is the mean of ``w_i n_i`` and ``r_i`` the remaining part of
    the loss, ``progress`` = ``ℓ_i / ℓ_i(0)``, relative to its mean over the tasks.
    """
    mask = jnp.ones(weights.shape, bool) if mask is None else mask
    count = jnp.maximum(mask.sum(), 1)
    scaled = jnp.where(mask, weights * norms, 0)
    mean = jnp.where(mask, progress, 0).sum() / count
    rate = jnp.where(mean > 0, progress / jnp.where(mean > 0, mean, 1), 1)
    target = scaled.sum() / count * rate**alpha
    gap = jnp.where(mask, scaled - target, 0)
    # Adam would follow the sign of a rounding error as that of any other gap.
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

    The gradient norm of every task, ``w_i ‖g_i‖``, is steered towards ``Ḡ r_i^α``:
    their mean, more for a task whose loss has fallen less since the start. After each
    step w descends ``Σ_i |w_i ‖g_i‖ − Ḡ r_i^α|`` with the target held constant, and is
    renormalised to ``Σ w = T``. The model's step uses the weights *before* that, as in
    the paper's Algorithm 1.

    The paper does not say what happens to a weight that steps below zero; here it stays
    at 1e-6, from where it can rise again. The norms are those of all parameters the
    balancer sees; the paper takes the last shared layer only.

    Args:
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      alpha: α, the strength of the restoring force, not negative: 1.5 in the paper's
        NYUv2 runs and LibMTL; others use 0.12 to 2. 0 asks for equal norms.
      learning_rate: Of Adam on the weights (in LibMTL the model's own optimiser learns
        them). The slope of a weight is ±‖g_i‖; Adam takes the scale out of it.
      optimizer: Replaces Adam (and ``learning_rate``).
      initial_losses: ℓ(0) ``[T]``, such as log(number of classes) where the first batch
        is not to be trusted. By default they are measured.
      reference_steps: ℓ_i(0) is the mean loss over the first so many steps of a task,
        and learning starts once all present tasks have theirs; the steps count from the
        first positive loss. 1 is the paper's; LibMTL
        averages the first epoch: pass your steps per epoch.
      compat: ``"libmtl"`` has ``w = T softmax(v)`` and descends in v, instead of
        descending in w and renormalising.
      scale: ``"native"`` and ``"sum"`` are weights that sum to T; ``"mean"`` divides
        by T.

    Returns:
      A balancer; needs the Gramian (of which it reads the diagonal) and ``losses``,
      which must not be negative. T backward passes; state:
      6 T numbers with Adam.

    Raises:
      ValueError: If ``alpha`` is negative, ``learning_rate`` or ``reference_steps`` is
        not positive, or ``initial_losses`` has another length than T.

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
        # No loss is large or small relative to zero: wait for one that is positive.
        steps = jnp.minimum(state.steps + (mask & (initial > 0)), reference_steps)
        learn = mask & ((steps == reference_steps) | ~mask).all()
        learn &= mask.sum() > 1  # one task alone has nothing to be balanced with

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
    """Weights that sum to n over the n present tasks, whose total share is kept."""
    total = jnp.where(mask, learned.value, 0).sum()
    weights = learned.value * (mask.sum() / jnp.where(total > 0, total, 1))
    moved = per_task.step(inner, learned._replace(value=weights), slope(weights), learn)
    value = jnp.where(mask, jnp.maximum(moved.value, _LEAST_WEIGHT), 0)
    value = value * (total / jnp.where(mask.any(), value.sum(), 1))
    return weights, moved._replace(value=jnp.where(learn, value, learned.value))


def _step_logits(inner, learned, slope, mask, learn):
    """``n softmax(v)`` over the n present tasks, by the chain rule."""
    share = jax.nn.softmax(learned.value, where=mask)
    weights = mask.sum() * share
    inward = jnp.where(mask, slope(weights), 0)
    inward = weights * (inward - share @ inward)
    return weights, per_task.step(inner, learned, inward, learn)
