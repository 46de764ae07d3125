"""Statistics of a split: objects per class, their sizes, and boxes that look wrong. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.anchors import box_sizes
from data.labels.labels import Annotations, ImageRecord
from utils.boxes import box_iou, xywh2xyxy

SAME_OBJECT = 0.9  # boxes of one class that overlap more are probably one object labeled twice


@dataclass(frozen=True, eq=False)
class SplitStatistics:
    """One split at one input size.

    Attributes:
        name: of the split.
        annotations: images and report.
        boxes: (nc,) objects per class.
        images: (nc,) images with at least one object of the class.
        classes: (n,) class of every object, in the order of the images.
        owners: (n,) number of the image of every object.
        sizes: (n, 2) width and height in pixels when the longer side of the image is the input size.
    """

    name: str
    annotations: Annotations
    boxes: NDArray[np.int64]
    images: NDArray[np.int64]
    classes: NDArray[np.int64]
    owners: NDArray[np.int64]
    sizes: NDArray[np.float64]

    @property
    def records(self) -> Sequence[ImageRecord]:
        """The usable images."""
        return self.annotations.records


def gather(name: str, annotations: Annotations, num_classes: int, imgsz: int) -> SplitStatistics:
    """Count one split.

    Args:
        num_classes: class numbers run from 0 to `num_classes - 1`.
        imgsz: longer side of the network's input, in pixels.
    """
    records = annotations.records
    per_image = [record.labels[:, 0].astype(np.int64) for record in records]
    classes = np.concatenate([np.zeros(0, np.int64), *per_image])
    once = np.concatenate([np.zeros(0, np.int64), *(np.unique(found) for found in per_image)])
    return SplitStatistics(
        name,
        annotations,
        np.bincount(classes, minlength=num_classes),
        np.bincount(once, minlength=num_classes),
        classes,
        np.repeat(np.arange(len(records)), [len(found) for found in per_image]),
        box_sizes(records, imgsz),
    )


def below(statistics: SplitStatistics, side: float) -> NDArray[np.int64]:
    """Return the indices (k,) of the objects with a side shorter than `side` pixels, smallest first."""
    shorter = statistics.sizes.min(1, initial=np.inf)
    order = np.argsort(shorter, kind="stable")
    return order[shorter[order] < side]


def outside(records: Sequence[ImageRecord], tolerance: float = 1.0) -> list[tuple[int, int, float]]:
    """Return boxes that extend beyond the border.

    Args:
        tolerance: pixels that do not count.

    Returns:
        (image, row, pixels beyond the border), the worst first.
    """
    found = []
    for i, record in enumerate(records):
        boxes = xywh2xyxy(record.labels[:, 1:].astype(np.float64)) * ((record.width, record.height) * 2)
        sides = np.array((record.width, record.height) * 2)
        over = np.maximum(-boxes, boxes - sides).max(1, initial=0.0)
        found += [(i, row, float(over[row])) for row in np.flatnonzero(over > tolerance).tolist()]
    return sorted(found, key=lambda item: -item[2])


def doubled(records: Sequence[ImageRecord]) -> list[tuple[int, int, int, float]]:
    """Return boxes of one class that lie on top of each other.

    Returns:
        (image, row, row, IoU), the most similar first.
    """
    found = []
    for i, record in enumerate(records):
        if len(record.labels) < 2:
            continue
        boxes = xywh2xyxy(record.labels[:, 1:].astype(np.float64)) * ((record.width, record.height) * 2)
        iou = np.triu(box_iou(boxes, boxes), 1)
        iou[record.labels[:, None, 0] != record.labels[None, :, 0]] = 0
        found += [(i, a, b, float(iou[a, b])) for a, b in np.argwhere(iou > SAME_OBJECT).tolist()]
    return sorted(found, key=lambda item: -item[3])


def level_shares(sizes: NDArray[np.float64], anchors: NDArray[np.float64], thr: float) -> NDArray[np.float64]:
    """Return the fraction of the boxes that each level's anchors match; a box can be matched on several levels.

    Args:
        sizes: (n, 2) widths and heights in pixels.
        anchors: (levels, anchors per level, 2) in pixels.
        thr: largest side ratio that matches (`anchor_t`).

    Returns:
        (levels,) 0..1.
    """
    if not len(sizes):
        return np.zeros(len(anchors))
    ratio = sizes[:, None, None] / anchors[None]
    matched = np.maximum(ratio, 1 / np.maximum(ratio, 1e-9)).max(3) < thr
    return matched.any(2).mean(0)
