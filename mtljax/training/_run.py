"""State of one call of :func:`mtljax.training.fit`."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from mtljax.training import _hosts, errors, records
from mtljax.training import checkpoint as checkpoints
from mtljax.training._options import Checkpointing, Evaluation, Execution, Logging
from mtljax.training._signals import Signals
from mtljax.training.progress import Progress
from mtljax.training.writers import (
    JsonlWriter,
    MemoryWriter,
    Seal,
    Writer,
    read_jsonl,
)

CHUNK_SECONDS = 1.0  # target duration of a call, bounds the delay of signal handling


class Best(NamedTuple):
    """The best evaluation so far."""

    step: int
    value: float
    metrics: dict[str, Any]  # the whole evaluation, plain JSON


class FitResult(NamedTuple):
    """Result of :func:`fit`.

    Examples:
      >>> from mtljax.training import FitResult
      >>> result = FitResult(None, 3, None, [], "SIGTERM", 0.5, None)
      >>> result.interrupted, result.exit_status
      (True, 143)
    """

    state: Any  # after the last step
    step: int  # completed steps
    best: Best | None  # None without `select`
    rows: list[dict[str, Any]]  # all metric rows of the run, including a resumed part
    signal: str | None  # SIGTERM or SIGINT if received, even in the last step
    seconds: float  # in training and evaluation, over all sessions
    run_dir: pathlib.Path | None

    @property
    def interrupted(self) -> bool:
        """Whether the run received a stop signal."""
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """Status for ``sys.exit``: 0, 130 (SIGINT) or 143 (SIGTERM)."""
        return {None: 0, "SIGINT": 130, "SIGTERM": 143}[self.signal]


class Window:
    """Means of the metrics over the steps between two train rows.

    The steps are summed one by one in float64. The result does not depend on chunks.
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
        """Returns means over the steps since the last row."""
        return {name: s / self._count for name, s in self._sums.items()}

    def saved(self) -> dict[str, Any]:
        """Returns the contents as plain JSON."""
        return {"count": self._count, "sums": records.to_json(self._sums)}

    def __bool__(self) -> bool:
        return self._count > 0


def label_of(seed: Any) -> dict[str, Any]:
    if seed is None:
        return {}
    return records.to_json(seed if isinstance(seed, Mapping) else {"seed": seed})


@jax.jit
def _all_finite(leaf):
    return jnp.isfinite(leaf).all()


def _nonfinite_parameter(state: PyTree) -> str | None:
    """Returns the path of a non-finite leaf of ``params``, or None."""
    params = getattr(state, "params", None)
    if params is None and isinstance(state, Mapping):
        params = state.get("params")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not _all_finite(leaf):
            return jax.tree_util.keystr(path)
    return None


class Subject(NamedTuple):
    """Description of a run for its rows and messages."""

    identity: dict[str, Any]  # plain JSON, compared on resume
    num_steps: int
    labels: list[dict[str, Any]]  # one per seed
    many: bool  # whether the metrics have an axis of seeds
    task_names: Sequence[str] | None


@dataclasses.dataclass
class Run:
    """One call of :func:`fit`, with the actions at the boundaries between chunks."""

    engine: Any
    subject: Subject
    _: dataclasses.KW_ONLY
    evaluation: Evaluation | None
    checkpointing: Checkpointing | None
    logging: Logging
    execution: Execution
    screen: Progress

    def __post_init__(self):
        options = self.checkpointing
        self.folder = None if options is None else pathlib.Path(options.directory)
        self.checkpoint_every = None if options is None else options.every
        self.num_steps, self.log_every = self.subject.num_steps, self.logging.every
        self.window = Window(self.log_every)
        self.best: Best | None = None
        self.score: float | None = None  # of the evaluation at the current step
        self.score_text = ""
        self.writers: list[Writer] = []
        self.keeper: Any = MemoryWriter()
        self.saver: checkpoints.Checkpointer | None = None
        self.done, self.saved_step = 0, -1
        self.resumed: Mapping[str, Any] | None = None  # record of the checkpoint
        self.seconds_before, self.started = 0.0, time.monotonic()
        self.sessions: list[dict[str, Any]] = []

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def result(self, state: PyTree, signals: Signals) -> FitResult:
        signals.reported = True
        return FitResult(
            state=state,
            step=self.done,
            best=self.best,
            rows=self.keeper.rows,
            signal=signals.name,
            seconds=self.seconds,
            run_dir=self.folder,
        )

    def restore(self, target: PyTree, may_differ: set[str]) -> PyTree:
        """Restores the newest undamaged checkpoint after checking its configuration."""
        saver = self.saver
        assert saver is not None

        def check(meta: Mapping[str, Any]) -> None:
            old, new = meta["identity"], self.subject.identity
            found = records.differences(
                {**old["config"], "fit": old["fit"]},
                {**new["config"], "fit": new["fit"]},
                may_differ,
            )
            if found:
                raise errors.ConfigMismatchError(
                    f"The run in {self.folder} was started with another configuration "
                    f"({'; '.join(found)})."
                )
            if meta["step"] > self.num_steps:
                raise ValueError(
                    f"The run in {self.folder} has made {meta['step']} steps already, "
                    f"more than num_steps={self.num_steps}."
                )

        if not saver.steps():
            raise errors.CheckpointError(
                f"No checkpoint in {saver.directory} to resume from. Start without "
                "resume (--resume), or pass overwrite=True (--overwrite)."
            )
        restored = saver.restore(target, warn=self.screen.note, check=check)
        meta = restored.meta
        self.engine.seek(meta["stream"])
        self.done = self.saved_step = restored.step
        self.resumed = meta
        self.best = Best(**meta["best"]) if meta["best"] else None
        self.seconds_before, self.sessions = meta["seconds"], meta["sessions"]
        self.window = Window(self.log_every, meta["window"])
        return restored.state

    def open_writers(
        self, writers: Sequence[Writer], stack: contextlib.ExitStack
    ) -> bool:
        """Opens all writers. Returns False if the run is finished and needs none."""
        complete = _hosts.on_main(lambda: self._open_writers(writers, stack))
        if not _hosts.is_main():
            self.writers = [self.keeper]
            if self.resumed is not None and self.folder is not None:
                self.keeper.rows = read_jsonl(self.folder)[1]
        if self.resumed is not None and self.saver is not None and not complete:
            self.saver.set_aside_after(self.done)
        return not complete

    def _open_writers(
        self, writers: Sequence[Writer], stack: contextlib.ExitStack
    ) -> bool:
        started = {
            "started": records.now(),
            "from_step": self.done,
            **records.environment(),
        }
        self.sessions = [*self.sessions, started]
        header = {
            **self.subject.identity,
            "task_names": self.subject.task_names,
            "seeds": [label.get("seed", label) for label in self.subject.labels],
            "num_steps": self.num_steps,
            "sessions": self.sessions,
        }
        step = None if self.resumed is None else self.done
        if self.folder is not None:
            self.keeper = JsonlWriter(self.folder / "metrics.jsonl")
            seal = None if self.resumed is None else Seal(**self.resumed["rows"])
            if seal and self.done == self.num_steps and self.keeper.load(seal):
                return True
            stack.callback(self.keeper.close)
            self.keeper.open(header, step, seal)
        self.writers = [self.keeper]
        for writer in writers:
            writer.open(header, step)
            stack.callback(writer.close)
            self.writers.append(writer)
        return False

    def train(self, state: PyTree, signals: Signals) -> PyTree:
        """Runs chunks until the last step or a signal."""
        self.screen.start(self.done)
        self.started = time.monotonic()
        if self.done == self.num_steps:  # final rows are missing in the file
            self._final_rows(state)
        limit, calls = 1, 0
        while True:
            signals.number, limit = _hosts.boundary(signals.number, limit)
            if signals.number is not None or self.done == self.num_steps:
                break
            n = min(limit, self._to_boundary())
            before = time.monotonic()
            state, metrics = self.engine.advance(state, self.done, n)
            metrics = self._by_task(metrics, 1)
            elapsed = max(time.monotonic() - before, 1e-9)
            calls += 1  # the first call compiles, so its time predicts nothing
            fits = 8 if calls == 1 else int(CHUNK_SECONDS / elapsed * n)
            limit = max(1, min(self.execution.chunk, 16 * limit, fits))
            self._log(metrics, n, elapsed)
            self._boundary(state)
            latest = {name: m[-1] for name, m in metrics.items()}
            self.screen.update(self.done, latest, self.score_text)
        if self.done < self.num_steps:
            self._check_params(state)
            self.save(state)
        return state

    def _by_task(self, metrics: Mapping[str, Any], axis: int) -> dict[str, Any]:
        """Converts dicts by task; ``axis`` is that of the seeds, if there are any."""
        names = self.subject.task_names
        return records.by_task(metrics, names, axis + self.subject.many)

    def _due(self) -> bool:
        every = None if self.evaluation is None else self.evaluation.every
        return every is not None and self.done % every == 0

    def _final_rows(self, state: PyTree) -> None:
        """Writes the rows of the last step that a longer run would not have."""
        if self.window:
            self.write(self.done, "train", self.window.means(), final=True)
        if self.evaluation is not None and not self._due():
            self.evaluate(state, final=True)

    def _to_boundary(self) -> int:
        """Returns the number of steps to the next evaluation, checkpoint or end."""
        evaluate = None if self.evaluation is None else self.evaluation.every
        everys = [e for e in (evaluate, self.checkpoint_every) if e is not None]
        return min([self.num_steps - self.done, *(e - self.done % e for e in everys)])

    def _log(self, metrics: dict[str, np.ndarray], count: int, elapsed: float) -> None:
        """Writes the train rows of a chunk, up to its first unusable step.

        All steps of a chunk end at once for the host. The ``seconds`` of a row are
        those of its step if the steps of the chunk take the same time.
        """
        end, stop = self.seconds, self.done + count
        bad = self._first_bad(metrics)
        good = {k: m[: bad[0]] for k, m in metrics.items()} if bad else metrics
        for at, means in self.window.add(self.done, good):
            seconds = end - elapsed * (stop - at) / count
            self.write(at, "train", means, final=False, seconds=seconds)
        if bad is not None:
            self._raise_bad(bad, metrics["losses"])
        self.done += count

    def _boundary(self, state: PyTree) -> None:
        """Evaluates and saves if due."""
        last = self.done == self.num_steps
        self.score = None
        if last:
            self._final_rows(state)
        if self._due():
            self.evaluate(state, final=False)
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

    def write(
        self,
        step: int,
        kind: str,
        values: Mapping[str, Any],
        *,
        final: bool,
        seconds: float | None = None,
    ):
        """Writes one row per seed. ``seconds`` are by default those of this call."""
        extra = {"final": True} if final else {}
        now = round(self.seconds if seconds is None else seconds, 3)
        many = self.subject.many
        for i, label in enumerate(self.subject.labels):
            mine = {k: np.asarray(v)[i] if many else v for k, v in values.items()}
            row = {"step": step, "kind": kind, **label, **mine, **extra}
            for writer in self.writers:
                writer.write({**row, "seconds": now})

    def evaluate(self, state: PyTree, *, final: bool) -> None:
        """Writes the rows of an evaluation and updates the best."""
        evaluation = self.evaluation
        if evaluation is None:
            return
        values = _hosts.fetch(dict(evaluation.function(state)))
        values = self._by_task(values, 0)
        values = {name: np.asarray(v) for name, v in values.items()}
        self.write(self.done, "eval", values, final=final)
        select = evaluation.select
        if select is None:
            return
        if select not in values:
            raise ValueError(
                f"select={select!r} must be one of the metrics that the evaluation "
                f"returns: {sorted(values)}."
            )
        value = float(np.mean(values[select], dtype=np.float64))
        sign = 1 if evaluation.mode == "min" else -1
        better = self.best is None or sign * value < sign * self.best.value
        if np.isfinite(value) and better:
            self.best = Best(self.done, value, records.to_json(values))
        self.score, self.score_text = value, f"{select} {value:#.4g}"

    def _first_bad(self, metrics: Mapping[str, np.ndarray]) -> tuple[int, ...] | None:
        """Returns ``(step in the chunk, [seed,] task)`` of the first unusable loss."""
        losses = metrics.get("losses", np.ones(1))
        good = np.isfinite(losses)
        if self.execution.positive_losses:
            good &= losses > 0
        return None if good.all() else tuple(map(int, np.argwhere(~good)[0]))

    def _raise_bad(self, bad: tuple[int, ...], losses: np.ndarray) -> None:
        step, task = self.done + bad[0] + 1, bad[-1]
        subject = self.subject
        name = subject.task_names[task] if subject.task_names else str(task)
        label = subject.labels[bad[1] if subject.many else 0]
        who = ", ".join(f"{k} {v}" for k, v in label.items()) if subject.many else ""
        value = float(losses[bad])
        kind, why = errors.NonFiniteLossError, ""
        if np.isfinite(value):
            kind = errors.NonPositiveLossError
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
            raise errors.NonFiniteLossError(
                f"Parameter {leaf} is not finite after step {self.done}, although the "
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
        """Writes the rows to the disk, then a checkpoint unless this step has one."""
        if self.saver is None or self.done == self.saved_step:
            return
        for writer in self.writers:  # first, so that each checkpoint has all its rows
            writer.flush(durable=True)
        session = {
            "identity": self.subject.identity,
            "step": self.done,
            "seconds": self.seconds,
            "best": self.best and self.best._asdict(),
            "window": self.window.saved(),
            "stream": self.engine.position(),
            "rows": _hosts.is_main() and self.keeper.seal()._asdict(),
            "sessions": self.sessions,
        }
        self.saver.save(self.done, state, session, metric=self.score)
        self.saved_step = self.done

    def say_interrupted(self, signals: Signals) -> None:
        """Prints the signal, the checkpoint, and how to continue."""
        text = f"Stopped by {signals.name} after step {self.done} of {self.num_steps}"
        path = self._last_checkpoint()
        if path is None:
            self.screen.note(f"{text}; nothing was saved.")
        else:
            self.screen.note(
                f"{text}; saved in {path}; the same command with --resume continues it."
            )
