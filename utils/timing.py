"""A stop-watch that waits for the device."""

from __future__ import annotations

import time

import torch

from utils.device import synchronize


class Profile:
    """Accumulates the seconds spent in `with profile:` blocks.

    Attributes:
        total: seconds over all blocks.
        last: seconds of the latest block.
        count: number of blocks.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.total = 0.0
        self.last = 0.0
        self.count = 0
        self._start = 0.0

    def _now(self) -> float:
        if self.device is not None:
            synchronize(self.device)
        return time.perf_counter()

    def __enter__(self) -> Profile:
        self._start = self._now()
        return self

    def __exit__(self, *exc: object) -> None:
        self.last = self._now() - self._start
        self.total += self.last
        self.count += 1
