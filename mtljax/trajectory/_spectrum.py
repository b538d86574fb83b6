"""Extreme eigenvalues and the spectral density, by Lanczos."""

from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mtljax.trajectory import _trees as trees
from mtljax.trajectory._curvature import Matvec


class Lanczos(NamedTuple):
    """What :func:`lanczos` returns, in ascending order of the values."""

    values: Float[Array, " m"]  # Ritz values
    weights: Float[Array, " m"]  # squared first entries: quadrature weights, sum 1
    bounds: Float[Array, " m"]  # an eigenvalue lies within this of each Ritz value


class Eigenvalues(NamedTuple):
    """What :func:`hessian_top_eigenvalues` returns."""

    top: Float[Array, " k"]  # largest first
    top_bound: Float[Array, " k"]
    bottom: Float[Array, " k"]  # smallest first
    bottom_bound: Float[Array, " k"]


class SpectralDensity(NamedTuple):
    """What :func:`spectral_density` returns."""

    grid: Float[Array, " points"]
    density: Float[Array, " points"]  # integrates to 1 over the grid, nearly
    nodes: Float[Array, "starts m"]
    weights: Float[Array, "starts m"]


def lanczos(
    product: Matvec, params: Any, key: PRNGKeyArray, *, num_iters: int
) -> Lanczos:
    """Ritz values of a symmetric linear map from m products, with error bounds.

    Orthogonalised fully, twice, in every iteration. Where an invariant subspace is
    exhausted, it goes on from a fresh random direction, so that no spurious zero enters
    and multiple eigenvalues are found.

    Args:
      product: Of :func:`hvp` or :func:`ggn_vp`.
      params: For the shapes.
      key: For the starting vector.
      num_iters: m, at most the number of parameters.

    Returns:
      Values, weights and bounds ``|β_m s_m|``: the residual of each Ritz pair, so that
      an exact eigenvalue is that near. Cost: m products, m copies of the parameters.

    Raises:
      ValueError: If num_iters is not positive or exceeds the number of parameters.

    Examples:
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
    # What was dropped where a subspace ended is an error too.
    dropped = jnp.where(coupled == 0, betas, 0)
    bounds = jnp.abs(betas[-1] * vectors[-1]) + jnp.max(dropped.at[-1].set(0))
    return Lanczos(values, jnp.square(vectors[0]), bounds)


def hessian_top_eigenvalues(
    product: Matvec, params: Any, key: PRNGKeyArray, *, k: int = 1, num_iters: int = 32
) -> Eigenvalues:
    """The k largest and the k smallest eigenvalues, with error bounds.

    Algebraically largest and smallest; a power iteration finds the largest modulus.

    Args:
      product: Of :func:`hvp` or :func:`ggn_vp`.
      params: For the shapes.
      key: For the starting vector.
      k: How many at each end.
      num_iters: Iterations of Lanczos, at least k and at most the number of parameters.

    Returns:
      Both ends with bounds: an eigenvalue is that near to the value beside it. Cost:
      num_iters products, num_iters copies of the parameters.

    Raises:
      ValueError: If k exceeds num_iters, or num_iters the number of parameters.

    Examples:
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
    """The density of the eigenvalues, by stochastic Lanczos quadrature.

    Ritz values of several starts with their quadrature weights, each a Gaussian of
    ``width`` times the range. The mean over starts of ``Σ w_i f(λ_i)`` estimates
    ``tr f(H) / P`` without bias for polynomials of degree below 2 m.

    Args:
      product: Of :func:`hvp` or :func:`ggn_vp`.
      params: For the shapes.
      key: For the starting vectors.
      num_iters: m.
      num_starts: Starting vectors.
      num_points: Points of the grid.
      width: Standard deviation of the Gaussians, in shares of the spectrum's range.

    Returns:
      Grid, density, and the raw nodes and weights. Cost: num_starts · m products, m
      copies of the parameters.

    Raises:
      ValueError: If a number is not positive.

    Examples:
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
