"""COCO detection JSON: images, categories, boxes and polygons.

Format: https://cocodataset.org/#format-data. Category ids are arbitrary: classes are numbered by ascending id, or
by name where the dataset YAML names its classes. Boxes are `x y width height` in pixels from the upper left corner.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.formats.yolo import ImageRecord, LabelFile, checked, fitting, from_pixels, to_pixels
from utils.errors import DataError, did_you_mean, listed, shown
from utils.files import read_text

Segment = NDArray[np.float32]

MAX_PAIRS = 4_000_000
_LARGEST = 1e9  # pixels

NEEDED = ("images", "annotations", "categories")
"""Lists of a file; `annotations` may be missing altogether, as in COCO's own lists of test images."""


@dataclass(frozen=True)
class CocoImage:
    """One entry of `images`: id, file name as written, (height, width) in pixels or None."""

    id: Any
    file_name: str
    size: tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class CocoFile:
    """An annotation file, its structure checked; boxes are checked image by image.

    Attributes:
        path: the file.
        categories: category id -> name, by ascending id.
        images: all images.
        annotations: image id -> its annotations, in the order of the file.
        notes: remarks on the whole file.
    """

    path: Path
    categories: Mapping[Any, str]
    images: tuple[CocoImage, ...]
    annotations: Mapping[Any, Sequence[Mapping[str, Any]]]
    notes: tuple[str, ...] = ()

    @cached_property
    def used(self) -> set[Any]:
        """Category ids that some annotation has."""
        return {item["category_id"] for items in self.annotations.values() for item in items}


def read_coco(path: Path) -> CocoFile:
    """Read an annotation file.

    Raises:
        DataError: not JSON (with the line), not COCO's structure, an id or a name given twice, or an annotation of an
            unknown category.
    """
    content = _load(path)
    categories, notes = _categories(content, path)
    images = tuple(_image(item, i, path) for i, item in enumerate(content["images"]))
    found: dict[Any, list[Mapping[str, Any]]] = {}
    for image in images:
        if image.id in found:
            raise DataError(f"{path}: images: id {shown(image.id)} is given twice")
        found[image.id] = []
    unlisted = []
    for i, item in enumerate(content["annotations"]):
        if not isinstance(item, dict) or not all(_is_id(item.get(key)) for key in ("image_id", "category_id")):
            raise DataError(
                f"{path}: annotations[{i}] is {shown(item)}; a mapping with image_id, category_id and bbox is needed"
            )
        if item["category_id"] not in categories:
            known = ", ".join(f"{number} ({shown(name)})" for number, name in list(categories.items())[:10])
            raise DataError(
                f"{path}: annotation {shown(item.get('id', i))}: no category has id {shown(item['category_id'])};"
                f" there are {known}"
            )
        if item["image_id"] in found:
            found[item["image_id"]].append(item)
        else:
            unlisted.append(item.get("id", i))
    if unlisted:
        first = shown(unlisted[0])
        notes.append(f"{path}: {len(unlisted)} annotations of images that are not listed, first {first}; left out")
    return CocoFile(path, categories, images, found, tuple(notes))


def annotation_file(
    images: Iterable[tuple[Any, str, ImageRecord]],
    category_ids: Sequence[Any],
    names: Mapping[int, str],
    *,
    polygons: bool = True,
    digits: int | None = None,
) -> dict[str, Any]:
    """Return labels in COCO's format: images, annotations, categories.

    Args:
        images: id, file name and objects of each image.
        category_ids: by class number.
        names: class number -> name.
        polygons: write segmentations, and the areas that they enclose.
        digits: decimals of pixel values; None keeps them all.
    """
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, file_name, image in images:
        entries.append({"id": image_id, "file_name": file_name, "width": image.width, "height": image.height})
        for label, (left, top, right, bottom), polygon in to_pixels(image):
            box, area = [left, top, right - left, bottom - top], (right - left) * (bottom - top)
            points: list[list[float]] = []
            if polygons and polygon is not None:
                points, area = [_rounded(polygon.reshape(-1).tolist(), digits)], _polygon_area(polygon)
            fields = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category_ids[label]}
            fields |= {"bbox": _rounded(box, digits), "area": _rounded([area], digits)[0], "iscrowd": 0}
            annotations.append(fields | ({"segmentation": points} if polygons else {}))
    listed = [{"id": category_ids[number], "name": name, "supercategory": ""} for number, name in names.items()]
    return {"images": entries, "annotations": annotations, "categories": listed}


def _rounded(values: list[float], digits: int | None) -> list[float]:
    return values if digits is None else [round(value, digits) for value in values]


def _polygon_area(polygon: NDArray[np.float64]) -> float:
    """Return the area inside a polygon, by the shoelace formula."""
    x, y = polygon.T
    return float(abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2)


def class_numbers(coco: CocoFile, classes: Sequence[str] | None) -> dict[Any, int]:
    """Return the class number of each category id.

    Args:
        classes: names by class number; None numbers the categories by ascending id.

    Raises:
        DataError: annotations have a category that is not among the names.
    """
    if classes is None:
        return {number: i for i, number in enumerate(coco.categories)}
    numbers = {name: i for i, name in enumerate(classes)}
    unknown = [name for number, name in coco.categories.items() if name not in numbers and number in coco.used]
    if unknown:
        hint = did_you_mean(unknown[0], [name for name in classes if name not in coco.categories.values()])
        raise DataError(f"{coco.path}: has objects of {listed(unknown)}, but the classes are {listed(classes)}{hint}")
    return {number: numbers[name] for number, name in coco.categories.items() if name in numbers}


def image_labels(
    coco: CocoFile, image: CocoImage, others: Iterable[Any], numbers: Mapping[Any, int], size: tuple[int, int]
) -> LabelFile:
    """Return the objects of one image; groups (`iscrowd`) are left out and counted.

    Args:
        image: entry of the image.
        others: ids of further entries of the same file, whose objects belong to it too.
        numbers: category id -> class.
        size: (height, width) of the image, in pixels.

    Raises:
        DataError: sizes that differ, or the first object that cannot be used.
    """
    if image.size is not None and image.size != size:
        (h, w), (height, width) = image.size, size
        raise DataError(
            f"{coco.path}: image {image.id} ({image.file_name}): {w}x{h} pixels there, {width}x{height} in the file;"
            " boxes in pixels would be wrong"
        )
    items = [item for number in (image.id, *others) for item in coco.annotations[number]]
    kept = [item for item in items if not item.get("iscrowd")]
    places = [f"{coco.path}: annotation {shown(item.get('id', i))}" for i, item in enumerate(kept)]
    polygons = [_polygon(item.get("segmentation"), place, size) for item, place in zip(kept, places)]
    boxes = [_box(item, polygon, size, place) for item, polygon, place in zip(kept, polygons, places)]
    labels = np.zeros((len(kept), 5), np.float64)
    labels[:, 0] = [numbers[item["category_id"]] for item in kept]
    labels[:, 1:] = from_pixels(np.array(boxes, np.float64).reshape(-1, 4), size, places)
    fit, notes = fitting(polygons, labels[:, 1:], size, places)
    return checked(labels, fit, places, notes=notes, crowd=len(items) - len(kept))


def join_polygons(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Join all parts of an object into one polygon, at their nearest points by a bridge without width.

    Of parts with many points, every n-th one is tried for the bridge: at most `MAX_PAIRS` pairs are compared.

    Args:
        parts: (k, 2) points of each part.

    Returns:
        (m, 2) points; filled, it covers the parts and nothing else.
    """
    joined = parts[0]
    for part in parts[1:]:
        step = math.isqrt(len(joined) * len(part) // MAX_PAIRS) + 1
        distance = ((joined[::step, None] - part[None, ::step]) ** 2).sum(2)
        here, there = (int(k) * step for k in np.unravel_index(int(distance.argmin()), distance.shape))
        round_trip = np.concatenate((part[there:], part[: there + 1]), 0)
        joined = np.concatenate((joined[: here + 1], round_trip, joined[here:]), 0)
    return joined


def _load(path: Path) -> dict[str, Any]:
    text = read_text(path, limit=2**33)
    try:
        content = json.loads(text)
        if "\\ud" in text or "\\uD" in text:  # an escape may give half of a surrogate pair, which no file can hold
            json.dumps(content, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # too many digits, half of a surrogate pair; too many brackets
        raise DataError(f"{path}: not valid JSON: {error}") from error
    table = content if isinstance(content, dict) else {}
    lists = {"annotations": [], **table}
    missing = [key for key in NEEDED if not isinstance(lists.get(key), list)]
    if missing:
        hint = did_you_mean(missing[0], [key for key in table if key not in NEEDED])
        raise DataError(f"{path}: is not a COCO detection file: lists {', '.join(missing)} are missing{hint}")
    return lists


def _is_id(value: object) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _categories(content: Mapping[str, Any], path: Path) -> tuple[dict[Any, str], list[str]]:
    """Return category id -> name by ascending id, and what was dropped.

    Exports of Roboflow begin with a category that groups the others and has no objects: it is not a class.
    """
    entries: list[tuple[Any, str, str]] = []
    for i, item in enumerate(content["categories"]):
        known = (
            isinstance(item, dict) and type(item.get("id")) is int and isinstance(item.get("name"), (str, int, float))
        )
        if not known or not str(item["name"]).strip():
            raise DataError(
                f"{path}: categories[{i}] is {shown(item)}; a mapping with a number 'id' and a 'name' is needed"
            )
        entries.append((item["id"], str(item["name"]).strip(), str(item.get("supercategory") or "none").strip()))
    used = {item.get("category_id") for item in content["annotations"] if isinstance(item, dict)
            and _is_id(item.get("category_id"))}  # fmt: skip
    dropped = {number: name for number, name, above in entries if above == "none" and number not in used
               and any(name == other for key, _, other in entries if key != number)}  # fmt: skip
    notes = [
        f"{path}: category {shown(name)} (id {number}) groups the others and has no objects; it is not a class"
        for number, name in dropped.items()
    ]
    found: dict[Any, str] = {}
    for number, name, _ in entries:
        if number in dropped and name == dropped[number]:
            continue
        if number in found or name in found.values():
            raise DataError(f"{path}: categories: id {number} or name {shown(name)} is given twice")
        found[number] = name
    return {number: found[number] for number in sorted(found)}, notes


def _image(item: object, i: int, path: Path) -> CocoImage:
    name = item.get("file_name") if isinstance(item, dict) else None
    if not isinstance(item, dict) or not _is_id(item.get("id")) or not isinstance(name, str) or not name:
        raise DataError(f"{path}: images[{i}] is {shown(item)}; a mapping with 'id' and 'file_name' is needed")
    sides = [int(v) for v in (item.get("height"), item.get("width")) if isinstance(v, (int, float)) and 0 < v < 2**31]
    return CocoImage(item["id"], name, (sides[0], sides[1]) if len(sides) == 2 else None)


def _polygon(value: object, place: str, size: tuple[int, int]) -> Segment | None:
    """Return (k, 2) normalized points, all parts of the object joined; None for masks, boxes and lines."""
    if not isinstance(value, list):
        return None  # run lengths: no polygon, the box is used
    try:
        parts = [np.asarray(part, np.float64).reshape(-1, 2) for part in value if len(part) >= 6]
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{place}: segmentation: lists of x, y, x, y, ... are needed") from error
    if not parts:
        return None
    if not all((np.abs(part) < _LARGEST).all() for part in parts):
        raise DataError(f"{place}: segmentation is not finite")
    points = join_polygons(parts) / (size[1], size[0])
    return points.clip(0, 1).astype(np.float32)


def _box(
    item: Mapping[str, Any], polygon: Segment | None, size: tuple[int, int], place: str
) -> tuple[float, float, float, float]:
    """Return xyxy in pixels: `bbox`, or the box around the polygon where that is missing."""
    value = item.get("bbox")
    if not value and polygon is not None:
        (left, top), (right, bottom) = polygon.min(0) * (size[1], size[0]), polygon.max(0) * (size[1], size[0])
        return float(left), float(top), float(right), float(bottom)
    if not isinstance(value, list) or len(value) != 4 or not all(isinstance(v, (int, float)) for v in value):
        raise DataError(f"{place}: bbox is {shown(value)}; four numbers x, y, width, height are needed")
    if not all(abs(v) < _LARGEST for v in value):
        raise DataError(f"{place}: bbox {shown(value)} is not finite")
    x, y, width, height = map(float, value)
    return x, y, x + width, y + height
