"""Trace of the Fisher information, with labels sampled from the model."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mtljax.balancer import check_choice
from mtljax.trajectory import _trees as trees

Estimator: TypeAlias = Literal["per_example", "batch", "exact"]
Output: TypeAlias = Literal["categorical", "bernoulli", "gaussian"]
Reduction: TypeAlias = Literal["sum", "mean"]


class FisherTrace(NamedTuple):
    """Result of :func:`fisher_trace`."""

    trace: Float[Array, ""]
    standard_error: Float[Array, ""]  # over the averaged terms; NaN for one term
    terms: Float[Array, " n"]  # squared norms, per example or per batch


def fisher_trace(
    model: Callable[[Any, Any], Any],
    params: Any,
    inputs: Any,
    key: PRNGKeyArray | None = None,
    *,
    estimator: Estimator = "per_example",
    output: Output = "categorical",
    reduction: Reduction = "sum",
    batch_size: int = 32,
) -> FisherTrace:
    r"""Estimates the trace of the Fisher information matrix of one task.

    .. math:: \mathrm{tr} F = E_x E_{ŷ \sim p(·|x)} \|∇_θ \log p(ŷ|x)\|^2

    The estimators differ in cost and variance:

    - ``"per_example"`` samples one label per example and is unbiased.
    - ``"batch"`` multiplies the squared norm of the gradient of a batch with sampled
      labels by B. It is also unbiased, because scores have the mean zero. It needs no
      per-example gradient, but the value of a batch has a relative standard deviation
      of about √(2/r), where r is the effective rank of F.
    - ``"exact"`` sums over all classes and has no label noise. For dense outputs it
      sums over positions, which are independent given x.

    Mueller et al. specify neither the estimator nor the treatment of regression. The
    Gaussian of unit variance and the sum over positions are our choices.

    Args:
      model: A function ``model(params, inputs) -> outputs`` in evaluation mode, with
        leaves ``[B, ...]``. The outputs are the parameters of ``output``: logits with
        classes last, logits, or means. Examples must not interact.
      params: Parameters to differentiate with respect to.
      inputs: Leaves ``[N, ...]``.
      key: Random key of the labels. Not needed for ``"exact"``.
      estimator: One of the estimators above.
      output: Distribution that the model parametrises: a softmax, independent
        sigmoids, or normal distributions of unit variance.
      reduction: Whether the log-likelihood of an example is the sum or the mean over
        its outputs (positions of a dense task, several labels).
      batch_size: Number of examples per batch. It must divide N for ``"batch"``. For
        ``"per_example"`` it is the number of examples that are processed at once.

    Returns:
      :class:`FisherTrace`: Trace, standard error and terms. ``"per_example"`` costs N
      gradients of one example and the memory of batch_size copies of the parameters.
      ``"batch"`` costs N / batch_size gradients of a batch and 2 copies. ``"exact"``
      costs N times the number of outputs (all D entries of an example) and 2 copies.

    Raises:
      ValueError: If the key is missing, or if N is not a multiple of ``batch_size`` for
        ``"batch"``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.trajectory import fisher_trace
      >>> x = jnp.array([[1.0], [2.0]])
      >>> model = lambda w, x: x * w[None]  # two logits
      >>> exact = fisher_trace(model, jnp.zeros(2), x, estimator="exact")
      >>> [float(t) for t in exact.terms], float(exact.trace)  # x² tr(diag p − p pᵀ)
      ([0.5, 2.0], 1.25)

    References:
      Jastrzębski et al., `arXiv 2012.14193 <https://arxiv.org/abs/2012.14193>`_, 2020;
      Mueller et al., `arXiv 2408.14677 <https://arxiv.org/abs/2408.14677>`_, 2024.
    """
    name = "fisher_trace"
    check_choice(name, "estimator", estimator, Estimator)
    check_choice(name, "output", output, Output)
    check_choice(name, "reduction", reduction, Reduction)
    trees.check_positive(name, "batch_size", batch_size)
    trees.check_params(name, params)
    count = trees.check_length(name, "inputs", inputs)
    single = jax.tree.map(lambda x: x[:, None], inputs)

    def factor(outputs) -> float:
        """Returns 1 / (number of terms of one log-likelihood) if it is their mean."""
        size = outputs[0].size // (outputs.shape[-1] if output == "categorical" else 1)
        return 1 / size if reduction == "mean" else 1.0

    def pulled(x, scores):
        """Returns ``‖Jᵀ scores‖²`` for the outputs of a batch."""
        outputs, pull = jax.vjp(lambda p: model(p, x), params)
        return trees.square_norm(pull(scores(outputs).astype(outputs.dtype)))

    if estimator == "exact":

        def term(x):
            outputs, pull = jax.vjp(lambda p: model(p, x), params)
            vectors = factor(outputs) * _score_basis(outputs[0], output)
            square = lambda v: trees.square_norm(pull(v[None].astype(outputs.dtype))[0])
            return jax.lax.map(square, vectors).sum()

        return _summary(jax.lax.map(term, single))
    if key is None:
        raise ValueError(
            f"{name}: estimator={estimator!r} draws labels and needs key. Pass "
            "key=jax.random.key(...)."
        )

    def drawn(x, key):
        return pulled(x, lambda out: factor(out) * _sampled_score(out, output, key))

    if estimator == "per_example":
        keys = jax.random.split(key, count)
        terms = jax.lax.map(
            lambda pair: drawn(*pair), (single, keys), batch_size=min(batch_size, count)
        )
        return _summary(terms)
    if count % batch_size:
        raise ValueError(
            f"{name}: the {count} inputs must be a multiple of batch_size={batch_size}."
        )
    batches = jax.tree.map(lambda x: x.reshape(-1, batch_size, *x.shape[1:]), inputs)
    keys = jax.random.split(key, count // batch_size)
    # ‖Σ scores / B‖² · B
    terms = jax.lax.map(lambda pair: drawn(*pair) / batch_size, (batches, keys))
    return _summary(terms)


def _summary(terms: Array) -> FisherTrace:
    count = terms.shape[0]
    spread = terms.std(ddof=1) if count > 1 else jnp.full((), jnp.nan, terms.dtype)
    return FisherTrace(terms.mean(), spread / count**0.5, terms)


def _sampled_score(outputs: Array, output: Output, key: PRNGKeyArray) -> Array:
    """Returns the derivative of log p(ŷ) by the outputs, with ŷ from the model."""
    z = jax.lax.stop_gradient(trees.wide(outputs))
    if output == "categorical":
        label = jax.random.categorical(key, z)
        return jax.nn.one_hot(label, z.shape[-1], dtype=z.dtype) - jax.nn.softmax(z)
    if output == "bernoulli":
        p = jax.nn.sigmoid(z)
        return jax.random.bernoulli(key, p).astype(z.dtype) - p
    return jax.random.normal(key, z.shape, z.dtype)


def _score_basis(outputs: Array, output: Output) -> Array:
    """Returns vectors ``[D, ...]`` whose outer products sum to the Fisher matrix."""
    z = jax.lax.stop_gradient(trees.wide(outputs))
    identity = jnp.eye(z.size, dtype=z.dtype).reshape(z.size, *z.shape)
    if output == "gaussian":
        return identity
    if output == "bernoulli":
        p = jax.nn.sigmoid(z)
        return identity * jnp.sqrt(p * (1 - p))[None]
    p = jax.nn.softmax(z)
    here = identity.sum(-1, keepdims=True)  # one-hot at the position of the class
    weight = jnp.sqrt(p.reshape((z.size,) + (1,) * z.ndim))
    return weight * (identity - here * p[None])
