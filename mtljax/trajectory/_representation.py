"""Similarity of representations by linear CKA."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def cka(
    x: Float[Array, "n p"], y: Float[Array, "n q"], *, unbiased: bool = False
) -> Float[Array, ""]:
    r"""Computes the linear centred kernel alignment (CKA) of two sets of features.

    .. math:: \frac{\|Y^T X\|_F^2}{\|X^T X\|_F \, \|Y^T Y\|_F}

    The columns of X and Y are centred. The value is 1 for a rotated and scaled copy. It
    is biased upwards unless n is much larger than p and q. With ``unbiased=True`` the
    function uses the U-statistic of HSIC. This value is 0 on average for independent
    features and may be negative.

    Args:
      x: Features ``[n, p]`` of n inputs.
      y: Features ``[n, q]`` of the same inputs, in the same order.
      unbiased: Whether to remove the bias, which requires n >= 4.

    Returns:
      The similarity, a scalar. It is NaN if features are constant. The cost is n p q
      multiplications, or n² (p + q) if unbiased. The memory is p q, or n² if unbiased.

    Raises:
      ValueError: If there are fewer than 2 inputs, or fewer than 4 if unbiased.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.trajectory import cka
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
    """Returns the U-statistic of HSIC times n (n − 3), for kernels without diagonal."""
    n = k.shape[0]
    rows_k, rows_l = k.sum(1), l.sum(1)
    trace = (k * l).sum()
    means = rows_k.sum() * rows_l.sum() / ((n - 1) * (n - 2))
    return trace + means - 2 * jnp.vdot(rows_k, rows_l) / (n - 2)
