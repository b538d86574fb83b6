"""Extreme eigenvalues and the spectral density by the Lanczos method."""

from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mtljax.trajectory import _trees as trees
from mtljax.trajectory._curvature import Matvec


class Lanczos(NamedTuple):
    """Result of :func:`lanczos`, in ascending order of the values."""

    values: Float[Array, " m"]  # Ritz values
    weights: Float[Array, " m"]  # squared first entries: quadrature weights, sum 1
    bounds: Float[Array, " m"]  # distance bound to an eigenvalue, per Ritz value


class Eigenvalues(NamedTuple):
    """Result of :func:`hessian_top_eigenvalues`."""

    top: Float[Array, " k"]  # largest first
    top_bound: Float[Array, " k"]
    bottom: Float[Array, " k"]  # smallest first
    bottom_bound: Float[Array, " k"]


class SpectralDensity(NamedTuple):
    """Result of :func:`spectral_density`."""

    grid: Float[Array, " points"]
    density: Float[Array, " points"]  # its integral over the grid is nearly 1
    nodes: Float[Array, "starts m"]
    weights: Float[Array, "starts m"]


def lanczos(
    product: Matvec, params: Any, key: PRNGKeyArray, *, num_iters: int
) -> Lanczos:
    """Computes Ritz values of a symmetric linear map, with error bounds.

    Every iteration orthogonalises the new vector twice against all previous vectors. If
    an invariant subspace is exhausted, the iteration continues from a new random
    direction. Therefore no spurious zeros occur, and multiple eigenvalues are found.

    Args:
      product: A linear map from :func:`hvp` or :func:`ggn_vp`.
      params: Parameters, used for their shapes.
      key: Random key of the starting vector.
      num_iters: m, at most the number of parameters.

    Returns:
      :class:`Lanczos`: Values, weights and bounds ``|β_m s_m|``. A bound is the
      residual of the Ritz pair, so the distance to an exact eigenvalue is at most this.
      The cost is m products and m copies of the parameters.

    Raises:
      ValueError: If ``num_iters`` is not positive or exceeds the number of parameters.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from mtljax.trajectory import lanczos
      >>> scale = jnp.array([5.0, 2.0, -1.0])
      >>> found = lanczos(lambda v: scale * v, scale, jax.random.key(0), num_iters=3)
      >>> found.values.round(3).tolist()
      [-1.0, 2.0, 5.0]

    References:
      Golub and Van Loan, Matrix Computations, 4th ed., chapter 10.
    """
    trees.check_positive("lanczos", "num_iters", num_iters)
    trees.check_params("lanczos", params)
    flat, unravel = jax.flatten_util.ravel_pytree(trees.widen(params))
    size, dtype = flat.size, flat.dtype
    if num_iters > size:
        raise ValueError(
            f"lanczos: num_iters={num_iters} exceeds the {size} parameters."
        )
    tiny = 100 * jnp.finfo(dtype).eps
    start_key, restart_key = jax.random.split(key)

    def apply(vector):
        return jax.flatten_util.ravel_pytree(product(unravel(vector)))[0].astype(dtype)

    def clean(vector, basis):
        for _ in range(2):
            inside = jnp.matmul(basis, vector, precision="highest")
            vector = vector - jnp.matmul(inside, basis, precision="highest")
        return vector

    def unit(vector):
        return vector / jnp.linalg.norm(vector)

    def body(carry, i):
        basis, vector, scale = carry
        basis = basis.at[i].set(vector)
        image = apply(vector)
        alpha = jnp.vdot(vector, image, precision="highest")
        rest = clean(image, basis)
        beta = jnp.linalg.norm(rest)
        scale = jnp.maximum(scale, jnp.hypot(alpha, beta))
        done = beta <= tiny * scale
        fresh = jax.random.normal(jax.random.fold_in(restart_key, i), (size,), dtype)
        following = unit(clean(jnp.where(done, unit(fresh), rest), basis))
        return (basis, following, scale), (alpha, beta, jnp.where(done, 0, beta))

    basis = jnp.zeros((num_iters, size), dtype)
    first = unit(jax.random.normal(start_key, (size,), dtype))
    _, (alphas, betas, coupled) = jax.lax.scan(
        body, (basis, first, jnp.zeros((), dtype)), jnp.arange(num_iters)
    )
    between = coupled[:-1]
    matrix = jnp.diag(alphas) + jnp.diag(between, 1) + jnp.diag(between, -1)
    values, vectors = jnp.linalg.eigh(matrix)
    # The coupling that is dropped at the end of a subspace adds to the error.
    dropped = jnp.where(coupled == 0, betas, 0)
    bounds = jnp.abs(betas[-1] * vectors[-1]) + jnp.max(dropped.at[-1].set(0))
    return Lanczos(values, jnp.square(vectors[0]), bounds)


def hessian_top_eigenvalues(
    product: Matvec, params: Any, key: PRNGKeyArray, *, k: int = 1, num_iters: int = 32
) -> Eigenvalues:
    """Computes the k largest and the k smallest eigenvalues, with error bounds.

    The order is algebraic. A power iteration, in contrast, finds the largest modulus.

    Args:
      product: A linear map from :func:`hvp` or :func:`ggn_vp`.
      params: Parameters, used for their shapes.
      key: Random key of the starting vector.
      k: Number of eigenvalues at each end.
      num_iters: Lanczos iterations, at least k and at most the number of parameters.

    Returns:
      :class:`Eigenvalues`: The values at both ends with bounds on the distance to an
      exact eigenvalue. The cost is num_iters products and num_iters copies of the
      parameters.

    Raises:
      ValueError: If ``k`` exceeds ``num_iters``, or if ``num_iters`` exceeds the number
        of parameters.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from mtljax.trajectory import hessian_top_eigenvalues
      >>> scale = jnp.array([5.0, 2.0, -1.0])
      >>> found = hessian_top_eigenvalues(
      ...     lambda v: scale * v, scale, jax.random.key(0), num_iters=3)
      >>> found.top.tolist(), found.bottom.tolist()
      ([5.0], [-1.0])

    References:
      See :func:`lanczos`.
    """
    trees.check_positive("hessian_top_eigenvalues", "k", k)
    if k > num_iters:
        raise ValueError(
            f"hessian_top_eigenvalues: k={k} exceeds num_iters={num_iters}."
        )
    found = lanczos(product, params, key, num_iters=num_iters)
    return Eigenvalues(
        top=found.values[::-1][:k],
        top_bound=found.bounds[::-1][:k],
        bottom=found.values[:k],
        bottom_bound=found.bounds[:k],
    )


def spectral_density(
    product: Matvec,
    params: Any,
    key: PRNGKeyArray,
    *,
    num_iters: int = 32,
    num_starts: int = 4,
    num_points: int = 256,
    width: float = 0.01,
) -> SpectralDensity:
    """Estimates the density of the eigenvalues by stochastic Lanczos quadrature.

    The density is a sum of Gaussians at the Ritz values of several starts, with their
    quadrature weights. The standard deviation is ``width`` times the range of the
    values. The mean over starts of ``Σ w_i f(λ_i)`` estimates ``tr f(H) / P`` without
    bias for polynomials f of degree below 2 m.

    Args:
      product: A linear map from :func:`hvp` or :func:`ggn_vp`.
      params: Parameters, used for their shapes.
      key: Random key of the starting vectors.
      num_iters: m.
      num_starts: Number of starting vectors.
      num_points: Number of grid points.
      width: Standard deviation of the Gaussians, relative to the range of the spectrum.

    Returns:
      :class:`SpectralDensity`: Grid, density, and the nodes and weights of every start.
      The cost is num_starts · m products and m copies of the parameters.

    Raises:
      ValueError: If an argument is not positive, or if ``num_iters`` exceeds the number
        of parameters.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from mtljax.trajectory import spectral_density
      >>> scale = jnp.array([5.0, 2.0, -1.0])
      >>> found = spectral_density(
      ...     lambda v: scale * v, scale, jax.random.key(0), num_iters=3)
      >>> round(float(jnp.trapezoid(found.density, found.grid)), 2)
      1.0

    References:
      Ghorbani et al., `arXiv 1901.10159 <https://arxiv.org/abs/1901.10159>`_, 2019.
    """
    name = "spectral_density"
    trees.check_positive(name, "num_starts", num_starts)
    trees.check_positive(name, "num_points", num_points)
    if not width > 0:
        raise ValueError(f"{name}: width={width} must be positive.")
    keys = jax.random.split(key, num_starts)
    run = lambda key: lanczos(product, params, key, num_iters=num_iters)
    found = jax.lax.map(run, keys)
    low, high = found.values.min(), found.values.max()
    reach = high - low
    sigma = width * jnp.where(reach > 0, reach, jnp.maximum(jnp.abs(high), 1.0))
    grid = jnp.linspace(low - 5 * sigma, high + 5 * sigma, num_points)
    apart = (grid[:, None, None] - found.values[None]) / sigma
    bells = jnp.exp(-jnp.square(apart) / 2) / (sigma * (2 * jnp.pi) ** 0.5)
    density = (bells * found.weights[None]).sum(2).mean(1)
    return SpectralDensity(grid, density, found.values, found.weights)
