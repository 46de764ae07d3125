"""Counters of what happened on the simulated device, keyed by (what, file:line)."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torchvision

Events = Counter[tuple[str, str]]
_SKIPPED_FOLDERS = (os.path.dirname(__file__), os.path.dirname(torch.__file__), os.path.dirname(torchvision.__file__))
_SKIPPED_FILES = ("/contextlib.py", "/unittest/mock.py", "/copy.py")


@dataclass
class Record:
    """What happened on the device.

    Attributes:
        ops, launches, waits, copies: operators, estimated kernel launches, host waits for the device, copies.
        host: operators on CPU tensors only.
        not_finite: float16 results with infinite or NaN values.
        peaks: largest finite float16 value per operator and line.
        stages: names of the open `stage` blocks.
    """

    ops: Events = field(default_factory=Counter)
    launches: Events = field(default_factory=Counter)
    waits: Events = field(default_factory=Counter)
    copies: Events = field(default_factory=Counter)
    host: Events = field(default_factory=Counter)
    not_finite: Events = field(default_factory=Counter)
    peaks: dict[tuple[str, str], float] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)

    def clear(self) -> None:
        """Forget everything counted so far."""
        for counter in (self.ops, self.launches, self.waits, self.copies, self.host, self.not_finite, self.peaks):
            counter.clear()

    @staticmethod
    def total(counter: Events) -> int:
        """Return the number of events in a counter."""
        return sum(counter.values())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Prefix the places recorded inside the block with a name."""
        self.stages.append(name)
        try:
            yield
        finally:
            self.stages.pop()

    def place(self) -> str:
        """Return `file:line` of the innermost frame outside PyTorch and this package."""
        frame = sys._getframe(1)
        while frame.f_back and _is_library(frame.f_code.co_filename):
            frame = frame.f_back
        stage = f"{self.stages[-1]} " if self.stages else ""
        return f"{stage}{'/'.join(frame.f_code.co_filename.split('/')[-2:])}:{frame.f_lineno}"

    def table(self) -> str:
        """Return the counters as text, most frequent first."""
        lines = [f"{self.total(self.ops)} operators, about {self.total(self.launches)} launches"]
        for title, counter in (("waits", self.waits), ("copies", self.copies), ("not finite", self.not_finite)):
            lines.append(f"{title}: {self.total(counter)}")
            lines += [f"  {count:>5}  {what:<34} {place}" for (what, place), count in counter.most_common()]
        return "\n".join(lines)


def _is_library(path: str) -> bool:
    return path.startswith(_SKIPPED_FOLDERS) or path.endswith(_SKIPPED_FILES)
