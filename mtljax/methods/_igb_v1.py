"""IGBv1: larger weights for tasks with a larger improvable gap."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mtljax.balancer import Balancer, check_number, factory, from_weights
from mtljax.methods import _igb
from mtljax.types import Losses, Mask, Number, Scale, Weights


class IGBv1State(NamedTuple):
    """State of :func:`igb_v1`."""

    base: _igb.ReferenceLosses
    average: Losses  # moving average of the losses; the last losses with ema=0
    log_weights: Weights  # λ of the last batch in which each task was present
    task_weights: Weights  # λ_i / L_i


def igb_v1_log_weights(
    gaps: Losses, mask: Mask | None = None, temperature: Number = 1.0
) -> Weights:
    """Computes ``λ = n softmax(gap / τ)`` over the n present tasks (Eq. 3)."""
    mask = jnp.ones(gaps.shape, bool) if mask is None else mask
    return mask.sum() * jax.nn.softmax(gaps / temperature, where=mask)


@factory
def igb_v1(
    num_tasks: int,
    *,
    window: tuple[int, int] = (_igb.EPOCH, 2 * _igb.EPOCH),
    base: ArrayLike | None = None,
    num_steps: int | None = None,
    temperature: Number = 1.0,
    ema: Number = 0.0,
    floors: ArrayLike | None = None,
    scale: Scale = "native",
) -> Balancer:
    """Improvable gap balancing, the heuristic version (IGBv1).

    The update descends ``Σ_i λ_i log L_i`` with ``λ = n softmax(L / L_base)``, where λ
    is constant under differentiation and n is the number of present tasks. Therefore
    ``d = Σ_i (λ_i / L_i) g_i``. ``L_base,i`` is the mean loss of task i over an early
    window of steps. ``L_i / L_base,i`` is the *improvable gap*, the distance to a final
    loss of 0. The update does not change if a loss is multiplied by a constant.

    Until the window is complete, ``λ = 1``, which is :func:`scale_invariant`. As all
    losses decrease, all gaps tend to 0. Late in training the method is therefore close
    to :func:`scale_invariant` again (inferred, not in the paper).

    Combined with a gradient balancer, ``mtljax.compose(igb_v1(T), mgda(T))``, there are
    two variants for the task-specific parameters. With ``heads="weighted"`` they
    receive both weights, as in the authors' code for MGDA, IMTL-G and Nash-MTL. In
    Algorithm 3 of the paper they receive λ/L only: ``optax.partition({"shared":
    chain(compose(igb, mgda), adam), "own": chain(igb, adam)}, labels)``.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      window: Range ``(start, stop)`` of steps whose mean losses are ``L_base``. The
        window of a task counts the batches in which it was present. The paper uses the
        second epoch, ``(n, 2 * n)`` for n steps per epoch, because losses in the first
        epoch may be too large. The default is that of its NYUv2 run. ``(0, 1)`` uses
        the first batch.
      base: Reference losses ``L_base``, shape ``[T]``, if known. The window is then not
        used.
      num_steps: Number of steps of the run, if known. It is used to check the window.
      temperature: Temperature τ of ``softmax(gap / τ)``. A smaller value gives a
        stronger effect. The paper has no temperature, which corresponds to 1.
      ema: Decay of a moving average of the losses in the gaps. The paper uses the
        losses of the batch, which corresponds to 0.
      floors: Estimates ``ℓ*`` of the final losses, shape ``[T]``:
        ``gap_i = (L_i - ℓ*_i) / (L_base,i - ℓ*_i)``. The paper uses 0.
      scale: ``"native"``, or effective weights ``λ_i / L_i`` normalised to the
        ``"sum"`` or ``"mean"`` scale.

    Returns:
      A :class:`mtljax.Balancer` that reads ``losses``, which must be positive. A step
      costs one backward pass. The state has 4 T numbers, with λ as ``log_weights``. λ
      is 1 until the window of every present task is complete.

    Raises:
      ValueError: If the window is empty or does not end inside the run, ``base`` or
        ``temperature`` is not positive, ``ema`` is outside [0, 1), or a shape is wrong.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.igb_v1(3, base=jnp.array([1.95, 0.85, 0.28]))
      >>> grads = {"w": jnp.eye(3)}
      >>> losses = jnp.array([1.5, 0.7, 0.22])
      >>> _, state = balancer.update(grads, balancer.init(grads), losses=losses)
      >>> state.log_weights.tolist()
      [0.97643, 1.03091, 0.99266]

    References:
      Dai et al., `Improvable Gap Balancing for Multi-Task Learning
      <https://arxiv.org/abs/2307.15429>`_, 2023.
    """
    reference = _igb.make_window("igb_v1", num_tasks, window, base, num_steps)
    check_number("igb_v1", "temperature", temperature, above=0.0)
    _igb.check_decay("igb_v1", ema)
    floor = jnp.zeros(num_tasks) if floors is None else jnp.asarray(floors, jnp.float32)
    if floor.shape != (num_tasks,):
        raise ValueError(
            f"igb_v1: floors has shape {floor.shape}; it must be ({num_tasks},), one "
            "final loss per task."
        )

    def init():
        ones = jnp.ones(num_tasks, jnp.float32)
        return IGBv1State(reference.init(num_tasks), 0 * ones, ones, ones)

    def weigh(state, *, losses, gramian, mask):
        del gramian
        first = state.base.steps == 0
        average = _igb.smoothed(state.average, losses, first, mask, ema)
        ready = reference.ready(state.base) | ~mask
        gap = _igb.gaps(average, state.base.mean, floor)
        share = igb_v1_log_weights(gap, mask, temperature)
        share = jnp.where(ready.all(), share, 1)
        return _igb.effective_weights(share, losses), IGBv1State(
            base=reference.update(state.base, losses, mask),
            average=average,
            log_weights=jnp.where(mask, share, state.log_weights),
            task_weights=state.task_weights,
        )

    return from_weights(
        "igb_v1",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="losses",
        native="free",
        scale=scale,
        reads_losses=True,
        positive_losses=True,
    )
