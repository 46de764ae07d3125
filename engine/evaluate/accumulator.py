"""Accumulation of detections and labels over the images of a validation, and the metrics of all of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from utils.metrics import (
    F1_SMOOTHING,
    IOU_THRESHOLDS,
    APResult,
    ConfusionMatrix,
    Curves,
    ap_per_class,
    match_detections,
    smooth,
)
from utils.structures import Batch

LOGGER = logging.getLogger(__name__)

COLUMNS = ("Class", "Images", "Instances", "P", "R", "mAP50", "mAP50-95")
HEAD = "%15.15s%7s%10s%8s%8s%8s%9s"
ROW = "%15.15s%7i%10i%8.3f%8.3f%8.3f%9.3f"


@dataclass(frozen=True)
class ImageOutcome:
    """One image after detection; boxes are in pixels of the original image, tensors on the CPU.

    Attributes:
        path: file.
        shape: (height, width) of the original image.
        detections: (n, 6) float32 xyxy, confidence, class; sorted by descending confidence.
        labels: (m, 5) float32 class, xyxy.
        correct: (n, 10) bool: whether each detection is a TP at IoU 0.5 ... 0.95.
    """

    path: str
    shape: tuple[int, int]
    detections: torch.Tensor
    labels: torch.Tensor
    correct: torch.Tensor


@dataclass(frozen=True)
class EvalResult:
    """Metrics of a validation.

    Attributes:
        mp, mr, map50, map: precision, recall, mAP at IoU 0.5 and at 0.5 ... 0.95; means over the classes with labels.
        classes: (k,) classes with labels.
        p, r, ap50, ap: (k,) the same per class.
        nt: (nc,) labels per class.
        class_maps: (nc,) mAP50-95 per class; the mean for classes without labels.
        images: number of images.
        losses: box, objectness and class loss (0 where no criterion was given).
        speeds: milliseconds per image of preprocess, inference, NMS.
        curves: precision, recall and F1 over confidence.
        confusion: (nc + 1, nc + 1) counts; None without plots.
        coco: COCO's twelve metrics (mAP50-95 and mAP50 first), if requested.
    """

    mp: float
    mr: float
    map50: float
    map: float
    classes: np.ndarray = field(repr=False)
    p: np.ndarray = field(repr=False)
    r: np.ndarray = field(repr=False)
    ap50: np.ndarray = field(repr=False)
    ap: np.ndarray = field(repr=False)
    nt: np.ndarray = field(repr=False)
    class_maps: np.ndarray = field(repr=False)
    images: int
    losses: tuple[float, float, float]
    speeds: tuple[float, float, float]
    curves: Curves = field(repr=False)
    confusion: np.ndarray | None = field(default=None, repr=False)
    coco: tuple[float, ...] | None = None

    @property
    def best_conf(self) -> float | None:
        """Return the confidence with the best mean F1, the middle one of equal ones; None if F1 is 0 everywhere."""
        if not len(self.classes):
            return None
        f1 = smooth(self.curves.f1.mean(0), F1_SMOOTHING)
        best = (f1 == f1.max()).nonzero()[0]
        return float(self.curves.confidence[best[len(best) // 2]]) if f1.any() else None


@dataclass
class Tally:
    """Accumulated detections and labels; each of several processes accumulates its own batches.

    Attributes:
        nc: number of classes.
        batches: batch number of each image.
        losses: (3,) box, objectness and class loss by batch number.
        seconds: time of preprocess, inference, NMS.
        outcomes: outcomes of the images, kept only for sinks.
        shown: batches to plot by batch number, with the detections (n, 6) of each image.
    """

    nc: int
    thresholds: torch.Tensor = field(default_factory=lambda: torch.from_numpy(IOU_THRESHOLDS).float())
    confusion: ConfusionMatrix | None = None
    images: int = 0
    batches: list[int] = field(default_factory=list)
    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    seconds: tuple[float, float, float] = (0.0, 0.0, 0.0)
    outcomes: list[ImageOutcome] = field(default_factory=list)
    shown: dict[int, tuple[Batch, list[torch.Tensor]]] = field(default_factory=dict)
    correct: list[torch.Tensor] = field(default_factory=list)
    detections: list[torch.Tensor] = field(default_factory=list)
    labels: list[torch.Tensor] = field(default_factory=list)

    def add(
        self, path: str, shape: tuple[int, int], detections: torch.Tensor, labels: torch.Tensor, batch: int = 0
    ) -> ImageOutcome:
        """Add the detections (n, 6) and labels (m, 5) of one image, boxes xyxy in pixels of that image."""
        correct = match_detections(detections, labels, self.thresholds)
        self.images += 1
        self.batches.append(batch)
        self.correct.append(correct)
        self.detections.append(detections[:, 4:])
        self.labels.append(labels[:, 0])
        if self.confusion is not None:
            self.confusion.process_batch(detections, labels)
        return ImageOutcome(path, shape, detections, labels, correct)

    def average_precision(self) -> tuple[APResult, np.ndarray]:
        """Return the metrics over all images, and the number of labels per class (nc,)."""
        nothing = torch.zeros(0, len(self.thresholds), dtype=torch.bool)
        correct = torch.cat([nothing, *self.correct]).numpy()
        detections = torch.cat([torch.zeros(0, 2), *self.detections]).numpy()
        labels = torch.cat([torch.zeros(0), *self.labels]).numpy()
        counts = np.bincount(labels.astype(int), minlength=self.nc)
        return ap_per_class(correct, detections[:, 0], detections[:, 1], labels), counts


def merge(parts: Sequence[Tally]) -> Tally:
    """Merge the tallies of several processes; images, and so equal confidences, keep the order of a single process."""
    if len(parts) == 1:
        return parts[0]
    batches = [number for part in parts for number in part.batches]
    order = sorted(range(len(batches)), key=batches.__getitem__)  # stable: images of a batch keep their order
    whole = Tally(parts[0].nc, parts[0].thresholds, confusion=parts[0].confusion, images=len(batches))
    for part in parts[1:]:
        if whole.confusion is not None and part.confusion is not None:
            whole.confusion.matrix += part.confusion.matrix
    whole.batches = [batches[i] for i in order]
    for name in ("correct", "detections", "labels", "outcomes"):
        rows = [row for part in parts for row in getattr(part, name)]
        setattr(whole, name, [rows[i] for i in order] if rows else [])
    whole.losses = dict(sorted(item for part in parts for item in part.losses.items()))
    whole.shown = {number: batch for part in parts for number, batch in part.shown.items()}
    preprocess, inference, nms_time = np.sum([part.seconds for part in parts], 0).tolist()
    whole.seconds = preprocess, inference, nms_time
    return whole


def summarize(tally: Tally) -> EvalResult:
    """Compute the metrics of the accumulated detections; zeros where a mean is empty."""
    share = 1000 / max(tally.images, 1)
    preprocess, inference, nms_time = tally.seconds
    losses = sum(tally.losses.values(), torch.zeros(3)) / max(len(tally.losses), 1)
    box, obj, cls = losses.tolist()
    metrics, counts = tally.average_precision()
    some = len(metrics.classes) > 0
    ap50, ap = metrics.ap[:, 0], metrics.ap.mean(1)
    mean_ap = float(ap.mean()) if some else 0.0
    class_maps = np.full(tally.nc, mean_ap)
    class_maps[metrics.classes] = ap
    return EvalResult(
        mp=float(metrics.p.mean()) if some else 0.0,
        mr=float(metrics.r.mean()) if some else 0.0,
        map50=float(ap50.mean()) if some else 0.0,
        map=mean_ap,
        classes=metrics.classes,
        p=metrics.p,
        r=metrics.r,
        ap50=ap50,
        ap=ap,
        nt=counts,
        class_maps=class_maps,
        images=tally.images,
        losses=(box, obj, cls),
        speeds=(preprocess * share, inference * share, nms_time * share),
        curves=metrics.curves,
        confusion=tally.confusion.matrix if tally.confusion is not None else None,
    )


def table_head() -> str:
    """Return the header of the table that `log_table` logs; followed by a progress bar, it fits 80 columns."""
    return HEAD % COLUMNS


def log_table(result: EvalResult, names: Mapping[int, str], class_rows: bool) -> None:
    """Log the row of all classes; with `class_rows`, also one row per labeled class if there are several."""
    instances = int(result.nt.sum())
    LOGGER.info(ROW, "all", result.images, instances, result.mp, result.mr, result.map50, result.map)
    if not instances:
        LOGGER.warning("there are no labels: mAP is undefined and reported as 0")
    if class_rows and len(names) > 1:
        for k, c in enumerate(result.classes.tolist()):
            values = result.p[k], result.r[k], result.ap50[k], result.ap[k]
            LOGGER.info(ROW, names.get(c, c), result.images, result.nt[c], *values)
