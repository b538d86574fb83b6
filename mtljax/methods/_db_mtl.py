"""DB-MTL: averaged gradients of the log losses, scaled to equal norm."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from mtljax import stack
from mtljax.balancer import (
    Balancer,
    check_choice,
    check_number,
    factory,
    from_grads,
    from_weights,
    rescale,
)
from mtljax.methods._tracked import (
    check_tracked,
    follow,
    row_norms,
    zeros_like_stacked,
)
from mtljax.types import Losses, Mask, Number, Scale, Weights


class DBMTLState(NamedTuple):
    """State of :func:`db_mtl` with ``beta=0``."""

    task_weights: Weights


class DBMTLTrackingState(NamedTuple):
    """State of :func:`db_mtl` with ``beta>0``."""

    tracked: Any  # moving average of the gradients of the log losses, [T, ...]
    steps: Int[Array, " tasks"]  # batches in which each task was present
    remainder: Weights  # weight of the initial zero in the average
    task_weights: Weights


def db_mtl_weights(norms: Weights, mask: Mask | None = None) -> Weights:
    """Computes ``max_j n_j / n_i``, which scales all gradients to the largest norm."""
    norms = norms if mask is None else jnp.where(mask, norms, 0)
    return jnp.where(norms > 0, jnp.max(norms) / jnp.where(norms > 0, norms, 1), 0)


def _log_slopes(losses: Losses, norms: Weights) -> Weights:
    """Computes ``1/ℓ_i``, and 0 for a task with zero loss and zero gradient."""
    return jnp.where((losses == 0) & (norms == 0), 0, 1 / losses)


@factory
def db_mtl(
    num_tasks: int,
    *,
    beta: Number = 0.9,
    beta_sigma: Number = 0.5,
    bias_correction: bool = False,
    scale: Scale = "native",
) -> Balancer:
    """Dual-balancing multi-task learning (DB-MTL).

    Loss-scale balancing uses the gradients of the log losses, ``g_i/ℓ_i``.
    Gradient-magnitude balancing scales their moving averages
    ``ĝ_i ← β_k ĝ_i + (1 − β_k) g_i/ℓ_i`` to the largest norm:
    ``d = max_j ‖ĝ_j‖ Σ_i ĝ_i/‖ĝ_i‖``. Here ``β_k = β/k^σ``, and k is the number of
    batches in which the task was present.

    The average starts at zero. The paper and LibMTL do not correct this bias. The norm
    of the first update is therefore ``1 − β`` times the unbiased norm, and with σ = 0
    about ``1/(1 − β)`` steps are too small. ``bias_correction`` divides the average by
    the total weight of the gradients in it. With ``beta=0`` there is no average, and
    the weights are a function of the Gramian.

    LibMTL adds 1e-8 to losses and norms. This implementation does not, so that the
    update is exactly homogeneous. A task with a zero gradient or a zero average does
    not contribute, even if its loss is zero. A zero loss with a nonzero gradient is
    outside the domain.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      beta: Decay β of the moving average, in [0, 1). The paper searches 0.1, 0.5 and
        0.9. LibMTL uses 0.9. With a traced β the state contains the average even if the
        value is zero.
      beta_sigma: Exponent σ ≥ 0. The paper searches 0 and 0.5 and obtains better
        results with 0.5, the default here. LibMTL uses 0.
      bias_correction: Whether to correct the bias of the average. Not in the paper.
      scale: ``"native"``, or the update scaled such that the weights of the gradients,
        ``max_j ‖ĝ_j‖ / (‖ĝ_i‖ ℓ_i)``, have the ``"sum"`` or ``"mean"`` scale.

    Returns:
      A :class:`mtljax.Balancer` that reads ``losses``, which must not be negative, and
      the stacked gradients. A step costs T backward passes. The state contains T copies
      of the gradient in float32 and 2 T numbers. Initialise it with the parameters that
      are balanced, see :func:`mtljax.shared_params`. With ``beta=0`` the balancer reads
      the Gramian instead of the gradients, and the state has T numbers.

    Raises:
      ValueError: If ``beta`` or ``beta_sigma`` is out of its range, or the state was
        initialised with other parameters.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.db_mtl(2, beta=0.0)
      >>> grads = {"w": jnp.array([[3.0, 0.0], [0.0, 10.0]])}
      >>> state = balancer.init({"w": jnp.zeros(2)})
      >>> update, _ = balancer.update(grads, state, losses=jnp.array([1.0, 5.0]))
      >>> update["w"].tolist()
      [3.0, 3.0]

    References:
      Lin et al., `Dual-Balancing for Multi-Task Learning
      <https://arxiv.org/abs/2308.12029>`_, 2023.
    """
    check_choice("db_mtl", "scale", scale, Scale)
    check_number("db_mtl", "beta", beta, at_least=0.0, below=1.0)
    check_number("db_mtl", "beta_sigma", beta_sigma, at_least=0.0)
    ones = jnp.ones(num_tasks, jnp.float32)

    def weigh(state, *, losses, gramian, mask):
        norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))
        slopes = _log_slopes(losses.astype(norms.dtype), norms)
        return slopes * db_mtl_weights(norms * slopes, mask), state

    # Inside a trace, np.asarray reads a concrete array, but an operator of jnp would
    # return a tracer.
    if not isinstance(beta, Tracer) and np.asarray(beta) == 0:
        return from_weights(
            "db_mtl",
            num_tasks,
            init=lambda: DBMTLState(ones),
            weigh=weigh,
            needs="gramian",
            native="free",
            scale=scale,
            reads_losses=True,
            domain=lambda losses: losses >= 0,
        )

    def init(params):
        return DBMTLTrackingState(
            zeros_like_stacked(params, num_tasks),
            jnp.zeros(num_tasks, jnp.int32),
            ones,
            ones,
        )

    def combine(state, grads, *, losses, mask):
        check_tracked("db_mtl", state.tracked, grads)
        steps = state.steps + mask
        kept = beta / jnp.maximum(steps, 1).astype(jnp.float32) ** beta_sigma
        inverse = _log_slopes(losses, row_norms(grads))
        tracked = follow(state.tracked, grads, 1 - kept, mask, inverse)
        remainder = jnp.where(mask, state.remainder * kept, state.remainder)
        present = stack.select(tracked, mask)
        norms = row_norms(present)
        correction = (
            1 / (1 - jnp.where(mask, remainder, 0)) if bias_correction else ones
        )
        factors = db_mtl_weights(norms * correction, mask) * correction
        native = jnp.where(mask, factors * inverse, 0)
        weights = rescale(native, mask, scale, "free")
        total = native.sum()
        change = jnp.where(total > 0, weights.sum() / jnp.where(total > 0, total, 1), 1)
        update = stack.combine(present, factors * change)
        return update, DBMTLTrackingState(tracked, steps, remainder, weights)

    return from_grads(
        "db_mtl",
        num_tasks,
        init=init,
        combine=combine,
        reads_losses=True,
        domain=lambda losses: losses >= 0,
    )
