"""SIGINT and SIGTERM: a run stops at the next chunk, a command with 130 or 143."""

import os
import signal
import threading
from typing import Any

_current: "Signals | None" = None


class Signals:
    """Notes the first SIGINT or SIGTERM; use it as a context manager.

    Outside of a :class:`Patient` section a signal raises at once. Inside of one it is
    only noted, and a second SIGINT raises. The sections of one context share it, so
    that a command that calls several runs starts no further one after a signal.

    With ``leave``, a signal outside of a section ends the process with 130 or 143. An
    exception that is raised while JAX traces or compiles can crash the process instead.
    """

    def __init__(self, *, leave: bool = False):
        self.leave = leave
        self.number: int | None = None
        self.reported = False  # the caller handles it: it need not be delivered again
        self._patience = 0
        self._old: dict[int, Any] = {}

    @property
    def name(self) -> str | None:
        """Name of the signal."""
        return None if self.number is None else signal.Signals(self.number).name

    def __enter__(self):
        global _current
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGTERM, signal.SIGINT):
            self._old[number] = signal.signal(number, self._handle)
        self._outer, _current = _current, self
        return self

    def __exit__(self, *exc_info: Any) -> None:
        global _current  # noqa: PLW0603
        if not self._old:
            return
        _current = self._outer
        for number, handler in self._old.items():
            signal.signal(number, handler)
        if exc_info[0] is None and self.number is not None and not self.reported:
            signal.raise_signal(self.number)  # too late for the result: deliver it

    def _handle(self, number: int, frame: Any) -> None:
        del frame
        again, self.number = self.number is not None, self.number or number
        if self.leave and not self._patience:
            # Outside of a run there is nothing to save.
            os.write(2, f"Stopped by {self.name}.\n".encode())
            os._exit(128 + number)
        if number == signal.SIGINT and (again or not self._patience):
            raise KeyboardInterrupt
        if not self._patience:
            raise SystemExit(128 + number)


class Patient:
    """The section of a run in which signals are noted only.

    It uses the enclosing :class:`Signals` or makes its own.
    """

    def __enter__(self) -> Signals:
        main = threading.current_thread() is threading.main_thread()
        self._own = Signals() if _current is None or not main else None
        self._signals = self._own or _current or Signals()
        self._signals._patience += 1
        if self._own is not None:
            self._own.__enter__()
        return self._signals

    def __exit__(self, *exc_info: Any) -> None:
        self._signals._patience -= 1
        if self._own is not None:
            self._own.__exit__(*exc_info)
