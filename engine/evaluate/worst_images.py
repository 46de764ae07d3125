"""The validation images with the most errors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.evaluate.accumulator import ImageOutcome
from utils.boxes import box_iou

SHOWN = 12
SHOWN_CONF = 0.25  # detections above it are shown to users; also the threshold of the confusion matrix


@dataclass(frozen=True)
class ImageErrors:
    """TP, FP and FN of one image; boxes in its pixels.

    Attributes:
        path: file.
        shape: (height, width).
        right: (k, 6) TP, detections matched with a label of their class at IoU 0.5: xyxy, confidence, class.
        wrong: (n, 6) FP, the other detections.
        missed: (m, 5) FN, labels without a detection: class, xyxy.
    """

    path: str
    shape: tuple[int, int]
    right: torch.Tensor
    wrong: torch.Tensor
    missed: torch.Tensor

    @property
    def errors(self) -> int:
        """Number of FP and FN; a box of the wrong class counts as both."""
        return len(self.wrong) + len(self.missed)


class WorstImages:
    """Keeps the images with the most errors; a sink of `EvalOptions`.

    Args:
        count: number of images to keep.
        conf_thres: only detections with a higher confidence count.
    """

    def __init__(self, count: int = SHOWN, conf_thres: float = SHOWN_CONF) -> None:
        self.count, self.conf_thres = count, conf_thres
        self._kept: list[ImageErrors] = []

    def __call__(self, outcome: ImageOutcome) -> None:
        """Add one image."""
        found = image_errors(outcome, self.conf_thres)
        if found.errors:
            self._kept = sorted([*self._kept, found], key=_worse_first)[: self.count]

    def found(self) -> tuple[ImageErrors, ...]:
        """Return the images with errors, worst first."""
        return tuple(self._kept)


def image_errors(outcome: ImageOutcome, conf_thres: float = SHOWN_CONF) -> ImageErrors:
    """Return the TP, FP and FN of one image at IoU 0.5."""
    seen = outcome.detections[:, 4] > conf_thres
    detections, correct = outcome.detections[seen], outcome.correct[seen, 0]
    right = detections[correct]
    missed = torch.ones(len(outcome.labels), dtype=torch.bool)
    if len(right) and len(outcome.labels):
        iou = box_iou(outcome.labels[:, 1:], right[:, :4])
        iou = torch.where(outcome.labels[:, :1] == right[None, :, 5], iou, -1.0)
        # As in `match_detections`: a detection is assigned the label with the largest IoU; for equal IoU the later one.
        missed[len(missed) - 1 - iou.flip(0).argmax(0)] = False
    return ImageErrors(outcome.path, outcome.shape, right, detections[~correct], outcome.labels[missed])


def _worse_first(found: ImageErrors) -> tuple[int, float, str]:
    return -found.errors, -float(found.wrong[:, 4].sum()), found.path
