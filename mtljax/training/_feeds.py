"""Data sources of a run: arrays on the device, or an iterator of batches."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mtljax.training import _hosts, loop, records
from mtljax.training._digest import tree_digest
from mtljax.training._options import Execution
from mtljax.training.errors import CheckpointError, ConfigMismatchError


def placement_of(state: Any, execution: Execution) -> _hosts.Placement | None:
    """Returns the placement of the arrays of a run, or None for one device.

    Raises:
      ValueError: If the state is not on a mesh, although several processes or a batch
        sharding require it.
    """
    mesh = _hosts.mesh_of(state)
    if mesh is None:
        if execution.batch_sharding is not None:
            raise ValueError(
                "Execution.batch_sharding needs a state on a mesh. Place at least one "
                "leaf with a NamedSharding."
            )
        if jax.process_count() > 1:
            raise ValueError(
                f"There are {jax.process_count()} processes, but the state lies on no "
                "mesh. Place it with a NamedSharding over the devices of all processes."
            )
        return None
    leaves, structure = jax.tree.flatten(state)
    batch = execution.batch_sharding or NamedSharding(mesh, PartitionSpec())
    shardings = tuple(leaf.sharding for leaf in leaves)
    return _hosts.Placement(mesh, structure, shardings, batch)


class Resident:
    """Runs chunks over data that are stored on the device."""

    def __init__(self, step, data, *, one, seeds, batch, placement, execution):
        batch_size, order_key = batch
        if batch_size is None or order_key is None:
            raise ValueError(
                "Training on arrays needs batch_size= and order_key=. The key "
                "determines the order of the data."
            )
        self.size = loop.num_examples(data, batch_size)
        mesh, spec, sharding = None, None, None
        if placement is not None:
            mesh, sharding = placement.mesh, placement.batch
            if seeds:  # a key has the sharding of its run
                spec = PartitionSpec(*placement.shardings[0].spec[:1])
        self._data = _hosts.place(mesh, data)
        self._key = _hosts.place(mesh, order_key, spec)
        shaped = lambda a: jax.ShapeDtypeStruct(
            (batch_size, *a.shape[1:]), a.dtype, sharding=sharding
        )
        shapes = jax.tree.map(shaped, self._data)
        self.metrics = loop.check_step(step, one, shapes)
        self._run = loop.make_runner(
            step,
            one,
            shapes,
            batch_size=batch_size,
            chunk=execution.chunk,
            seeds=seeds,
            loop_on=execution.loop_on,
            placement=placement,
        )

    def advance(self, state, start: int, n: int):
        """Runs ``n`` steps. Returns the metrics on the host, ``[n, ...]``."""
        with jax.transfer_guard("disallow"):
            state, metrics = self._run(state, self._data, self._key, start, n)
        metrics = jax.device_get(metrics)
        return state, jax.tree.map(lambda m: m[:n], metrics)

    def position(self) -> Any:
        """Returns None, because the order is a function of the key and the step."""
        return None

    def seek(self, position: Any) -> None:
        """Does nothing, see :meth:`position`."""
        del position


class Streamed:
    """Runs steps on batches of an iterator, and prefetches one batch."""

    size = None

    def __init__(self, step, stream, *, one, seeds, resumable, placement, execution):
        if resumable and not (
            hasattr(stream, "get_state") and hasattr(stream, "set_state")
        ):
            raise TypeError(
                f"A run with a directory needs a stream with get_state and set_state, "
                f"such as a Grain iterator. {type(stream).__name__} has neither."
            )
        if jax.process_count() > 1 and execution.batch_sharding is None:
            raise ValueError(
                "With several processes, a stream needs Execution(batch_sharding=...)."
            )
        self._stream, self._resumable, self._placement = stream, resumable, placement
        self._last: Any = None  # digest of the last batch, and the position before it
        self._pending: Any = self._fetch(0, mark=True)
        self.metrics = loop.check_step(step, one, self._pending)
        self._run = loop.make_stream_step(step, seeds=seeds, placement=placement)

    def _fetch(self, step: int, *, mark: bool):
        mark = mark and self._resumable
        before = self._state() if mark else None
        try:
            batch = next(self._stream)
        except StopIteration:
            raise ValueError(
                f"The stream ended after {step} steps. Make it repeat, or reduce "
                "num_steps."
            ) from None
        if mark:
            self._last = {"before": before, "digest": self._digest(batch)}
        return self._place(batch)

    def _state(self) -> Any:
        return records.pack_bytes(self._stream.get_state())

    def _digest(self, batch) -> str:
        """Computes the digest of the local part of a batch."""

        def local(leaf):
            if getattr(leaf, "is_fully_addressable", True):
                return leaf
            return [np.asarray(shard.data) for shard in leaf.addressable_shards]

        return tree_digest(jax.tree.map(local, batch))

    def _place(self, batch):
        if self._placement is None:
            return jax.device_put(batch)
        sharding = self._placement.batch

        def put(leaf):
            if isinstance(getattr(leaf, "sharding", None), NamedSharding):
                return leaf
            return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

        return jax.tree.map(put, batch)

    def _next(self, step: int, *, mark: bool):
        batch, self._pending = self._pending, None
        return self._fetch(step, mark=mark) if batch is None else batch

    def advance(self, state, start: int, n: int):
        """Runs ``n`` steps. Returns the metrics on the host, ``[n, ...]``."""
        rows, batch = [], self._next(start, mark=n == 1)
        for i in range(n):
            with jax.transfer_guard("disallow"):
                state, metrics = self._run(state, batch)
            rows.append(metrics)
            if i + 1 < n:  # no batch is fetched ahead, so the position is exact
                batch = self._next(start + i + 1, mark=i + 2 == n)
        return state, jax.tree.map(lambda *m: np.stack(m), *jax.device_get(rows))

    def position(self) -> Any:
        """Returns the position and the last batch's digest of each process's stream."""
        if self._pending is not None:  # fetched, but not yet used
            return _hosts.gather({"state": self._last["before"], "last": None})
        return _hosts.gather({"state": self._state(), "last": self._last})

    def seek(self, position: Any) -> None:
        """Moves the stream to a position after checking that it is the same stream.

        Raises:
          ConfigMismatchError: If the batch before the position is different.
        """
        if position is None:
            raise CheckpointError("The run to resume did not use a stream.")
        if len(position) != jax.process_count():
            raise ConfigMismatchError(
                f"The run used the streams of {len(position)} processes, but there "
                f"are now {jax.process_count()} processes."
            )
        self._pending = None
        mine = position[jax.process_index()]
        if mine["last"] is not None:
            self._stream.set_state(records.unpack_bytes(mine["last"]["before"]))
            try:
                same = self._digest(next(self._stream)) == mine["last"]["digest"]
            except StopIteration:
                same = False
            if not same:
                raise ConfigMismatchError(
                    "The stream is not that of the run to resume. Its seed, batch "
                    "size, length or order is different."
                )
        self._stream.set_state(records.unpack_bytes(mine["state"]))
