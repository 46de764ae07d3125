"""Which images a source holds and where their labels are: YOLO text, COCO JSON, Pascal VOC XML.

A source is a folder of images, a .txt list of images or an image (YOLO text beside them), or an annotated one:

- COCO: a .json file. `file_name` is looked for in the file's folder (and in the one above, where it is called
  `annotations`), in the dataset's `path`, in `images` of these, and in folders below that are called as the split or
  as the end of the file's name (`instances_val2017.json`: `val2017`); or only where the YAML's `images:` says.
- VOC: a folder with `Annotations` and `JPEGImages` (or `images`), a list in `ImageSets/Main` of such a folder, or a
  folder with XML files whose images have the same name, beside them, in `../JPEGImages` or in `../images`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from data.formats import coco, voc
from data.formats.yolo import LabelFile, label_path, read_labels
from data.images import IMAGE_SUFFIXES
from utils.errors import DataError

Reader = Callable[[tuple[int, int]], LabelFile]


@dataclass(frozen=True)
class AnnotatedSource:
    """COCO or VOC annotations.

    Attributes:
        path: the JSON; the VOC folder, the folder of XML files, or the list.
        kind: which of both.
        classes: names by class number; None = as the annotations have them.
        folders: where images are looked for, in this order.
    """

    path: Path
    kind: Literal["coco", "voc"]
    classes: tuple[str, ...] | None = None
    folders: tuple[Path, ...] = ()

    def __str__(self) -> str:
        return str(self.path)

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def key(self) -> str:
        """Differs for sources whose labels differ: the classes and folders count too."""
        return "\0".join([self.kind, str(self.path), *(self.classes or ("",)), *map(str, self.folders)])


Source = Path | AnnotatedSource


@dataclass(frozen=True)
class Listed:
    """An image of a source.

    Attributes:
        origin: place that names it, '' for a file found in a folder.
        label: file that its labels come from; it need not be there.
        read: reads them, given the (height, width) of the image.
    """

    origin: str
    label: Path
    read: Reader


def recognise(
    path: Path,
    classes: Sequence[str] | None = None,
    folders: Sequence[Path] = (),
    root: Path | None = None,
    split: str = "",
) -> Source:
    """Return the kind of source that a path of a dataset YAML names.

    Args:
        path: file or folder.
        classes: names by class number; None = as the annotations have them.
        folders: the folders to look for images in, where the YAML names them.
        root: folder of the dataset; None = that of the file.
        split: name of the split.

    Returns:
        The path itself when its labels are YOLO text (or none).
    """
    names = None if classes is None else tuple(classes)
    if path.suffix.lower() == ".json" and os.path.isfile(path):
        word = path.stem.rpartition("_")[2]
        return AnnotatedSource(path, "coco", names, tuple(folders) or _coco_folders(path.parent, root, (split, word)))
    base = _voc_base(path)
    if base is None:
        return path
    if not folders:
        below = (base / "JPEGImages", base / "images") if base != path or os.path.isdir(base / "Annotations") else ()
        beside = (path, path.parent / "JPEGImages", path.parent / "images")
        folders = below or beside
    return AnnotatedSource(path, "voc", names, tuple(folders))


def plain(path: Path) -> Listed:
    """Return an image with its YOLO label file."""
    label = label_path(path)
    return Listed("", label, partial(read_labels, label))


def images(source: AnnotatedSource) -> tuple[Iterator[tuple[Path, Listed]], tuple[str, ...]]:
    """Images of a source, and what is odd about it as a whole.

    Raises:
        DataError: annotations that cannot be read, or with classes that the dataset does not name.
    """
    if source.kind == "coco":
        content = coco.read_coco(source.path)
        return _coco_images(source, content), content.notes
    return _voc_images(source), ()


def class_names(sources: Sequence[AnnotatedSource]) -> tuple[str, ...]:
    """Names that annotations give to the classes: COCO's categories by rising id, else VOC's names, sorted.

    Raises:
        DataError: annotations that cannot be read, or without a class.
    """
    first = next((source for source in sources if source.kind == "coco"), None)
    if first is not None:
        names = tuple(coco.read_coco(first.path).categories.values())
    else:
        names = voc.class_names(path for source in sources for path in _xml_files(source) if os.path.lexists(path))
    if not names:
        raise DataError(f"{first or sources[0]}: names no class")
    return names


# ---- COCO


def _coco_folders(folder: Path, root: Path | None, words: Sequence[str]) -> tuple[Path, ...]:
    above = folder.parent if folder.name.lower() == "annotations" else folder
    bases = [base for start in (folder, root or above, above) for base in (start, start / "images")]
    inner = [base / word for base in bases for word in words if word]
    return tuple(dict.fromkeys([*bases, *inner]))


def _coco_images(source: AnnotatedSource, content: coco.CocoFile) -> Iterator[tuple[Path, Listed]]:
    numbers = coco.class_numbers(content, source.classes)
    place: dict[Path, coco.CocoImage] = {}
    others: dict[Path, list[Any]] = {}
    for path, image in located(source, content.images):
        if path in place:
            others.setdefault(path, []).append(image.id)
        place.setdefault(path, image)
    repeated = []
    for path, image in place.items():
        read = partial(coco.image_labels, content, image, others.get(path, ()), numbers)
        listed = Listed(f"{source.path}: image {image.id}", source.path, read)
        repeated += [(path, listed)] * len(others.get(path, ()))
        yield path, listed
    yield from repeated


def located(source: AnnotatedSource, images: Sequence[coco.CocoImage]) -> Iterator[tuple[Path, coco.CocoImage]]:
    """Return the path of each image; a missing one gets the first path that was tried."""
    folders = [folder for folder in source.folders if os.path.isdir(folder)] or list(source.folders[:1])
    for image in images:
        name = image.file_name.replace("\\", "/")
        found = next((i for i, folder in enumerate(folders) if os.path.isfile(folder / name)), 0)
        if found:
            folders.insert(0, folders.pop(found))  # most likely the next one is there too
        yield Path(os.path.abspath(folders[0] / name)), image


# ---- VOC


def _voc_base(path: Path) -> Path | None:
    """Return the folder that holds VOC's subfolders, or None if the path is not VOC."""
    if path.suffix.lower() == ".txt":
        parents = path.parents
        inside = len(parents) > 2 and parents[1].name == "ImageSets" and os.path.isdir(parents[2] / "Annotations")
        return parents[2] if inside and os.path.isfile(path) else None
    if not os.path.isdir(path):
        return None
    if os.path.isdir(path / "Annotations") and any(os.path.isdir(path / name) for name in ("JPEGImages", "images")):
        return path
    files = _in_folder(path, {".xml"})
    labels = label_path(path / "x").parent
    if not files or any(os.path.isfile(labels / f"{file.stem}.txt") for file in files):
        return None
    return path


def _voc_images(source: AnnotatedSource) -> Iterator[tuple[Path, Listed]]:
    candidates: dict[str, list[Path]] = {}
    for folder in source.folders:
        for path in _in_folder(folder, IMAGE_SUFFIXES):
            candidates.setdefault(path.stem, []).append(path)
    names = source.classes or class_names([source])
    listed: Mapping[Path, str]
    if os.path.isfile(source.path):
        base = _voc_base(source.path) or source.path.parent
        lines = voc.identifiers(source.path)
        listed = {base / "Annotations" / f"{name}.xml": f"{source.path}:{line}" for name, line in lines.items()}
    else:
        listed = {path: str(path) for path in _xml_files(source)}
    folder = source.path / "Annotations" if os.path.isdir(source.path / "Annotations") else source.path
    seen: set[Path] = set()
    for xml, origin in listed.items():
        image = _image_of(xml, candidates.get(xml.stem, ()), source.folders)
        seen.update((image, *candidates.pop(xml.stem, ())))
        yield image, Listed(origin, xml, partial(voc.read_voc, xml, names))
    for image in sorted({paths[0] for paths in candidates.values()} - seen):  # backgrounds; a list has none
        if folder != source.path or image.parent == source.path:
            xml = folder / f"{image.stem}.xml"
            yield image, Listed("", xml, partial(voc.read_voc, xml, names))


def _image_of(xml: Path, candidates: Sequence[Path], folders: Sequence[Path]) -> Path:
    """Return the image of an annotation: of several with its stem, or of none, the one that the XML names."""
    if len(candidates) == 1:
        return candidates[0]
    named = (voc.parse_voc(xml).file_name if os.path.exists(xml) else "") or f"{xml.stem}.jpg"
    if candidates:
        return next((path for path in candidates if path.name == named), candidates[0])
    return next((folder / named for folder in folders if os.path.isfile(folder / named)), folders[0] / named)


def _xml_files(source: AnnotatedSource) -> list[Path]:
    if os.path.isfile(source.path):
        base = _voc_base(source.path) or source.path.parent
        return [base / "Annotations" / f"{name}.xml" for name in voc.identifiers(source.path)]
    inner = source.path / "Annotations"
    return _in_folder(inner if os.path.isdir(inner) else source.path, {".xml"})


def _in_folder(folder: Path, suffixes: set[str] | frozenset[str]) -> list[Path]:
    """Files of a folder, not of those below it, sorted; none where it does not exist.

    Raises:
        DataError: a folder that cannot be read.
    """
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror or error}") from error
    return [folder / name for name in names if name[:1] != "." and os.path.splitext(name)[1].lower() in suffixes]
