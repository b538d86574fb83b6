"""Smooth Tchebycheff scalarisation: a soft maximum of the losses."""

from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
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
    """State of :func:`stch`; only ``form="mtl"`` moves it."""

    nadir: Losses  # mean loss of each task over its steps of recording so far
    steps: Int[Array, " tasks"]  # of each task, counted to the end of the recording
    task_weights: Weights


def _soft_max(
    terms: Float[Array, " tasks"], mu: Number, mask: Mask | None
) -> Float[Array, " tasks"]:
    """``softmax(terms/μ)``, centred before the division so that μ may be small."""
    top = jnp.max(terms, where=mask, initial=-jnp.inf)
    return jax.nn.softmax((terms - top) / mu, where=mask)


def stch_weights(
    losses: Losses,
    preference: Weights,
    ideal: Losses | HostVector,
    mu: Number,
    mask: Mask | None = None,
) -> Weights:
    """Gradient of ``μ log Σ_i exp(λ_i (ℓ_i − z_i)/μ)`` in the losses."""
    excess = losses - jnp.asarray(ideal, losses.dtype)
    return preference * _soft_max(preference * excess, mu, mask)


def stch_mtl_weights(
    losses: Losses, nadir: Losses, mu: Number, mask: Mask | None = None
) -> Weights:
    """Gradient of ``n μ log Σ_i (ℓ_i/ℓ_i^nadir)^{1/μ}`` over n present tasks."""
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

    ``form="set"``, the paper's equation, descends
    ``μ log Σ_i exp(λ_i (ℓ_i − z_i)/μ)``, which tends to the weighted maximum
    ``max_i λ_i (ℓ_i − z_i)`` as μ → 0: unlike linear scalarisation it can reach all of
    a non-convex Pareto front.

    ``form="mtl"`` is what the authors train networks with (their ``STCH_MTL``, LibMTL):
    ``warmup_steps`` steps that descend ``Σ log ℓ_i``, ``nadir_steps`` more during which
    the mean loss ``ℓ_i^nadir`` of every task is recorded, then
    ``T μ log Σ_i exp(log(ℓ_i/ℓ_i^nadir)/μ)``. It has neither preference nor ideal
    point. The steps of a task are those it was present in, and the warm-up lasts until
    all present tasks are through theirs.

    Args:
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      mu: μ, positive; the paper tries 0.01, 0.1, 0.5 and 1. 1 is LibMTL's default.
      preference: λ ``[T]`` of the set form, not negative; equal by default. Normalised
        to sum to 1 over the tasks present. May be a traced array.
      ideal: z ``[T]`` of the set form, or one number; 0 by default, as in TorchJD.
      form: ``"set"`` or ``"mtl"``.
      warmup_steps: Of the MTL form, which requires it: a number of epochs (4 in
        LibMTL) times your steps per epoch.
      nadir_steps: Of the MTL form; one epoch in the authors' code. By default a quarter
        of ``warmup_steps``, at least one, which is LibMTL's proportion.
      scale: ``"native"`` are the derivatives: they sum to less than 1 in the set form.
        ``"sum"`` and ``"mean"`` normalise them.

    Returns:
      A balancer; needs ``losses`` (positive ones in the MTL form) and reads, in the set
      form, the side input ``preference``, which replaces the constant. One backward
      pass; state: none, 2 T numbers in the MTL form.

    Raises:
      ValueError: If ``mu`` is not positive, the form is unknown, an argument belongs to
        the other form or has another length than T, a preference is negative or zero
        throughout, or (MTL form) a concrete loss is not positive.

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
    zero = isinstance(ideal, (int, float)) and ideal == 0
    if form == "mtl" and not (preference is None and zero):
        raise ValueError('stch: form="mtl" has no preference and no ideal point.')

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
    """First step of the recording and first step after it."""
    if form == "set":
        for argument, value in (
            ("warmup_steps", warmup_steps),
            ("nadir_steps", nadir_steps),
        ):
            if value is not None:
                raise ValueError(f'stch: {argument}={value} belongs to form="mtl".')
        return 0, 0
    if warmup_steps is None or warmup_steps < 0:
        raise ValueError(
            'stch: form="mtl" needs warmup_steps, at least 0 (4 epochs in the '
            f"authors' code), not {warmup_steps}."
        )
    if nadir_steps is None:
        nadir_steps = max(1, warmup_steps // 4)
    if nadir_steps < 1:
        raise ValueError(f"stch: nadir_steps must be at least 1, not {nadir_steps}.")
    return warmup_steps, warmup_steps + nadir_steps
