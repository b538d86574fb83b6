"""Progress display of a run, on a terminal or in a log."""

import datetime
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtljax.extras import require


def describe(
    metrics: Mapping[str, Any], task_names: Sequence[str] | None = None
) -> str:
    """Formats losses and task weights (means over seeds) as one line.

    Args:
      metrics: Dict with ``losses`` ``[T]`` and optional ``task_weights`` ``[T]``, or
        ``[S, T]`` with seeds. A dict by task has its own names.
      task_names: T names. They are shown for at most four tasks.

    Returns:
      The line. For more than four tasks it contains a mean and a range.

    Examples:
      >>> from mtljax.training.progress import describe
      >>> describe({"losses": [0.5, 1.25], "task_weights": [0.5, 0.5]}, ["a", "b"])
      'loss a 0.500 b 1.25  weight a 0.50 b 0.50'
      >>> describe({"losses": [0.1] * 11})
      'loss 0.100 (0.100 to 0.100)'
    """
    parts = []
    for name, label, style in [
        ("losses", "loss", "#.3g"),
        ("task_weights", "weight", ".2f"),
    ]:
        if name not in metrics:
            continue
        given, names = metrics[name], task_names
        if isinstance(given, Mapping):
            names = list(given)
            given = np.stack([np.asarray(given[task]) for task in names], -1)
        values = np.atleast_1d(np.asarray(given, np.float64))
        values = values.reshape(-1, values.shape[-1]).mean(0)  # over the seeds
        if len(values) > 4:
            low, high = format(values.min(), style), format(values.max(), style)
            text = f"{format(values.mean(), style)} ({low} to {high})"
        else:
            names = names if len(names or ()) == len(values) else None
            text = " ".join(
                (f"{names[i]} " if names else "") + format(v, style)
                for i, v in enumerate(values)
            )
        parts.append(f"{label} {text}")
    return "  ".join(parts)


class Progress:
    """Shows a live bar on a terminal, and plain lines elsewhere.

    A plain line is printed at the start, at the end, and at most every
    ``every_seconds`` in between. Plain lines contain no control characters.

    Args:
      num_steps: Number of steps of the whole run.
      task_names: Names of the losses.
      title: Name of the run, for example the method.
      every_seconds: Minimum time between two plain lines, in seconds.
      stream: Text file for the output. The default is standard output.
      enabled: Whether to show progress. Notes are always shown.

    Examples:
      >>> from mtljax.training import Progress
      >>> with Progress(10, title="demo") as progress:
      ...     progress.update(10, {"losses": [0.5, 0.25]})
      demo: step 10/10 (100%)  loss 0.500 0.250
    """

    def __init__(
        self,
        num_steps: int,
        *,
        task_names: Sequence[str] | None = None,
        title: str = "",
        every_seconds: float = 10.0,
        stream: Any = None,
        enabled: bool = True,
    ):
        self._num_steps = num_steps
        self._names = task_names
        self._title = title
        self._every = every_seconds
        self._stream = stream or sys.stdout
        self._enabled = enabled
        self._live: Any = None
        self._task: Any = None
        self._start_step: int | None = None  # first step of the speed measurement
        self._started = self._last_line = time.monotonic()
        self._printed = -1
        self._seen: tuple[int, Mapping[str, Any], str] | None = None

    def __enter__(self):
        if self._enabled and self._stream.isatty():
            self._live = self._make_live()
            self._live.start()
            self._task = self._live.add_task(
                self._title, total=self._num_steps, rate="", eta="", text="compiling"
            )
        return self

    def __exit__(self, *exc_info: Any) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._enabled and self._seen and self._seen[0] != self._printed:
            self._line(*self._seen)

    def _make_live(self):
        require("mtljax.training.Progress", "train", "rich")
        from rich import progress
        from rich.console import Console
        from rich.table import Column

        return progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=20),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]} {task.fields[eta]}"),
            progress.TextColumn(
                "{task.fields[text]}",
                markup=False,
                table_column=Column(overflow="fold", ratio=1),
            ),
            console=Console(file=self._stream),
            refresh_per_second=4,
            expand=True,
        )

    def start(self, step: int) -> None:
        """Shows the first step of the run."""
        self._last_line = time.monotonic()
        if self._live is not None:
            self._live.update(self._task, completed=step)

    def _speed(self, step: int) -> tuple[str, str]:
        if self._start_step is None:  # no speed yet, because the first steps compile
            self._start_step, self._started = step, time.monotonic()
        elapsed = time.monotonic() - self._started
        done = step - self._start_step
        if done <= 0 or elapsed <= 0:
            return "", ""
        rate = done / elapsed
        number = f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
        left = datetime.timedelta(seconds=round((self._num_steps - step) / rate))
        return f"{number} steps/s", f"{left} left"

    def update(
        self, step: int, metrics: Mapping[str, Any], evaluation: str = ""
    ) -> None:
        """Shows the state of the run after ``step`` steps.

        Args:
          step: Number of completed steps.
          metrics: Train metrics, see ``describe``.
          evaluation: A short text about the last evaluation.
        """
        if not self._enabled:
            return
        self._seen = (step, metrics, evaluation)
        rate, eta = self._speed(step)
        if self._live is not None:
            text = "  ".join(filter(None, [describe(metrics, self._names), evaluation]))
            self._live.update(self._task, completed=step, rate=rate, eta=eta, text=text)
        elif (
            self._printed < 0
            or step >= self._num_steps
            or time.monotonic() - self._last_line >= self._every
        ):
            self._line(step, metrics, evaluation)

    def _line(self, step: int, metrics: Mapping[str, Any], evaluation: str) -> None:
        self._printed, self._last_line = step, time.monotonic()
        share = f"{step}/{self._num_steps} ({100 * step // self._num_steps}%)"
        title = f"{self._title}: " if self._title else ""
        parts = [f"{title}step {share}", *self._speed(step)]
        parts += [describe(metrics, self._names), evaluation]
        print("  ".join(filter(None, parts)), file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """Prints one line above the bar, even if the display is not enabled."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)
