"""Primitives are found as objects, in this version of JAX."""

import jax
import jax.numpy as jnp
import pytest

from mtljax.gradients import _primitives as primitives


def last(function, *args):
    return jax.make_jaxpr(function)(*args).jaxpr.eqns[-1]


X = jnp.ones((3, 3))


@pytest.mark.parametrize(
    ("found", "function"),
    [
        (primitives.DOT, lambda x: x @ x),
        (primitives.TRANSPOSE, lambda x: x.T),
        (primitives.RESHAPE, lambda x: x.reshape(9)),
        (primitives.ELEMENTWISE, jnp.tanh),
        (primitives.REORDERS, jax.lax.optimization_barrier),
        (primitives.REMAT, jax.checkpoint(jnp.tanh)),
        (primitives.CALLS, jax.jit(lambda x: x + 1)),
    ],
)
def test_an_operation_is_recognised(found, function):
    assert last(function, X).primitive in found


def test_custom_rules_and_loops_are_no_calls():
    def loop(x):
        return jax.lax.scan(lambda c, _: (c + 1, None), x, None, 2)[0]

    for function in (jax.nn.relu, loop):
        equations = jax.make_jaxpr(function)(X).jaxpr.eqns
        inner = [e for e in equations if primitives.body_of_call(e) is None]
        assert function is jax.nn.relu or len(inner) == len(equations)
    assert primitives.bodies(last(loop, X).params)


def test_a_parameter_that_a_rule_has_not_read_is_not_understood():
    assert primitives.understood({"axes": (0,), "new": None}, {"axes"})
    assert not primitives.understood({"axes": (0,), "new": 3}, {"axes"})
