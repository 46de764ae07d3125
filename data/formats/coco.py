"""COCO detection JSON: images, categories, boxes and outlines.

Format: https://cocodataset.org/#format-data. Category ids are arbitrary numbers: classes are numbered by rising id, or
by name where the dataset YAML names its classes. Boxes are `x y width height` in pixels from the upper left corner.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.formats.yolo import LabelFile, checked, from_pixels
from utils.errors import DataError, did_you_mean

Segment = NDArray[np.float32]

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
        categories: category id -> name, by rising id.
        images: all images.
        annotations: image id -> its annotations, in the order of the file.
        notes: what is odd about the whole file.
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
    categories = _categories(content["categories"], path)
    images = tuple(_image(item, i, path) for i, item in enumerate(content["images"]))
    found: dict[Any, list[Mapping[str, Any]]] = {image.id: [] for image in images}
    if len(found) != len(images):
        seen: set[Any] = set()
        twice = next(image.id for image in images if image.id in seen or seen.add(image.id))  # type: ignore[func-returns-value]
        raise DataError(f"{path}: images: id {twice!r} is given twice")
    strangers = []
    for i, item in enumerate(content["annotations"]):
        if not isinstance(item, dict) or "image_id" not in item or "category_id" not in item:
            raise DataError(f"{path}: annotations[{i}]: a mapping with image_id, category_id and bbox is needed")
        if item["category_id"] not in categories:
            known = ", ".join(f"{number} ({name})" for number, name in list(categories.items())[:10])
            raise DataError(
                f"{path}: annotation {item.get('id', i)}: no category has id {item['category_id']!r}; there are {known}"
            )
        if item["image_id"] in found:
            found[item["image_id"]].append(item)
        else:
            strangers.append(item.get("id", i))
    lost = f"{path}: {len(strangers)} annotations of images that are not listed, first {strangers[:1]}; left out"
    return CocoFile(path, categories, images, found, (lost,) if strangers else ())


def is_coco(path: Path) -> bool:
    """Whether a file name is that of a COCO annotation file."""
    return path.suffix.lower() == ".json"


def class_numbers(coco: CocoFile, classes: Sequence[str] | None) -> dict[Any, int]:
    """Class number of each category id.

    Args:
        classes: names by class number; None numbers the categories by rising id.

    Raises:
        DataError: annotations have a category that is not among the names.
    """
    if classes is None:
        return {number: i for i, number in enumerate(coco.categories)}
    numbers = {name: i for i, name in enumerate(classes)}
    unknown = [name for number, name in coco.categories.items() if name not in numbers and number in coco.used]
    if unknown:
        hint = did_you_mean(unknown[0], [name for name in classes if name not in coco.categories.values()])
        raise DataError(f"{coco.path}: has objects of {_listed(unknown)}, but the classes are {_listed(classes)}{hint}")
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
    places = [f"{coco.path}: annotation {item.get('id', i)}" for i, item in enumerate(kept)]
    polygons = [_polygon(item.get("segmentation"), place, size) for item, place in zip(kept, places)]
    boxes = [_box(item, polygon, size, place) for item, polygon, place in zip(kept, polygons, places)]
    labels = np.zeros((len(kept), 5), np.float32)
    labels[:, 0] = [numbers[item["category_id"]] for item in kept]
    labels[:, 1:] = from_pixels(np.array(boxes, np.float64).reshape(-1, 4), size, places)
    return checked(labels, polygons, places, crowd=len(items) - len(kept))


def join_polygons(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """One outline through all parts of an object, joined where they are nearest by a bridge without width.

    Args:
        parts: (k, 2) points of each part.

    Returns:
        (m, 2) points; filled, it covers the parts and nothing else.
    """
    joined = parts[0]
    for part in parts[1:]:
        distance = ((joined[:, None] - part[None]) ** 2).sum(2)
        here, there = np.unravel_index(int(distance.argmin()), distance.shape)
        round_trip = np.concatenate((part[there:], part[: there + 1]), 0)
        joined = np.concatenate((joined[: here + 1], round_trip, joined[here:]), 0)
    return joined


def _load(path: Path) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    table = content if isinstance(content, dict) else {}
    lists = {"annotations": [], **table}
    missing = [key for key in NEEDED if not isinstance(lists.get(key), list)]
    if missing:
        hint = did_you_mean(missing[0], [key for key in table if key not in NEEDED])
        raise DataError(f"{path}: is no COCO detection file: lists {', '.join(missing)} are missing{hint}")
    return lists


def _categories(items: Sequence[Any], path: Path) -> dict[Any, str]:
    found: dict[Any, str] = {}
    for i, item in enumerate(items):
        if not isinstance(item, dict) or not isinstance(item.get("id"), int) or not str(item.get("name") or "").strip():
            raise DataError(f"{path}: categories[{i}] is {item!r}; a mapping with a number 'id' and a 'name' is needed")
        name = str(item["name"]).strip()
        if item["id"] in found or name in found.values():
            raise DataError(f"{path}: categories[{i}]: id {item['id']} or name '{name}' is given twice")
        found[item["id"]] = name
    return {number: found[number] for number in sorted(found)}


def _image(item: Any, i: int, path: Path) -> CocoImage:
    if not isinstance(item, dict) or not isinstance(item.get("id"), (int, str)) or not item.get("file_name"):
        raise DataError(f"{path}: images[{i}] is {item!r}; a mapping with 'id' and 'file_name' is needed")
    height, width = item.get("height"), item.get("width")
    known = isinstance(height, (int, float)) and isinstance(width, (int, float)) and height > 0 and width > 0
    return CocoImage(item["id"], str(item["file_name"]), (int(height), int(width)) if known else None)  # type: ignore[arg-type]


def _polygon(value: Any, place: str, size: tuple[int, int]) -> Segment | None:
    """(k, 2) parts of the sides, all parts of the object joined; None for masks, boxes and lines."""
    if not isinstance(value, list):
        return None  # run lengths: no outline, the box counts
    try:
        parts = [np.asarray(part, np.float64).reshape(-1, 2) for part in value if len(part) >= 6]
    except (TypeError, ValueError) as error:
        raise DataError(f"{place}: segmentation: lists of x, y, x, y, ... are needed") from error
    if not parts:
        return None
    points = join_polygons(parts) / (size[1], size[0])
    if not np.isfinite(points).all():
        raise DataError(f"{place}: segmentation is not finite")
    return points.clip(0, 1).astype(np.float32)


def _box(
    item: Mapping[str, Any], polygon: Segment | None, size: tuple[int, int], place: str
) -> tuple[float, float, float, float]:
    """Left, top, right, bottom in pixels: `bbox`, or what encloses the outline where that is missing."""
    value = item.get("bbox")
    if not value and polygon is not None:
        (left, top), (right, bottom) = polygon.min(0) * (size[1], size[0]), polygon.max(0) * (size[1], size[0])
        return float(left), float(top), float(right), float(bottom)
    numbers = isinstance(value, list) and len(value) == 4
    if not isinstance(value, list) or not numbers or not all(isinstance(v, (int, float)) for v in value):
        raise DataError(f"{place}: bbox is {value!r}; four numbers x, y, width, height are needed")
    x, y, width, height = map(float, value)
    return x, y, x + width, y + height


def _listed(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{name}'" for name in names[:most]) + more
