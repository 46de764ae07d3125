"""YOLO label files, and the checks that rows of every format pass.

A label file lies where YOLOv5 looks for it (`.../images/a/b.jpg` -> `.../labels/a/b.txt`, the last `images` counts; a
image outside an `images` folder has its label beside it) and holds a row per object: `class x y w h`, or
`class x1 y1 x2 y2 x3 y3 ...` for a polygon, all as parts of the image's sides.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from utils.errors import DataError

ROUNDING = 1.0
"""Pixels by which a box in pixels may reach over the border before it counts as a mistake; it is then cut."""


@dataclass(frozen=True, eq=False)
class LabelFile:
    """The objects of one image, checked.

    Attributes:
        labels: (n, 5) float32 class, center x, center y, width, height, as parts of the sides.
        segments: n polygons (k, 2) float32, or none.
        duplicates: rows removed.
        notes: what is odd but kept or fixed, by file and place.
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
    """Where the labels of an image are: the last folder `images` becomes `labels`, the suffix `.txt`."""
    head, found, tail = str(image).rpartition(f"{os.sep}images{os.sep}")
    return Path(f"{head}{os.sep}labels{os.sep}{tail}" if found else image).with_suffix(".txt")


def read_labels(path: str | Path) -> LabelFile:
    """Read and check one label file.

    Rows with more than six numbers are polygons and become boxes. Where one row is a polygon, every box of the file
    gets its four corners as one.

    Raises:
        DataError: the first wrong row, by file and line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error
    rows = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]
    labels = np.zeros((len(rows), 5), np.float32)
    polygons: list[NDArray[np.float32] | None] = []
    for i, (number, row) in enumerate(rows):
        try:
            values = np.array([float(text) for text in row], np.float32)
        except ValueError as error:
            raise DataError(f"{path}:{number}: {str(error).split(': ')[-1]} is not a number") from error
        if len(row) > 6:
            if len(row) % 2 == 0:
                raise DataError(f"{path}:{number}: {len(row)} columns; a polygon has a class and pairs of x and y")
            polygon = values[1:].reshape(-1, 2)
            polygons.append(polygon)
            labels[i] = (values[0], *enclosing_box(polygon))
        elif len(row) == 5:
            labels[i] = values
            polygons.append(None)
        else:
            raise DataError(f"{path}:{number}: {len(row)} columns; 5 (class x y w h) or a polygon are needed")
    return checked(labels, polygons, [f"{path}:{number}" for number, _ in rows])


def checked(
    labels: NDArray[np.float32],
    polygons: Sequence[NDArray[np.float32] | None],
    places: Sequence[str],
    *,
    crowd: int = 0,
    difficult: int = 0,
) -> LabelFile:
    """Check the rows of one image; remove repetitions and sort the rest then (as YOLOv5 does).

    Args:
        labels: (n, 5) float32 class, center x, center y, width, height, as parts of the sides.
        polygons: outline of each row, (k, 2) parts of the sides; None where there is none.
        places: file and place of each row, for messages.
        crowd, difficult: objects left out.

    Raises:
        DataError: the first row with a value that is not allowed.
    """
    _check_values(labels, places)
    outlined = any(polygon is not None for polygon in polygons)
    pairs = zip(labels, polygons)
    segments = [corners(row[1:]) if given is None else given for row, given in pairs] if outlined else []
    flat = np.flatnonzero((labels[:, 3:] <= 0).any(1))
    notes = [f"{places[flat[0]]}: {len(flat)} boxes without area, the first one here; kept"] if len(flat) else []
    removed = 0
    if len(labels) > 1:
        _, first = np.unique(labels, axis=0, return_index=True)
        removed = len(labels) - len(first)
    if removed:
        place = places[min(set(range(len(labels))) - set(first.tolist()))]
        notes.append(f"{place}: {removed} duplicate rows, the first one here; removed")
        labels = labels[first]
        segments = [segments[i] for i in first] if outlined else []
    return LabelFile(labels, tuple(segments), removed, tuple(notes), crowd, difficult)


def enclosing_box(points: NDArray[np.float32]) -> tuple[np.float32, ...]:
    """Center x, center y, width, height of the box around (k, 2) points."""
    low, high = points.min(0), points.max(0)
    return (*((low + high) / 2), *(high - low))


def corners(xywh: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the four corners of a box, clockwise from the upper left."""
    return xywh[:2] + xywh[2:] * np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]], np.float32)


def from_pixels(boxes_xyxy: NDArray[np.float64], size: tuple[int, int], places: Sequence[str]) -> NDArray[np.float32]:
    """Boxes in pixels as a label file has them.

    A box that a label file could not hold, because it reaches over the border, is cut where that is no more than
    `ROUNDING`, and is a mistake where it is more.

    Args:
        boxes_xyxy: (n, 4) left, top, right, bottom in pixels, the first pixel from 0 to 1.
        size: (height, width) of the image.
        places: file and place of each box, for messages.

    Returns:
        (n, 4) float32 center x, center y, width, height, as parts of the sides.

    Raises:
        DataError: the first box that has a negative side, or lies outside of the image.
    """
    boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
    sides = np.array((size[1], size[0]) * 2, np.float64)
    out = _centerd(boxes / sides)
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
            raise DataError(f"{places[i]}: box {text} (left top right bottom) does not lie in {where}")
        out[i] = _centerd(cut[None] / sides)[0]
    return out.clip(0, 1).astype(np.float32)


def _centerd(xyxy: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate(((xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]), 1)


def _check_values(labels: NDArray[np.float32], places: Sequence[str]) -> None:
    """Raise for the first row with a value that is not allowed."""
    classes, boxes = labels[:, 0], labels[:, 1:]
    with np.errstate(invalid="ignore"):
        checks = (
            (~np.isfinite(labels).all(1), "is not finite"),
            ((classes < 0) | (classes != np.floor(classes)), "has a class that is not an integer from 0"),
            ((boxes < 0).any(1), "has a negative value"),
            ((boxes > 1).any(1), "has a value above 1; center and size are parts of the image's sides"),
        )
    for wrong, problem in checks:
        if wrong.any():
            i = int(np.argmax(wrong))
            row = " ".join(f"{value:g}" for value in labels[i])
            raise DataError(f"{places[i]}: row '{row}' {problem}")
