"""Reasons to stop a training: `--patience`, SIGTERM (schedulers) and SIGINT (Ctrl-C)."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

LOGGER = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class EarlyStopping:
    """Tracks the best fitness; for equal values the latest epoch counts.

    Args:
        patience: epochs without a better fitness after which the training stops; 0 = never.

    Attributes:
        best_fitness: highest fitness so far.
        best_epoch: epoch of the best fitness, -1 before the first update.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best_fitness, self.best_epoch = 0.0, -1

    def update(self, epoch: int, fitness: float) -> None:
        """Record the fitness of a validated epoch."""
        if fitness >= self.best_fitness or self.best_epoch < 0:
            self.best_fitness, self.best_epoch = fitness, epoch

    def should_stop(self, epoch: int) -> bool:
        """Return whether patience is exhausted at this epoch."""
        stop = 0 < self.patience <= epoch - self.best_epoch
        if stop:
            LOGGER.info("No better fitness since epoch %d: stopped early (--patience)", self.best_epoch)
        return stop

    def state_dict(self) -> dict[str, Any]:
        """Return the best fitness and its epoch."""
        return {"best_fitness": self.best_fitness, "best_epoch": self.best_epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; other keys are ignored."""
        self.best_fitness, self.best_epoch = float(state["best_fitness"]), int(state["best_epoch"])


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
