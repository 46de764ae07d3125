"""Plots of a validation: first batches with labels and detections, curves, confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

from engine.evaluate.accumulator import EvalResult
from engine.evaluate.chart_process import Draw, call
from utils.boxes import xyxy2xywhn
from utils.draw import image_grid
from utils.errors import DataError
from utils.files import atomic_path
from utils.metrics import smooth
from utils.plots import plot_confidence_curve, plot_confusion_matrix, plot_precision_recall
from utils.structures import Batch


def draw_batch(
    folder: Path, number: int, batch: Batch, found: Sequence[torch.Tensor], names: Mapping[int, str]
) -> None:
    """Write `val_batch<number>_labels.jpg` and `val_batch<number>_pred.jpg`.

    Args:
        found: per image (n, 6) xyxy in pixels of the input, confidence, class.
    """
    targets = batch.targets.cpu()
    write_image(folder / f"val_batch{number}_labels.jpg", image_grid(batch.images, targets, batch.paths, names))
    rows = detection_targets(found, (batch.images.shape[2], batch.images.shape[3]))
    write_image(folder / f"val_batch{number}_pred.jpg", image_grid(batch.images, rows, batch.paths, names))


def detection_targets(found: Sequence[torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
    """Return the detections of a batch as targets with a confidence column.

    Args:
        found: per image (n, 6) xyxy in pixels, confidence, class.
        shape: (height, width) of the images.

    Returns:
        (M, 7) image, class, normalized cxcywh, confidence.
    """
    image = torch.repeat_interleave(torch.arange(len(found)), torch.tensor([len(rows) for rows in found]))
    together = torch.cat(list(found)).cpu()
    boxes = xyxy2xywhn(together[:, :4], w=shape[1], h=shape[0])
    return torch.cat((image[:, None].float(), together[:, 5:6], boxes, together[:, 4:5]), 1)


def draw_charts(folder: Path, result: EvalResult, names: Mapping[int, str], draw: Draw = call) -> None:
    """Write PR_curve.png, P_curve.png, R_curve.png, F1_curve.png and confusion_matrix.png.

    Args:
        draw: calls a function of `utils.plots` with its arguments, at once or in another process.
    """
    classes, curves = result.classes.tolist(), result.curves
    path, points = folder / "PR_curve.png", (curves.at_recall, curves.precision_at_recall)
    draw(plot_precision_recall, path, *points, result.ap50, classes, names)
    for letter, word, values in (
        ("F1", "F1", curves.f1),
        ("P", "Precision", curves.precision),
        ("R", "Recall", curves.recall),
    ):
        mean = smooth(values.mean(0)) if len(values) else np.zeros_like(curves.confidence)
        path = folder / f"{letter}_curve.png"
        draw(plot_confidence_curve, path, curves.confidence, values, mean, word, classes, names)
    if result.confusion is not None:
        draw(plot_confusion_matrix, folder / "confusion_matrix.png", result.confusion, names)


def write_image(path: Path, image: np.ndarray) -> None:
    """Write a (H, W, 3) uint8 BGR image atomically."""
    with atomic_path(path) as part:
        if not cv2.imwrite(str(part), image):
            raise DataError(f"{path}: the image cannot be written")
