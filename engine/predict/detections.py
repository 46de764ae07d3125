"""What was found in an image, in words and as an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.sources.frames import Frame
from utils.draw import class_name, draw_boxes


@dataclass(frozen=True)
class Detections:
    """The boxes of one frame.

    Attributes:
        frame: the image and where it is from.
        boxes: (n, 6) float32: left, top, right, bottom in pixels of the image, score, class; by falling score.
        input_shape: (height, width) of the network's input.
        inference_s: seconds that the network took for this image.
    """

    frame: Frame
    boxes: NDArray[np.float32]
    input_shape: tuple[int, int]
    inference_s: float = 0.0

    @property
    def classes(self) -> NDArray[np.int64]:
        """(n,) class numbers."""
        return self.boxes[:, 5].astype(np.int64)


@dataclass(frozen=True)
class DrawStyle:
    """How boxes are drawn.

    Attributes:
        names: class names by number.
        line_thickness: pixels.
        labels: write class names.
        scores: write scores beside the names.
    """

    names: Mapping[int, str]
    line_thickness: int = 3
    labels: bool = True
    scores: bool = True


def annotated(found: Detections, style: DrawStyle) -> NDArray[np.uint8]:
    """Return a copy of the image (H, W, 3) uint8 BGR with its boxes, the most confident drawn last."""
    rows = found.boxes[::-1]
    classes = rows[:, 5].astype(int)
    captions = None
    if style.labels:
        captions = [
            class_name(style.names, c) + (f" {score:.2f}" if style.scores else "")
            for c, score in zip(classes, rows[:, 4])
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
    """`256x320 17 RBCs, 1 WBC, 12.3ms`: input size, what was found, time of the network."""
    height, width = found.input_shape
    return f"{height}x{width} {counts_text(found.classes, names)}, {1000 * found.inference_s:.1f}ms"
