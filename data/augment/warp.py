"""Random geometry as one matrix from canvas to output, and a renderer that samples each output pixel once.

A canvas is never painted: it is a list of tiles (images with a place). YOLOv5 pastes four images into a canvas of
twice the side, then warps the canvas and throws most of it away; here each tile is warped straight into the part of the
output that it covers. The result is the same up to interpolation at the tiles' edges.

Coordinates are continuous: pixel i covers [i, i + 1), so boxes and pixels follow one matrix, and a flip is x -> W - x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from data.augment.config import AugmentConfig
from data.letterbox import FILL, Image
from data.sizes import HW
from utils.boxes import resample_segments, segment2box

Matrix = NDArray[np.float64]
Labels = NDArray[np.float32]
Segments = Sequence[NDArray[np.float32]]

SEGMENT_POINTS = 1000  # a polygon is resampled to that many points, so that its box stays tight after a perspective


@dataclass(frozen=True)
class Tile:
    """An image with its place on a canvas, in canvas pixels.

    Attributes:
        image: (h, w, 3) uint8, of any size: it is scaled to `size` on the way to the output.
        size: (height, width) on the canvas.
        offset: (x, y) of its top left corner; may be negative.
        visible: (x1, y1, x2, y2) part of the canvas that it may cover.
    """

    image: Image
    size: HW
    offset: tuple[float, float]
    visible: tuple[float, float, float, float]


@dataclass(frozen=True)
class Canvas:
    """Tiles on an area of (height, width) `shape`; later tiles cover earlier ones, the rest is gray."""

    tiles: tuple[Tile, ...]
    shape: HW


@dataclass(frozen=True)
class Warp:
    """A map from canvas to output.

    Attributes:
        matrix: (3, 3) float64, continuous canvas pixels to continuous output pixels.
        scale: zoom factor in it, for the filter of shrunken boxes.
        shape: (height, width) of the output.
    """

    matrix: Matrix
    scale: float
    shape: HW


def draw_warp(
    config: AugmentConfig,
    canvas: HW,
    output: HW,
    rng: np.random.Generator,
    flips: tuple[bool, bool] = (False, False),
) -> Warp:
    """Draw perspective, rotation, zoom, shear and shift, in this order, about the canvas's center.

    Args:
        canvas, output: (height, width) of both sides.
        flips: (upside down, left-right), applied last.
    """
    (height, width), (out_h, out_w) = canvas, output
    p, angle, zoom, shear, shift = _draw_numbers(config, rng)
    cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
    center = np.array(((1, 0, -width / 2), (0, 1, -height / 2), (0, 0, 1)))
    tilt = np.array(((1, 0, 0), (0, 1, 0), (*p, 1)))
    turn = np.array(((cos, sin, 0), (-sin, cos, 0), (0, 0, 1)))
    slant = np.array(((1, math.tan(shear[0]), 0), (math.tan(shear[1]), 1, 0), (0, 0, 1)))
    back = np.array(((1, 0, shift[0] * out_w), (0, 1, shift[1] * out_h), (0, 0, 1)))
    matrix = back @ slant @ turn @ tilt @ center
    if flips[0]:
        matrix = np.array(((1.0, 0, 0), (0, -1, out_h), (0, 0, 1))) @ matrix
    if flips[1]:
        matrix = np.array(((-1.0, 0, out_w), (0, 1, 0), (0, 0, 1))) @ matrix
    return Warp(matrix, zoom, output)


def _draw_numbers(
    config: AugmentConfig, rng: np.random.Generator
) -> tuple[NDArray[np.float64], float, float, NDArray[np.float64], NDArray[np.float64]]:
    """Draw perspective (2), angle and shear (2) in radians, zoom, the center's place in the output (2, fractions)."""
    u = rng.uniform(-1, 1, 8)
    perspective = u[:2] * config.perspective
    angle = math.radians(u[2] * config.degrees)
    zoom = 1 + float(u[3]) * config.scale
    return perspective, angle, zoom, np.radians(u[4:6] * config.shear), 0.5 + u[6:8] * config.translate


def render(canvas: Canvas, warp: Warp) -> Image:
    """Draw a canvas through a warp.

    Returns:
        (H, W, 3) uint8 of the warp's shape; linear interpolation inside tiles, gray where there is none.
    """
    # OpenCV warps four channels more than twice as fast as three, to the same values.
    out = np.full((*warp.shape, 4), FILL, np.uint8)
    for tile in canvas.tiles:
        place = _tile_matrix(tile, warp.matrix)
        if warp.matrix[0, 1] == warp.matrix[1, 0] == 0 and not warp.matrix[2, :2].any():
            _paint_upright(out, tile, warp.matrix, place)
        else:
            _paint_slanted(out, tile, place)
    return cv2.cvtColor(out, cv2.COLOR_BGRA2BGR)


def _tile_matrix(tile: Tile, matrix: Matrix) -> Matrix:
    """Return the (3, 3) matrix from continuous pixels of the tile's own image to continuous output pixels."""
    (h, w), (ih, iw) = tile.size, tile.image.shape[:2]
    return matrix @ np.array(((w / iw, 0, tile.offset[0]), (0, h / ih, tile.offset[1]), (0, 0, 1)))


def _covered(a: float, b: float, low: float, high: float, side: int) -> tuple[int, int]:
    """Return the output pixels with centers in the image of [low, high) under x -> a x + b; neighbors leave no gap."""
    start, stop = sorted((a * low + b, a * high + b))
    return max(math.ceil(start - 0.5), 0), min(math.ceil(stop - 0.5), side)


def _paint_upright(out: Image, tile: Tile, matrix: Matrix, place: Matrix) -> None:
    """Render an axis-aligned tile: exactly the output pixels it covers, with its border replicated."""
    x1, y1, x2, y2 = tile.visible
    left, right = _covered(matrix[0, 0], matrix[0, 2], x1, x2, out.shape[1])
    top, bottom = _covered(matrix[1, 1], matrix[1, 2], y1, y2, out.shape[0])
    if left >= right or top >= bottom:
        return
    part = out[top:bottom, left:right]
    if _paint_whole(part, tile, place, (left, top)):
        return
    (a, _, tx), (_, d, ty) = place[:2].tolist()
    # Index i is the continuous point i + 0.5, on both sides.
    forward = np.array(((a, 0, tx + 0.5 * a - 0.5 - left), (0, d, ty + 0.5 * d - 0.5 - top)))
    size = (right - left, bottom - top)
    image = cv2.cvtColor(tile.image, cv2.COLOR_BGR2BGRA)
    cv2.warpAffine(image, forward, size, dst=part, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _paint_whole(part: Image, tile: Tile, place: Matrix, corner: tuple[int, int]) -> bool:
    """Fill `part` by a plain copy or resize when the tile lands on it with whole pixels; False when it does not."""
    (a, _, tx), (_, d, ty) = place[:2].tolist()
    height, width = tile.image.shape[:2]
    if a == d == 1.0 and tx.is_integer() and ty.is_integer():
        x, y = corner[0] - int(tx), corner[1] - int(ty)
        cv2.cvtColor(tile.image[y : y + part.shape[0], x : x + part.shape[1]], cv2.COLOR_BGR2BGRA, dst=part)
        return True
    whole = (tx, ty) == corner and abs(a * width - part.shape[1]) < 1e-6 and abs(d * height - part.shape[0]) < 1e-6
    if whole:
        image = cv2.resize(tile.image, (part.shape[1], part.shape[0]), interpolation=cv2.INTER_LINEAR)
        cv2.cvtColor(image, cv2.COLOR_BGR2BGRA, dst=part)
    return whole


def _paint_slanted(out: Image, tile: Tile, place: Matrix) -> None:
    """Render a rotated, sheared or perspective tile within the bounding box of the pixels it covers."""
    (h, w), (ih, iw) = tile.size, tile.image.shape[:2]
    (ox, oy), (vx1, vy1, vx2, vy2) = tile.offset, tile.visible
    x1, x2 = max(math.floor((vx1 - ox) * iw / w), 0), min(math.ceil((vx2 - ox) * iw / w), iw)
    y1, y2 = max(math.floor((vy1 - oy) * ih / h), 0), min(math.ceil((vy2 - oy) * ih / h), ih)
    if x1 >= x2 or y1 >= y2:
        return
    corners = np.array(((x1, y1), (x2, y1), (x2, y2), (x1, y2)), np.float64)
    moved = transform_points(corners, place)
    left, top = np.maximum(np.floor(moved.min(0)) - 1, 0).astype(int).tolist()
    right, bottom = np.minimum(np.ceil(moved.max(0)) + 1, (out.shape[1], out.shape[0])).astype(int).tolist()
    if left >= right or top >= bottom:
        return
    # One repeated pixel around it closes the seams that interpolation between two tiles would fill.
    image = cv2.cvtColor(tile.image[y1:y2, x1:x2], cv2.COLOR_BGR2BGRA)
    image = cv2.copyMakeBorder(image, 1, 1, 1, 1, cv2.BORDER_REPLICATE)
    to_image = np.array(((1, 0, x1 - 0.5), (0, 1, y1 - 0.5), (0, 0, 1)))  # index in `image` to continuous pixel
    to_index = np.array(((1, 0, -0.5 - left), (0, 1, -0.5 - top), (0, 0, 1)))
    forward = to_index @ place @ to_image
    part, size = out[top:bottom, left:right], (right - left, bottom - top)
    if place[2, :2].any():
        cv2.warpPerspective(image, forward, size, part, cv2.INTER_LINEAR, cv2.BORDER_TRANSPARENT)
    else:
        cv2.warpAffine(image, forward[:2], size, part, cv2.INTER_LINEAR, cv2.BORDER_TRANSPARENT)


def transform_points(points: NDArray[np.floating], matrix: Matrix) -> NDArray[np.float64]:
    """Send (n, 2) points x, y through a (3, 3) matrix, with the division by the third coordinate."""
    moved = points @ matrix[:, :2].T + matrix[:, 2]
    return moved[:, :2] / moved[:, 2:]


def transform_labels(labels: Labels, segments: Segments, warp: Warp) -> Labels:
    """Send labels through a warp, clip them to the output, and drop those of which too little is left.

    Args:
        labels: (n, 5) class, xyxy in canvas pixels.
        segments: polygon of each label, (k, 2) canvas pixels (an empty one where there is none), or nothing at all. A
            box follows its polygon where there is one, else its four corners.

    Returns:
        (m, 5) class, xyxy in output pixels.
    """
    if not len(labels):
        return labels
    x1, y1, x2, y2 = labels[:, 1:5].T
    corners = np.stack((x1, y1, x2, y1, x2, y2, x1, y2), 1).reshape(-1, 2)
    moved = transform_points(corners, warp.matrix).reshape(-1, 4, 2)
    boxes = np.concatenate((moved.min(1), moved.max(1)), 1).astype(np.float32)
    has_polygon = np.zeros(len(labels), bool)
    height, width = warp.shape
    for i, segment in enumerate(segments):
        if len(segment):
            has_polygon[i] = True
            points = resample_segments([segment], SEGMENT_POINTS)[0]
            boxes[i] = segment2box(transform_points(points, warp.matrix), width, height)
    boxes = boxes.clip(0, np.array((width, height, width, height), np.float32))
    keep = box_candidates(labels[:, 1:5].T * warp.scale, boxes.T, area_thr=np.where(has_polygon, 0.01, 0.1))
    return np.concatenate((labels[keep, :1], boxes[keep]), 1)


def box_candidates(
    box1: NDArray[np.floating],
    box2: NDArray[np.floating],
    wh_thr: float = 2.0,
    ar_thr: float = 100.0,
    area_thr: float | NDArray[np.floating] = 0.1,
    eps: float = 1e-16,
) -> NDArray[np.bool_]:
    """Return which boxes to keep after a transform.

    Args:
        box1: (4, n) xyxy before, in pixels (times the zoom).
        box2: (4, n) xyxy after.
        wh_thr: both sides must be longer than this, in pixels.
        ar_thr: the longer side over the shorter one must be below this.
        area_thr: area after over area before must be above this; one number, or one per box.

    Returns:
        (n,) bool.
    """
    w1, h1 = box1[2] - box1[0], box1[3] - box1[1]
    w2, h2 = box2[2] - box2[0], box2[3] - box2[1]
    slimness = np.maximum(w2 / (h2 + eps), h2 / (w2 + eps))
    return (w2 > wh_thr) & (h2 > wh_thr) & (w2 * h2 / (w1 * h1 + eps) > area_thr) & (slimness < ar_thr)
