"""STCH: smooth Tchebycheff scalarisation, a soft maximum of the losses."""

from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from mtljax.balancer import Balancer, check_choice, check_number, factory, from_weights
from mtljax.methods._preference import (
    HostVector,
    TaskVector,
    constant_preference,
    present_preference,
    task_vector,
)
from mtljax.types import Losses, Mask, Number, Scale, Weights

Form: TypeAlias = Literal["set", "mtl"]


class STCHState(NamedTuple):
    """State of :func:`stch`. Only ``form="mtl"`` changes it."""

    nadir: Losses  # mean loss of each task over the recorded steps
    steps: Int[Array, " tasks"]  # steps of each task, at most to the end of recording
    task_weights: Weights


def _soft_max(
    terms: Float[Array, " tasks"], mu: Number, mask: Mask | None
) -> Float[Array, " tasks"]:
    """Computes ``softmax(terms/μ)``, centred before the division for small μ."""
    top = jnp.max(terms, where=mask, initial=-jnp.inf)
    return jax.nn.softmax((terms - top) / mu, where=mask)


def stch_weights(
    losses: Losses,
    preference: Weights,
    ideal: Losses | HostVector,
    mu: Number,
    mask: Mask | None = None,
) -> Weights:
    """Computes the gradient of ``μ log Σ_i exp(λ_i (ℓ_i − z_i)/μ)`` for the losses."""
    excess = losses - jnp.asarray(ideal, losses.dtype)
    return preference * _soft_max(preference * excess, mu, mask)


def stch_mtl_weights(
    losses: Losses, nadir: Losses, mu: Number, mask: Mask | None = None
) -> Weights:
    """Computes the gradient of ``n μ log Σ_i (ℓ_i/ℓ_i^nadir)^{1/μ}`` for the losses.

    n is the number of present tasks.
    """
    mask = jnp.ones(losses.shape, bool) if mask is None else mask
    return mask.sum() * _soft_max(jnp.log(losses) - jnp.log(nadir), mu, mask) / losses


@factory
def stch(
    num_tasks: int,
    *,
    mu: Number = 1.0,
    preference: TaskVector | None = None,
    ideal: Number | TaskVector = 0.0,
    form: Form = "set",
    warmup_steps: int | None = None,
    nadir_steps: int | None = None,
    scale: Scale = "native",
) -> Balancer:
    """Smooth Tchebycheff scalarisation (STCH).

    ``form="set"`` is the equation of the paper. The objective is
    ``μ log Σ_i exp(λ_i (ℓ_i − z_i)/μ)`` with the preference λ and the ideal point z. It
    tends to the weighted maximum ``max_i λ_i (ℓ_i − z_i)`` as μ → 0. Unlike linear
    scalarisation, it can reach every point of a non-convex Pareto front.

    ``form="mtl"`` is the form with which the authors train networks (their ``STCH_MTL``
    and LibMTL). The first ``warmup_steps`` steps descend ``Σ log ℓ_i``. The next
    ``nadir_steps`` steps also record the mean loss ``ℓ_i^nadir`` of each task. All
    further steps descend ``T μ log Σ_i exp(log(ℓ_i/ℓ_i^nadir)/μ)``. This form has no
    preference and no ideal point. The steps of a task are those in which it was
    present. The third phase starts when all present tasks have completed the first two.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      mu: Smoothing parameter μ, positive. The paper evaluates 0.01, 0.1, 0.5 and 1.
        LibMTL defaults to 1.
      preference: Preference λ of the set form, shape ``[T]``, non-negative, equal by
        default. It is normalised to sum to 1 over the present tasks. It may be traced.
      ideal: Ideal point z of the set form, a number or shape ``[T]``. The default 0 is
        that of TorchJD.
      form: ``"set"`` or ``"mtl"``.
      warmup_steps: Number of warm-up steps. Required by the MTL form. LibMTL uses 4
        epochs, so multiply 4 by the number of steps per epoch.
      nadir_steps: Number of steps over which the MTL form averages the losses. The
        authors' code uses one epoch. The default is a quarter of ``warmup_steps``, at
        least one, as in LibMTL.
      scale: ``"native"`` are the derivatives, which sum to less than 1 in the set form.
        ``"sum"`` and ``"mean"`` normalise them.

    Returns:
      A :class:`mtljax.Balancer` that reads ``losses``, which must be positive in the
      MTL form. In the set form it also reads the side input ``preference``, which
      overrides the constant. A step costs one backward pass. The state has 2 T numbers
      in the MTL form. In the set form it is constant.

    Raises:
      ValueError: If ``mu`` is not positive, the form is unknown, an argument belongs to
        the other form or does not have T entries, a preference is negative, all
        preferences are zero, ``warmup_steps`` is missing or negative in the MTL form,
        or ``nadir_steps`` is less than 1.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.stch(2, mu=0.5)
      >>> grads = {"w": jnp.eye(2)}
      >>> losses = jnp.array([1.0, 2.0])
      >>> balancer.update(grads, balancer.init(grads), losses=losses)[0]["w"].tolist()
      [0.134, 0.366]

    References:
      Lin et al., `Smooth Tchebycheff Scalarization for Multi-Objective Optimization
      <https://arxiv.org/abs/2402.19078>`_, 2024.
    """
    check_choice("stch", "form", form, Form)
    check_number("stch", "mu", mu, above=0.0)
    origin = task_vector("stch", "ideal", num_tasks, ideal)
    constant = constant_preference("stch", num_tasks, preference)
    start, end = _phases(form, warmup_steps, nadir_steps)
    # A traced ideal point is not checked, as all traced hyper-parameters.
    zero = isinstance(ideal, Tracer) or (np.ndim(ideal) == 0 and np.asarray(ideal) == 0)
    if form == "mtl" and not (preference is None and zero):
        raise ValueError(
            'stch: form="mtl" has no preference and no ideal point. Remove these '
            'arguments or use form="set".'
        )

    def init():
        ones = jnp.ones(num_tasks, jnp.float32)
        return STCHState(ones, jnp.zeros(num_tasks, jnp.int32), ones)

    def weigh_set(state, *, losses, gramian, mask, preference):
        del gramian
        chosen = present_preference("stch", constant, preference, mask, losses.dtype)
        return stch_weights(losses, chosen, origin, mu, mask), state

    def weigh_mtl(state, *, losses, gramian, mask):
        del gramian
        ready = ((state.steps >= end) | ~mask).all()
        weights = jnp.where(
            ready,
            stch_mtl_weights(losses, state.nadir, mu, mask),
            1 / losses,
        )
        recording = mask & (state.steps >= start) & (state.steps < end)
        share = 1 / jnp.maximum(state.steps - start + 1, 1)
        nadir = state.nadir + share * (losses - state.nadir)
        return weights, STCHState(
            nadir=jnp.where(recording, nadir, state.nadir),
            steps=jnp.minimum(state.steps + mask, end),
            task_weights=weights,
        )

    return from_weights(
        "stch",
        num_tasks,
        init=init,
        weigh=weigh_set if form == "set" else weigh_mtl,
        needs="losses",
        native="free",
        scale=scale,
        reads_losses=True,
        positive_losses=form == "mtl",
        side_inputs=("preference",) if form == "set" else (),
    )


def _phases(
    form: Form, warmup_steps: int | None, nadir_steps: int | None
) -> tuple[int, int]:
    """Returns the first step of the recording and the first step after it."""
    if form == "set":
        for argument, value in (
            ("warmup_steps", warmup_steps),
            ("nadir_steps", nadir_steps),
        ):
            if value is not None:
                raise ValueError(
                    f'stch: {argument}={value} belongs to form="mtl". Remove it or use '
                    'form="mtl".'
                )
        return 0, 0
    if warmup_steps is None or warmup_steps < 0:
        raise ValueError(
            'stch: form="mtl" needs warmup_steps of at least 0 (4 epochs in the '
            f"authors' code), not {warmup_steps}."
        )
    if nadir_steps is None:
        nadir_steps = max(1, warmup_steps // 4)
    if nadir_steps < 1:
        raise ValueError(f"stch: nadir_steps must be at least 1, not {nadir_steps}.")
    return warmup_steps, warmup_steps + nadir_steps
