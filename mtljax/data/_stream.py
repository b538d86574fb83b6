"""Batches of data sets that do not fit on the device, through Grain."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mtljax.data.types import DataError
from mtljax.extras import require

if TYPE_CHECKING:
    import grain

Batch = dict[str, Any]


def stream(
    source: Any,
    batch_size: int,
    *,
    seed: int,
    transform: Callable[[Batch], Batch] | None = None,
    num_threads: int = 0,
) -> "grain.DatasetIterator":
    """Returns an endless, resumable iterator of shuffled batches.

    Indices are shuffled and batched first. A batch is then read at once, by one gather
    per array or one call of ``source.__getitems__``. Each epoch has a different order.
    Within an epoch no example is repeated, and an incomplete last batch is dropped.

    Args:
      source: A dict of arrays of equal length (NumPy or memory-mapped), or a random
        access source of dicts with ``__len__`` and ``__getitems__`` or ``__getitem__``,
        such as :func:`mtljax.data.tfds_source`.
      batch_size: Number of examples per batch.
      seed: Seed of the order, 0 to ``2**32 - 1``.
      transform: Function of each batch, a dict of arrays. It must be deterministic, so
        that a resumed stream repeats it.
      num_threads: Number of threads that read ahead, for slow sources (files,
        decoding). Threads are slower for arrays in memory.

    Returns:
      An iterator of dicts of arrays ``[batch_size, ...]``. Its ``get_state()`` returns
      a small dict, and ``set_state()`` restores this position. Orbax saves the iterator
      with ``grain.checkpoint.CheckpointSave(iterator)``. It restores it into a new
      ``stream`` of equal arguments with ``CheckpointRestore``.

    Raises:
      DataError: If the batch is larger than the set, arrays differ in length, or the
        seed is out of range.

    Examples:
      >>> from mtljax.data import load, stream
      >>> train = load("multidigits", train_size=100).train
      >>> batches = stream(train, 32, seed=0)
      >>> next(batches)["image"].shape
      (32, 12, 12, 1)
      >>> state = batches.get_state()
      >>> following = next(batches)["left"]
      >>> batches.set_state(state)
      >>> (next(batches)["left"] == following).all()
      np.True_
    """
    require("mtljax.data.stream", "train", "grain")
    import grain

    length, gather = _reader(source)
    _check_batch(batch_size, length)
    if not 0 <= seed < 2**32:
        raise DataError(f"seed must be between 0 and 2**32 - 1, not {seed}.")

    def read(idx: np.ndarray) -> Batch:
        batch = gather(np.asarray(idx))
        return batch if transform is None else transform(batch)

    indices = grain.MapDataset.range(length).seed(seed).shuffle()
    # Batching precedes repeating, so that no batch belongs to two epochs.
    batches = indices.batch(batch_size, drop_remainder=True).repeat(None).map(read)
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=2 * num_threads
    )
    return iter(batches.to_iter_dataset(options))


def _reader(source: Any) -> tuple[int, Callable[[np.ndarray], Batch]]:
    if isinstance(source, Mapping):
        arrays = dict(source)
        lengths = {key: len(array) for key, array in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(
                f"stream needs one or more arrays of equal length, not {lengths}."
            )
        gather = lambda idx: {key: array[idx] for key, array in arrays.items()}
        return next(iter(lengths.values())), gather

    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        raise DataError(
            "stream needs a dict of arrays or a source with __len__ and __getitem__, "
            f"not {type(source).__name__}."
        )

    def gather_rows(idx: np.ndarray) -> Batch:
        many = getattr(source, "__getitems__", None)
        rows = many(idx.tolist()) if many else [source[i] for i in idx.tolist()]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    return len(source), gather_rows


def _check_batch(batch_size: int, num_examples: int) -> None:
    """Checks that at least one batch fits in the set."""
    if not 1 <= batch_size <= num_examples:
        raise DataError(
            f"batch_size must be between 1 and the {num_examples} examples of the set, "
            f"not {batch_size}."
        )
