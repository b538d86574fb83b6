"""What feeds a run with batches: arrays on the device, or an iterator."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtljax.training import loop, records
from mtljax.training.errors import CheckpointError


class Resident:
    """Runs chunks over data that live on the device."""

    def __init__(
        self, step, data, *, one, batch_size, order_key, chunk, seeds, loop_on
    ):
        if batch_size is None or order_key is None:
            raise ValueError(
                "Training on arrays needs batch_size= and order_key= "
                "(which fixes the order of the data)."
            )
        self.size = loop.num_examples(data, batch_size)
        self._data = jax.tree.map(jnp.asarray, data)
        self._key = order_key
        self.batch = jax.eval_shape(
            lambda d: jax.tree.map(lambda a: a[:batch_size], d), self._data
        )
        self._run = loop.make_runner(
            step,
            one,
            self.batch,
            batch_size=batch_size,
            chunk=chunk,
            seeds=seeds,
            loop_on=loop_on,
        )

    def advance(self, state, start: int, n: int):
        with jax.transfer_guard("disallow"):
            state, metrics = self._run(state, self._data, self._key, start, n)
        metrics = jax.device_get(metrics)
        return state, jax.tree.map(lambda m: m[:n], metrics)

    def position(self) -> Any:
        return None

    def seek(self, position: Any) -> None:
        del position


class Streamed:
    """Runs steps on batches from an iterator, fetching the next during the step."""

    size = None

    def __init__(self, step, stream, *, seeds, resumable):
        if resumable and not (
            hasattr(stream, "get_state") and hasattr(stream, "set_state")
        ):
            raise TypeError(
                f"A run with a directory needs a stream with get_state and set_state, "
                f"such as a Grain iterator, and {type(stream).__name__} has none."
            )
        self._stream = stream
        self._run = loop.make_stream_step(step, seeds=seeds)

    def _next(self, step: int):
        try:
            return jax.device_put(next(self._stream))
        except StopIteration:
            raise ValueError(
                f"The stream ended after {step} steps; make it repeat, or lower "
                "num_steps."
            ) from None

    def advance(self, state, start: int, n: int):
        rows, batch = [], self._next(start)
        for i in range(n):
            with jax.transfer_guard("disallow"):
                state, metrics = self._run(state, batch)
            rows.append(metrics)
            if i + 1 < n:  # none is fetched beyond, so the position is exact
                batch = self._next(start + i + 1)
        return state, jax.tree.map(lambda *m: np.stack(m), *jax.device_get(rows))

    def position(self) -> Any:
        get_state = getattr(self._stream, "get_state", None)
        return records.pack_bytes(get_state()) if get_state else None

    def seek(self, position: Any) -> None:
        if position is None:
            raise CheckpointError("The run to resume was not fed by a stream.")
        self._stream.set_state(records.unpack_bytes(position))
