"""YOLO label files, and the checks that rows of every format pass.

A label file is where YOLOv5 looks for it (`.../images/a/b.jpg` -> `.../labels/a/b.txt`, the last `images` counts; an
image outside an `images` folder has its labels beside it) and holds a row per object: `class x y w h`, or
`class x1 y1 x2 y2 x3 y3 ...` for a polygon, all normalized by the image's sides.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from utils.errors import DataError, shown
from utils.files import read_text

MAX_CLASS = 2**24  # class numbers are exact in float32 up to here

ROUNDING = 1.0
"""Pixels by which a box may extend beyond the border, or be larger than the image, and is clipped; more is an error."""

TOLERANCE = 1e-5
"""By how much a normalized value may lie outside of 0..1 (rounding of six decimals); it is then clipped."""


@dataclass(frozen=True, eq=False)
class LabelFile:
    """The objects of one image, checked.

    Attributes:
        labels: (n, 5) float32 class, normalized cxcywh.
        segments: n polygons (k, 2) float32, or none.
        duplicates: rows removed.
        notes: irregularities that are kept or fixed, by file and place.
        crowd: COCO groups (`iscrowd`) left out.
        difficult: VOC objects marked as difficult, left out.
    """

    labels: NDArray[np.float32]
    segments: tuple[NDArray[np.float32], ...] = ()
    duplicates: int = 0
    notes: tuple[str, ...] = ()
    crowd: int = 0
    difficult: int = 0


def label_path(image: str | Path) -> Path:
    """Return the label file of an image: the last folder `images` becomes `labels`, the suffix `.txt`."""
    head, found, tail = str(image).rpartition(f"{os.sep}images{os.sep}")
    return Path(os.path.splitext(f"{head}{os.sep}labels{os.sep}{tail}" if found else image)[0] + ".txt")


def number(text: str) -> float:
    """Return a number in ASCII decimal notation (`float` also takes `1_0`, `nan` and digits of other scripts).

    Raises:
        ValueError: anything else.
    """
    if not _DECIMAL.fullmatch(text):
        raise ValueError(f"{shown(text)} is not a number")
    return float(text)


_DECIMAL = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)


def read_labels(path: str | Path, size: tuple[int, int] | None = None) -> LabelFile:
    """Read and check one label file.

    Rows with more than six values are polygons and become boxes. Where one row is a polygon, the corners of every box
    of the file become one. Rows of a box and its key points (pose labels) are recognized, and keep the box.

    Args:
        path: the label file.
        size: (height, width) of the image in pixels; a box may be larger by `ROUNDING`. None: by `TOLERANCE` only.

    Raises:
        DataError: the first wrong row, by file and line.
    """
    text = read_text(path)
    if (plain := _plain_labels(text)) is not None:
        return LabelFile(plain)
    rows = [(i, line.split()) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    values: list[list[float]] = []
    for i, words in rows:
        try:
            values.append([number(word) for word in words])
        except ValueError as error:
            raise DataError(f"{path}:{i}: {error}") from error
    places = [f"{path}:{i}" for i, _ in rows]
    notes = []
    if _is_pose(values):
        notes.append(f"{places[0]}: rows of a box and key points; the key points are ignored")
        values = [row[:5] for row in values]
    labels = np.zeros((len(rows), 5), np.float64)
    polygons: list[NDArray[np.floating] | None] = []
    for i, row in enumerate(values):
        if len(row) > 6:
            if len(row) % 2 == 0:
                raise DataError(f"{places[i]}: {len(row)} columns; a polygon has a class and pairs of x and y")
            polygon = np.array(row[1:]).reshape(-1, 2)
            _check_polygon(polygon, places[i])
            polygons.append(polygon.clip(0, 1))
            labels[i, 0], labels[i, 1:] = row[0], enclosing_box(polygon.clip(0, 1))
        elif len(row) == 5:
            labels[i] = row
            polygons.append(None)
        else:
            hint = "; a confidence at the end (--save-conf) is not part of a label" if len(row) == 6 else ""
            raise DataError(f"{places[i]}: {len(row)} columns; 5 (class x y w h) or a polygon are needed{hint}")
    return checked(labels, polygons, places, size=size, notes=notes)


_ROW = r"[ \t]*\d{1,7}(?:[ \t]+(?:0?\.\d+|[01](?:\.0*)?)){4}[ \t]*"
_PLAIN = re.compile(rf"(?:{_ROW}(?:\r?\n|\Z))+", re.ASCII)


def _plain_labels(text: str) -> NDArray[np.float32] | None:
    """Parse a file of boxes with nothing to report: values from 0 to 1, areas above 0, no repetition.

    Returns:
        (n, 5) float32, what `checked` would return; None for any other file.
    """
    if not _PLAIN.fullmatch(text):
        return None
    labels = np.fromstring(text, np.float64, sep=" ").astype(np.float32).reshape(-1, 5)
    if not labels[:, 3:].all() or len(set(labels.view("V20").ravel().tolist())) < len(labels):
        return None
    return labels


def _is_pose(rows: Sequence[Sequence[float]]) -> bool:
    """Return whether all rows of a file are a box with the same number of key points (at least 3), not polygons.

    Signs: visibilities 0, 1 or 2 as every third number; or all key points lie inside the boxes, while some row, read as
    a polygon, crosses itself and has its second point (width, height) far from the rest.
    """
    lengths = {len(row) for row in rows}
    count = lengths.pop() - 5 if len(lengths) == 1 else 0
    if count < 6:
        return False
    table = np.array(rows, np.float64)
    if count % 3 == 0 and count >= 9 and np.isin(table[:, 7::3], (0, 1, 2)).all():
        return True
    if count % 2:
        return False
    center, size = table[:, None, 1:3], table[:, None, 3:5]
    points = table[:, 5:].reshape(len(table), -1, 2)
    inside = (np.abs(points - center) <= size / 2 + 0.01).all()
    low, high = points.min(1), points.max(1)
    distance = np.maximum(low - size[:, 0], size[:, 0] - high).max(1)
    far = distance > (high - low).max(1)
    return bool(inside and any(_crosses_itself(row[1:].reshape(-1, 2)) for row in table[far][:50]))


def _crosses_itself(points: NDArray[np.float64]) -> bool:
    """Return whether two non-adjacent edges of a closed polygon meet."""
    points = points[(points != np.roll(points, 1, 0)).any(1)]  # no edges of length 0
    n = len(points)
    if n < 4 or n > 500:
        return False
    ends = np.roll(points, -1, 0)
    edge = ends - points

    def side(of: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the (n, n) sign of the side of edge i on which point j lies."""
        offset = of[None] - points[:, None]
        return np.sign(edge[:, None, 0] * offset[..., 1] - edge[:, None, 1] * offset[..., 0])

    parted = side(points) * side(ends) <= 0
    gap = np.abs(np.arange(n)[:, None] - np.arange(n))
    return bool((parted & parted.T & (gap > 1) & (gap < n - 1)).any())


def _check_polygon(points: NDArray[np.float64], place: str) -> None:
    with np.errstate(invalid="ignore"):
        wrong = ~((points >= -TOLERANCE) & (points <= 1 + TOLERANCE)).all(1)
    if wrong.any():
        x, y = points[int(np.argmax(wrong))]
        raise DataError(f"{place}: polygon point {x:g} {y:g} is not between 0 and 1")


def checked(
    labels: NDArray[np.floating],
    polygons: Sequence[NDArray[np.floating] | None],
    places: Sequence[str],
    *,
    size: tuple[int, int] | None = None,
    notes: Sequence[str] = (),
    crowd: int = 0,
    difficult: int = 0,
) -> LabelFile:
    """Check the rows of one image; remove repetitions and sort the rest then (as YOLOv5 does).

    Args:
        labels: (n, 5) class, normalized cxcywh; checked before they become float32.
        polygons: polygon of each row, (k, 2) normalized; None where there is none.
        places: file and place of each row, for messages.
        size: (height, width) of the image in pixels, where a box may be larger than it by `ROUNDING`.
        notes: earlier notes on the file.
        crowd, difficult: objects left out.

    Raises:
        DataError: the first row with a value that is not allowed.
    """
    _check_values(labels, places, size)
    notes = list(notes)
    over = np.flatnonzero(((labels[:, 1:] < 0) | (labels[:, 1:] > 1)).any(1))
    if len(over):
        notes.append(f"{places[over[0]]}: {len(over)} boxes beyond the border by rounding, the first one here; clipped")
    labels = np.concatenate((labels[:, :1], labels[:, 1:].clip(0, 1)), 1).astype(np.float32) + 0.0  # no -0.0
    has_polygons = any(polygon is not None for polygon in polygons)
    pairs = zip(labels, polygons) if has_polygons else ()
    segments = [corners(row[1:]) if given is None else given.astype(np.float32) for row, given in pairs]
    flat = np.flatnonzero((labels[:, 3:] <= 0).any(1))
    if len(flat):
        notes.append(f"{places[flat[0]]}: {len(flat)} boxes without area, the first one here; kept")
    removed = 0
    if len(labels) > 1:
        _, first = np.unique(labels, axis=0, return_index=True)
        removed = len(labels) - len(first)
    if removed:
        place = places[min(set(range(len(labels))) - set(first.tolist()))]
        notes.append(f"{place}: {removed} duplicate rows, the first one here; removed")
        labels = labels[first]
        segments = [segments[i] for i in first] if has_polygons else []
    return LabelFile(labels, tuple(segments), removed, tuple(notes), crowd, difficult)


def fitting(
    polygons: Sequence[NDArray[np.floating] | None],
    boxes: NDArray[np.float64],
    size: tuple[int, int],
    places: Sequence[str],
) -> tuple[list[NDArray[np.floating] | None], tuple[str, ...]]:
    """Leave out polygons that do not have the boxes of their objects: training follows polygons, validation boxes.

    Args:
        polygons: polygon of each object, (k, 2) normalized, or None.
        boxes: (n, 4) normalized cxcywh of the objects.
        size: (height, width) of the image in pixels.
        places: file and place of each object, for messages.

    Returns:
        The polygons, None where the box around one differs from the object's by more than `ROUNDING`; notes on them.
    """
    out = list(polygons)
    for i, polygon in enumerate(polygons):
        if polygon is not None:
            low, high = polygon.min(0), polygon.max(0)
            half = boxes[i, 2:] / 2
            ends = (boxes[i, :2] - half).clip(0, 1), (boxes[i, :2] + half).clip(0, 1)
            off = np.abs((low - ends[0], high - ends[1])) * (size[1], size[0])
            out[i] = polygon if off.max() <= ROUNDING + 1e-3 else None
    wrong = [i for i, polygon in enumerate(out) if polygon is not polygons[i]]
    if not wrong:
        return out, ()
    return out, (
        f"{places[wrong[0]]}: {len(wrong)} polygons differ from the boxes of their objects by more than {ROUNDING:g}"
        " pixel, the first one here; only the boxes are used",
    )


def enclosing_box(points: NDArray[np.floating]) -> tuple[np.floating, ...]:
    """Return cxcywh of the box around (k, 2) points."""
    low, high = points.min(0), points.max(0)
    return (*((low + high) / 2), *(high - low))


def corners(xywh: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the corners (4, 2) of a box (4,) xywh, clockwise from the upper left."""
    return xywh[:2] + xywh[2:] * np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]], np.float32)


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """One usable image and its objects.

    Attributes:
        path: the image.
        height, width: its size in pixels, upright.
        labels: (n, 5) float32: class, normalized cxcywh.
        segments: n polygons, (k, 2) float32 x, y, normalized; empty if the label file has boxes only.
    """

    path: Path
    height: int
    width: int
    labels: NDArray[np.float32]
    segments: tuple[NDArray[np.float32], ...] = ()


PixelObject = tuple[int, list[float], "NDArray[np.float64] | None"]


def to_pixels(image: ImageRecord) -> list[PixelObject]:
    """Return class, xyxy and polygon (k, 2) or None of every object, in pixels."""
    sides = np.array((image.width, image.height), np.float64)
    objects: list[PixelObject] = []
    for i, row in enumerate(image.labels.astype(np.float64)):
        center, half = row[1:3] * sides, row[3:5] * sides / 2
        polygon = image.segments[i].astype(np.float64) * sides if image.segments else None
        objects.append((int(row[0]), [*(center - half).tolist(), *(center + half).tolist()], polygon))
    return objects


def from_pixels(boxes_xyxy: NDArray[np.float64], size: tuple[int, int], places: Sequence[str]) -> NDArray[np.float64]:
    """Convert boxes in pixels to those of a label file.

    A box that a label file could not hold, because it extends beyond the border, is clipped where that is no more than
    `ROUNDING`, and is an error where it is more.

    Args:
        boxes_xyxy: (n, 4) xyxy in pixels, the first pixel from 0 to 1.
        size: (height, width) of the image.
        places: file and place of each box, for messages.

    Returns:
        (n, 4) float64 normalized cxcywh.

    Raises:
        DataError: the first box that has a negative side, or is outside of the image.
    """
    boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
    sides = np.array((size[1], size[0]) * 2, np.float64)
    out = _centered(boxes / sides)
    wrong = ~((out >= 0) & (out <= 1)).all(1)  # of NaN too
    for i in np.flatnonzero(wrong).tolist():
        cut = boxes[i].clip(0, sides)
        text = " ".join(f"{value:g}" for value in boxes[i])
        if not np.isfinite(boxes[i]).all():
            raise DataError(f"{places[i]}: box {text} is not finite")
        if (out[i, 2:] < 0).any():
            raise DataError(f"{places[i]}: box {text} (left top right bottom) has a negative side")
        if np.abs(cut - boxes[i]).max() > ROUNDING:
            where = f"the image of {size[1]}x{size[0]} pixels"
            raise DataError(f"{places[i]}: box {text} (left top right bottom) is not inside {where}")
        out[i] = _centered(cut[None] / sides)[0]
    return out.clip(0, 1)


def _centered(xyxy: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate(((xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]), 1)


def _check_values(labels: NDArray[np.floating], places: Sequence[str], size: tuple[int, int] | None) -> None:
    """Raise for the first row with a value that is not allowed."""
    classes, boxes = labels[:, 0], labels[:, 1:]
    largest = 1 + np.full(4, TOLERANCE)
    if size is not None:
        largest[2:] += ROUNDING / size[1], ROUNDING / size[0]
    with np.errstate(invalid="ignore"):
        checks = (
            (~np.isfinite(labels).all(1), "is not finite"),
            ((classes < 0) | (classes != np.floor(classes)), "has a class that is not an integer from 0"),
            (classes > MAX_CLASS, f"has a class above {MAX_CLASS}"),
            ((boxes < -TOLERANCE).any(1), "has a negative value"),
            (
                (boxes > largest).any(1),
                "has a value above 1; cxcywh are normalized by the image's sides",
            ),
        )
    for wrong, problem in checks:
        if wrong.any():
            i = int(np.argmax(wrong))
            row = " ".join(f"{value:.10g}" for value in labels[i])
            raise DataError(f"{places[i]}: row '{row}' {problem}")
