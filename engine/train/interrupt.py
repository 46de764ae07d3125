"""Deferred handling of SIGTERM (schedulers) and SIGINT (Ctrl-C) during training."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopNow(BaseException):
    """A stop was requested inside an interruptible block."""


class StopRequest:
    """Context manager that records signals instead of acting on them; Ctrl-C after another signal interrupts at once.

    A repeated SIGTERM does not interrupt: a scheduler and torchrun may both send one, and SIGKILL follows. Outside
    the main thread no signal is handled: Python delivers signals to the main thread only.

    Attributes:
        signal: the signal received, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._immediate = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Raise `StopNow` inside this block as soon as a signal arrives."""
        self._immediate = True
        try:
            if self.signal is not None:
                raise StopNow
            yield
        finally:
            self._immediate = False

    def exit(self) -> NoReturn:
        """End the process as the signal would have: KeyboardInterrupt, or exit status 128 + signal number."""
        number = self.signal or signal.SIGTERM
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    def _handle(self, number: int, _frame: object) -> None:
        if self.signal is not None:
            if number == signal.SIGTERM:
                return
            raise KeyboardInterrupt
        self.signal = number
        if self._immediate:
            raise StopNow
