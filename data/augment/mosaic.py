"""Mosaics: four or nine images on one canvas (laid out, not painted; see `warp.py`), and pasted mirror objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from data.augment.warp import Canvas, Labels, Segments, Tile, Warp, render, transform_points
from data.letterbox import Image
from data.sizes import HW
from utils.boxes import bbox_ioa

Offsets = list[tuple[int, int]]


@dataclass(frozen=True)
class LabeledImage:
    """A decoded image with its labels.

    Attributes:
        image: (h, w, 3) uint8 BGR.
        size: (height, width) that it takes in the network's input (`image` may be smaller).
        labels: (n, 5) float32 class, cxcywh, normalized.
        segments: polygons, one (k, 2) float32 per label, normalized; or empty.
    """

    image: Image
    size: HW
    labels: Labels
    segments: tuple[NDArray[np.float32], ...] = ()


def mosaic4(images: Sequence[LabeledImage], imgsz: int, rng: np.random.Generator) -> tuple[Canvas, Labels, Segments]:
    """Lay out four images that meet in a random point of a canvas of twice the side.

    The point lies in the canvas's middle half; images are cut at the canvas's border.

    Returns:
        The canvas (2 imgsz square); (n, 5) labels class, xyxy in canvas pixels, clipped; their polygons (empty
        arrays where there are none; no entries when no image has any).
    """
    cx, cy = (int(v) for v in rng.uniform(imgsz / 2, imgsz * 1.5, 2))
    (h0, w0), (h1, _), (_, w2), _ = (p.size for p in images)
    offsets = [(cx - w0, cy - h0), (cx, cy - h1), (cx - w2, cy), (cx, cy)]
    return _assemble(images, offsets, (2 * imgsz, 2 * imgsz))


def mosaic9(images: Sequence[LabeledImage], imgsz: int, rng: np.random.Generator) -> tuple[Canvas, Labels, Segments]:
    """Lay out nine images, one in the middle and eight around it, seen through a random window of twice the side.

    Returns:
        As `mosaic4`.
    """
    left, top = (int(v) for v in rng.uniform(0, imgsz, 2))
    offsets = [(x + imgsz - left, y + imgsz - top) for x, y in _ring([p.size for p in images])]
    return _assemble(images, offsets, (2 * imgsz, 2 * imgsz))


def _ring(sizes: Sequence[HW]) -> Offsets:
    """Return the top-left corners (x, y) of an image at (0, 0) and eight around it, each touching the last.

    8 1 2
    7 0 3
    6 5 4
    """
    (h0, w0), (h1, w1), (h2, _), (h3, _), _, (_, w5), (_, w6), (h7, w7), (h8, w8) = sizes
    return [
        (0, 0),
        (0, -h1),
        (w1, -h2),
        (w0, 0),
        (w0, h3),
        (w0 - w5, h0),
        (w0 - w5 - w6, h0),
        (-w7, h0 - h7),
        (-w8, h0 - h7 - h8),
    ]


def _assemble(images: Sequence[LabeledImage], offsets: Offsets, shape: HW) -> tuple[Canvas, Labels, Segments]:
    height, width = shape
    tiles, rows = [], []
    for p, (x, y) in zip(images, offsets):
        h, w = p.size
        visible = (max(x, 0), max(y, 0), min(x + w, width), min(y + h, height))
        if visible[0] < visible[2] and visible[1] < visible[3]:
            tiles.append(Tile(p.image, p.size, (x, y), visible))
        rows.append(place_labels(p.labels, p.size, (x, y)))
    labels = np.concatenate(rows, 0)
    labels[:, 1:] = labels[:, 1:].clip(0, (width, height, width, height))
    segments = []
    if any(p.segments for p in images):
        for p, (x, y) in zip(images, offsets):
            segments += [s.clip(0, (width, height)) for s in place_segments(p, (x, y))]
    return Canvas(tuple(tiles), shape), labels, segments


def place_labels(labels: Labels, size: tuple[float, float], offset: tuple[float, float]) -> Labels:
    """Convert labels (n, 5) from normalized cxcywh to xyxy in pixels, for an image of `size` at (x, y) `offset`."""
    h, w = size
    out = np.empty_like(labels)
    out[:, 0] = labels[:, 0]
    side = np.array((w, h), np.float32)
    center = labels[:, 1:3] * side + np.array(offset, np.float32)
    half = labels[:, 3:5] * (side / 2)
    out[:, 1:3], out[:, 3:5] = center - half, center + half
    return out


def place_segments(image: LabeledImage, offset: tuple[float, float]) -> list[NDArray[np.float32]]:
    """Return the polygons of an image at (x, y) `offset` in pixels, one per label; empty ones where it has none."""
    if not image.segments:
        return [np.zeros((0, 2), np.float32)] * len(image.labels)
    h, w = image.size
    side, corner = np.array((w, h), np.float32), np.array(offset, np.float32)
    return [s * side + corner for s in image.segments]


def choose_pastes(
    labels: Labels, segments: Segments, width: float, share: float, rng: np.random.Generator
) -> list[int]:
    """Pick objects with polygons whose mirror image covers less than 30 % of every existing box.

    Args:
        labels: (n, 5) class, xyxy in pixels.
        segments: n polygons (empty where there is none).
        width: of the canvas, in pixels.
        share: fraction of the objects with polygons to try.

    Returns:
        Indices of the labels to paste, in the order of pasting.
    """
    with_polygon = [i for i, s in enumerate(segments) if len(s)]
    tries = rng.choice(with_polygon, round(share * len(with_polygon)), replace=False).tolist() if with_polygon else []
    present, chosen = labels[:, 1:5], []
    for i in tries:
        x1, y1, x2, y2 = labels[i, 1:5]
        box = np.array((width - x2, y1, width - x1, y2), np.float32)
        if (bbox_ioa(box, present) < 0.3).all():
            chosen.append(i)
            present = np.concatenate((present, box[None]), 0)
    return chosen


def mirror(labels: Labels, segments: Segments, chosen: Sequence[int], width: float) -> tuple[Labels, Segments]:
    """Return labels and polygons with the mirror images of the chosen ones appended."""
    new = labels[list(chosen)]
    new[:, [1, 3]] = width - new[:, [3, 1]]
    turned = [np.stack((width - segments[i][:, 0], segments[i][:, 1]), 1) for i in chosen]
    return np.concatenate((labels, new), 0), [*segments, *turned]


def paste_mirrored(image: Image, canvas: Canvas, segments: Segments, warp: Warp) -> None:
    """Draw polygons of the horizontally flipped canvas over `image` (H, W, 3), in place.

    Args:
        image: the canvas rendered through `warp`.
        canvas: source of the pixels.
        segments: polygons (k, 2) of the objects to draw, in pixels of the unflipped canvas.
        warp: transformation from canvas to image.
    """
    flip = np.array(((-1.0, 0, canvas.shape[1]), (0, 1, 0), (0, 0, 1)))
    through = Warp(warp.matrix @ flip, warp.scale, warp.shape)
    mask = np.zeros(warp.shape, np.uint8)
    for segment in segments:
        points = transform_points(segment, through.matrix) - 0.5
        cv2.fillPoly(mask, [np.round(points).astype(np.int32)], 255)
    cv2.copyTo(render(canvas, through), mask, image)
