"""Gradient Vaccine: turn gradients until their angles are what they usually are."""

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
    """Weights of the sum of the turned gradients, and the new targets.

    ``orders[i]`` is the order in which task i meets the others. A turned gradient is a
    combination of the originals, so T coefficients describe it.
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

    PCGrad turns a gradient only when its cosine φ with another is negative, and up to
    zero. GradVac keeps a running mean ``φ̂_ij`` of the cosines of each pair, and turns
    ``g_i'`` towards ``g_j`` whenever ``φ < φ̂_ij``, until it is at that cosine:
    ``g_i' += ‖g_i'‖ (φ̂√(1−φ²) − φ√(1−φ̂²)) / (‖g_j‖√(1−φ̂²)) g_j``. Then
    ``φ̂_ij ← (1−β) φ̂_ij + β φ``, from ``φ̂ = 0``. The first step, and β = 0, are PCGrad.

    φ is measured after the turns towards earlier tasks and before this one, as in all
    codebases. A pair with a zero gradient neither turns nor learns. The gradient is
    treated as a whole; :func:`mtljax.per_layer` gives the paper's choice per layer.

    Args:
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      key: Seeds the random order; lives in the state.
      beta: β of the running mean, in [0, 1]. 0.01 in the paper; LibMTL and TorchJD
        default to 0.5.
      update_always: The running mean follows every cosine (paper, LibMTL, TorchJD);
        False: only those below it (SamsungLabs' and ForkMerge's code).
      order: ``"fixed"`` visits tasks 0, 1, … instead (deterministic).
      scale: ``"native"`` and ``"sum"`` add the turned gradients; ``"mean"`` averages
        them.

    Returns:
      A balancer; needs the Gramian: T backward passes and O(T⁴) scalar work. State: the
      key and T² cosines. No promise of non-conflict beyond PCGrad's for T = 2, β = 0.

    Raises:
      ValueError: If β is outside [0, 1] or ``order`` unknown.

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
