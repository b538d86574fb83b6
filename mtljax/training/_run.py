"""One run as :func:`mtljax.training.fit` drives it: rows, checkpoints, a clean stop."""

import contextlib
import pathlib
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from mtljax.training import checkpoint as checkpoints
from mtljax.training import records
from mtljax.training.errors import (
    CheckpointError,
    ConfigMismatchError,
    NonFiniteLossError,
    NonPositiveLossError,
)
from mtljax.training.progress import Progress
from mtljax.training.writers import JsonlWriter, MemoryWriter, Writer

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


class Signals:
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


class Window:
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


def label_of(seed: Any) -> dict[str, Any]:
    if seed is None:
        return {}
    return records.to_json(seed if isinstance(seed, Mapping) else {"seed": seed})


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


class Run:
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
        self.window = Window(log_every)
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
        self.window = Window(self.log_every, meta["window"])
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

    def train(self, state: PyTree, signals: Signals, chunk: int) -> PyTree:
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

    def say_interrupted(self, signals: Signals) -> None:
        """One line: what stopped, where it is, how to go on."""
        text = f"Stopped by {signals.name} after step {self.done} of {self.num_steps}"
        path = self._last_checkpoint()
        if path is None:
            self.screen.note(f"{text}; nothing is saved.")
        else:
            self.screen.note(
                f"{text}; saved in {path}; the same command with --resume goes on."
            )
