"""Pascal VOC XML: objects of an image with name, box and, where a tool wrote it, an outline.

Format: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html. Corners count in pixels from 0, as
labelling tools write them; in PASCAL's own files (`<source><annotation>PASCAL VOC...`) the first pixel has number 1, so
there 1 is taken off, as YOLOv5 does. Objects marked as difficult are left out, as YOLOv5 does.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.formats.yolo import LabelFile, checked, from_pixels
from utils.errors import DataError, did_you_mean

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class UnknownClassError(DataError):
    """An object of a class that the dataset does not name: a mistake of the set, not of one image."""


def read_voc(path: Path, classes: Sequence[str], size: tuple[int, int]) -> LabelFile:
    """Read and check one annotation.

    Args:
        path: the XML.
        classes: names by class number.
        size: (height, width) of the image, in pixels.

    Raises:
        UnknownClassError: an object is called otherwise.
        DataError: broken XML, another size, or the first object that cannot be used.
    """
    root = _parse(path)
    _check_size(root, path, size)
    numbers = {name: i for i, name in enumerate(classes)}
    base = 1.0 if (root.findtext("source/annotation") or "").strip().upper().startswith("PASCAL VOC") else 0.0
    labels, boxes, polygons, places = [], [], [], []
    difficult = 0
    for i, item in enumerate(root.findall("object"), 1):
        name = _name(item)
        place = f"{path}: object {i} ({name or 'without name'})"
        if name not in numbers:
            raise UnknownClassError(f"{place}: the classes are {', '.join(classes)}{did_you_mean(name, classes)}")
        if (item.findtext("difficult") or "").strip() == "1":
            difficult += 1
            continue
        labels.append(numbers[name])
        boxes.append(_box(item, place, base))
        polygons.append(_polygon(item, place, base, size))
        places.append(place)
    rows = np.zeros((len(labels), 5), np.float32)
    rows[:, 0] = labels
    rows[:, 1:] = from_pixels(np.array(boxes, np.float64).reshape(-1, 4), size, places)
    return checked(rows, polygons, places, difficult=difficult)


def class_names(files: Iterable[Path]) -> tuple[str, ...]:
    """All names that objects have, sorted.

    Raises:
        DataError: a file is no XML.
    """
    return tuple(sorted({_name(item) for path in files for item in _parse(path).findall("object")} - {""}))


def file_name(path: Path) -> str:
    """Return the image file that an annotation names, or ''."""
    return (_parse(path).findtext("filename") or "").strip()


def identifiers(listing: Path) -> dict[str, int]:
    """Images of an `ImageSets/Main` list, without suffix, each with its line.

    Raises:
        DataError: not readable.
    """
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{listing}: cannot be read as a list of images: {error}") from error
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            found.setdefault(line.split()[0], number)
    return found


def element(name: str, text: object = "", children: Iterable[ElementTree.Element] = ()) -> ElementTree.Element:
    """Return an XML element for writing."""
    out = ElementTree.Element(name)
    out.text = str(text) or None
    out.extend(children)
    return out


def annotation(
    image: str, size: tuple[int, int], objects: Iterable[tuple[str, Sequence[float], NDArray[np.floating] | None]]
) -> str:
    """Return the XML annotation of one image.

    Args:
        image: file name.
        size: (height, width) in pixels.
        objects: name, (left, top, right, bottom) and outline (k, 2) or None, in pixels from 0.
    """
    items = []
    for name, box, polygon in objects:
        fixed = {"name": name, "pose": "Unspecified", "truncated": 0, "difficult": 0}
        parts = [element(key, value) for key, value in fixed.items()]
        parts.append(element("bndbox", children=[element(k, f"{v:.3f}") for k, v in zip(_CORNERS, box)]))
        if polygon is not None:
            points = [(f"{axis}{i}", value) for i, xy in enumerate(polygon, 1) for axis, value in zip("xy", xy)]
            parts.append(element("polygon", children=[element(key, f"{value:.3f}") for key, value in points]))
        items.append(element("object", children=parts))
    sides = [element("width", size[1]), element("height", size[0]), element("depth", 3)]
    head = [element("filename", image), element("size", children=sides), element("segmented", 0)]
    root = element("annotation", children=[*head, *items])
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _parse(path: Path) -> ElementTree.Element:
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise DataError(f"{path}:{error.position[0]}: not valid XML: {error}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if root.tag != "annotation":
        raise DataError(f"{path}: begins with <{root.tag}>; a VOC annotation begins with <annotation>")
    return root


def _name(item: ElementTree.Element) -> str:
    return (item.findtext("name") or "").strip()


def _check_size(root: ElementTree.Element, path: Path, size: tuple[int, int]) -> None:
    try:
        width, height = (int(float(root.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    except ValueError as error:
        raise DataError(f"{path}: size: {error}") from error
    if width > 0 and height > 0 and (height, width) != size:  # some tools write 0
        raise DataError(
            f"{path}: {width}x{height} pixels there, {size[1]}x{size[0]} in the image; boxes in pixels would be wrong"
        )


def _box(item: ElementTree.Element, place: str, base: float) -> list[float]:
    try:
        return [float(item.findtext(f"bndbox/{key}", "")) - base for key in _CORNERS]
    except ValueError as error:
        raise DataError(f"{place}: bndbox: numbers {', '.join(_CORNERS)} are needed") from error


def _polygon(item: ElementTree.Element, place: str, base: float, size: tuple[int, int]) -> NDArray[np.float32] | None:
    """(k, 2) parts of the sides from `<polygon><x1/><y1/><x2/>...`, an addition of labelling tools."""
    node = item.find("polygon")
    if node is None:
        return None
    values: Mapping[str, str] = {child.tag: child.text or "" for child in node}
    count = len(values) // 2
    try:
        points = np.array([[float(values[f"{axis}{i}"]) for axis in "xy"] for i in range(1, count + 1)], np.float64)
    except (KeyError, ValueError) as error:
        raise DataError(f"{place}: polygon: numbers x1, y1, x2, y2, ... are needed") from error
    if count < 3:
        return None
    return ((points - base) / (size[1], size[0])).clip(0, 1).astype(np.float32)
