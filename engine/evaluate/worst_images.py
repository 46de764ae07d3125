"""The images of a validation that a detector does worst on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.evaluate.accumulator import ImageOutcome
from utils.boxes import box_iou

SHOWN = 12
USE_SCORE = 0.25  # detections above it are what a user sees; the confusion matrix counts the same ones


@dataclass(frozen=True)
class ImageErrors:
    """What is right and wrong about one image; boxes in its pixels.

    Attributes:
        path: file.
        shape: (height, width).
        right: (k, 6) detections that stand for a label of their class at IoU 0.5: corners, score, class.
        wrong: (n, 6) the other detections: false positives.
        missed: (m, 5) labels that no detection stands for: class, corners.
    """

    path: str
    shape: tuple[int, int]
    right: torch.Tensor
    wrong: torch.Tensor
    missed: torch.Tensor

    @property
    def errors(self) -> int:
        """False positives and misses together; a box of the wrong class is one of each."""
        return len(self.wrong) + len(self.missed)


class WorstImages:
    """Keeps the images with the most errors; a sink of `EvalOptions`.

    Args:
        count: how many are kept.
        conf_thres: detections with a higher score count.
    """

    def __init__(self, count: int = SHOWN, conf_thres: float = USE_SCORE) -> None:
        self.count, self.conf_thres = count, conf_thres
        self._kept: list[ImageErrors] = []

    def __call__(self, outcome: ImageOutcome) -> None:
        """Look at one image."""
        found = image_errors(outcome, self.conf_thres)
        if found.errors:
            self._kept = sorted([*self._kept, found], key=_worse_first)[: self.count]

    def found(self) -> tuple[ImageErrors, ...]:
        """Return the images with errors, worst first."""
        return tuple(self._kept)


def image_errors(outcome: ImageOutcome, conf_thres: float = USE_SCORE) -> ImageErrors:
    """Split detections into right and wrong ones, and find the labels that were missed, at IoU 0.5."""
    seen = outcome.detections[:, 4] > conf_thres
    detections, correct = outcome.detections[seen], outcome.correct[seen, 0]
    right = detections[correct]
    missed = torch.ones(len(outcome.labels), dtype=torch.bool)
    if len(right) and len(outcome.labels):
        iou = box_iou(outcome.labels[:, 1:], right[:, :4])
        iou = torch.where(outcome.labels[:, :1] == right[None, :, 5], iou, -1.0)
        # As in the count: a detection stands for the label it overlaps most; of equal overlaps the later one.
        missed[len(missed) - 1 - iou.flip(0).argmax(0)] = False
    return ImageErrors(outcome.path, outcome.shape, right, detections[~correct], outcome.labels[missed])


def _worse_first(found: ImageErrors) -> tuple[int, float, str]:
    return -found.errors, -float(found.wrong[:, 4].sum()), found.path
