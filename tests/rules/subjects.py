"""Everything that the rules hold for: all methods, and all balancers made of them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from programs import DIM, PARAMS, tree
from registry import CASES, CLASSICS, WRAPPED, Case, WrapperCase

import mtljax
from mtljax.sharpness import SamGrads

SIGNS = np.where(np.arange(DIM) % 3 == 0, -0.1, 0.1)


class Subject(NamedTuple):
    """A balancer of the registry, and what its inputs look like."""

    id: str
    build: Callable[..., mtljax.Balancer]  # build(num_tasks, key=None)
    factory: Callable[..., Any]
    case: Case | WrapperCase

    @property
    def paired(self) -> bool:
        """Whether it takes a loss part and a flat part of the gradients."""
        return self.id.startswith("flat_split")

    @property
    def classic(self) -> bool:
        """Whether tests that compile a program of their own run by default."""
        return isinstance(self.case, WrapperCase) or (
            self.case.name in CLASSICS and not self.case.options
        )

    def grads(self, matrix, dtype=jnp.float32) -> Any:
        """The rows of a matrix [T, DIM] as the input of the balancer."""
        if not self.paired:
            return tree(matrix, dtype)
        with np.errstate(all="ignore"):
            flat = np.asarray(matrix) * SIGNS
        return SamGrads(tree(matrix, dtype), tree(flat, dtype))

    @property
    def fewest(self) -> int:
        return self.case.min_tasks


def _methods():
    for case in CASES:
        factory = mtljax.METHODS[case.name].factory
        yield Subject(case.id, case.build, factory, case)


def _wrappers():
    for case in WRAPPED:
        yield Subject(case.id, case.build, case.factory, case)


SUBJECTS = [*_methods(), *_wrappers()]


@functools.cache
def built(subject_id: str, tasks: int = 3) -> mtljax.Balancer:
    subject = next(s for s in SUBJECTS if s.id == subject_id)
    return subject.build(tasks)


@functools.cache
def vmapped(subject_id: str, tasks: int = 3):
    """One program for a stack of batches, each with a state of its own."""
    balancer = built(subject_id, tasks)

    def update(grads, state, losses, mask):
        return balancer.update(grads, state, losses=losses, mask=mask)

    return jax.jit(jax.vmap(update))


def params(dtype=jnp.float32):
    """Parameters in buffers of their own, which may be donated."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), PARAMS)


def raw(state):
    """Leaves as plain arrays: a key has no bits to compare."""

    def leaf(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return [leaf(x) for x in jax.tree.leaves(state)]
