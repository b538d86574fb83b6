"""AdaTask: one optimizer state per task, and the sum of their updates."""

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
    choose,
    commit,
)


class AdaTaskState(NamedTuple):
    """State of :func:`adatask`."""

    batch: Int[Array, ""]  # number of updates
    key: PRNGKeyArray | None
    tasks: Any  # optimizer states, every leaf [T, ...]


def adatask(
    optimizer: optax.GradientTransformation,
    num_tasks: int,
    *,
    moments: states.Moments = "full",
    key: PRNGKeyArray | None = None,
) -> Balancer:
    """AdaTask: applies one optimizer per task and adds the updates.

    The update is ``u = Σ_t O(g_t, s_t)`` for the stacked gradients ``g_t``. With Adam,
    the gradient of each task is divided by its own second moment before the sum.
    Therefore no task dominates by the scale of its gradient. The result equals that of
    :func:`alternate` with ``groups=1, state="per_task"``, but the gradients may come
    from any source. Apply it to the shared parameters, and the plain optimizer to the
    own parameters::

        optax.partition({"shared": adatask(optax.adam(1e-3), 3),
                         "own": optax.adam(1e-3)}, labels)

    Args:
      optimizer: Any optax optimizer whose state consists of arrays, including the
        learning rate. It may also be ``optax.scale_by_adam()``, followed by the other
        transformations in the chain. Weight decay inside it would be applied T times.
        Its schedules read the number of updates, independently of the present tasks.
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      moments: See :class:`StepOptions`.
      key: Random key of the rounding with ``moments="bfloat16"``.

    Returns:
      A balancer that reads the stacked gradients (T backward passes). Its result is the
      update of an optimizer, and not a gradient. A task that is absent by ``mask``,
      shape ``[T]``, contributes nothing, and its state is unchanged. A non-finite
      gradient gives a NaN update and an unchanged state. The state is T times that of
      the optimizer.

    Raises:
      ValueError: If the optimizer state cannot be stacked, or if ``num_tasks``,
        ``moments`` or ``key`` is invalid or missing.

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
            return choose(present.reshape((-1,) + (1,) * (n.ndim - 1)), n, o)

        moved = AdaTaskState(
            state.batch + present.any().astype(jnp.int32),
            state.key,
            jax.tree.map(kept, new, state.tasks),
        )
        update = jax.tree.map(lambda u, g: u.sum(0).astype(g.dtype), each, updates)
        return commit(healthy, update, moved, state)

    return Balancer(init, update, name=name, num_tasks=num_tasks, needs="grads")
