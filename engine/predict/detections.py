"""Detections of one image: record, drawing, one-line description."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.sources.frames import Frame
from utils.draw import class_name, draw_boxes


@dataclass(frozen=True)
class Detections:
    """Boxes of one frame.

    Attributes:
        frame: the image and its origin.
        boxes: (n, 6) float32: xyxy in pixels of the image, confidence, class; sorted by descending confidence.
        input_shape: (height, width) of the network's input.
        inference_s: seconds of inference for this image.
    """

    frame: Frame
    boxes: NDArray[np.float32]
    input_shape: tuple[int, int]
    inference_s: float = 0.0

    @property
    def classes(self) -> NDArray[np.int64]:
        """Class numbers (n,)."""
        return self.boxes[:, 5].astype(np.int64)


@dataclass(frozen=True)
class DrawStyle:
    """Drawing style of boxes.

    Attributes:
        names: class names by number.
        line_thickness: pixels.
        labels: draw class names.
        confidence: draw the confidence beside the names.
    """

    names: Mapping[int, str]
    line_thickness: int = 3
    labels: bool = True
    confidence: bool = True


def annotated(found: Detections, style: DrawStyle) -> NDArray[np.uint8]:
    """Return a copy of the image (H, W, 3) uint8 BGR with its boxes, the most confident drawn last."""
    rows = found.boxes[::-1]
    classes = rows[:, 5].astype(int)
    captions = None
    if style.labels:
        captions = [
            class_name(style.names, c) + (f" {conf:.2f}" if style.confidence else "")
            for c, conf in zip(classes, rows[:, 4])
        ]
    return draw_boxes(found.frame.image, rows[:, :4], classes, captions, style.line_thickness)


def counts_text(classes: NDArray[np.integer], names: Mapping[int, str]) -> str:
    """Return the counts of classes (n,) as `17 RBCs, 1 WBC` in class order, or `no detections`."""
    parts = []
    for number, count in zip(*np.unique(classes, return_counts=True)):
        name = class_name(names, int(number))
        parts.append(f"{count} {name}" + ("s" if count > 1 and not name.endswith("s") else ""))
    return ", ".join(parts) or "no detections"


def describe(found: Detections, names: Mapping[int, str]) -> str:
    """Return input size, counts and inference time as `256x320 17 RBCs, 1 WBC, 12.3ms`."""
    height, width = found.input_shape
    return f"{height}x{width} {counts_text(found.classes, names)}, {1000 * found.inference_s:.1f}ms"
