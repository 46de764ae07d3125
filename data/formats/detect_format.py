"""Which images a source holds and where their labels are: YOLO text, COCO JSON, Pascal VOC XML.

A source is a folder of images, a .txt list of images or an image (YOLO text beside them), or an annotated one:

- COCO: a .json file. `file_name` is looked for in the file's folder (and in the one above, where it is called
  `annotations`), in the dataset's `path`, in `images` of these, and in folders below that are named like the split or
  like the end of the file's name (`instances_val2017.json`: `val2017`); or only where the YAML's `images:` says.
- VOC: a folder with `Annotations`, a list below `ImageSets` beside it, or a folder whose XML files have the names of
  images: beside them, in `JPEGImages` or `images`, or where YOLO labels would be.

Where no image is in these folders, the first one's name is searched for in all folders of the dataset. VOC's folder
names may be in lower case.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from data.formats import coco, voc
from data.formats.yolo import LabelFile, label_path, read_labels
from data.images import IMAGE_SUFFIXES
from utils.errors import DataError
from utils.files import folder_names

LOGGER = logging.getLogger(__name__)

Reader = Callable[[tuple[int, int]], LabelFile]


@dataclass(frozen=True)
class AnnotatedSource:
    """COCO or VOC annotations.

    Attributes:
        path: the JSON; the VOC folder, the folder of XML files, or the list.
        kind: which of the two.
        classes: names by class number; None = as the annotations have them.
        folders: where images are looked for, in this order.
        search: folder below which they are looked for where none of these has the first one; None: nowhere.
    """

    path: Path
    kind: Literal["coco", "voc"]
    classes: tuple[str, ...] | None = None
    folders: tuple[Path, ...] = ()
    search: Path | None = None

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


def recognize(
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
        above = path.parent.parent if path.parent.name.lower() == "annotations" else path.parent
        places = tuple(folders) or _coco_folders(path.parent, above, root or above, (split, word))
        search = min(above, root or above, key=lambda folder: len(folder.parts))
        return AnnotatedSource(path, "coco", names, places, None if folders else search)
    found = _voc_folders(path)
    if found is None:
        return path
    return AnnotatedSource(path, "voc", names, tuple(folders) or found.images, None if folders else found.base)


def plain(path: Path, origin: str = "") -> Listed:
    """Return an image, with the place that names it, and its YOLO label file."""
    label = label_path(path)
    return Listed(origin, label, partial(read_labels, label))


def images(source: AnnotatedSource) -> tuple[Iterator[tuple[Path, Listed]], tuple[str, ...]]:
    """Return the images of a source, and notes on it as a whole.

    Raises:
        DataError: annotations that cannot be read, or with classes that the dataset does not name.
    """
    if source.kind == "coco":
        content = coco.read_coco(source.path)
        return _coco_images(source, content), content.notes
    return _voc_images(source), ()


def class_names(sources: Sequence[AnnotatedSource]) -> tuple[str, ...]:
    """Return the class names of annotations: COCO's categories by ascending id, else VOC's names, sorted.

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


def _coco_folders(folder: Path, above: Path, root: Path, words: Sequence[str]) -> tuple[Path, ...]:
    bases = [base for start in (folder, root, above) for base in (start, start / "images")]
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


def coco_ids(source: AnnotatedSource) -> tuple[dict[Path, Any], dict[int, Any]]:
    """Return the image id by path, and the category id by class number, of a COCO file."""
    content = coco.read_coco(source.path)
    images: dict[Path, Any] = {}
    for path, image in located(source, content.images):
        images.setdefault(path, image.id)
    return images, {number: key for key, number in coco.class_numbers(content, source.classes).items()}


def located(source: AnnotatedSource, images: Sequence[coco.CocoImage]) -> Iterator[tuple[Path, coco.CocoImage]]:
    """Return the path of each image; a missing one gets the first path that was tried."""
    names, folders = _names_and_folders(source, [image.file_name.replace("\\", "/") for image in images])
    for image, name in zip(images, names):
        found = next((i for i, folder in enumerate(folders) if os.path.isfile(folder / name)), 0)
        if found:
            folders.insert(0, folders.pop(found))  # most likely the next one is there too
        yield Path(os.path.abspath(folders[0] / name)), image


def _names_and_folders(source: AnnotatedSource, names: list[str]) -> tuple[list[str], list[Path]]:
    """Return the file names with or without their folders, and the folders to look in: the first pair that fits."""
    folders = [folder for folder in source.folders if os.path.isdir(folder)] or list(source.folders[:1])
    plain_names = [name.rpartition("/")[2] for name in names]
    clear = plain_names != names and len({*plain_names}) == len({*names})
    for tried in (names, plain_names if clear else []):
        if any(os.path.isfile(folder / name) for name in tried[:20] for folder in folders):
            return tried, folders
        if found := _searched(source, tried[:1]):
            return tried, [*found, *folders]
    return names, folders


def _searched(source: AnnotatedSource, names: Sequence[str]) -> list[Path]:
    """Return the folder that holds the first of the file names, searched for in all folders of the dataset."""
    found = find_folder(source.search, names[0]) if source.search is not None and names else None
    if found is None:
        return []
    LOGGER.info("%s: its images are in %s", source, found)
    return [found]


def find_folder(base: Path, name: str, most: int = 20_000) -> Path | None:
    """Return the folder, `base` or below it, in which there is a file `name` ('a.jpg', 'b/a.jpg').

    Hidden folders are left out, and those after the first `most` folders.
    """
    for count, (folder, folders, _) in enumerate(os.walk(base)):
        folders[:] = sorted(inner for inner in folders if not inner.startswith("."))
        if os.path.isfile(os.path.join(folder, name)):
            return Path(folder)
        if count >= most:
            break
    return None


# ---- VOC


class _VocFolders(NamedTuple):
    """Folder of the dataset, of its XML files, and of its images."""

    base: Path
    xml: Path
    images: tuple[Path, ...]


def _voc_folders(path: Path) -> _VocFolders | None:
    """Return the folders of a VOC folder or list, or None if the path is not VOC."""
    if path.suffix.lower() == ".txt":
        lists = next((folder for folder in path.parents if folder.name.lower() == "imagesets"), None)
        base = lists.parent if lists is not None and os.path.isfile(path) else None
    else:
        base = path
    xml = _subfolder(base, "annotations") if base is not None else None
    text = base == path and xml is not None and xml.name != "Annotations" and _subfolder(path, "labels")
    if base is not None and xml is not None and not text and _in_folder(xml, {".xml"}):
        return _VocFolders(base, xml, _image_subfolders(base) or (base / "JPEGImages",))
    if not os.path.isdir(path):
        return None
    labels = label_path(path / "x").parent
    files = _in_folder(path, {".xml"})
    if files and not any(os.path.isfile(labels / f"{file.stem}.txt") for file in files):
        return _VocFolders(path.parent, path, (path, *_image_subfolders(path.parent)))
    if labels == path or not _in_folder(labels, {".xml"}):
        return None
    texts = [file for file in _in_folder(labels, {".txt"}) if file.name != "classes.txt"]
    return None if texts else _VocFolders(path, labels, (path,))


def _subfolder(folder: Path, name: str) -> Path | None:
    """Return the subfolder called `name` in any case."""
    with contextlib.suppress(DataError):  # not readable; it may be a folder above the dataset
        for entry in folder_names(folder):
            if entry.lower() == name and os.path.isdir(folder / entry):
                return folder / entry
    return None


def _image_subfolders(folder: Path) -> tuple[Path, ...]:
    found = (_subfolder(folder, name) for name in ("jpegimages", "images"))
    return tuple(path for path in found if path is not None)


def _voc_images(source: AnnotatedSource) -> Iterator[tuple[Path, Listed]]:
    names = source.classes or class_names([source])
    listed = _xml_files(source)
    folders = list(source.folders)
    if not any(_in_folder(folder, IMAGE_SUFFIXES) for folder in folders):
        folders = _searched(source, [_image_name(xml) for xml in [*listed][:1]]) or folders
    candidates: dict[str, list[Path]] = {}
    for folder in folders:
        for path in _in_folder(folder, IMAGE_SUFFIXES):
            candidates.setdefault(path.stem, []).append(path)
    seen: set[Path] = set()
    for xml, origin in listed.items():
        image = _image_of(xml, candidates.get(xml.stem, ()), folders)
        seen.update((image, *candidates.pop(xml.stem, ())))
        yield image, Listed(origin, xml, partial(voc.read_voc, xml, names))
    if os.path.isfile(source.path):
        return  # a list names all of its images
    folder = _xml_folder(source)
    for image in sorted({paths[0] for paths in candidates.values()} - seen):  # backgrounds
        if folder != source.path or image.parent == source.path:
            xml = folder / f"{image.stem}.xml"
            yield image, Listed("", xml, partial(voc.read_voc, xml, names))


def _image_name(xml: Path) -> str:
    """Return the file name of the image that an annotation names."""
    return (voc.parse_voc(xml).file_name if os.path.exists(xml) else "") or f"{xml.stem}.jpg"


def _image_of(xml: Path, candidates: Sequence[Path], folders: Sequence[Path]) -> Path:
    """Return the image of an annotation: of several with its stem, or of none, the one that the XML names."""
    if len(candidates) == 1:
        return candidates[0]
    named = _image_name(xml)
    if candidates:
        return next((path for path in candidates if path.name == named), candidates[0])
    return next((folder / named for folder in folders if os.path.isfile(folder / named)), folders[0] / named)


def _xml_folder(source: AnnotatedSource) -> Path:
    found = _voc_folders(source.path)
    return found.xml if found is not None else source.path


def _xml_files(source: AnnotatedSource) -> dict[Path, str]:
    """Return the XML files of a source, each with the place that names it."""
    folder = _xml_folder(source)
    if os.path.isfile(source.path):
        lines = voc.identifiers(source.path)
        return {folder / f"{name}.xml": f"{source.path}:{line}" for name, line in lines.items()}
    return {path: str(path) for path in _in_folder(folder, {".xml"})}


def _in_folder(folder: Path, suffixes: set[str] | frozenset[str]) -> list[Path]:
    """Return the files of a folder, not of those below it, sorted; none where it does not exist.

    Raises:
        DataError: a folder that cannot be read.
    """
    names = folder_names(folder)
    return [folder / name for name in names if name[:1] != "." and os.path.splitext(name)[1].lower() in suffixes]
