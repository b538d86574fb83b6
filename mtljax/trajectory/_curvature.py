"""Products with the Hessian and the Gauss-Newton matrix, and their traces."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mtljax.trajectory import _trees as trees

Loss = Callable[[Any, Any], Any]
Matvec = Callable[[Any], Any]


class Trace(NamedTuple):
    """Result of :func:`hessian_trace`."""

    trace: Float[Array, ""]
    standard_error: Float[Array, ""]  # NaN with one probe
    samples: Float[Array, " n"]  # zᵀ H z of every probe vector


def hvp(loss: Loss, params: Any, batches: Any) -> Matvec:
    """Returns the Hessian of the mean loss over n batches as a linear map.

    The product is ``H v = d/dτ ∇L(θ + τ v)``. It is computed in forward mode over
    reverse mode, so no second backward graph is needed.

    Args:
      loss: ``loss(params, batch) -> ()``, a mean over the batch.
      params: Parameters to differentiate with respect to.
      batches: Leaves ``[n, B, ...]``.

    Returns:
      A function ``product(v)`` that returns ``H v``, for trees with the structure of
      params, at least float32. The cost is n Hessian-vector products of 2 to 3
      gradients each. The memory is 3 copies of the parameters.

    Raises:
      ValueError: If there is no batch, or if a parameter is not floating-point.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.trajectory import hvp
      >>> cube = lambda w, x: (x * w**3).mean()
      >>> product = hvp(cube, jnp.array(2.0), jnp.ones((1, 1)))
      >>> float(product(jnp.array(1.0)))  # 6 w
      12.0
    """
    count = trees.check_length("hvp", "batches", batches)
    trees.check_params("hvp", params)

    def product(vector):
        tangent = _like(vector, params)

        def one(batch):
            gradient = jax.grad(lambda p: loss(p, batch))
            return jax.jvp(gradient, (params,), (tangent,))[1]

        with jax.default_matmul_precision("highest"):
            return trees.mean_over(one, batches, count)

    return product


def ggn_vp(
    model: Callable[[Any, Any], Any],
    output_loss: Callable[[Any, Any], Any],
    params: Any,
    batches: tuple[Any, Any],
) -> Matvec:
    """Returns the generalised Gauss-Newton matrix ``Jᵀ H_z J`` as a linear map.

    The matrix is positive semi-definite if the loss is convex in the outputs. It is the
    Fisher matrix for the softmax cross-entropy and for half the squared error.

    Args:
      model: ``model(params, inputs) -> outputs``, in evaluation mode.
      output_loss: ``output_loss(outputs, targets) -> ()``, a mean over the batch.
      params: Parameters to differentiate with respect to.
      batches: ``(inputs, targets)``, leaves ``[n, B, ...]``.

    Returns:
      A function ``product(v)`` for trees with the structure of params, at least
      float32. The cost is n times 1 forward, 1 forward-mode and 1 backward pass. The
      memory is 3 copies of the parameters.

    Raises:
      ValueError: If there is no batch, or if a parameter is not floating-point.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.trajectory import ggn_vp
      >>> model, square = lambda w, x: x * w**2, lambda z, y: ((z - y) ** 2).mean() / 2
      >>> batches = jnp.ones((1, 1)), jnp.zeros((1, 1))
      >>> float(ggn_vp(model, square, jnp.array(3.0), batches)(jnp.array(1.0)))  # (2w)²
      36.0

    References:
      Schraudolph, Fast curvature matrix-vector products, Neural Computation, 2002.
    """
    count = trees.check_length("ggn_vp", "batches", batches)
    trees.check_params("ggn_vp", params)

    def product(vector):
        tangent = _like(vector, params)

        def one(batch):
            x, y = batch
            forward = lambda p: model(p, x)
            z, moved = jax.jvp(forward, (params,), (tangent,))
            slope = jax.grad(lambda out: output_loss(out, y))
            curved = jax.jvp(slope, (z,), (moved,))[1]
            return jax.vjp(forward, params)[1](curved)[0]

        with jax.default_matmul_precision("highest"):
            return trees.mean_over(one, batches, count)

    return product


def _like(vector: Any, params: Any) -> Any:
    return jax.tree.map(lambda v, p: jnp.asarray(v, p.dtype), vector, params)


def hessian_trace(
    product: Matvec, params: Any, key: PRNGKeyArray, *, num_probes: int = 32
) -> Trace:
    r"""Estimates the trace of a symmetric linear map by Hutchinson's method.

    .. math:: \mathrm{tr} H = E\, z^T H z, \quad z_i = ±1

    The estimate is unbiased. Its variance per probe is
    :math:`2 \sum_{i \ne j} H_{ij}^2`.

    Args:
      product: A linear map from :func:`hvp` or :func:`ggn_vp`.
      params: Parameters, used for their shapes.
      key: Random key of the probe vectors.
      num_probes: n. The error is proportional to 1/√n.

    Returns:
      :class:`Trace`: Mean, standard error and the n terms. The cost is n products. The
      memory is one vector.

    Raises:
      ValueError: If ``num_probes`` is not positive.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from mtljax.trajectory import hessian_trace
      >>> found = hessian_trace(lambda v: 3 * v, jnp.zeros(5), jax.random.key(0))
      >>> float(found.trace), float(found.standard_error)  # exact for a diagonal one
      (15.0, 0.0)

    References:
      Hutchinson, A stochastic estimator of the trace of the influence matrix, 1990.
      Yao et al., `arXiv 1912.07145 <https://arxiv.org/abs/1912.07145>`_ (PyHessian).
    """
    trees.check_positive("hessian_trace", "num_probes", num_probes)
    trees.check_params("hessian_trace", params)
    leaves, treedef = jax.tree.flatten(trees.widen(params))

    def sample(key):
        keys = jax.random.split(key, len(leaves))
        signs = [
            jax.random.rademacher(k, p.shape, p.dtype)
            for k, p in zip(keys, leaves, strict=True)
        ]
        z = treedef.unflatten(signs)
        return trees.dot(z, product(z))

    samples = jax.lax.map(sample, jax.random.split(key, num_probes))
    if num_probes == 1:
        return Trace(samples[0], jnp.full_like(samples[0], jnp.nan), samples)
    error = samples.std(ddof=1) / num_probes**0.5
    return Trace(samples.mean(), error, samples)
