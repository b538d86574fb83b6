"""AdaTask: one optimiser state a task, the directions added up."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from mtljax import stack
from mtljax.alternating import _states as states
from mtljax.alternating._schedule import ROUNDING, draw_key
from mtljax.balancer import (
    Balancer,
    as_mask,
    check_choice,
    check_num_tasks,
    commit,
)


class AdaTaskState(NamedTuple):
    """State of :func:`adatask`."""

    batch: Int[Array, ""]  # updates made
    key: PRNGKeyArray | None
    tasks: Any  # optimiser states, every leaf [T, ...]


def adatask(
    optimizer: optax.GradientTransformation,
    num_tasks: int,
    *,
    moments: states.Moments = "full",
    key: PRNGKeyArray | None = None,
) -> Balancer:
    """An optimiser per task over stacked gradients: per-task moments, one update.

    ``u = Σ_t O(g_t, s_t)``. With Adam every task's gradient is divided by its own
    second moment before they meet, so that none drowns the others by its scale. Equal
    to :func:`alternate` with ``groups=1, state="per_task"``, but takes gradients from
    anywhere. The shared parameters are meant; give own ones the optimiser itself::

        optax.partition({"shared": adatask(optax.adam(1e-3), 3),
                         "own": optax.adam(1e-3)}, labels)

    Args:
      optimizer: Any optax optimiser whose state is made of arrays, learning rate
        included, or only ``optax.scale_by_adam()`` with the rest behind it in the
        chain: weight decay inside it would act T times. Its schedules read the number
        of updates, whichever tasks were present.
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      moments: See :func:`alternate`.
      key: Seeds the rounding of ``moments="bfloat16"``.

    Returns:
      A balancer that needs the stacked gradients (T backward passes); its result is an
      update, not a gradient. ``mask`` ``[T]``: an absent task adds nothing and its
      state stays. A non-finite gradient gives a non-finite update and leaves the state.
      State: T times the optimiser's.

    Raises:
      ValueError: If the optimiser's state cannot be stacked, or a key is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from mtljax.alternating import adatask
      >>> opt = adatask(optax.adam(0.1), 2)
      >>> params = {"w": jnp.zeros(2)}
      >>> grads = {"w": jnp.array([[1.0, 1.0], [-1000.0, 1000.0]])}
      >>> updates, _ = opt.update(grads, opt.init(params), params)
      >>> updates["w"].round(3).tolist()
      [0.0, -0.2]

    References:
      Yang et al., `AdaTask: A Task-aware Adaptive Learning Rate Approach to Multi-task
      Learning <https://arxiv.org/abs/2211.15055>`_, 2022.
    """
    name = "adatask"
    check_num_tasks(name, num_tasks)
    check_choice(name, "moments", moments, states.Moments)
    if moments == "bfloat16" and key is None:
        raise ValueError(
            f"{name}: moments='bfloat16' rounds at random; pass "
            "key=jax.random.key(...)."
        )

    def init(params):
        states.check(name, optimizer, params)
        kept = states.shrink(states.copies(optimizer.init, params, num_tasks), moments)
        return AdaTaskState(jnp.zeros((), jnp.int32), key, kept)

    def update(updates, state, params=None, *, losses=None, mask=None, **extra_args):
        del extra_args
        stack.check(updates, num_tasks, name)
        present = as_mask(name, num_tasks, mask)
        if mask is not None:
            updates = stack.select(updates, present)
        healthy = stack.all_finite(updates)
        shapes = jax.tree.map(lambda g: g[0], updates) if params is None else params

        def one(grad, kept, value):
            return states.step(
                optimizer,
                grad,
                states.widen(optimizer, shapes, kept),
                params,
                batch=state.batch,
                value=value,
            )

        values = jnp.zeros(num_tasks) if losses is None else jnp.asarray(losses)
        each, new = jax.vmap(one)(updates, state.tasks, values)
        each = stack.select(each, present)
        healthy &= jnp.isfinite(jnp.where(present, values, 0)).all()
        rounding = state.key
        if rounding is not None:
            rounding = draw_key(rounding, ROUNDING, state.batch)
        new = states.narrow(new, state.tasks, rounding)

        def kept(n, o):
            return jnp.where(present.reshape((-1,) + (1,) * (n.ndim - 1)), n, o)

        moved = AdaTaskState(
            state.batch + present.any().astype(jnp.int32),
            state.key,
            jax.tree.map(kept, new, state.tasks),
        )
        update = jax.tree.map(lambda u, g: u.sum(0).astype(g.dtype), each, updates)
        return commit(healthy, update, moved, state)

    return Balancer(init, update, name=name, num_tasks=num_tasks, needs="grads")
