"""A runtime that detects rectangles by their color."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

NAMES = {0: "red", 1: "green/../x", 2: "größe"}
SCORES = (0.9, 0.6, 0.3)
COLORS = ((0, 0, 255), (0, 255, 0), (255, 0, 0))  # BGR, by class


class ColorRuntime:
    """Detects the bounding box of the red, green and blue pixels, with fixed confidences."""

    names = NAMES
    stride = 32
    imgsz = None
    fixed_batch = None
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.error_at: int | None = None

    def warmup(self, shape: tuple[int, ...]) -> None:
        pass

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8
        self.shapes.append(tuple(images.shape))
        if self.error_at == len(self.shapes):
            raise KeyboardInterrupt
        out = torch.zeros(len(images), 3, 8)
        for i, image in enumerate(images.int()):
            for c in range(3):
                others = [k for k in range(3) if k != c]
                ys, xs = torch.nonzero((image[c] > 150) & (image[others].amax(0) < 60), as_tuple=True)
                if len(xs):
                    box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
                    left, top, right, bottom = (float(v) for v in box)
                    out[i, c, :4] = torch.tensor([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
                    out[i, c, 4], out[i, c, 5 + c] = SCORES[c], 1.0
        return out


def rectangles(size: tuple[int, int], *boxes: tuple[int, int, int, int, int]) -> NDArray[np.uint8]:
    """A gray BGR image of (height, width) with (class, left, top, right, bottom) rectangles."""
    image = np.full((*size, 3), 90, np.uint8)
    for c, left, top, right, bottom in boxes:
        image[top:bottom, left:right] = COLORS[c]
    return image
