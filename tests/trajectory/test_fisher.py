"""The Fisher trace: exact against the GGN, the sampled ones against the exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from precision import enable_x64
from trajectory import lab

from mtljax import trajectory


def run64(key=None, model=lab.model, **options):
    with enable_x64(True):
        p, x = lab.wide(lab.params()), jnp.asarray(lab.data()["x"])
        function = lambda: trajectory.fisher_trace(model, p, x, key, **options)
        return jax.tree.map(np.asarray, jax.jit(function)())


def test_the_exact_one_is_the_trace_of_the_ggn():
    found = run64(estimator="exact")
    np.testing.assert_allclose(found.trace, np.trace(lab.ggn()), rtol=1e-12)


@pytest.mark.deep
@pytest.mark.parametrize("estimator", ["per_example", "batch"])
def test_the_sampled_ones_are_unbiased(estimator):
    exact = np.trace(lab.ggn())
    p = jax.tree.map(jnp.float32, lab.params())
    x = jnp.asarray(lab.data()["x"], jnp.float32)
    one = lambda key: trajectory.fisher_trace(
        lab.model, p, x, key, estimator=estimator, batch_size=8
    )
    keys = jax.random.split(jax.random.key(0), 1000)
    found = jax.jit(lambda: jax.vmap(one)(keys))()
    error = found.trace.std() / 1000**0.5
    assert error < 0.02 * exact
    assert abs(found.trace.mean() - exact) < 4 * error
    # The reported standard error is that of the terms; here x is always the same, so
    # it may only be larger than the spread over labels.
    assert jnp.sqrt(jnp.square(found.standard_error).mean()) > 0.8 * found.trace.std()


@pytest.mark.deep
def test_other_outputs_have_their_closed_forms():
    jac, _ = lab.jacobian()
    with enable_x64(True):
        logits = lab.model(lab.wide(lab.params()), jnp.asarray(lab.data()["x"]))
        p = np.asarray(jax.nn.sigmoid(logits))
    squares = (jac**2).sum(-1)
    gaussian = run64(estimator="exact", output="gaussian").trace
    np.testing.assert_allclose(gaussian, squares.sum(1).mean(), rtol=1e-12)
    bernoulli = run64(estimator="exact", output="bernoulli").trace
    np.testing.assert_allclose(
        bernoulli, (p * (1 - p) * squares).sum(1).mean(), rtol=1e-12
    )
    mean = run64(estimator="exact", output="bernoulli", reduction="mean").trace
    np.testing.assert_allclose(mean, bernoulli / 9, rtol=1e-12)
    drawn = run64(jax.random.key(3), output="gaussian")
    assert abs(drawn.trace - gaussian) < 4 * drawn.standard_error


@pytest.mark.deep
def test_dense_outputs_are_summed_over_positions():
    """Two positions of the same logits, independent given x: twice the trace."""
    twice = lambda p, x: jnp.stack([lab.model(p, x)] * 2, 1)
    once = run64(estimator="exact").trace
    both = run64(estimator="exact", model=twice).trace
    np.testing.assert_allclose(both, 2 * once, rtol=1e-12)
    mean = run64(estimator="exact", model=twice, reduction="mean").trace
    np.testing.assert_allclose(mean, once / 2, rtol=1e-12)


def test_costs():
    counter = lab.Counter(lab.model)
    p, x = lab.params(), jnp.asarray(lab.data()["x"])
    run = lambda **kw: (
        lambda: trajectory.fisher_trace(counter, p, x, jax.random.key(0), **kw)
    )
    assert counter.during(run(estimator="batch", batch_size=8)) == 3
    assert counter.during(run(estimator="exact")) == 24  # one forward; 3 backward each


def test_mistakes_are_named(as_users):
    run = lambda *args, **kw: trajectory.fisher_trace(
        lab.model, lab.params(), lab.data()["x"], *args, **kw
    )
    with pytest.raises(ValueError, match="draws labels and needs key"):
        run()
    with pytest.raises(
        ValueError, match="24 inputs must be a multiple of batch_size=7"
    ):
        run(jax.random.key(0), estimator="batch", batch_size=7)
    with pytest.raises(ValueError, match="estimator"):
        run(jax.random.key(0), estimator="empirical")
