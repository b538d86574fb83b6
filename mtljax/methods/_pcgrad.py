"""PCGrad: remove from each task gradient what conflicts with the others."""

from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from mtljax.balancer import Balancer, check_choice, factory, from_weights
from mtljax.types import Gramian, Mask, Scale, Weights

Order: TypeAlias = Literal["random", "fixed"]


class PCGradState(NamedTuple):
    """State of :func:`pcgrad`."""

    key: PRNGKeyArray  # consumed by the next update
    task_weights: Weights


def pcgrad_weights(
    gramian: Gramian, orders: Int[Array, "tasks tasks"], mask: Mask | None = None
) -> Weights:
    """Weights ``w`` such that PCGrad's direction is ``Σ_i w_i g_i``.

    ``orders[i]`` is the order in which task i meets the others. Each projected
    gradient is a combination of the originals, so T coefficients describe it.
    """
    num_tasks = gramian.shape[0]
    mask = jnp.ones(num_tasks, bool) if mask is None else mask

    def surgery(task, order):
        def project(coefficients, other):
            dot = jnp.matmul(gramian[other], coefficients, precision="highest")
            conflict = (dot < 0) & (other != task) & mask[other]
            square = jnp.where(conflict, gramian[other, other], 1)
            shift = jnp.where(conflict, dot / jnp.where(square > 0, square, 1), 0)
            return coefficients.at[other].add(-shift), None

        start = jax.nn.one_hot(task, num_tasks, dtype=gramian.dtype)
        return jax.lax.scan(project, start, order)[0]

    projected = jax.vmap(surgery)(jnp.arange(num_tasks), orders)
    return jnp.where(mask[:, None], projected, 0).sum(axis=0)


@factory
def pcgrad(
    num_tasks: int,
    *,
    key: PRNGKeyArray,
    order: Order = "random",
    scale: Scale = "native",
) -> Balancer:
    """Projecting conflicting gradients (Algorithm 1 of the paper).

    Every gradient ``g_i`` visits the others in random order and, where
    ``<g_i', g_j> < 0``, loses its component along the *original* ``g_j``:
    ``g_i' -= <g_i', g_j>/‖g_j‖² g_j``. The update is ``Σ_i g_i'``.

    Codebases differ: the order is drawn per task here, as in the paper, TorchJD and
    LibMTL (SamsungLabs' and metaworld's code share one); a gradient never meets itself.

    Args:
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      key: Seeds the random order; lives in the state.
      order: ``"fixed"`` visits tasks 0, 1, … instead (deterministic).
      scale: ``"native"`` and ``"sum"`` add the projected gradients (paper, LibMTL,
        nash-mtl, TorchJD); ``"mean"`` averages them (CAGrad's code).

    Returns:
      A balancer; needs the Gramian: T backward passes and O(T³) scalar work. State:
      the key. The update conflicts with no task for T = 2; for T ≥ 3 it may.

    Examples:
      >>> import jax, jax.numpy as jnp, mtljax
      >>> balancer = mtljax.pcgrad(2, key=jax.random.key(0))
      >>> grads = {"w": jnp.array([[1.0, 0.0], [-1.0, 1.0]])}
      >>> balancer.update(grads, balancer.init(grads))[0]["w"].tolist()
      [0.5, 1.5]

    References:
      Yu et al., `Gradient Surgery for Multi-Task Learning
      <https://arxiv.org/abs/2001.06782>`_, 2020.
    """
    check_choice("pcgrad", "order", order, Order)

    def init():
        return PCGradState(key, jnp.ones(num_tasks, jnp.float32))

    def weigh(state, *, losses, gramian, mask):
        del losses
        next_key, draw = jax.random.split(state.key)
        tasks = jnp.arange(num_tasks)
        orders = jnp.broadcast_to(tasks, (num_tasks, num_tasks))
        if order == "random":
            orders = jax.random.permutation(draw, orders, axis=1, independent=True)
        weights = pcgrad_weights(gramian, orders, mask)
        return weights, state._replace(key=next_key)

    return from_weights(
        "pcgrad",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="gramian",
        native="sum",
        scale=scale,
    )
