"""Best fitness of a training and `--patience`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

LOGGER = logging.getLogger(__name__)


class EarlyStopping:
    """Tracks the best fitness; of equal values the latest epoch counts.

    Args:
        patience: epochs without a better fitness after which the training stops; 0 = never.

    Attributes:
        best_fitness: highest fitness so far.
        best_epoch: its epoch, -1 before the first update.
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
