"""A traced function as a list of operations."""

import jax
import jax.numpy as jnp
import numpy as np

from mtljax.gradients._program import flatten, needed, run


def test_calls_are_inlined_and_give_the_same_results():
    def function(x, y):
        inner = jax.jit(lambda a: jnp.sin(a) * 2)
        return inner(x) + inner(y), jax.checkpoint(jnp.cos)(y)

    arguments = jnp.arange(3.0), jnp.ones(3)
    program = flatten(jax.make_jaxpr(function)(*arguments))
    assert program.rematerialises
    env = dict(program.constants)
    env |= dict(zip(program.inputs, arguments, strict=True))
    for op in program.ops:
        assert "jaxpr" not in op.params
        run(op, env)
    for ref, want in zip(program.outputs, function(*arguments), strict=True):
        np.testing.assert_allclose(env[ref], want, rtol=1e-6)


def test_only_what_a_result_needs_is_kept():
    def function(x):
        unused = jnp.exp(x)
        jax.debug.callback(lambda _: None, x)
        return jnp.sin(x), unused

    program = flatten(jax.make_jaxpr(function)(1.0))
    kept = needed(program.ops, program.outputs[:1])
    names = {op.primitive.name for op in kept}
    assert "sin" in names
    assert "exp" not in names
    assert any(op.eqn.effects for op in kept)
