"""Records shared by data and engine: samples, batches and the geometry of images."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch


@dataclass(frozen=True)
class ImageShapes:
    """Geometry of an image resized and padded to the network's input.

    Attributes:
        original: (height, width) of the file, in pixels.
        ratio: (height, width) scale factors, input pixels per original pixel.
        pad: (left, top) padding in input pixels.
    """

    original: tuple[int, int]
    ratio: tuple[float, float]
    pad: tuple[float, float]

    @property
    def ratio_pad(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return the `ratio_pad` argument of `utils.boxes.scale_boxes`."""
        return self.ratio, self.pad


@dataclass(frozen=True)
class Sample:
    """One image with its labels.

    Attributes:
        image: (H, W, 3) uint8, BGR.
        labels: (n, 5) float32: class, cxcywh, normalized by the size of the (padded) image.
        path: file name.
        shapes: geometry of resizing and padding; None if several images were mixed (mosaic).
        index: number of the image in its dataset.
    """

    image: np.ndarray
    labels: np.ndarray
    path: str
    shapes: ImageShapes | None
    index: int


@dataclass(frozen=True)
class Batch:
    """Images of one size, stacked.

    Attributes:
        images: (B, 3, H, W) uint8, RGB.
        targets: (M, 6) float32: image number in the batch, class, cxcywh, normalized.
        paths: B file names.
        shapes: B geometries, None for mixed images.
    """

    images: torch.Tensor
    targets: torch.Tensor
    paths: tuple[str, ...]
    shapes: tuple[ImageShapes | None, ...]

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (called by the loader's pin thread)."""
        return replace(self, images=self.images.pin_memory(), targets=self.targets.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`; the copy does not block if the memory is pinned."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
        )


def to_unit(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Convert uint8 pixels to [0, 1] on their device, the only place where this happens; any shape.

    Floating-point input is assumed to be in [0, 1] and only converted to `dtype`.
    """
    return images.to(dtype).div_(255) if images.dtype == torch.uint8 else images.to(dtype)
