"""PCGrad: projects each gradient to remove conflicts with the others."""

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
    """Computes weights ``w`` such that the PCGrad update is ``Σ_i w_i g_i``.

    ``orders[i]`` is the order in which gradient i is compared with the others. A
    projected gradient is a linear combination of the original gradients and is
    represented by T coefficients.
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
    """Projecting conflicting gradients (PCGrad), Algorithm 1 of the paper.

    Each gradient ``g_i`` is compared with the others in random order. If
    ``<g_i', g_j> < 0``, the component along the *original* ``g_j`` is removed:
    ``g_i' -= <g_i', g_j>/‖g_j‖² g_j``. The update is ``Σ_i g_i'``.

    Codebases differ in the order. Here it is sampled for each task, as in the paper,
    TorchJD and LibMTL. The code of SamsungLabs and metaworld uses one order for all
    tasks. A gradient is never compared with itself.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      key: Key of ``jax.random`` for the order of the tasks, stored in the state.
      order: ``"random"`` samples an order for each task. ``"fixed"`` uses the order 0,
        1, …, which is deterministic.
      scale: ``"native"`` and ``"sum"`` sum the projected gradients, as in the paper,
        LibMTL, nash-mtl and TorchJD. ``"mean"`` averages them, as in the CAGrad code.

    Returns:
      A :class:`mtljax.Balancer` that reads the Gramian. A step costs T backward passes
      and O(T³) scalar operations. The state contains the key. For T = 2 the update
      conflicts with no task. For T ≥ 3 it may.

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
