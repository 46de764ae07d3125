"""Images of a training run: labels, first batches, results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.predict.writers import write_image
from utils.draw import image_grid
from utils.plots import plot_history, plot_labels
from utils.structures import Batch

if TYPE_CHECKING:
    from engine.train.setup import Setup


def labels(s: Setup) -> None:
    """labels.jpg: classes, box centers and sizes of the training split."""
    rows = np.concatenate(s.labels) if s.labels else np.zeros((0, 5), np.float32)
    plot_labels(s.folder / "labels.jpg", rows, s.data.names)


def training_batch(s: Setup, batch: Batch, number: int) -> None:
    """train_batch<number>.jpg: what the network is shown, augmentation and boxes."""
    image = image_grid(batch.images, batch.targets, batch.paths, s.data.names)
    write_image(s.folder / f"train_batch{number}.jpg", image)


def results(folder: Path) -> None:
    """results.png: losses and metrics so far."""
    plot_history(folder / "results.png", folder / "results.csv")
