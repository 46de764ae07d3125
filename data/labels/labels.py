"""Labels: the images of a split, their objects, and their errors.

Labels come as YOLO text (`data.formats.yolo`), COCO JSON (`data.formats.coco`) or Pascal VOC XML (`data.formats.voc`);
`data.formats.detect_format` determines which. All pass the same checks.

As in YOLOv5, an image that cannot be used, or that has a wrong row, is left out and reported; repeated rows are used
once; an image without labels is background. A class that the dataset has no name for is an error for the whole dataset.
COCO's groups (`iscrowd`) and VOC's difficult objects are left out and counted.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.formats.detect_format import AnnotatedSource, Listed, Source, find_folder, images, plain, recognize
from data.formats.yolo import ImageRecord, LabelFile, label_path, read_labels
from data.images import CACHE_SUFFIX, IMAGE_SUFFIXES
from data.labels import cache as label_cache
from data.labels.scan import scan
from data.labels.table import STATUSES, ImageRecords, ImageTable
from data.lists import read_list
from utils.errors import DataError
from utils.files import check_regular, read_text

__all__ = [
    "Annotations",
    "ImageRecord",
    "LabelFile",
    "LabelReport",
    "label_path",
    "list_images",
    "load_annotations",
    "read_labels",
]

LOGGER = logging.getLogger(__name__)

_SHOWN = 20  # messages in a summary; all of them are in LabelReport.messages


@dataclass(frozen=True)
class LabelReport:
    """Result of the verification of a split.

    Attributes:
        images: images listed.
        labeled: usable images with at least one object.
        missing: usable images without a label file.
        empty: usable images with a label file without rows.
        corrupt: images left out, because they or their labels cannot be used.
        duplicate_images: images listed more than once (used once).
        duplicate_rows: label rows left out as repetitions.
        boxes: objects in the usable images.
        messages: one line per problem, with file and, for labels, place.
        crowd: COCO groups in the usable images, left out.
        difficult: VOC objects marked as difficult in the usable images, left out.
    """

    images: int
    labeled: int
    missing: int
    empty: int
    corrupt: int
    duplicate_images: int
    duplicate_rows: int
    boxes: int
    messages: tuple[str, ...] = ()
    crowd: int = 0
    difficult: int = 0

    def summary(self) -> str:
        """Return the counts in one line, then the first problems, one line each."""
        background = self.missing + self.empty
        lines = [
            f"{self.images} images: {self.labeled} with labels ({self.boxes} boxes), {background} backgrounds"
            f" ({self.missing} label files missing, {self.empty} empty), {self.corrupt} corrupt and left out"
        ]
        if self.duplicate_rows or self.duplicate_images:
            lines[0] += f", {self.duplicate_rows} duplicate rows and {self.duplicate_images} duplicate images removed"
        if self.crowd:
            lines[0] += f", {self.crowd} groups (iscrowd) left out"
        if self.difficult:
            lines[0] += f", {self.difficult} difficult objects left out"
        lines += self.messages[:_SHOWN]
        if len(self.messages) > _SHOWN:
            lines.append(f"... and {len(self.messages) - _SHOWN} more")
        return "\n".join(lines)


@dataclass(frozen=True)
class Annotations:
    """The usable images of a split, sorted by path, and the report."""

    records: Sequence[ImageRecord]
    report: LabelReport


def load_annotations(
    sources: Sequence[str | Source],
    num_classes: int,
    *,
    single_cls: bool = False,
    cache_folder: str | Path | None = None,
    progress: bool = True,
    require_labels: bool = True,
) -> Annotations:
    """List, verify and load the labels of one split.

    Args:
        sources: folders (searched with all below them), .txt lists of images, images, or annotations: as
            `DataConfig.split` gives them, or paths (COCO and VOC classes are then numbered as the files have them).
        num_classes: class numbers run from 0 to `num_classes - 1`.
        single_cls: turn every class into 0.
        cache_folder: folder of the cache file; None = as in YOLOv5: beside the labels folder or the list.
        progress: show a bar on standard error.
        require_labels: refuse a split without a single object.

    Raises:
        DataError: a source is missing, no image found, none usable, no labels at all, or an unknown class.
    """
    known = [source if isinstance(source, AnnotatedSource) else recognize(Path(source)) for source in sources]
    listed, repeated, notes = _list(known)
    if not listed:
        kinds = ", ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
        lists = any("imagesets" in str(source).lower() for source in known)
        hint = "; a VOC list needs a folder 'Annotations' with XML files beside 'ImageSets'" if lists else ""
        raise DataError(f"{', '.join(map(str, sources))}: no images found; allowed are files that end in {kinds}{hint}")
    paths = sorted(listed, key=str)  # the order of the strings, as in YOLOv5
    cache = _cache_path(known, paths[0], cache_folder)
    table = scan(paths, listed, cache, progress)
    report = _report(table, repeated, notes)
    where = ", ".join(map(str, sources))
    if report.corrupt == report.images:
        raise DataError(f"{where}: none of {report.images} images can be used: {table.notes[0][-1]}")
    if require_labels and report.boxes == 0:
        annotated = [str(source) for source in known if isinstance(source, AnnotatedSource)]
        first = f"; first problem: {report.messages[0]}" if report.messages else ""
        if annotated:
            raise DataError(f"{where}: no labels for {report.images} images in {', '.join(annotated)}{first}")
        missing = np.flatnonzero(table.numbers[:, 2] == STATUSES.index("missing"))
        unlabeled = [paths[i] for i in missing.tolist()]
        if not unlabeled:
            raise DataError(f"{where}: no labels in {report.images} images: their label files are empty{first}")
        looked = sorted({str(label_path(path).parent) for path in paths})
        more = f" and {len(looked) - 3} more folders" if len(looked) > 3 else ""
        raise DataError(
            f"{where}: no labels in {report.images} images; looked for .txt files in {', '.join(looked[:3])}{more}"
            f"{_other_labels(unlabeled[0])}{first}"
        )
    usable = np.flatnonzero(table.usable)
    records = ImageRecords((paths[i] for i in usable.tolist()), table.take(usable), single_cls)
    _check_classes(records, num_classes, listed)
    return Annotations(records, report)


def _other_labels(image: Path) -> str:
    """Return the ending of a message that names labels of an image found elsewhere, and the line to write."""
    expected = label_path(image)
    base = Path(os.path.commonpath([image.parent, expected.parent]))
    base = base.parent if base == image.parent else base
    found = find_folder(base, expected.name, most=2000)
    if found == image.parent:
        return f"; they are beside the images: move them there, or rename the folder 'images' of {image.parent}"
    head, labels, tail = f"{found}{os.sep}".rpartition(f"{os.sep}labels{os.sep}")
    of_others = labels and os.path.isdir(f"{head}{os.sep}images{os.sep}{tail}")
    if found is not None and not of_others:
        return f"; {found / expected.name} is there: rename {found} to {expected.parent}, or move its files there"
    xml = find_folder(base, f"{image.stem}.xml", most=2000)
    if xml is not None:
        return f"; {xml / image.stem}.xml is there: write 'train: {xml}' in the dataset YAML"
    files = (file for folder in (image.parent, base, base / "annotations") for file in sorted(folder.glob("*.json")))
    coco = next((file for file in files if '"annotations"' in read_text(file, limit=2**33)), None)
    return f"; a COCO file is there: write 'train: {coco}' in the dataset YAML" if coco is not None else ""


def list_images(sources: Iterable[str | Source]) -> tuple[dict[Path, str], int]:
    """Return the images of all sources.

    Folders are searched with all below them, hidden files and folders left out. In a list, entries are relative to the
    list's folder, or else to the current folder.

    Returns:
        ({path: where it is listed, '' for a folder}, number of repetitions left out).

    Raises:
        DataError: a source is missing, not readable, or neither a folder, a list, annotations nor an image.
    """
    found, repeated, _ = _list([s if isinstance(s, AnnotatedSource) else recognize(Path(s)) for s in sources])
    return {path: listed.origin for path, listed in found.items()}, repeated


def _list(sources: Iterable[Source]) -> tuple[dict[Path, Listed], int, tuple[str, ...]]:
    """Return images with their labels, the number of repetitions, and notes on whole sources."""
    found: dict[Path, Listed] = {}
    repeated = 0
    notes: list[str] = []
    for source in sources:
        if isinstance(source, AnnotatedSource):
            new, more = images(source)
            notes += more
        else:
            new = _plain_images(source, notes)  # adds to `notes` once it is read
        for path, listed in new:
            repeated += path in found
            found.setdefault(path, listed)
    return found, repeated, (*notes, *_shared_labels(found))


def _shared_labels(found: Mapping[Path, Listed]) -> Iterator[str]:
    """Yield a message for each YOLO label file that several images share, such as a photo and its mask."""
    owners: dict[str, list[Path]] = {}  # by text, which compares several times faster than a Path
    for path, listed in found.items():
        label = str(listed.label)
        if label.endswith(".txt"):
            owners.setdefault(label, []).append(path)
    for label, paths in owners.items():
        if len(paths) > 1 and os.path.exists(label):
            yield f"{label}: its labels are used for {len(paths)} images: {', '.join(map(str, sorted(paths)))}"


_SIDECARS = frozenset(
    ("", ".txt", ".xml", ".json", ".csv", ".yaml", ".yml", ".md", ".html", ".names", ".data", ".cache", ".npz", ".npy",
     ".db", ".ini", ".py", ".sh", ".pkl", ".mat", CACHE_SUFFIX)
)  # fmt: skip
"""Suffixes of files beside images that are not images."""


def _plain_images(source: Path, notes: list[str]) -> Iterator[tuple[Path, Listed]]:
    """Yield the images of a folder or list, or the image itself; a message about other files is added to `notes`."""
    files: Iterable[tuple[Path, str]]
    if os.path.isdir(source):
        files = ((path, "") for path in _walk(source))
    elif not os.path.exists(source):
        raise DataError(f"{source}: no such folder, list of images or annotation file")
    elif check_regular(source) and source.suffix.lower() in IMAGE_SUFFIXES:
        files = [(source, "")]
    elif source.suffix.lower() == ".txt":
        files = ((Path(os.path.abspath(path)), f"{source}:{number}") for number, path in read_list(source))
    else:
        raise DataError(f"{source}: is neither a folder, a .txt list of images, a COCO .json file nor an image")
    others = []
    for path, origin in files:
        suffix = path.suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            yield path, plain(path, origin)
        elif origin or suffix not in _SIDECARS:
            others.append(path)
    if others:
        counts = Counter(path.suffix.lower() for path in others)
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(5))
        notes.append(f"{source}: {len(others)} files left out whose format is not read ({kinds}), first {others[0]}")


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and of all below it, hidden ones left out; links are followed, except in a circle."""
    for base, folders, files in os.walk(folder, followlinks=True, onerror=refuse_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".") and not _is_loop(os.path.join(base, name))]
        yield from (Path(base, name) for name in files if not name.startswith("."))


def refuse_unreadable(error: OSError) -> None:
    """Raise DataError for a folder that `os.walk` cannot read; it is not an empty one."""
    raise DataError(f"{error.filename}: cannot be read: {error.strerror or error}") from error


def _is_loop(folder: str) -> bool:
    """Return whether a folder is a link to one that contains it."""
    above = os.path.realpath(os.path.dirname(folder))
    return os.path.islink(folder) and Path(above).is_relative_to(os.path.realpath(folder))


def _cache_path(sources: Sequence[Source], first_image: Path, folder: str | Path | None) -> Path:
    first = sources[0]
    if isinstance(first, AnnotatedSource):
        base = first.path
    else:
        base = first if len(sources) == 1 and first.suffix == ".txt" else label_path(first_image).parent
    name = base.stem if os.path.isfile(base) else base.name
    annotated = any(isinstance(source, AnnotatedSource) for source in sources)
    if len(sources) > 1 or annotated:  # so that datasets which share their first folder do not share a cache
        keys = (source.key if isinstance(source, AnnotatedSource) else str(source) for source in sources)
        name += f"-{label_cache.short_hash(keys)}"
    return Path(folder if folder is not None else base.parent) / f"{name}.cache.npz"


def _report(table: ImageTable, repeated: int, notes: tuple[str, ...]) -> LabelReport:
    counts = dict(zip(STATUSES, np.bincount(table.numbers[:, 2], minlength=len(STATUSES)).tolist()))
    boxes, _, duplicates, crowd, difficult = table.numbers[table.usable, 3:].sum(0).tolist()
    return LabelReport(
        images=len(table),
        duplicate_images=repeated,
        duplicate_rows=duplicates,
        boxes=boxes,
        messages=(*notes, *(message for _, found in sorted(table.notes.items()) for message in found)),
        crowd=crowd,
        difficult=difficult,
        **counts,
    )


def _check_classes(records: ImageRecords, num_classes: int, listed: Mapping[Path, Listed]) -> None:
    if records.labels[:, 0].max(initial=0) < num_classes:
        return
    record = next(record for record in records if record.labels[:, 0].max(initial=0) >= num_classes)
    number = int(record.labels[record.labels[:, 0] >= num_classes][0, 0])
    file = listed[record.path].label
    line = f":{_line_of_class(file, number)}" if file.suffix == ".txt" else ""
    used = np.unique(records.labels[:, 0]).astype(int)
    from_one = used[0] > 0 and used[-1] == num_classes
    hint = "; no label has class 0: if they count from 1, begin the list with a name that no object has: [unused, ...]"
    raise DataError(
        f"{file}{line}: class {number}, but the dataset has {num_classes} classes; allowed are 0-{num_classes - 1}"
        f"{hint if from_one else ''}"
    )


def _line_of_class(path: Path, number: int) -> int:
    for i, line in enumerate(read_text(path).splitlines(), 1):
        first = line.split()[:1]
        if first and math.isclose(float(first[0]), number):
            return i
    return 1
