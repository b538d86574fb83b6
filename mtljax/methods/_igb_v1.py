"""IGBv1: more weight to the tasks whose loss is still large for its own scale."""

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
    average: Losses  # of the losses; the last ones with ema=0
    log_weights: Weights  # λ of the last batch in which each task was present
    task_weights: Weights  # λ_i / L_i


def igb_v1_log_weights(
    gaps: Losses, mask: Mask | None = None, temperature: Number = 1.0
) -> Weights:
    """``λ = n softmax(gap / τ)`` over the n present tasks (Eq. 3)."""
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

    Descends ``Σ_i λ_i log L_i`` with ``λ = n softmax(L / L_base)``, a constant for
    differentiation: ``d = Σ_i (λ_i / L_i) g_i``. ``L_base,i`` is the mean loss of task
    i over an early window of steps; ``L_i / L_base,i`` is the *improvable gap*, the
    distance to a final loss that is taken to be 0. Until the window is over ``λ = 1``,
    which is :func:`scale_invariant`. As all losses fall all gaps tend to 0, so that
    late in training the method turns into that again (inferred, not in the paper).
    Multiplying a loss by a constant changes nothing.

    Before a gradient balancer (``mtljax.compose(igb_v1(T), mgda(T))``) own parameters
    get either both weights (``heads="weighted"``: the authors' code for MGDA, IMTL-G
    and Nash-MTL) or λ/L alone (the paper's Algorithm 3): ``optax.partition({"shared":
    chain(compose(igb, mgda), adam), "own": chain(igb, adam)}, labels)``.

    Args:
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      window: ``(start, stop)``: steps whose losses make ``L_base``, all of equal
        weight. The paper's is the second epoch, ``(n, 2 * n)`` for n steps per epoch:
        in the first, losses may be too large to tell the scale. The default is its
        NYUv2 run's. ``(0, 1)`` takes the losses of the first batch.
      base: ``L_base`` itself ``[T]``, where it is known; there is no window then.
      num_steps: Steps of the run, where known, to check the window against.
      temperature: τ in ``softmax(gap / τ)``. Not in the paper (1): smaller is stronger.
      ema: Decay of a moving average of the losses that the gaps are taken of. Not in
        the paper (0: the losses of the batch).
      floors: Estimates ``ℓ*`` ``[T]`` of the final losses:
        ``gap_i = (L_i - ℓ*_i) / (L_base,i - ℓ*_i)``. Not in the paper (0).
      scale: ``"native"``, or effective weights ``λ_i / L_i`` normalised to the
        ``"sum"`` or ``"mean"`` scale.

    Returns:
      A balancer; needs ``losses``, all positive. One backward pass; state: 4 T numbers,
      with λ as ``log_weights``. A task's window counts the batches in which it was
      present; λ is 1 until all present tasks have their ``L_base``.

    Raises:
      ValueError: If the window is empty or does not end inside the run, ``base`` or
        ``temperature`` is not positive, ``ema`` is outside [0, 1), or a shape
        is wrong.

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
