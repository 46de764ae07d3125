"""Sizes that images and batches get: long-side fit, rectangular batches, multi-scale training. Numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

HW = tuple[int, int]


def fit_long_side(height: int, width: int, imgsz: int) -> HW:
    """Return the size at which the longer side is `imgsz`, the other one rounded up: ceil(side * imgsz / longest)."""
    longest = max(height, width)
    return -(-height * imgsz // longest), -(-width * imgsz // longest)


def rect_order(sizes: Sequence[HW] | NDArray[np.integer]) -> NDArray[np.int64]:
    """Return image indices sorted by height / width; a stable order.

    Args:
        sizes: (n, 2) heights and widths in pixels.
    """
    hw = np.asarray(sizes, np.float64).reshape(-1, 2)
    return np.argsort(hw[:, 0] / hw[:, 1], kind="heapsort")  # no stable sort has the reference's ties; this one has


def rect_batch_shapes(
    sizes: Sequence[HW] | NDArray[np.integer], batch_size: int, imgsz: int, stride: int, pad: float
) -> list[HW]:
    """Return height and width of each batch when images are taken in the order of `rect_order`.

    The longer side is `imgsz`, the other just holds the batch's most extreme image; `pad` strides are added and both
    are rounded up to whole strides.

    Args:
        sizes: (n, 2) heights and widths in pixels, in any order.
        pad: extra padding in strides (validation: 0.5).

    Returns:
        One (height, width) per batch.
    """
    hw = np.asarray(sizes, np.float64).reshape(-1, 2)
    ratio = np.sort(hw[:, 0] / hw[:, 1])
    shapes = []
    for start in range(0, len(ratio), batch_size):
        flattest, tallest = ratio[start], ratio[start : start + batch_size][-1]
        tall, wide = (tallest, 1.0) if tallest < 1 else (1.0, 1 / flattest) if flattest > 1 else (1.0, 1.0)
        shapes.append((_whole_strides(tall * imgsz, stride, pad), _whole_strides(wide * imgsz, stride, pad)))
    return shapes


def multi_scale_sizes(imgsz: int, stride: int) -> list[int]:
    """Return the sizes of multi-scale training: the multiples of `stride` between 0.5 and 1.5 times `imgsz`."""
    first = imgsz // 2 // stride
    last = (int(imgsz * 1.5) + stride - 1) // stride
    return [k * stride for k in range(first, last + 1)]


def multi_scale_shape(height: int, width: int, size: int, stride: int) -> HW:
    """Return the shape of a batch when its longer side becomes `size`, each side rounded up to whole strides."""
    cell = max(height, width) * stride
    return -(-height * size // cell) * stride, -(-width * size // cell) * stride


def _whole_strides(side: float, stride: int, pad: float) -> int:
    return math.ceil(side / stride + pad) * stride
