"""Box operations: format conversion, clipping, rescaling, IoU.

Formats: `xyxy` left, top, right, bottom; `xywh` center x, center y, width, height; a trailing `n` means normalized by
the image width and height. Unless stated otherwise, functions take NumPy arrays or tensors, keep dtype and device and
return a new array.
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
    """Stack columns along a new last axis, with the dtype of `like` if it is floating point."""
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
    """Convert xyxy boxes (..., 4) to xywh (..., 4) in the same unit."""
    x1, y1, x2, y2 = _columns(x)
    return _stack(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), x)


def xywh2xyxy(x: Array) -> Array:
    """Convert xywh boxes (..., 4) to xyxy (..., 4) in the same unit."""
    cx, cy, w, h = _columns(x)
    half_w, half_h = w / 2, h / 2
    return _stack((cx - half_w, cy - half_h, cx + half_w, cy + half_h), x)


def xywhn2xyxy(x: Array, w: float = 640, h: float = 640, padw: float = 0, padh: float = 0) -> Array:
    """Convert normalized xywh boxes (..., 4) to xyxy (..., 4) in pixels.

    Args:
        x: (..., 4) normalized xywh.
        w, h: image width and height in pixels.
        padw, padh: padding at the left and top in pixels.
    """
    cx, cy, bw, bh = _columns(x)
    half_w, half_h = bw / 2, bh / 2
    return _stack(
        (w * (cx - half_w) + padw, h * (cy - half_h) + padh, w * (cx + half_w) + padw, h * (cy + half_h) + padh), x
    )


def xyxy2xywhn(x: Array, w: float = 640, h: float = 640, clip: bool = False, eps: float = 0.0) -> Array:
    """Convert xyxy boxes in pixels (..., 4) to normalized xywh (..., 4).

    Args:
        x: (..., 4) xyxy in pixels.
        w, h: image width and height in pixels.
        clip: clip the boxes to the image first.
        eps: with `clip`, margin at the right and bottom in pixels.
    """
    boxes = clip_boxes(x, (h - eps, w - eps)) if clip else x
    x1, y1, x2, y2 = _columns(boxes)
    return _stack(((x1 + x2) / 2 / w, (y1 + y2) / 2 / h, (x2 - x1) / w, (y2 - y1) / h), x)


def xyn2xy(x: Array, w: float = 640, h: float = 640, padw: float = 0, padh: float = 0) -> Array:
    """Convert normalized points (..., 2) to pixels; arguments as for `xywhn2xyxy`."""
    return _stack((w * x[..., 0] + padw, h * x[..., 1] + padh), x)


def segment2box(segment: np.ndarray, width: float = 640, height: float = 640) -> np.ndarray:
    """Return the bounding box of the points of a polygon that lie inside the image.

    Args:
        segment: (n, 2) x, y in pixels.

    Returns:
        (4,) xyxy in pixels; zeros if no point is inside.
    """
    x, y = segment[:, 0], segment[:, 1]
    points = segment[(x >= 0) & (y >= 0) & (x <= width) & (y <= height)]
    if not len(points):
        return np.zeros(4, segment.dtype)
    return np.concatenate((points.min(0), points.max(0)))


def segments2boxes(segments: Sequence[np.ndarray]) -> np.ndarray:
    """Return the bounding boxes (k, 4) xywh of k polygons (n, 2), in the unit of the points."""
    boxes = [np.concatenate((s.min(0), s.max(0))) for s in segments]
    return xyxy2xywh(np.array(boxes).reshape(-1, 4))


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
    """Clip xyxy boxes (..., 4) to an image of `shape` (height, width, ...) in pixels."""
    height, width = float(shape[0]), float(shape[1])
    x1, y1, x2, y2 = _columns(boxes)
    limited = (_clamp(x1, 0, width), _clamp(y1, 0, height), _clamp(x2, 0, width), _clamp(y2, 0, height))
    return _stack(limited, boxes)


def scale_boxes(
    img1_shape: Sequence[float], boxes: Array, img0_shape: Sequence[float], ratio_pad: RatioPad | None = None
) -> Array:
    """Rescale xyxy boxes from the letterboxed network input to the original image, and clip them to it.

    Args:
        img1_shape: (height, width) of the network input.
        boxes: (..., 4) xyxy in pixels of the network input; further columns are dropped.
        img0_shape: (height, width, ...) of the original image.
        ratio_pad: ((ratio, ratio), (left, top)) from the loader; None = computed from the two shapes for a centered
            letterbox.

    Returns:
        (..., 4) xyxy in pixels of the original image.
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
    """Compute the pairwise IoU of two sets of boxes.

    Args:
        a: (n, 4) xyxy.
        b: (m, 4) xyxy.
        eps: added to the union.

    Returns:
        (n, m) in [0, 1].
    """
    ax1, ay1, ax2, ay2 = (column[:, None] for column in _columns(a))
    bx1, by1, bx2, by2 = (column[None] for column in _columns(b))
    inter = _overlap(ax1, ax2, bx1, bx2) * _overlap(ay1, ay2, by1, by2)
    return inter / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inter + eps)


def _overlap(a_low: Array, a_high: Array, b_low: Array, b_high: Array) -> Array:
    """Return the length of the intersection of intervals."""
    if isinstance(a_low, torch.Tensor):
        # relu has gradient 0 at 0 in every PyTorch version; that of clamp changed between 2.10 and 2.14.
        return (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).relu()
    return (np.minimum(a_high, b_high) - np.maximum(a_low, b_low)).clip(0)


def _span(a_low: Array, a_high: Array, b_low: Array, b_high: Array) -> Array:
    """Return the length of the smallest interval that contains both."""
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
    """Compute IoU, GIoU, DIoU or CIoU of paired boxes; differentiable.

    GIoU (https://arxiv.org/abs/1902.09630) = IoU - (hull - union) / hull; DIoU and CIoU
    (https://arxiv.org/abs/1911.08287) = IoU - center distance^2 / hull diagonal^2 (- alpha * v), with
    v = (4 / pi^2) (atan(w2 / h2) - atan(w1 / h1))^2 and alpha = v / (1 - IoU + v), which has no gradient.

    Args:
        box1, box2: (..., 4), broadcastable.
        xywh: the boxes are xywh, else xyxy.
        GIoU, DIoU, CIoU: variant to compute; none = IoU.
        eps: added to denominators.

    Returns:
        Broadcast shape without the last axis; at most 1, and negative values are possible for GIoU, DIoU and CIoU.
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
    """Return x1, y1, x2, y2, width, height; the height of xyxy boxes is clamped to `eps` for the aspect ratio."""
    if xywh:
        cx, cy, w, h = box.unbind(-1)
        half_w, half_h = w / 2, h / 2
        return cx - half_w, cy - half_h, cx + half_w, cy + half_h, w, h
    x1, y1, x2, y2 = box.unbind(-1)
    return x1, y1, x2, y2, x2 - x1, (y2 - y1).clamp(eps)


def bbox_ioa(box1: Array, box2: Array, eps: float = 1e-7) -> Array:
    """Compute the intersection of `box1` and `box2` divided by the area of `box2`.

    Args:
        box1: (4,) or (n, 4) xyxy.
        box2: (m, 4) xyxy.
        eps: added to the area.

    Returns:
        (m,) or (n, m) in [0, 1].
    """
    ax1, ay1, ax2, ay2 = (column[..., None] for column in _columns(box1))
    bx1, by1, bx2, by2 = _columns(box2)
    inter = _overlap(ax1, ax2, bx1, bx2) * _overlap(ay1, ay2, by1, by2)
    return inter / ((bx2 - bx1) * (by2 - by1) + eps)


def wh_iou(wh1: Array, wh2: Array, eps: float = 1e-7) -> Array:
    """Compute the pairwise IoU of boxes with a common center.

    Args:
        wh1: (n, 2) widths and heights.
        wh2: (m, 2) widths and heights.
        eps: added to the union.

    Returns:
        (n, m) in [0, 1].
    """
    a, b = wh1[:, None], wh2[None]
    inter = torch.minimum(a, b).prod(-1) if isinstance(a, torch.Tensor) else np.minimum(a, b).prod(-1)
    return inter / (a.prod(-1) + b.prod(-1) - inter + eps)
