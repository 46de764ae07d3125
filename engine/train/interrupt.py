"""Stopping a training from outside: SIGTERM (a scheduler) and SIGINT (Ctrl-C) are noted, and obeyed when it is safe."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopNow(BaseException):
    """A stop was asked for inside a block that may be broken off."""


class StopRequest:
    """Listens to `SIGNALS` for the length of a `with` block; a Ctrl-C after another signal breaks off at once.

    A repeated SIGTERM does not: a scheduler and torchrun may both send one, and SIGKILL follows when it takes too long.

    In another thread than the main one nothing is listened to: Python delivers signals to the main thread only.

    Attributes:
        number: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within this block a signal raises `StopNow`."""
        self._at_once = True
        try:
            if self.number is not None:
                raise StopNow
            yield
        finally:
            self._at_once = False

    def leave(self) -> NoReturn:
        """End the process as the signal would have: KeyboardInterrupt, or exit status 128 + number."""
        number = self.number or signal.SIGTERM
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            if number == signal.SIGTERM:
                return
            raise KeyboardInterrupt
        self.number = number
        if self._at_once:
            raise StopNow
