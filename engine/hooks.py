"""What is written while training runs: results.csv, TensorBoard, pictures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.files import atomic_path

LOGGER = logging.getLogger(__name__)

COLUMNS = (
    "epoch",
    "train/box_loss",
    "train/obj_loss",
    "train/cls_loss",
    "metrics/precision",
    "metrics/recall",
    "metrics/mAP_0.5",
    "metrics/mAP_0.5:0.95",
    "val/box_loss",
    "val/obj_loss",
    "val/cls_loss",
    "x/lr0",
    "x/lr1",
    "x/lr2",
)


class CsvLog:
    """results.csv as YOLOv5 writes it: cells right-aligned to 20 characters, one row per epoch."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.csv"

    def drop_from(self, epoch: int) -> None:
        """Remove the rows of `epoch` and later ones: a resumed run writes them again, once."""
        if not self.path.is_file():
            return
        lines = self.path.read_text().splitlines()
        kept = [line for line in lines[1:] if line.strip() and int(float(line.split(",")[0])) < epoch]
        with atomic_path(self.path) as part:
            part.write_text("\n".join([*lines[:1], *kept]) + "\n")

    def add(self, values: Sequence[float]) -> None:
        """Append one row (`COLUMNS`)."""
        new = not self.path.is_file()
        with open(self.path, "a") as stream:
            if new:
                stream.write(",".join(f"{c:>20}" for c in COLUMNS) + "\n")
            stream.write(",".join(f"{v:20.5g}" for v in values) + "\n")


class TensorBoardLog:
    """The same numbers for TensorBoard; absent without complaint only when the package is not installed."""

    def __init__(self, folder: Path) -> None:
        self.writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            LOGGER.info("TensorBoard: not installed (pip install tensorboard); results.csv holds the same numbers")
            return
        self.writer = SummaryWriter(str(folder))

    def add(self, values: Sequence[float]) -> None:
        """Write one epoch (`COLUMNS`)."""
        if self.writer is None:
            return
        for name, value in zip(COLUMNS[1:], values[1:], strict=True):
            self.writer.add_scalar(name, value, int(values[0]))

    def close(self) -> None:
        """Flush and close the event file."""
        if self.writer is not None:
            self.writer.close()
