"""Feeding a set that lives on the device: an order per epoch, a gather per step."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Integer, PRNGKeyArray

from mtljax.data.types import DataError

Tree = TypeVar("Tree")


def epoch_order(
    key: PRNGKeyArray,
    epoch: int | Integer[Array, ""],
    num_examples: int,
    batch_size: int,
) -> Int[Array, "batches batch"]:
    """Which examples make up which batch of an epoch.

    A pure function of key and epoch: a resumed run needs no loader state, only its
    step. Works under ``jit`` with a traced ``epoch``.

    Args:
      key: Typed key of the run.
      epoch: Number of the epoch.
      num_examples: Size of the set.
      batch_size: Examples per batch; the last ``num_examples % batch_size`` of the
        epoch's order are left out, others each time.

    Returns:
      Indices ``[num_examples // batch_size, batch_size]``, int32, no index twice.

    Raises:
      DataError: If the batch is empty or larger than the set.

    Examples:
      >>> import jax
      >>> from mtljax.data import epoch_order
      >>> order = epoch_order(jax.random.key(0), 3, num_examples=10, batch_size=4)
      >>> order.shape, len(set(order.ravel().tolist()))
      ((2, 4), 8)
    """
    check_batch(batch_size, num_examples)
    order = jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)
    num_batches = num_examples // batch_size
    return order[: num_batches * batch_size].reshape(num_batches, batch_size)


def take(data: Tree, idx: Int[Array, "..."]) -> Tree:
    """Gathers examples from every array of a tree, inside ``jit``.

    Pass ``data`` to the jitted function as an argument: an array it closes over
    becomes a constant of the program.

    Args:
      data: Pytree of arrays ``[N, ...]``.
      idx: Indices of any shape, in ``[0, N)``.

    Returns:
      The same tree with leaves ``[*idx.shape, ...]``.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from mtljax.data import take
      >>> data = {"image": jnp.zeros((5, 2, 2, 1)), "left": jnp.arange(5)}
      >>> jax.jit(take)(data, jnp.array([4, 0]))["left"].tolist()
      [4, 0]
    """
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[idx], data)


def check_batch(batch_size: int, num_examples: int) -> None:
    """Raises unless at least one batch fits in the set."""
    if not 1 <= batch_size <= num_examples:
        raise DataError(
            f"batch_size must be between 1 and the {num_examples} examples of the set, "
            f"not {batch_size}."
        )
