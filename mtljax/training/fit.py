"""The driver of a run: evaluation, rows, checkpoints, progress, and a clean stop."""

import contextlib
import pathlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from mtljax.training import checkpoint as checkpoints
from mtljax.training import loop, records
from mtljax.training.errors import (
    CheckpointError,
    ConfigMismatchError,
    NonFiniteLossError,
    NonPositiveLossError,
    RunExistsError,
)
from mtljax.training.progress import Progress
from mtljax.training.writers import JsonlWriter, MemoryWriter, TensorBoardWriter, Writer

CHUNK_SECONDS = 1.0  # how long one call aims to take, so that a signal is soon heard


class Best(NamedTuple):
    """The best evaluation so far."""

    step: int
    value: float
    metrics: dict[str, Any]  # the whole evaluation, plain JSON


class FitResult(NamedTuple):
    """What :func:`fit` returns."""

    state: Any  # after the last step
    step: int  # completed steps
    best: Best | None  # None without `select`
    rows: list[dict[str, Any]]  # all metric rows of the run, a resumed part included
    interrupted: bool  # stopped by SIGTERM or SIGINT before `num_steps`
    seconds: float  # in training and evaluation, over all sessions
    run_dir: pathlib.Path | None


class _Signals:
    """Notes SIGTERM and SIGINT; a second SIGINT interrupts at once."""

    def __init__(self):
        self.name: str | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        del frame
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


class _Window:
    """Means of the metrics over the steps between two train rows.

    Summed step by step in float64, so that where the chunks are cut does not matter.
    """

    def __init__(self, every: int, saved: Mapping[str, Any] | None = None):
        self._every = every
        self._count: int = saved["count"] if saved else 0
        sums = saved["sums"] if saved else {}
        self._sums = {name: np.asarray(s, np.float64) for name, s in sums.items()}

    def add(self, first: int, metrics: Mapping[str, np.ndarray]):
        """Yields ``(step, means)`` at each multiple of ``every``."""
        length = len(next(iter(metrics.values()))) if metrics else 0
        at = 0
        while at < length:
            stop = min(length, at + self._every - (first + at) % self._every)
            for name, values in metrics.items():
                part = np.asarray(values[at:stop], np.float64)
                start = self._sums.get(name, np.zeros(part.shape[1:]))
                both = np.concatenate([start[None], part])
                self._sums[name] = np.add.accumulate(both)[-1]
            self._count += stop - at
            at = stop
            if (first + at) % self._every == 0:
                yield first + at, self.means()
                self._count, self._sums = 0, {}

    def means(self) -> dict[str, np.ndarray]:
        """Means over the steps since the last row."""
        return {name: s / self._count for name, s in self._sums.items()}

    def saved(self) -> dict[str, Any]:
        """Plain form."""
        return {"count": self._count, "sums": records.to_json(self._sums)}

    def __bool__(self) -> bool:
        return self._count > 0


class _Resident:
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


class _Streamed:
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


def own_state(state: PyTree) -> PyTree:
    """Copies a state into buffers of its own, without weak types.

    So the caller's arrays survive donation, no buffer occurs twice, and the first
    call compiles the same program as the others.

    Examples:
      >>> w = jnp.ones(3)
      >>> twice = own_state({"a": w, "b": w, "lr": 0.5})
      >>> twice["a"] is twice["b"], twice["lr"]
      (False, Array(0.5, dtype=float32))
    """

    def own(leaf):
        leaf = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.copy(leaf)
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        return jnp.array(leaf, dtype=dtype, copy=True)

    return jax.tree.map(own, state)


def _nonfinite_parameter(state: PyTree) -> str | None:
    """Path of a non-finite leaf of ``state.params`` or ``state["params"]``."""
    params = getattr(state, "params", None)
    if params is None and isinstance(state, Mapping):
        params = state.get("params")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
        if inexact and not np.isfinite(jax.device_get(leaf)).all():
            return jax.tree_util.keystr(path)
    return None


def holds_run(run_dir: str | pathlib.Path) -> bool:
    """Whether a directory holds the files of a run.

    Examples:
      >>> holds_run("/no/such/directory")
      False
    """
    run_dir = pathlib.Path(run_dir)
    metrics = run_dir / "metrics.jsonl"
    return metrics.exists() or bool(checkpoints.saved_steps(run_dir / "checkpoints"))


def remove_run(run_dir: str | pathlib.Path) -> None:
    """Deletes the files that :func:`fit` wrote into a directory, and nothing else."""
    run_dir = pathlib.Path(run_dir)
    for name in ("metrics.jsonl", "metrics.jsonl.new"):
        (run_dir / name).unlink(missing_ok=True)
    folder = run_dir / "checkpoints"
    ours = [folder / str(step) for step in checkpoints.saved_steps(folder)]
    ours += checkpoints.our_leftovers(folder)
    ours += folder.glob("*.damaged")
    for path in ours:
        shutil.rmtree(path)
    for path in (run_dir / "tensorboard").glob("events.out.tfevents.*"):
        path.unlink()
    for path in (folder, run_dir / "tensorboard"):
        with contextlib.suppress(OSError):  # absent, or not empty
            path.rmdir()


def load_run(
    run_dir: str | pathlib.Path,
    target: PyTree,
    which: int | Literal["latest", "best"] = "best",
    *,
    mode: checkpoints.Mode = "min",
) -> checkpoints.Restored:
    """Loads a state of a finished (or running) run for evaluation.

    Args:
      run_dir: Directory given to :func:`fit`.
      target: A state of the right structure, or its shapes.
      which: ``"best"``, ``"latest"`` or a step that was kept.
      mode: The ``select_mode`` of the run.

    Returns:
      State, step and record.

    Raises:
      CheckpointError: No such checkpoint, or it is damaged.
      TreeMismatchError: It holds another tree.
    """
    with checkpoints.Checkpointer(
        pathlib.Path(run_dir) / "checkpoints", mode=mode
    ) as ckpt:
        return ckpt.restore(target, which)


def _label(seed: Any) -> dict[str, Any]:
    if seed is None:
        return {}
    return records.to_json(seed if isinstance(seed, Mapping) else {"seed": seed})


class _Run:
    """One call of :func:`fit`: its parts, and what happens at each boundary."""

    def __init__(
        self,
        *,
        engine,
        folder,
        identity,
        num_steps,
        labels,
        many,
        task_names,
        eval_fn,
        eval_every,
        select,
        select_mode,
        log_every,
        checkpoint_every,
        positive_losses,
        screen,
    ):
        self.engine, self.folder, self.identity = engine, folder, identity
        self.num_steps, self.labels, self.many = num_steps, labels, many
        self.task_names, self.eval_fn, self.eval_every = task_names, eval_fn, eval_every
        self.select, self.select_mode = select, select_mode
        self.log_every, self.checkpoint_every = log_every, checkpoint_every
        self.positive_losses = positive_losses
        self.screen: Progress = screen
        self.window = _Window(log_every)
        self.best: Best | None = None
        self.score: float | None = None  # of the evaluation at this very step
        self.score_text = ""
        self.writers: list[Writer] = []
        self.keeper: Any = MemoryWriter()
        self.saver: checkpoints.Checkpointer | None = None
        self.done, self.resumed, self.saved_step = 0, False, -1
        self.seconds_before, self.started = 0.0, time.monotonic()
        self.environment = records.environment()

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def result(self, state: PyTree) -> FitResult:
        return FitResult(
            state=state,
            step=self.done,
            best=self.best,
            rows=self.keeper.rows,
            interrupted=self.done < self.num_steps,
            seconds=self.seconds,
            run_dir=self.folder,
        )

    def restore(self, target: PyTree, may_differ: set[str]) -> PyTree:
        """State of the newest good checkpoint, once its configuration is checked."""
        saver = self.saver
        assert saver is not None

        def check(meta: Mapping[str, Any]) -> None:
            old, new = meta["identity"], self.identity
            found = records.differences(
                {**old["config"], "fit": old["fit"]},
                {**new["config"], "fit": new["fit"]},
                may_differ,
            )
            if found:
                raise ConfigMismatchError(
                    f"The run in {self.folder} was started with another configuration "
                    f"({'; '.join(found)})."
                )
            if meta["step"] > self.num_steps:
                raise ValueError(
                    f"The run in {self.folder} has made {meta['step']} steps already, "
                    f"more than num_steps={self.num_steps}."
                )

        if not saver.steps():
            raise CheckpointError(
                f"No checkpoint in {saver.directory} to resume from: start without "
                "--resume, or with --overwrite if the run died before its first one."
            )
        restored = saver.restore(target, warn=self.screen.note, check=check)
        saver.set_aside_after(restored.step)
        meta = restored.meta
        self.done = self.saved_step = restored.step
        self.resumed = True
        self.best = Best(**meta["best"]) if meta["best"] else None
        self.seconds_before = meta["seconds"]
        self.window = _Window(self.log_every, meta["window"])
        self.engine.seek(meta["stream"])
        return restored.state

    def open_writers(
        self, writers: Sequence[Writer], stack: contextlib.ExitStack
    ) -> bool:
        """Opens all writers; False if the run is finished and needs none."""
        if self.folder is not None:
            self.keeper = JsonlWriter(self.folder / "metrics.jsonl")
            if self.resumed and self.done == self.num_steps and self.keeper.load():
                return False
        started = {
            "started": records.now(),
            "from_step": self.done,
            **self.environment,
        }
        header = {
            **self.identity,
            "task_names": self.task_names,
            "seeds": [label.get("seed", label) for label in self.labels],
            "num_steps": self.num_steps,
            "sessions": [started],
        }
        self.writers = [self.keeper, *writers]
        for writer in self.writers:
            writer.open(header, self.done if self.resumed else None)
            stack.callback(writer.close)
        return True

    def train(self, state: PyTree, signals: _Signals, chunk: int) -> PyTree:
        """Chunk after chunk until the end or a signal."""
        self.screen.start(self.done)
        self.started = time.monotonic()
        limit, calls = 1, 0
        while self.done < self.num_steps and signals.name is None:
            n = min(limit, self._to_boundary())
            before = time.monotonic()
            state, metrics = self.engine.advance(state, self.done, n)
            elapsed = max(time.monotonic() - before, 1e-9)
            calls += 1  # the first compiles: its time says nothing about the next
            fits = 8 if calls == 1 else int(CHUNK_SECONDS / elapsed * n)
            limit = max(1, min(chunk, 16 * limit, fits))
            self._log(metrics)
            self._boundary(state)
            latest = {name: m[-1] for name, m in metrics.items()}
            self.screen.update(self.done, latest, self.score_text)
        if self.done < self.num_steps:
            self._check_params(state)
            self.save(state)
        return state

    def _to_boundary(self) -> int:
        """Steps until the next evaluation, checkpoint or the end."""
        everys = [e for e in (self.eval_every, self.checkpoint_every) if e is not None]
        return min([self.num_steps - self.done, *(e - self.done % e for e in everys)])

    def _log(self, metrics: dict[str, np.ndarray]) -> None:
        """Train rows of a chunk, up to its first bad step."""
        bad = self._first_bad(metrics)
        good = {k: m[: bad[0]] for k, m in metrics.items()} if bad else metrics
        for at, means in self.window.add(self.done, good):
            self.write(at, "train", means, final=False)
        if bad is not None:
            self._raise_bad(bad, metrics["losses"])
        self.done += len(next(iter(metrics.values())))
        if self.done == self.num_steps and self.window:
            means = self.window.means()
            self.write(self.done, "train", means, final=True)

    def _boundary(self, state: PyTree) -> None:
        """Evaluation and checkpoint, where due."""
        last = self.done == self.num_steps
        due = self.eval_every is not None and self.done % self.eval_every == 0
        self.score = None
        if self.eval_fn is not None and (due or last):
            self.evaluate(state, final=not due)
        for writer in self.writers:
            writer.flush()
        every = self.checkpoint_every
        if (
            last
            or (every is not None and self.done % every == 0)
            or (self.best is not None and self.best.step == self.done)
        ):
            self._check_params(state)
            self.save(state)

    def write(self, step: int, kind: str, values: Mapping[str, Any], *, final: bool):
        """One row for each run of the batch of runs."""
        extra = {"final": True} if final else {}
        for i, label in enumerate(self.labels):
            mine = {k: np.asarray(v)[i] if self.many else v for k, v in values.items()}
            row = {"step": step, "kind": kind, **label, **mine, **extra}
            for writer in self.writers:
                writer.write({**row, "seconds": round(self.seconds, 3)})

    def evaluate(self, state: PyTree, *, final: bool) -> None:
        """Writes the rows of an evaluation and updates the best."""
        if self.eval_fn is None:
            return
        values = jax.device_get(dict(self.eval_fn(state)))
        values = {name: np.asarray(v) for name, v in values.items()}
        self.write(self.done, "eval", values, final=final)
        if self.select is None:
            return
        if self.select not in values:
            raise ValueError(
                f"select={self.select!r} is none of the metrics that eval_fn returns: "
                f"{sorted(values)}."
            )
        value = float(np.mean(values[self.select], dtype=np.float64))
        sign = 1 if self.select_mode == "min" else -1
        better = self.best is None or sign * value < sign * self.best.value
        if np.isfinite(value) and better:
            self.best = Best(self.done, value, records.to_json(values))
        self.score, self.score_text = value, f"{self.select} {value:#.4g}"

    def _first_bad(self, metrics: Mapping[str, np.ndarray]) -> tuple[int, ...] | None:
        """Index ``(step in the chunk, [seed,] task)`` of the first unusable loss."""
        losses = metrics.get("losses", np.ones(1))
        good = np.isfinite(losses)
        if self.positive_losses:
            good &= losses > 0
        return None if good.all() else tuple(map(int, np.argwhere(~good)[0]))

    def _raise_bad(self, bad: tuple[int, ...], losses: np.ndarray) -> None:
        step, task = self.done + bad[0] + 1, bad[-1]
        name = self.task_names[task] if self.task_names else str(task)
        label = self.labels[bad[1]] if self.many else self.labels[0]
        who = ", ".join(f"{k} {v}" for k, v in label.items()) if self.many else ""
        value = float(losses[bad])
        kind, why = NonFiniteLossError, ""
        if np.isfinite(value):
            kind = NonPositiveLossError
            why = ", but the method takes the logarithm of the losses"
        raise kind(
            f"The loss of task {name!r} became {value} in step {step}"
            f"{f' ({who})' if who else ''}{why}; {self._good()}.",
            step=step,
            task=name,
            checkpoint=self._last_checkpoint(),
        )

    def _check_params(self, state: PyTree) -> None:
        leaf = _nonfinite_parameter(state)
        if leaf is not None:
            raise NonFiniteLossError(
                f"Parameter {leaf} is not finite after step {self.done}, though the "
                f"losses were; {self._good()}.",
                step=self.done,
                checkpoint=self._last_checkpoint(),
            )

    def _last_checkpoint(self) -> str | None:
        if self.saver is None:
            return None
        self.saver.wait()
        steps = self.saver.steps()
        return str(self.saver.path(steps[-1])) if steps else None

    def _good(self) -> str:
        path = self._last_checkpoint()
        if path is None:
            return "no checkpoint had been written"
        return f"the last good checkpoint is {path}"

    def save(self, state: PyTree) -> None:
        """Rows to the disk, then a checkpoint, unless this step has one."""
        if self.saver is None or self.done == self.saved_step:
            return
        for writer in self.writers:  # rows first: a resume never lacks any
            writer.flush(durable=True)
        session = {
            "identity": self.identity,
            "step": self.done,
            "seconds": self.seconds,
            "best": self.best and self.best._asdict(),
            "window": self.window.saved(),
            "stream": self.engine.position(),
            "environment": self.environment,
        }
        self.saver.save(self.done, state, session, metric=self.score)
        self.saved_step = self.done

    def say_interrupted(self, signals: _Signals) -> None:
        """One line: what stopped, where it is, how to go on."""
        text = f"Stopped by {signals.name} after step {self.done} of {self.num_steps}"
        path = self._last_checkpoint()
        if path is None:
            self.screen.note(f"{text}; nothing is saved.")
        else:
            self.screen.note(
                f"{text}; saved in {path}; the same command with --resume goes on."
            )


def fit(
    state: PyTree,
    step: loop.Step,
    data: Any,
    *,
    num_steps: int,
    batch_size: int | None = None,
    order_key: Key[Array, "..."] | None = None,
    seeds: int | Sequence[int | Mapping[str, Any]] | None = None,
    task_names: Sequence[str] | None = None,
    eval_fn: Callable[[Any], Mapping[str, Any]] | None = None,
    eval_every: int | None = None,
    eval_at_start: bool = False,
    select: str | None = None,
    select_mode: checkpoints.Mode = "min",
    log_every: int = 50,
    run_dir: str | pathlib.Path | None = None,
    checkpoint_every: int | None = None,
    keep_last: int = 2,
    resume: bool | Literal["auto"] = False,
    overwrite: bool = False,
    config: Any = None,
    may_differ: Iterable[str] = (),
    writers: Sequence[Writer] = (),
    tensorboard: bool = False,
    progress: bool = True,
    title: str = "",
    chunk: int = 1000,
    positive_losses: bool = False,
    loop_on: Literal["device", "host"] | None = None,
) -> FitResult:
    """Trains: ``num_steps`` of ``step``, with everything a run needs around it.

    The numbers depend on neither the chunks nor on interruptions: a run that was
    stopped or killed and resumed ends with the same bits, and the same rows but for
    their ``seconds``.

    Args:
      state: Initial state, any pytree with everything that changes. With several
        ``seeds`` every leaf has a leading axis ``[S]``. It is copied, not donated.
      step: Pure ``step(state, batch) -> (state, metrics)`` for *one* run; ``metrics``
        is a dict of arrays. If it has ``"losses"`` ``[T]``, a non-finite one stops
        the run; ``"task_weights"`` ``[T]`` are shown.
      data: A pytree of arrays ``[N, ...]`` that stays on the device, or an iterator
        of batches (with Grain's ``get_state``/``set_state`` if ``run_dir`` is given).
      num_steps: Steps of the whole run, the part before a resume included.
      batch_size: Examples per step, for arrays.
      order_key: Fixes the order of arrays; ``[S]`` keys with several seeds.
      seeds: Label of the rows, or S of them: the runs are then vmapped. A label is a
        number or a dict, e.g. ``{"seed": 0, "lr": 0.1}``.
      task_names: T names, for messages and plots.
      eval_fn: ``eval_fn(state) -> dict`` of arrays (``[S, ...]`` with several seeds);
        jit it yourself. Called every ``eval_every`` steps and after the last.
      eval_every: Steps between evaluations; None for one at the end.
      eval_at_start: Whether to evaluate the initial state as well.
      select: The entry of the evaluation (mean over all its elements, so over seeds)
        that picks the best checkpoint, normally a validation metric.
      select_mode: Whether the best is the smallest or the largest.
      log_every: Steps between train rows, which hold means over those steps.
      run_dir: Where to write ``metrics.jsonl`` and ``checkpoints/<step>``; None writes
        nothing.
      checkpoint_every: Steps between checkpoints. One is also written at each new
        best, at an interruption, and at the end.
      keep_last: How many of the newest checkpoints to keep, besides the best.
      resume: True goes on from the newest undamaged checkpoint in ``run_dir``;
        ``"auto"`` does so if there is one and starts afresh otherwise.
      overwrite: Deletes the files of an earlier run in ``run_dir`` first.
      config: Dataclass or mapping, stored with every checkpoint and in the header of
        the rows, and compared on resume.
      may_differ: Dotted names of fields of ``config`` that a resume may change,
        besides :data:`mtljax.training.MAY_DIFFER`.
      writers: Further receivers of the rows.
      tensorboard: Whether to write ``run_dir/tensorboard`` too.
      progress: Whether to show progress.
      title: What runs, shown before the progress.
      chunk: The most steps between two looks of the host.
      positive_losses: Whether a loss of zero or less stops the run as well; pass a
        balancer's ``positive_losses``.
      loop_on: Whether steps over arrays are looped over inside the compiled program or
        on the host; by default on the host only for convolutions on a CPU.

    Returns:
      The last state, the best evaluation and the rows.

    Raises:
      RunExistsError: ``run_dir`` holds a run; nothing was touched.
      CheckpointError: Nothing usable to resume from.
      ConfigMismatchError: The run to resume has another configuration.
      TreeMismatchError: The run to resume has another state.
      NonFiniteLossError: A loss is NaN or infinite; names step, task and checkpoint.
      NonPositiveLossError: Likewise, a loss is not positive (``positive_losses``).
      ValueError: Arguments or shapes do not fit together.

    Examples:
      >>> def step(w, batch):
      ...     loss = jnp.square(w - batch["x"]).mean()
      ...     return w - 0.1 * (w - batch["x"].mean()), {"losses": loss[None]}
      >>> result = fit(jnp.float32(9), step, {"x": jnp.ones(64)}, num_steps=100,
      ...              batch_size=8, order_key=jax.random.key(0), log_every=25,
      ...              progress=False)
      >>> round(float(result.state), 3), [row["step"] for row in result.rows]
      (1.0, [25, 50, 75, 100])
    """
    _check_arguments(
        {
            "log_every": log_every,
            "eval_every": eval_every,
            "checkpoint_every": checkpoint_every,
            "chunk": chunk,
        },
        resume=bool(resume),
        overwrite=overwrite,
        run_dir=run_dir,
    )
    if select is not None and eval_fn is None:
        raise ValueError(f"select={select!r} needs an eval_fn.")
    folder = None if run_dir is None else pathlib.Path(run_dir)
    many = seeds is not None and not isinstance(seeds, int)
    labels = [_label(s) for s in (seeds if isinstance(seeds, Sequence) else [seeds])]
    one = _single(state, len(labels) if many else None)
    if hasattr(data, "__next__"):
        engine: Any = _Streamed(step, data, seeds=many, resumable=folder is not None)
    else:
        engine = _Resident(
            step,
            data,
            batch_size=batch_size,
            order_key=order_key,
            chunk=chunk,
            seeds=many,
            one=one,
            loop_on=loop_on,
        )
        _check_metrics(loop.check_step(step, one, engine.batch), task_names)
    identity = {
        "config": records.to_json({} if config is None else config),
        "fit": {
            "batch_size": batch_size,
            "num_examples": engine.size,
            "order_key": None
            if order_key is None
            else records.to_json(jax.random.key_data(order_key)),
            "seeds": labels,
            "task_names": list(task_names) if task_names else None,
        },
    }
    state = own_state(state)
    with contextlib.ExitStack() as stack:
        screen = stack.enter_context(
            Progress(num_steps, task_names=task_names, title=title, enabled=progress)
        )
        run = _Run(
            engine=engine,
            folder=folder,
            identity=identity,
            num_steps=num_steps,
            labels=labels,
            many=many,
            task_names=task_names,
            eval_fn=eval_fn,
            eval_every=eval_every,
            select=select,
            select_mode=select_mode,
            log_every=log_every,
            checkpoint_every=checkpoint_every,
            positive_losses=positive_losses,
            screen=screen,
        )
        if folder is not None:
            if resume == "auto":
                resume = bool(checkpoints.saved_steps(folder / "checkpoints"))
                overwrite = not resume
            if overwrite:
                remove_run(folder)
            run.saver = stack.enter_context(
                checkpoints.Checkpointer(
                    folder / "checkpoints", keep_last=keep_last, mode=select_mode
                )
            )
            if resume:
                state = run.restore(state, {*records.MAY_DIFFER, *may_differ})
            run.saver.clean()
            if tensorboard:  # beside the rows
                writers = [*writers, TensorBoardWriter(folder / "tensorboard")]
        if not run.open_writers(writers, stack):
            return run.result(state)
        signals = stack.enter_context(_Signals())
        if eval_at_start and run.done == 0 and not run.resumed:
            run.evaluate(state, final=False)
            run.save(state)
        state = run.train(state, signals, chunk)
        if run.done < num_steps:
            run.say_interrupted(signals)
        return run.result(state)


def _check_arguments(
    counts: Mapping[str, int | None],
    *,
    resume: bool,
    overwrite: bool,
    run_dir: str | pathlib.Path | None,
) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other.")
    if resume and run_dir is None:
        raise ValueError("resume needs a run_dir.")
    if run_dir is not None and holds_run(run_dir) and not (resume or overwrite):
        raise RunExistsError(
            f"{run_dir} already holds a run: add --resume to go on with it or "
            "--overwrite to start again."
        )


def _single(state: PyTree, num_seeds: int | None) -> PyTree:
    """Shapes of the state of one run."""
    shapes = jax.eval_shape(lambda s: s, state)
    if num_seeds is None:
        return shapes
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        if leaf.shape[:1] != (num_seeds,):
            raise ValueError(
                f"State leaf {jax.tree_util.keystr(path) or '(root)'} has shape "
                f"{leaf.shape}; its leading axis must be the {num_seeds} seeds."
            )
    return jax.eval_shape(lambda s: jax.tree.map(lambda x: x[0], s), state)


def _check_metrics(metrics: Any, task_names: Sequence[str] | None) -> None:
    if not isinstance(metrics, Mapping) or any(
        not hasattr(m, "shape") for m in metrics.values()
    ):
        raise ValueError("The step must return (state, metrics), metrics a flat dict.")
    losses = metrics.get("losses")
    if losses is not None and len(losses.shape) != 1:
        raise ValueError(f"metrics['losses'] has shape {losses.shape}; it must be [T].")
    if losses is not None and task_names and len(task_names) != losses.shape[0]:
        raise ValueError(
            f"There are {len(task_names)} task_names but {losses.shape[0]} losses."
        )
