"""ARML: auxiliary weights that align the gradient with the main task."""

from typing import Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from mtljax.balancer import (
    Balancer,
    check_choice,
    check_num_tasks,
    check_number,
    factory,
    from_weights,
)
from mtljax.forkmerge import _checks as checks
from mtljax.solvers import project_simplex
from mtljax.types import Scale, Weights

Projection: TypeAlias = Literal["exact", "released"]


class ARMLState(NamedTuple):
    """State of :func:`arml`."""

    learned: Weights
    steps: Int[Array, ""]
    task_weights: Weights


@factory
def arml(
    num_tasks: int,
    *,
    main: int = 0,
    learning_rate: ArrayLike = 0.05,
    update_every: int = 20,
    projection: Projection = "exact",
    scale: Scale = "native",
) -> Balancer:
    """Auxiliary task reweighting for minimum-data learning (ARML), without noise.

    The update is ``d = g_m + Σ_{k≠m} α_k g_k`` for the main task m, with ``α_k = 1``
    initially. Every N steps, ``α <- Π(α − β ∇_α ‖g_m − Σ_k α_k g_k‖²)``. Π is the
    projection onto ``α ≥ 0, Σ α_k = K`` for K auxiliary tasks. The paper uses the
    weighted likelihood of the auxiliary tasks as a prior of the parameters. The method
    minimises the distance between the score function (the gradient of the logarithm)
    of this prior and that of the likelihood of the main task.

    The method follows the authors' released code for semi-supervised learning. Its β
    and N are the defaults. There are three differences:

    - In the released code, the model takes no step on the batches that change α.
    - The released code approximates Π by a shift to the sum K, followed by clipping at
      0. Use ``projection="released"`` for this variant.
    - The noise of the Langevin dynamics in the paper belongs to the optimizer, for
      example ``optax.add_noise``. The released script disables it by default.

    Args:
      num_tasks: T, at least two, length of the leading axis of every leaf.
      main: Index m of the main task.
      learning_rate: β. Inner products of gradients have the unit of squared losses.
      update_every: N.
      projection: ``"exact"`` or ``"released"``. The latter may return a sum above K.
      scale: Scale of the update. The native scale is ``"sum"``.

    Returns:
      A balancer that needs the Gramian, which costs T backward passes. The state
      contains 2 T numbers. α is updated only on batches with all tasks (inferred).

    Raises:
      ValueError: If ``main`` is not the index of a task, if no other task exists, or
        if ``learning_rate`` or ``update_every`` is not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax import forkmerge
      >>> balancer = forkmerge.arml(3, learning_rate=0.1, update_every=1)
      >>> grads = {"w": jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])}
      >>> _, state = balancer.update(grads, balancer.init(grads))
      >>> state.learned.tolist()
      [1.0, 1.1, 0.9]

    References:
      Shi et al., `Auxiliary Task Reweighting for Minimum-data Learning
      <https://arxiv.org/abs/2010.08244>`_, 2020.
    """
    check_num_tasks("arml", num_tasks)
    checks.task_index("arml", num_tasks, main)
    if num_tasks < 2:
        raise ValueError(
            "arml: with num_tasks=1 there is no auxiliary task. Use at least 2 tasks."
        )
    check_number("arml", "learning_rate", learning_rate, above=0)
    if update_every < 1:
        raise ValueError(f"arml: update_every must be positive, not {update_every}.")
    check_choice("arml", "projection", projection, Projection)
    helpers = num_tasks - 1

    def project(alpha: Weights, auxiliary: Array) -> Weights:
        if projection == "exact":
            return helpers * project_simplex(alpha / helpers, auxiliary)
        total = jnp.where(auxiliary, alpha, 0).sum()
        return jnp.maximum(alpha + (helpers - total) / helpers, 0)

    def init():
        learned, used = (jnp.ones(num_tasks, jnp.float32) for _ in "12")
        return ARMLState(learned, jnp.int32(0), used)

    def weigh(state, *, losses, gramian, mask):
        del losses
        auxiliary = jnp.arange(num_tasks) != main
        alpha = jnp.where(auxiliary, state.learned, 0)
        pull = jnp.matmul(gramian, alpha, precision="highest")
        moved = alpha - learning_rate * 2 * (pull - gramian[main])
        steps = state.steps + 1
        due = (steps >= update_every) & mask.all()
        learned = jnp.where(due & auxiliary, project(moved, auxiliary), state.learned)
        learned = learned.at[main].set(1)
        new = state._replace(
            learned=learned.astype(state.learned.dtype),
            steps=jnp.where(due, 0, steps),
        )
        return state.learned, new

    return from_weights(
        "arml",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="gramian",
        native="sum",
        scale=scale,
    )
