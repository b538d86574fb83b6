"""Writers of metric rows: JSON lines, TensorBoard, memory."""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from mtljax.training.errors import CheckpointError, OutputError
from mtljax.training.records import to_json

Row = dict[str, Any]


@runtime_checkable
class Writer(Protocol):
    """Receives the rows of a run. :func:`fit` calls the methods in this order."""

    def open(self, header: Mapping[str, Any], resume_step: int | None) -> None:
        """Starts a run, or resumes it after ``resume_step`` and deletes later rows."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes one row of plain JSON with at least ``step`` and ``kind``."""

    def flush(self, *, durable: bool = False) -> None:
        """Passes the rows to the operating system, or to the disk if ``durable``."""

    def close(self) -> None:
        """Ends the run."""


def read_jsonl(path: str | pathlib.Path) -> tuple[Row, list[Row]]:
    """Reads a metrics file and ignores an incomplete last line.

    Args:
      path: The file, or the run directory that contains ``metrics.jsonl``.

    Returns:
      The header (configuration, seeds, sessions, ...) and the rows.

    Raises:
      FileNotFoundError: If the file does not exist.
      ValueError: If a line other than the last is damaged. The message names the line.

    Examples:
      >>> import pathlib, tempfile
      >>> from mtljax.training import JsonlWriter, read_jsonl
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
      >>> writer = JsonlWriter(path)
      >>> writer.open({"config": {"lr": 0.1}}, None)
      >>> writer.write({"step": 1, "kind": "train", "losses": [0.5, 0.25]})
      >>> writer.close()
      >>> header, rows = read_jsonl(path)
      >>> header["config"], rows[0]["losses"]
      ({'lr': 0.1}, [0.5, 0.25])
    """
    path = pathlib.Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # a last line without newline is cut
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise ValueError(f"Line {number} of {path} is damaged.") from None
    if not rows or rows[0].get("kind") != "header":
        return {}, rows
    return rows[0], rows[1:]


@contextlib.contextmanager
def writing(path: str | pathlib.Path):
    """Converts an ``OSError`` to an error of one sentence that names the path."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise OutputError(f"{path} cannot be written: {why}.") from error


def atomic_write(path: pathlib.Path, content: bytes) -> None:
    """Writes a file atomically: after a kill it is the old or the new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    with new.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Seal(NamedTuple):
    """Number and digest of the rows that belong to a checkpoint.

    The final rows, which a longer run does not have, are counted separately and without
    their ``seconds``, because they can be computed again.
    """

    rows: int
    digest: str
    final_rows: int
    final_digest: str


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"


class _Sealer:
    """Updates a seal row by row."""

    def __init__(self, rows: Sequence[Row] = ()):
        self._counts = [0, 0]
        self._digests = [hashlib.sha256(), hashlib.sha256()]
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        final = bool(row.get("final"))
        if final:
            row = {name: value for name, value in row.items() if name != "seconds"}
        self._counts[final] += 1
        self._digests[final].update(_line(row))

    def seal(self) -> Seal:
        lasting, final = (digest.hexdigest() for digest in self._digests)
        return Seal(self._counts[0], lasting, self._counts[1], final)


def sealed_rows(path: pathlib.Path, seal: Seal) -> list[Row]:
    """Returns the rows that belong to a checkpoint, and the final rows after them.

    Later rows and incomplete lines are ignored.

    Raises:
      CheckpointError: If a row is absent or was changed.
    """
    lines = path.read_bytes().split(b"\n")[1:-1] if path.exists() else []
    rows, count = [], 0
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or (count == seal.rows and not row.get("final")):
            break
        rows.append(row)
        count += not row.get("final")
    if _Sealer(rows).seal()[:2] != seal[:2]:
        lost = f"of {seal.rows} rows only {count} are readable"
        raise CheckpointError(
            f"The rows in {path} are not those of the checkpoint to resume from "
            f"({lost if count < seal.rows else 'a row was changed'}). Restore the "
            "file, or pass overwrite=True (--overwrite) to start again."
        )
    return rows


class JsonlWriter:
    """Appends rows to a file of JSON lines whose first line is the header.

    A kill leaves at most one incomplete last line. Resuming removes this line, the rows
    after the restored step, and the rows marked ``final``, which only exist because the
    earlier run was shorter. All this is one atomic rewrite. The finished file equals
    that of an uninterrupted run, except for ``seconds`` in the rows and ``sessions`` in
    the header.

    Args:
      path: The file. Its folder is created if absent.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        self.rows: list[Row] = []
        self._file = None
        self._pending: list[bytes] = []
        self._sealer = _Sealer()

    def open(
        self,
        header: Mapping[str, Any],
        resume_step: int | None,
        seal: Seal | None = None,
    ) -> None:
        """Starts the file, or truncates it to ``resume_step``.

        Args:
          header: Plain JSON.
          resume_step: Step to resume from, or None for a new run.
          seal: Seal of the checkpoint to resume from. Rows that do not match it are
            rejected.

        Raises:
          CheckpointError: If the rows do not match ``seal``.
          OutputError: If the file cannot be written.
        """
        if resume_step is not None and (seal is not None or self.path.exists()):
            rows = sealed_rows(self.path, seal) if seal else read_jsonl(self.path)[1]
            rows = [row for row in rows if not row.get("final")]
            self.rows = [row for row in rows if row.get("step", 0) <= resume_step]
        self._sealer = _Sealer(self.rows)
        first = {"kind": "header", **to_json(header)}
        with writing(self.path):
            atomic_write(self.path, b"".join(map(_line, [first, *self.rows])))
            self._file = self.path.open("ab", buffering=0)

    def load(self, seal: Seal) -> bool:
        """Loads the rows of a finished run. Returns False if it must be rewritten.

        Raises:
          CheckpointError: If other rows do not match ``seal``.
        """
        rows = sealed_rows(self.path, seal)
        self.rows = rows
        try:
            header, _ = read_jsonl(self.path)
        except ValueError:
            return False
        return bool(header) and _Sealer(rows).seal() == seal

    def seal(self) -> Seal:
        """Returns the seal of all rows so far."""
        return self._sealer.seal()

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row. NaN and infinities become null."""
        if self._file is None:
            raise ValueError("The writer is not open.")
        plain = to_json(row)
        self.rows.append(plain)
        self._sealer.add(plain)
        self._pending.append(_line(plain))

    def flush(self, *, durable: bool = False) -> None:
        """Makes the rows visible to readers, and durable if requested."""
        if self._file is None:
            return
        content, self._pending = b"".join(self._pending), []
        with writing(self.path):
            while content:
                content = content[self._file.write(content) :]
            if durable:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flushes the rows to the disk and closes the file."""
        if self._file is not None:
            try:
                self.flush(durable=True)
            finally:
                self._file.close()
                self._file = None


class MemoryWriter:
    """Stores the rows of this process in ``rows``, for runs without a directory.

    Examples:
      >>> from mtljax.training import MemoryWriter
      >>> writer = MemoryWriter()
      >>> writer.open({}, None)
      >>> writer.write({"step": 1, "kind": "train", "losses": [0.5, 0.25]})
      >>> writer.rows
      [{'step': 1, 'kind': 'train', 'losses': [0.5, 0.25]}]
    """

    def __init__(self):
        self.rows: list[Row] = []

    def open(self, header: Mapping[str, Any], resume_step: int | None) -> None:
        """Starts with no rows."""
        del header, resume_step
        self.rows = []

    def write(self, row: Mapping[str, Any]) -> None:
        """Stores a row in the same plain form as in a file."""
        self.rows.append(to_json(row))

    def flush(self, *, durable: bool = False) -> None:
        """Does nothing."""
        del durable

    def close(self) -> None:
        """Does nothing."""


class TensorBoardWriter:
    """Writes the numbers of the rows as TensorBoard scalars.

    The entry ``losses`` of a row with ``kind`` ``"train"`` becomes
    ``train/losses/<task>``. If the run has several seeds, ``/seed_<seed>`` is appended.

    Args:
      directory: Folder of the event files.

    Raises:
      ImportError: If tensorboardX is not installed.
    """

    def __init__(self, directory: str | pathlib.Path):
        try:
            import tensorboardX
        except ImportError:
            raise ImportError(
                "TensorBoardWriter needs tensorboardX: "
                "pip install 'mtljax[tensorboard]'."
            ) from None
        self._make = tensorboardX.SummaryWriter
        self._directory = str(directory)
        self._events: Any = None
        self._tasks: list[str] = []
        self._many = False

    def open(self, header: Mapping[str, Any], resume_step: int | None) -> None:
        """Opens an event file that hides the events after ``resume_step``."""
        self._tasks = list(header.get("task_names") or [])
        self._many = len(header.get("seeds") or []) > 1
        purge = None if resume_step is None else resume_step + 1
        self._events = self._make(self._directory, purge_step=purge)
        if resume_step is None:
            config = json.dumps(to_json(header.get("config")), indent=2)
            self._events.add_text("config", f"```\n{config}\n```")

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes the numbers of a row. Per-task lists use task names."""
        suffix = f"/seed_{row['seed']}" if self._many and "seed" in row else ""
        for name, value in to_json(row).items():
            if name in ("step", "kind", "seed", "final"):
                continue
            for tag, number in self._scalars(f"{row['kind']}/{name}", value):
                self._events.add_scalar(tag + suffix, number, row["step"])

    def _scalars(self, tag: str, value: Any):
        if isinstance(value, list):
            named = len(value) == len(self._tasks)
            for i, item in enumerate(value):
                yield from self._scalars(
                    f"{tag}/{self._tasks[i] if named else i}", item
                )
        elif isinstance(value, dict):
            for name, item in value.items():
                yield from self._scalars(f"{tag}/{name}", item)
        elif isinstance(value, int | float):
            yield tag, value

    def flush(self, *, durable: bool = False) -> None:
        """Passes the events to the system. They are never made durable."""
        del durable
        self._events.flush()

    def close(self) -> None:
        """Closes the event file."""
        if self._events is not None:
            self._events.close()
            self._events = None
