"""Similarity of representations: linear CKA."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def cka(
    x: Float[Array, "n p"], y: Float[Array, "n q"], *, unbiased: bool = False
) -> Float[Array, ""]:
    r"""Linear centred kernel alignment of two sets of features of the same inputs.

    .. math:: \frac{\|Y^T X\|_F^2}{\|X^T X\|_F \, \|Y^T Y\|_F}

    for centred columns: 1 for a rotated and scaled copy. Biased upwards unless n is
    much larger than p and q; ``unbiased`` uses the U-statistic of HSIC instead, which
    is 0 on average for independent features and may be negative.

    Args:
      x: Features ``[n, p]`` of n inputs.
      y: Features ``[n, q]`` of the same inputs, in the same order.
      unbiased: Whether to remove the bias; needs n >= 4.

    Returns:
      The similarity; NaN where features are constant. Cost: n p q multiplications, or
      n² (p + q). Memory: p q, or n².

    Raises:
      ValueError: If there are too few inputs.

    Examples:
      >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [1.0, 1.0]])
      >>> float(cka(x, -5 * x[:, ::-1]))
      1.0

    References:
      Kornblith et al., `arXiv 1905.00414 <https://arxiv.org/abs/1905.00414>`_, 2019;
      Nguyen et al., `arXiv 2010.15327 <https://arxiv.org/abs/2010.15327>`_, 2020.
    """
    least = 4 if unbiased else 2
    if x.shape[0] < least:
        raise ValueError(f"cka: {x.shape[0]} inputs are fewer than {least}.")
    dtype = jnp.promote_types(jnp.promote_types(x.dtype, y.dtype), jnp.float32)
    x, y = (a.astype(dtype) - a.astype(dtype).mean(0, keepdims=True) for a in (x, y))

    def product(a, b):
        return jnp.matmul(a, b, precision="highest")

    if unbiased:
        kernels = [product(a, a.T) for a in (x, y)]
        k, l = (m * (1 - jnp.eye(m.shape[0], dtype=dtype)) for m in kernels)
        cross, own_x, own_y = _hsic(k, l), _hsic(k, k), _hsic(l, l)
        return cross / jnp.sqrt(own_x * own_y)
    cross = jnp.square(product(y.T, x)).sum()
    own = [jnp.linalg.norm(product(a.T, a)) for a in (x, y)]
    return cross / own[0] / own[1]


def _hsic(k: Array, l: Array) -> Array:
    """The U-statistic of HSIC, from kernels without a diagonal, times n (n − 3)."""
    n = k.shape[0]
    rows_k, rows_l = k.sum(1), l.sum(1)
    trace = (k * l).sum()
    means = rows_k.sum() * rows_l.sum() / ((n - 1) * (n - 2))
    return trace + means - 2 * jnp.vdot(rows_k, rows_l) / (n - 2)
