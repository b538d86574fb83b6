"""Handling of SIGINT and SIGTERM: a run stops at the next chunk boundary."""

import os
import signal
import threading
from typing import Any

_current: "Signals | None" = None


class Signals:
    """Records the first SIGINT or SIGTERM. Use it as a context manager.

    Outside of a :class:`Patient` section, a signal raises immediately. Inside, it is
    only recorded, and a second SIGINT raises. All sections of one context share the
    record. A command that calls several runs therefore starts no further run after a
    signal.

    With ``leave``, a signal outside of a section ends the process with status 130 or
    143. An exception that is raised while JAX traces or compiles can crash the process.
    """

    def __init__(self, *, leave: bool = False):
        self.leave = leave
        self.number: int | None = None
        # Whether the caller handles the signal, so that it is not delivered again.
        self.reported = False
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
            signal.raise_signal(self.number)  # not part of the result, so deliver it

    def _handle(self, number: int, frame: Any) -> None:
        del frame
        again, self.number = self.number is not None, self.number or number
        if self.leave and not self._patience:
            # Outside of a run no state needs to be saved.
            os.write(2, f"Stopped by {self.name}.\n".encode())
            os._exit(128 + number)
        if number == signal.SIGINT and (again or not self._patience):
            raise KeyboardInterrupt
        if not self._patience:
            raise SystemExit(128 + number)


class Patient:
    """A section in which signals are only recorded.

    It uses the enclosing :class:`Signals` context or creates one.
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
