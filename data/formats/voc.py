"""Pascal VOC XML: objects of an image with name, box and, where a tool wrote it, a polygon.

Format: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html. Coordinates are pixels from 0, as
labeling tools write them; in PASCAL's own files (`<source><annotation>PASCAL VOC...`) they start at 1,
which is subtracted, as YOLOv5 does. Objects marked as difficult are left out, as YOLOv5 does.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from data.formats.yolo import LabelFile, checked, fitting, from_pixels, number
from data.images import IMAGE_SUFFIXES
from utils.errors import DataError, did_you_mean, listed, shown
from utils.files import check_regular, read_text

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_LIMIT = 2**26  # bytes of an annotation


class UnknownClassError(DataError):
    """An object of a class that the dataset does not name: a mistake of the dataset, not of one image."""


@dataclass(frozen=True)
class VocObject:
    """One `<object>` as written; box and polygon are parsed on access.

    Attributes:
        element: the XML element.
        place: file and number of the object, for messages.
    """

    element: ElementTree.Element
    place: str

    @property
    def name(self) -> str:
        """Class name, '' where it is missing."""
        return (self.element.findtext("name") or "").strip()

    @property
    def difficult(self) -> bool:
        """Whether the object is marked as difficult."""
        return (self.element.findtext("difficult") or "").strip() == "1"

    def box(self) -> list[float]:
        """Return xyxy as written; DataError where a number is missing."""
        try:
            return [number(self.element.findtext(f"bndbox/{key}", "").strip()) for key in _CORNERS]
        except ValueError as error:
            raise DataError(f"{self.place}: bndbox: numbers {', '.join(_CORNERS)} are needed") from error

    def polygon(self) -> NDArray[np.float64] | None:
        """Return (k, 2) points of `<polygon><x1/><y1/><x2/>...`, an addition of labeling tools; None without."""
        node = self.element.find("polygon")
        if node is None:
            return None
        values: Mapping[str, str] = {child.tag: (child.text or "").strip() for child in node}
        count = len(values) // 2
        try:
            points = [[number(values[f"{axis}{i}"]) for axis in "xy"] for i in range(1, count + 1)]
        except (KeyError, ValueError) as error:
            raise DataError(f"{self.place}: polygon: numbers x1, y1, x2, y2, ... are needed") from error
        if not np.isfinite(points).all():
            raise DataError(f"{self.place}: polygon is not finite")
        return np.array(points, np.float64) if count >= 3 else None


@dataclass(frozen=True)
class VocAnnotation:
    """One annotation file.

    Attributes:
        file_name: image that it names, without folders; '' where it names none.
        size: (height, width) in pixels as written; 0 where it is missing.
        corner_base: coordinate of the first pixel: 1 in PASCAL's own files, else 0.
        objects: in the order of the file.
    """

    file_name: str
    size: tuple[float, float]
    corner_base: float
    objects: tuple[VocObject, ...]


def parse_voc(path: Path) -> VocAnnotation:
    """Parse an annotation file without judging its objects.

    Raises:
        DataError: not XML, not an annotation, or a size that is not a number.
    """
    root = _parse(path)
    try:
        width, height = (number((root.findtext(f"size/{side}") or "0").strip()) for side in ("width", "height"))
    except ValueError as error:
        raise DataError(f"{path}: size: {error}") from error
    pascal = (root.findtext("source/annotation") or "").strip().upper().startswith("PASCAL VOC")
    name = (root.findtext("filename") or "").strip().replace("\\", "/").rpartition("/")[2]
    objects = []
    for i, item in enumerate(root.findall("object"), 1):
        title = (item.findtext("name") or "").strip()
        objects.append(VocObject(item, f"{path}: object {i} ({title[:80] or 'without name'})"))
    return VocAnnotation(name, (height, width), 1.0 if pascal else 0.0, tuple(objects))


def read_voc(path: Path, classes: Sequence[str], size: tuple[int, int]) -> LabelFile:
    """Read and check one annotation.

    Args:
        path: the XML.
        classes: names by class number.
        size: (height, width) of the image, in pixels.

    Raises:
        UnknownClassError: an object of another class.
        DataError: invalid XML, another size, or the first object that cannot be used.
    """
    annotation = parse_voc(path)
    if min(annotation.size) > 0 and annotation.size != size:  # some tools write 0
        written = "x".join(f"{side:g}" for side in reversed(annotation.size))
        raise DataError(
            f"{path}: {written} pixels there, {size[1]}x{size[0]} in the image; boxes in pixels would be wrong"
        )
    numbers = {name: i for i, name in reversed(list(enumerate(classes)))}
    used = []
    for item in annotation.objects:
        if item.name not in numbers:
            raise UnknownClassError(
                f"{item.place}: the classes are {listed(classes)}{did_you_mean(item.name, classes)}"
            )
        if not item.difficult:
            used.append(item)
    base, sides = annotation.corner_base, np.array((size[1], size[0]))
    boxes = np.array([item.box() for item in used], np.float64).reshape(-1, 4) - base
    points = [item.polygon() for item in used]
    polygons = [None if p is None else ((p - base) / sides).clip(0, 1).astype(np.float32) for p in points]
    places = [item.place for item in used]
    labels = np.array([numbers[item.name] for item in used], np.float64)
    rows = np.concatenate((labels[:, None], from_pixels(boxes, size, places)), 1)
    fit, notes = fitting(polygons, rows[:, 1:], size, places)
    return checked(rows, fit, places, notes=notes, difficult=len(annotation.objects) - len(used))


def class_names(files: Iterable[Path]) -> tuple[str, ...]:
    """Return all class names of the objects, sorted.

    Raises:
        DataError: a file that cannot be parsed.
    """
    return tuple(sorted({item.name for path in files for item in parse_voc(path).objects} - {""}))


def identifiers(listing: Path) -> dict[str, int]:
    """Return the images of an `ImageSets` list, without folder and suffix, each with its line.

    Raises:
        DataError: not readable.
    """
    found: dict[str, int] = {}
    for i, line in enumerate(read_text(listing).splitlines(), 1):
        if line.strip():
            name = PurePosixPath(line.split()[0].replace("\\", "/")).name
            found.setdefault(Path(name).stem if Path(name).suffix.lower() in IMAGE_SUFFIXES else name, i)
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
        objects: name, xyxy and polygon (k, 2) or None, in pixels from 0.
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
    if check_regular(path).st_size > _LIMIT:
        raise DataError(f"{path}: more than {_LIMIT} bytes for one annotation")
    try:
        root = ElementTree.fromstring(path.read_bytes())
    except ElementTree.ParseError as error:
        raise DataError(f"{path}:{error.position[0]}: not valid XML: {error}") from error
    except (OSError, ValueError, LookupError) as error:  # unreadable; an encoding that does not exist
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if root.tag != "annotation":
        raise DataError(f"{path}: begins with <{shown(root.tag)[1:-1]}>; a VOC annotation begins with <annotation>")
    return root
