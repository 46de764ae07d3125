"""Plots of a training run: labels, first batches, results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.predict.writers import write_image
from utils.draw import image_grid
from utils.plots import plot_history, plot_label_correlogram, plot_labels
from utils.structures import Batch


def labels(folder: Path, labels: Sequence[NDArray[np.floating]], names: Mapping[int, str]) -> None:
    """Write labels.jpg (class counts, box centers and sizes) and labels_correlogram.jpg (joint distributions).

    Args:
        folder: run folder.
        labels: per image (n, 5) class, xywhn.
        names: class names by index.
    """
    rows = np.concatenate(labels) if labels else np.zeros((0, 5), np.float32)
    plot_labels(folder / "labels.jpg", rows, names)
    plot_label_correlogram(folder / "labels_correlogram.jpg", rows)


def training_batch(folder: Path, batch: Batch, index: int, names: Mapping[int, str]) -> None:
    """Write train_batch<index>.jpg: images and boxes as the network receives them."""
    image = image_grid(batch.images, batch.targets, batch.paths, names)
    write_image(folder / f"train_batch{index}.jpg", image)


def results(folder: Path) -> None:
    """Write results.png: losses and metrics so far."""
    plot_history(folder / "results.png", folder / "results.csv")
