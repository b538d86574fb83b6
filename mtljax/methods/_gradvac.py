"""GradVac: aligns gradient pairs to the running mean of their cosine."""

from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mtljax.balancer import Balancer, check_choice, check_number, factory, from_weights
from mtljax.types import Gramian, Mask, Number, Scale, Weights

Order: TypeAlias = Literal["random", "fixed"]
Cosines: TypeAlias = Float[Array, "tasks tasks"]


class GradVacState(NamedTuple):
    """State of :func:`gradvac`."""

    key: PRNGKeyArray  # consumed by the next update
    targets: Cosines  # running mean of the cosine of g_i' and g_j
    task_weights: Weights


def gradvac_weights(
    gramian: Gramian,
    targets: Cosines,
    orders: Int[Array, "tasks tasks"],
    beta: Number,
    mask: Mask | None = None,
    *,
    update_always: bool = True,
) -> tuple[Weights, Cosines]:
    """Computes the weights of the sum of the modified gradients, and the new targets.

    ``orders[i]`` is the order in which gradient i is compared with the others. A
    modified gradient is a linear combination of the original gradients and is
    represented by T coefficients.
    """
    num = gramian.shape[0]
    dtype = gramian.dtype
    eps = jnp.finfo(dtype).eps
    mask = jnp.ones(num, bool) if mask is None else mask
    largest = jnp.max(jnp.diagonal(gramian), where=mask, initial=0)
    gramian = gramian / jnp.where(largest > 0, largest, 1)
    norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))

    def turn(task, goals, order):
        def meet(carry, other):
            coefficients, goals = carry
            slope = jnp.matmul(gramian, coefficients, precision="highest")
            length = jnp.sqrt(jnp.maximum(coefficients @ slope, 0))
            product = length * norms[other]
            takes_part = (other != task) & mask[task] & mask[other] & (product > 0)
            cosine = slope[other] / jnp.where(takes_part, product, 1)
            cosine = jnp.clip(cosine, -1, 1)
            goal = goals[other]
            turns = takes_part & (cosine < goal)
            sine = jnp.sqrt(jnp.maximum(1 - cosine**2, 0))
            goal_sine = jnp.sqrt(jnp.maximum(1 - goal**2, eps))
            amount = length * (goal * sine - cosine * goal_sine)
            amount = amount / (jnp.where(turns, norms[other], 1) * goal_sine)
            coefficients = coefficients.at[other].add(jnp.where(turns, amount, 0))
            learns = takes_part if update_always else turns
            moved = (1 - beta) * goal + beta * cosine
            goals = goals.at[other].set(jnp.where(learns, moved, goal))
            return (coefficients, goals), None

        start = jax.nn.one_hot(task, num, dtype=dtype)
        return jax.lax.scan(meet, (start, goals.astype(dtype)), order)[0]

    turned, targets = jax.vmap(turn)(jnp.arange(num), targets, orders)
    return jnp.where(mask[:, None], turned, 0).sum(axis=0), targets


@factory
def gradvac(
    num_tasks: int,
    *,
    key: PRNGKeyArray,
    beta: Number = 0.01,
    update_always: bool = True,
    order: Order = "random",
    scale: Scale = "native",
) -> Balancer:
    """Gradient Vaccine (GradVac).

    PCGrad modifies a gradient only if its cosine φ with another gradient is negative,
    and increases this cosine to zero. GradVac keeps a running mean ``φ̂_ij`` of the
    cosine of each pair. If ``φ < φ̂_ij``, it adds a multiple of ``g_j`` to ``g_i'`` such
    that the cosine becomes ``φ̂_ij``:
    ``g_i' += ‖g_i'‖ (φ̂√(1−φ²) − φ√(1−φ̂²)) / (‖g_j‖√(1−φ̂²)) g_j``. The running mean is
    ``φ̂_ij ← (1−β) φ̂_ij + β φ`` and starts at 0. The first step is that of PCGrad, and
    so is every step with β = 0.

    φ is measured after the changes for earlier tasks and before the change for this
    task, as in all codebases. If a gradient of a pair is zero, neither the gradients
    nor the running mean of the pair change. The method acts on the whole gradient. Use
    :func:`mtljax.per_layer` for the variant per layer of the paper.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      key: Key of ``jax.random`` for the order of the tasks, stored in the state.
      beta: Rate β of the running mean, in [0, 1]. The paper uses 0.01. LibMTL and
        TorchJD default to 0.5.
      update_always: Whether each cosine updates the running mean, as in the paper,
        LibMTL and TorchJD. With False only cosines below it do, as in the code of
        SamsungLabs and ForkMerge.
      order: ``"random"`` samples an order for each task. ``"fixed"`` uses the order 0,
        1, …, which is deterministic.
      scale: ``"native"`` and ``"sum"`` sum the modified gradients. ``"mean"`` averages
        them.

    Returns:
      A :class:`mtljax.Balancer` that reads the Gramian. A step costs T backward passes
      and O(T⁴) scalar operations. The state contains the key and T² cosines. The update
      is guaranteed to conflict with no task only for T = 2 and β = 0, as in PCGrad.

    Raises:
      ValueError: If ``beta`` is outside [0, 1], or ``order`` is unknown.

    Examples:
      >>> import jax, jax.numpy as jnp, mtljax
      >>> balancer = mtljax.gradvac(2, key=jax.random.key(0))
      >>> grads = {"w": jnp.array([[1.0, 0.0], [-1.0, 1.0]])}
      >>> balancer.update(grads, balancer.init(grads))[0]["w"].tolist()
      [0.5, 1.5]

    References:
      Wang et al., `Gradient Vaccine: Investigating and Improving Multi-task
      Optimization in Massively Multilingual Models
      <https://arxiv.org/abs/2010.05874>`_, 2020.
    """
    check_number("gradvac", "beta", beta, at_least=0.0, at_most=1.0)
    check_choice("gradvac", "order", order, Order)

    def init():
        targets = jnp.zeros((num_tasks, num_tasks), jnp.float32)
        return GradVacState(key, targets, jnp.ones(num_tasks, jnp.float32))

    def weigh(state, *, losses, gramian, mask):
        del losses
        next_key, draw = jax.random.split(state.key)
        tasks = jnp.arange(num_tasks)
        orders = jnp.broadcast_to(tasks, (num_tasks, num_tasks))
        if order == "random":
            orders = jax.random.permutation(draw, orders, axis=1, independent=True)
        weights, targets = gradvac_weights(
            gramian, state.targets, orders, beta, mask, update_always=update_always
        )
        return weights, state._replace(key=next_key, targets=targets)

    return from_weights(
        "gradvac",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="gramian",
        native="sum",
        scale=scale,
    )
