"""SDMGrad: the min-norm point with regularisation to the mean gradient."""

from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from mtljax.balancer import Balancer, check_choice, check_number, factory, from_weights
from mtljax.methods._cross import cross_or_own
from mtljax.solvers import (
    SolverStatus,
    min_norm_point,
    on_present,
    project_simplex,
    unsolved,
)
from mtljax.types import Gramian, Mask, Number, Scale, Weights

Inner: TypeAlias = Literal["exact", "reference"]


class SDMGradState(NamedTuple):
    """State of :func:`sdmgrad`."""

    shares: Weights  # w, the initial point of the inner loop "reference"
    solver: SolverStatus
    task_weights: Weights


def _uniform(gramian: Gramian, mask: Mask | None) -> tuple[Weights, Mask]:
    mask = jnp.ones(gramian.shape[0], bool) if mask is None else mask
    return mask.astype(gramian.dtype) / jnp.maximum(mask.sum(), 1), mask


def sdmgrad_weights(
    gramian: Gramian, lamda: Number, mask: Mask | None = None
) -> tuple[Weights, SolverStatus]:
    """Computes ``argmin_w ‖Σ_i w_i g_i + λ g_0‖²`` over the simplex exactly.

    Because ``Σ w_i = 1``, it is the min-norm point of the vectors ``g_i + λ g_0``.
    """
    uniform, mask = _uniform(gramian, mask)
    slope = lamda * jnp.matmul(gramian, uniform, precision="highest")
    shifted = gramian + slope[:, None] + slope[None, :] + lamda * (uniform @ slope)
    return min_norm_point(jnp.where(mask[:, None] & mask[None, :], shifted, 0), mask)


def sdmgrad_reference_weights(
    shares: Weights,
    gramian: Gramian,
    lamda: Number,
    *,
    learning_rate: Number = 10.0,
    momentum: Number = 0.5,
    steps: int = 20,
    mask: Mask | None = None,
) -> Weights:
    """Runs the authors' inner loop, projected momentum SGD on the scaled matrix."""
    uniform, mask = _uniform(gramian, mask)
    lengths = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))
    size = uniform @ lengths
    size = jnp.where(size > 0, size, 1)
    gramian = gramian / size / size
    # A hyper-parameter with a wider dtype must not change the dtype of the carry.
    lamda, learning_rate, momentum = (
        jnp.asarray(x, gramian.dtype) for x in (lamda, learning_rate, momentum)
    )

    def step(carry, _):
        shares, velocity = carry
        mixed = shares + lamda * uniform
        slope = jnp.matmul(gramian, mixed, precision="highest")
        velocity = momentum * velocity + slope
        return (
            project_simplex(shares - learning_rate * velocity, mask),
            velocity,
        ), None

    first = (shares.astype(gramian.dtype), jnp.zeros_like(uniform))
    return jax.lax.scan(step, first, length=steps)[0][0]


def _positive_part(matrix: Gramian) -> Gramian:
    """Returns the positive semi-definite matrix nearest to the symmetric part."""
    matrix = (matrix + matrix.T) / 2
    size = jnp.max(jnp.abs(matrix))
    size = jnp.where(size > 0, size, 1)
    values, vectors = jnp.linalg.eigh(matrix / size)
    roots = vectors * jnp.sqrt(jnp.maximum(values, 0))[None, :]
    return size * jnp.matmul(roots, roots.T, precision="highest")


@factory
def sdmgrad(
    num_tasks: int,
    *,
    lamda: Number = 0.3,
    inner: Inner = "exact",
    learning_rate: Number = 10.0,
    momentum: Number = 0.5,
    steps: int = 20,
    scale: Scale = "native",
) -> Balancer:
    """Stochastic direction-oriented multi-objective gradient descent (SDMGrad).

    The weights w minimise ``½ ‖Σ_i w_i g_i + λ g_0‖²`` over the simplex, where ``g_0``
    is the mean gradient. The update is ``d = (Σ_i w_i g_i + λ g_0)/(1 + λ)``. It is
    that of MGDA for λ = 0 and the mean gradient for λ → ∞. For λ > 0 it may conflict
    with a task.

    In the paper, the matrix of inner products is ``J₁J₂ᵀ`` of two independent batches,
    and ``g_i`` comes from a third batch. Pass the matrix as
    ``update(..., cross_gramian=mtljax.stack.cross_gramian(grads1, grads2))``. Otherwise
    the method uses the Gramian of the batch.

    The authors' inner loop does not converge with their step size. On a single batch
    the scaled matrix has eigenvalues near 2, and the step size 10 is far above 2/2. The
    loop then ends at a vertex or cycles. The default therefore solves the problem
    exactly. A cross Gramian is not symmetric and may be indefinite. ``"exact"`` uses
    the positive semi-definite matrix nearest to its symmetric part. This choice is not
    in the paper, but the expectation of the cross Gramian is such a matrix.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      lamda: Regularisation λ ≥ 0. The authors' runs, LibMTL and TorchJD use 0.3. The
        default of the authors' class is 0.6.
      inner: ``"exact"`` or ``"reference"``. The latter is the loop of the authors,
        LibMTL and TorchJD. It starts at the weights of the last step and uses the
        matrix divided by the squared mean gradient norm.
      learning_rate: Step size of this loop. The authors' code and TorchJD use 10, and
        LibMTL uses 5.
      momentum: Momentum of this loop, in [0, 1).
      steps: Number of steps of this loop.
      scale: ``"native"`` and ``"mean"`` are weights on the simplex. ``"sum"``
        multiplies them by the number of present tasks.

    Returns:
      A :class:`mtljax.Balancer` that reads the Gramian. A step costs T backward passes,
      and 2 T more for the ``cross_gramian`` of two other batches. The state has T
      numbers and the solver status.

    Raises:
      ValueError: If a hyper-parameter is out of its range, or the shape of
        ``cross_gramian`` is not ``[T, T]``.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.sdmgrad(2)
      >>> grads = {"w": jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])}
      >>> update, state = balancer.update(grads, balancer.init(grads))
      >>> state.shares.tolist(), state.task_weights.tolist()
      ([0.63, 0.37], [0.60, 0.40])

    References:
      Xiao et al., `Direction-oriented Multi-objective Learning: Simple and Provable
      Stochastic Algorithms <https://arxiv.org/abs/2305.18409>`_, 2023.
    """
    check_number("sdmgrad", "lamda", lamda, at_least=0.0)
    check_choice("sdmgrad", "inner", inner, Inner)
    check_number("sdmgrad", "learning_rate", learning_rate, above=0.0)
    check_number("sdmgrad", "momentum", momentum, at_least=0.0, below=1.0)
    if steps < 1:
        raise ValueError(f"sdmgrad: steps must be positive, not {steps}.")

    def init():
        return SDMGradState(
            jnp.full(num_tasks, 1 / num_tasks, jnp.float32),
            unsolved(),
            jnp.ones(num_tasks, jnp.float32),
        )

    def weigh(state, *, losses, gramian, mask, cross_gramian):
        del losses
        matrix, finite = cross_or_own("sdmgrad", gramian, cross_gramian, mask)
        status = state.solver
        if inner == "exact":
            if cross_gramian is not None:
                matrix = _positive_part(matrix)
            found, status = sdmgrad_weights(matrix, lamda, mask)

            def solve(shares):
                del shares
                return found
        else:

            def solve(shares):
                return sdmgrad_reference_weights(
                    shares,
                    matrix,
                    lamda,
                    learning_rate=learning_rate,
                    momentum=momentum,
                    steps=steps,
                    mask=mask,
                )

        shares, kept = on_present(state.shares, mask, solve)
        uniform, _ = _uniform(matrix, mask)
        weights = (shares + lamda * uniform) / (1 + lamda)
        new = state._replace(shares=kept.astype(jnp.float32), solver=status)
        new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)
        return jnp.where(finite, weights, jnp.nan), new

    return from_weights(
        "sdmgrad",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="gramian",
        native="mean",
        scale=scale,
        side_inputs=("cross_gramian",),
    )
