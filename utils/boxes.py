"""Boxes: conversions between forms, clipping, scaling back, overlaps.

Suffixes name the form: `xyxy` left, top, right, bottom; `xywh` center x, center y, width, height; a trailing `n` means
parts of the image's sides instead of pixels. Every function takes NumPy arrays and tensors alike (unless it says
otherwise), keeps dtype and device, and returns a new array.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch

Array = TypeVar("Array", np.ndarray, torch.Tensor)
RatioPad = tuple[tuple[float, float], tuple[float, float]]


def _stack(columns: Sequence[Array], like: Array) -> Array:
    """Join columns as the last axis, in the dtype of `like` when that is a floating one."""
    if isinstance(like, torch.Tensor):
        return torch.stack(list(columns), -1)
    stacked = np.stack(columns, -1)
    return stacked.astype(like.dtype, copy=False) if np.issubdtype(like.dtype, np.floating) else stacked


def _columns(boxes: Array) -> tuple[Array, Array, Array, Array]:
    return boxes[..., 0], boxes[..., 1], boxes[..., 2], boxes[..., 3]


def _clamp(values: Array, low: float, high: float) -> Array:
    if isinstance(values, torch.Tensor):
        return values.clamp(low, high)
    return values.clip(low, high)


def xyxy2xywh(x: Array) -> Array:
    """Corners to center and size; (..., 4) in, (..., 4) out, any unit."""
    x1, y1, x2, y2 = _columns(x)
    return _stack(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), x)


def xywh2xyxy(x: Array) -> Array:
    """Center and size to corners; (..., 4) in, (..., 4) out, any unit."""
    cx, cy, w, h = _columns(x)
    half_w, half_h = w / 2, h / 2
    return _stack((cx - half_w, cy - half_h, cx + half_w, cy + half_h), x)


def xywhn2xyxy(x: Array, w: float = 640, h: float = 640, padw: float = 0, padh: float = 0) -> Array:
    """Convert normalized cxcywh boxes (n, 4) to pixel xyxy.

    Args:
        x: (..., 4) center x, center y, width, height as parts of the sides.
        w, h: sides in pixels.
        padw, padh: pixels added at the left and at the top.
    """
    cx, cy, bw, bh = _columns(x)
    half_w, half_h = bw / 2, bh / 2
    return _stack(
        (w * (cx - half_w) + padw, h * (cy - half_h) + padh, w * (cx + half_w) + padw, h * (cy + half_h) + padh), x
    )


def xyxy2xywhn(x: Array, w: float = 640, h: float = 640, clip: bool = False, eps: float = 0.0) -> Array:
    """Pixel corners to normalized center and size.

    Args:
        x: (..., 4) corners in pixels.
        w, h: sides in pixels.
        clip: first clip the boxes to the image, less `eps` pixels at the right and the bottom.
    """
    boxes = clip_boxes(x, (h - eps, w - eps)) if clip else x
    x1, y1, x2, y2 = _columns(boxes)
    return _stack(((x1 + x2) / 2 / w, (y1 + y2) / 2 / h, (x2 - x1) / w, (y2 - y1) / h), x)


def xyn2xy(x: Array, w: float = 640, h: float = 640, padw: float = 0, padh: float = 0) -> Array:
    """Convert normalized points (..., 2) to pixels: image size `w`, `h`, padding `padw` left and `padh` top."""
    return _stack((w * x[..., 0] + padw, h * x[..., 1] + padh), x)


def segment2box(segment: np.ndarray, width: float = 640, height: float = 640) -> np.ndarray:
    """Bounding box of those points of a polygon that lie in the image.

    Args:
        segment: (n, 2) x, y in pixels.

    Returns:
        (4,) corners in pixels; zeros when no point is inside.
    """
    x, y = segment[:, 0], segment[:, 1]
    points = segment[(x >= 0) & (y >= 0) & (x <= width) & (y <= height)]
    if not len(points):
        return np.zeros(4, segment.dtype)
    return np.concatenate((points.min(0), points.max(0)))


def segments2boxes(segments: Sequence[np.ndarray]) -> np.ndarray:
    """Bounding boxes of k polygons of (n, 2) points: (k, 4) center and size, in the unit of the points."""
    corners = [np.concatenate((s.min(0), s.max(0))) for s in segments]
    return xyxy2xywh(np.array(corners).reshape(-1, 4))


def resample_segments(segments: Sequence[np.ndarray], n: int = 1000) -> list[np.ndarray]:
    """Resample closed polygons (k, 2) to `n` points each by linear interpolation; (n, 2) float32."""
    resampled = []
    for segment in segments:
        closed = np.concatenate((segment, segment[:1]), 0)
        at = np.linspace(0, len(closed) - 1, n)
        given = np.arange(len(closed))
        resampled.append(np.stack([np.interp(at, given, closed[:, k]) for k in range(2)], 1).astype(np.float32))
    return resampled


def clip_boxes(boxes: Array, shape: Sequence[float]) -> Array:
    """Corners (..., 4) limited to an image of `shape` (height, width, ...)."""
    height, width = float(shape[0]), float(shape[1])
    x1, y1, x2, y2 = _columns(boxes)
    limited = (_clamp(x1, 0, width), _clamp(y1, 0, height), _clamp(x2, 0, width), _clamp(y2, 0, height))
    return _stack(limited, boxes)


def scale_boxes(
    img1_shape: Sequence[float], boxes: Array, img0_shape: Sequence[float], ratio_pad: RatioPad | None = None
) -> Array:
    """Corners in a network input to corners in the original image, clipped to it.

    Args:
        img1_shape: (height, width) of the network input.
        boxes: (..., 4) corners in its pixels; of wider rows only the first four columns are used and returned.
        img0_shape: (height, width, ...) of the original image.
        ratio_pad: ((ratio, ratio), (left, top)) as kept by the loader; None = computed from the two shapes, for a
            image resized to fit and centerd.

    Returns:
        (..., 4) corners in original pixels.
    """
    if ratio_pad is None:
        gain = min(img1_shape[0] / img0_shape[0], img1_shape[1] / img0_shape[1])
        left = (img1_shape[1] - img0_shape[1] * gain) / 2
        top = (img1_shape[0] - img0_shape[0] * gain) / 2
    else:
        gain = ratio_pad[0][0]
        left, top = ratio_pad[1]
    x1, y1, x2, y2 = _columns(boxes)
    scaled = ((x1 - left) / gain, (y1 - top) / gain, (x2 - left) / gain, (y2 - top) / gain)
    return clip_boxes(_stack(scaled, boxes), img0_shape)


def box_iou(a: Array, b: Array, eps: float = 1e-7) -> Array:
    """Intersection over union of every box of `a` with every box of `b`.

    Args:
        a: (n, 4) corners.
        b: (m, 4) corners.

    Returns:
        (n, m) in 0..1.
    """
    ax1, ay1, ax2, ay2 = (column[:, None] for column in _columns(a))
    bx1, by1, bx2, by2 = (column[None] for column in _columns(b))
    inter = _overlap(ax1, ax2, bx1, bx2) * _overlap(ay1, ay2, by1, by2)
    return inter / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inter + eps)


def _overlap(a_low: Array, a_high: Array, b_low: Array, b_high: Array) -> Array:
    """Length of the common part of intervals, 0 where there is none."""
    if isinstance(a_low, torch.Tensor):
        return (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0)
    return (np.minimum(a_high, b_high) - np.maximum(a_low, b_low)).clip(0)


def _span(a_low: Array, a_high: Array, b_low: Array, b_high: Array) -> Array:
    """Length of the smallest interval that holds both."""
    if isinstance(a_low, torch.Tensor):
        return torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)
    return np.maximum(a_high, b_high) - np.minimum(a_low, b_low)


def bbox_iou(
    box1: torch.Tensor,
    box2: torch.Tensor,
    xywh: bool = True,
    GIoU: bool = False,
    DIoU: bool = False,
    CIoU: bool = False,
    eps: float = 1e-7,
) -> torch.Tensor:
    """Overlap of paired boxes: IoU, or one of its relatives; differentiable.

    IoU; GIoU (https://arxiv.org/abs/1902.09630) = IoU - (hull - union) / hull; DIoU and CIoU
    (https://arxiv.org/abs/1911.08287) = IoU - center distance^2 / hull diagonal^2 (- alpha * v), with
    v = (4 / pi^2) (atan(w2 / h2) - atan(w1 / h1))^2 and alpha = v / (1 - IoU + v) held constant in the gradient.

    Args:
        box1, box2: tensors (..., 4) that broadcast; center and size when `xywh`, else corners.

    Returns:
        (...) without the last axis; 1 for equal boxes, GIoU/DIoU/CIoU go below 0.
    """
    first = _sides(box1, xywh, eps)
    second = _sides(box2, xywh, eps)
    (ax1, ay1, ax2, ay2, aw, ah), (bx1, by1, bx2, by2, bw, bh) = first, second
    inter = _overlap(ax1, ax2, bx1, bx2) * _overlap(ay1, ay2, by1, by2)
    union = aw * ah + bw * bh - inter + eps
    iou = inter / union
    if not (GIoU or DIoU or CIoU):
        return iou
    hull_w, hull_h = _span(ax1, ax2, bx1, bx2), _span(ay1, ay2, by1, by2)
    if GIoU:
        hull = hull_w * hull_h + eps
        return iou - (hull - union) / hull
    diagonal2 = hull_w**2 + hull_h**2 + eps
    distance2 = ((bx1 + bx2 - ax1 - ax2) ** 2 + (by1 + by2 - ay1 - ay2) ** 2) / 4
    if not CIoU:
        return iou - distance2 / diagonal2
    v = (4 / math.pi**2) * (torch.atan(bw / bh) - torch.atan(aw / ah)) ** 2
    with torch.no_grad():
        alpha = v / (v - iou + (1 + eps))
    return iou - (distance2 / diagonal2 + v * alpha)


def _sides(box: torch.Tensor, xywh: bool, eps: float) -> tuple[torch.Tensor, ...]:
    """Corners, width and height of boxes; heights of corner boxes are kept above `eps` for the aspect ratio."""
    if xywh:
        cx, cy, w, h = box.unbind(-1)
        half_w, half_h = w / 2, h / 2
        return cx - half_w, cy - half_h, cx + half_w, cy + half_h, w, h
    x1, y1, x2, y2 = box.unbind(-1)
    return x1, y1, x2, y2, x2 - x1, (y2 - y1).clamp(eps)


def bbox_ioa(box1: Array, box2: Array, eps: float = 1e-7) -> Array:
    """Part of each box of `box2` that `box1` covers.

    Args:
        box1: (4,) corners, or (n, 4).
        box2: (m, 4) corners.

    Returns:
        (m,), or (n, m), in 0..1.
    """
    ax1, ay1, ax2, ay2 = (column[..., None] for column in _columns(box1))
    bx1, by1, bx2, by2 = _columns(box2)
    inter = _overlap(ax1, ax2, bx1, bx2) * _overlap(ay1, ay2, by1, by2)
    return inter / ((bx2 - bx1) * (by2 - by1) + eps)


def wh_iou(wh1: Array, wh2: Array, eps: float = 1e-7) -> Array:
    """Intersection over union of boxes that share their center.

    Args:
        wh1: (n, 2) widths and heights.
        wh2: (m, 2).

    Returns:
        (n, m) in 0..1.
    """
    a, b = wh1[:, None], wh2[None]
    inter = torch.minimum(a, b).prod(-1) if isinstance(a, torch.Tensor) else np.minimum(a, b).prod(-1)
    return inter / (a.prod(-1) + b.prod(-1) - inter + eps)
