"""Labels: which pictures a split holds, what is in them, and what is wrong with them.

A label file lies where YOLOv5 looks for it (`.../images/a/b.jpg` -> `.../labels/a/b.txt`, the last `images` counts; a
picture outside an `images` folder has its label beside it) and holds a row per object: `class x y w h`, or
`class x1 y1 x2 y2 x3 y3 ...` for a polygon, all as parts of the picture's sides.

What happens to mistakes, as in YOLOv5: a picture that cannot be used, or whose label file holds a wrong row, is left
out and reported; repeated rows count once; a picture without a label file, or with an empty one, is background. A class
number that the data set has no name for is an error for the whole set.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data import label_cache
from data.images import IMAGE_SUFFIXES, probe
from utils.errors import DataError

LOGGER = logging.getLogger(__name__)

MIN_SIDE = 10
"""Pictures with a shorter side (pixels) are left out."""

_CHUNK = 512  # pictures whose size and time one thread looks up at a time
_SHOWN = 20  # messages in a summary; all of them are in LabelReport.messages


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """One usable picture and its objects.

    Attributes:
        path: the picture.
        height, width: its size in pixels, upright.
        labels: (n, 5) float32: class, centre x, centre y, width, height; 0..1 of the sides.
        segments: n polygons, (k, 2) float32 x, y of the sides; empty if the label file has boxes only.
    """

    path: Path
    height: int
    width: int
    labels: NDArray[np.float32]
    segments: tuple[NDArray[np.float32], ...] = ()


@dataclass(frozen=True)
class LabelReport:
    """What the verification of a split found.

    Attributes:
        images: pictures listed.
        labelled: usable pictures with at least one object.
        missing: usable pictures without a label file.
        empty: usable pictures with a label file without rows.
        corrupt: pictures left out, because they or their labels cannot be used.
        duplicate_images: pictures listed more than once (used once).
        duplicate_rows: label rows left out as repetitions.
        boxes: objects in the usable pictures.
        messages: one line per problem, with file and, for labels, line.
    """

    images: int
    labelled: int
    missing: int
    empty: int
    corrupt: int
    duplicate_images: int
    duplicate_rows: int
    boxes: int
    messages: tuple[str, ...] = ()

    def summary(self) -> str:
        """The counts in one line, then the first problems, one line each."""
        background = self.missing + self.empty
        lines = [
            f"{self.images} images: {self.labelled} with labels ({self.boxes} boxes), {background} backgrounds"
            f" ({self.missing} label files missing, {self.empty} empty), {self.corrupt} corrupt and left out"
        ]
        if self.duplicate_rows or self.duplicate_images:
            lines[0] += f", {self.duplicate_rows} duplicate rows and {self.duplicate_images} duplicate images removed"
        lines += self.messages[:_SHOWN]
        if len(self.messages) > _SHOWN:
            lines.append(f"... and {len(self.messages) - _SHOWN} more")
        return "\n".join(lines)


@dataclass(frozen=True)
class Annotations:
    """The usable pictures of a split, sorted by path, and the report."""

    records: tuple[ImageRecord, ...]
    report: LabelReport


def load_annotations(
    sources: Sequence[str | Path],
    num_classes: int,
    *,
    single_cls: bool = False,
    cache_folder: str | Path | None = None,
    progress: bool = True,
    require_labels: bool = True,
) -> Annotations:
    """List, verify and load the labels of one split.

    Args:
        sources: folders (searched with all below them), .txt lists of pictures, or pictures.
        num_classes: class numbers run from 0 to `num_classes - 1`.
        single_cls: turn every class into 0.
        cache_folder: where the cache file goes; None = where YOLOv5 has it, beside the labels folder or the list.
        progress: show a bar on standard error.
        require_labels: refuse a split without a single object.

    Raises:
        DataError: a source is missing, no picture found, none usable, no labels at all, or a class number too high.
    """
    listed, repeated = list_images(sources)
    if not listed:
        kinds = ", ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
        raise DataError(f"{', '.join(map(str, sources))}: no pictures found; allowed are files that end in {kinds}")
    paths = sorted(listed, key=str)  # the order of the texts, as in YOLOv5
    cache = _cache_path([Path(source) for source in sources], paths[0], cache_folder)
    entries = _verified(paths, listed, cache, progress)
    report = _report(entries, repeated)
    where = ", ".join(map(str, sources))
    if report.corrupt == report.images:
        raise DataError(f"{where}: none of {report.images} pictures can be used: {report.messages[0]}")
    if require_labels and report.boxes == 0:
        looked = sorted({str(label_path(path).parent) for path in paths})
        more = f" and {len(looked) - 3} more folders" if len(looked) > 3 else ""
        raise DataError(
            f"{where}: no labels in {report.images} pictures; looked for .txt files in {', '.join(looked[:3])}{more}"
        )
    records = tuple(_record(path, entry, single_cls) for path, entry in zip(paths, entries) if entry.usable)
    _check_classes(records, num_classes)
    return Annotations(records, report)


def label_path(image: str | Path) -> Path:
    """Where the labels of a picture are: the last folder `images` becomes `labels`, the suffix `.txt`."""
    head, found, tail = str(image).rpartition(f"{os.sep}images{os.sep}")
    return Path(f"{head}{os.sep}labels{os.sep}{tail}" if found else image).with_suffix(".txt")


def list_images(sources: Iterable[str | Path]) -> tuple[dict[Path, str], int]:
    """Pictures of all sources.

    Folders are searched with all below them, hidden files and folders left out. In a list, an entry that begins with
    `./` is relative to the list's folder, any other to the current folder or else to the list's.

    Returns:
        ({path: where it is listed, '' for a folder}, number of repetitions left out).

    Raises:
        DataError: a source is missing, not readable, or neither a folder, a list nor a picture.
    """
    found: dict[Path, str] = {}
    repeated = 0
    for source in map(Path, sources):
        if source.is_dir():
            new: Iterable[tuple[Path, str]] = ((path, "") for path in _walk(source))
        elif source.is_file() and source.suffix.lower() in IMAGE_SUFFIXES:
            new = [(source, "")]
        elif source.is_file() and source.suffix.lower() == ".txt":
            new = _read_list(source)
        elif source.exists():
            raise DataError(f"{source}: is neither a folder, a .txt list of pictures nor a picture")
        else:
            raise DataError(f"{source}: no such folder or list of pictures")
        for path, origin in new:
            repeated += path in found
            found.setdefault(path, origin)
    return found, repeated


def _walk(folder: Path) -> Iterator[Path]:
    for base, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                yield Path(base, name)


def _read_list(source: Path) -> Iterator[tuple[Path, str]]:
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source}: cannot be read as a list of pictures: {error}") from error
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or os.path.splitext(text)[1].lower() not in IMAGE_SUFFIXES:
            continue
        path = Path(text)
        if text.startswith("./") or not (path.is_absolute() or path.exists()):
            path = source.parent / path
        yield Path(os.path.abspath(path)), f"{source}:{number}"


def _cache_path(sources: Sequence[Path], first_image: Path, folder: str | Path | None) -> Path:
    labels = label_path(first_image).parent
    base = sources[0] if len(sources) == 1 and sources[0].suffix == ".txt" else labels
    name = base.stem if base.suffix == ".txt" else base.name
    if len(sources) > 1:  # so that sets which share their first folder do not share a cache
        name += f"-{label_cache.short_hash(map(str, sources))}"
    return Path(folder if folder is not None else base.parent) / f"{name}.cache.npz"


def _verified(
    paths: Sequence[Path], listed: Mapping[Path, str], cache: Path, progress: bool
) -> list[label_cache.Entry]:
    """One entry per path: from the cache where size and time of picture and label are unchanged, else verified anew."""
    known = label_cache.read(cache)
    name = cache.name.split(".")[0]
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        parts = [paths[i : i + _CHUNK] for i in range(0, len(paths), _CHUNK)]
        stamps = [stamp for part in pool.map(_stamps, parts) for stamp in part]
        entries = [known.get(str(path)) for path in paths]
        todo = [i for i, entry in enumerate(entries) if entry is None or entry.stamp != stamps[i]]
        fresh = pool.map(lambda i: verify(paths[i], stamps[i], listed[paths[i]]), todo)
        bar = tqdm(fresh, total=len(todo), desc=f"verifying {name}", disable=not progress or not todo)
        for i, entry in zip(todo, bar):
            entries[i] = entry
    finally:
        pool.shutdown(cancel_futures=True)  # so that an interruption does not wait for the rest
    checked = [entry for entry in entries if entry is not None]
    if todo or len(known) != len(paths):
        label_cache.write(cache, [str(path) for path in paths], checked)
    return checked


def _stamps(paths: Sequence[Path]) -> list[tuple[int, int, int, int]]:
    return [label_cache.stamp(path, label_path(path)) for path in paths]


def verify(image: Path, stamp: tuple[int, int, int, int], listed: str = "") -> label_cache.Entry:
    """Check one picture and its label file.

    Args:
        image: the picture.
        stamp: what `label_cache.stamp` gives for it.
        listed: 'list:line' that names the picture, for messages.

    Returns:
        The entry; problems are messages in it, never exceptions.
    """
    found = LabelFile(np.zeros((0, 5), np.float32), (), 0, ())
    status = "missing"
    height = width = 0
    try:
        if stamp[0] < 0:
            raise DataError(f"{image}: no such file{f' (listed in {listed})' if listed else ''}")
        height, width = probe(image)
        if min(height, width) < MIN_SIDE:
            raise DataError(f"{image}: {width}x{height} pixels; both sides need at least {MIN_SIDE}")
        if stamp[2] >= 0:
            found = read_labels(label_path(image))
            status = "labelled" if len(found.labels) else "empty"
    except DataError as error:
        status = "corrupt"
        found = LabelFile(found.labels, (), 0, (f"{error} (left out)",))
    return label_cache.Entry(stamp, height, width, found.labels, found.segments, status, found.duplicates, found.notes)


@dataclass(frozen=True, eq=False)
class LabelFile:
    """One label file, checked.

    Attributes:
        labels: (n, 5) float32 class, centre x, centre y, width, height, as parts of the sides.
        segments: n polygons (k, 2) float32, or none.
        duplicates: rows removed.
        notes: what is odd but kept or mended, by file and line.
    """

    labels: NDArray[np.float32]
    segments: tuple[NDArray[np.float32], ...]
    duplicates: int
    notes: tuple[str, ...]


def read_labels(path: str | Path) -> LabelFile:
    """Read and check one label file.

    Rows with more than six numbers are polygons and become boxes; repeated rows are removed, and the rest is then
    sorted (as YOLOv5 does). Where one row is a polygon, every box of the file gets its four corners as one.

    Raises:
        DataError: the first wrong row, by file and line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error
    rows = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]
    polygons = any(len(row) > 6 for _, row in rows)
    labels = np.zeros((len(rows), 5), np.float32)
    segments: list[NDArray[np.float32]] = []
    for i, (number, row) in enumerate(rows):
        try:
            values = np.array([float(text) for text in row], np.float32)
        except ValueError as error:
            raise DataError(f"{path}:{number}: {str(error).split(': ')[-1]} is not a number") from error
        if len(row) > 6:
            if len(row) % 2 == 0:
                raise DataError(f"{path}:{number}: {len(row)} columns; a polygon has a class and pairs of x and y")
            segments.append(values[1:].reshape(-1, 2))
            labels[i] = (values[0], *_enclosing_box(segments[-1]))
        elif len(row) == 5:
            labels[i] = values
            if polygons:
                segments.append(_corners(values[1:]))
        else:
            raise DataError(f"{path}:{number}: {len(row)} columns; 5 (class x y w h) or a polygon are needed")
    numbers = [number for number, _ in rows]
    _check_rows(labels, numbers, path)
    flat = np.flatnonzero((labels[:, 3:] <= 0).any(1))
    notes = (
        [f"{path}:{numbers[flat[0]]}: {len(flat)} boxes without area, the first one here; kept"] if len(flat) else []
    )
    if len(labels) < 2:
        return LabelFile(labels, tuple(segments), 0, tuple(notes))
    _, first = np.unique(labels, axis=0, return_index=True)
    removed = len(labels) - len(first)
    if removed:
        line = numbers[min(set(range(len(labels))) - set(first.tolist()))]
        notes.append(f"{path}:{line}: {removed} duplicate rows, the first one here; removed")
        labels = labels[first]
        segments = [segments[i] for i in first] if polygons else []
    return LabelFile(labels, tuple(segments), removed, tuple(notes))


def _enclosing_box(points: NDArray[np.float32]) -> tuple[np.float32, ...]:
    low, high = points.min(0), points.max(0)
    return (*((low + high) / 2), *(high - low))


def _corners(xywh: NDArray[np.float32]) -> NDArray[np.float32]:
    """The four corners of a box, clockwise from the upper left."""
    return xywh[:2] + xywh[2:] * np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]], np.float32)


def _check_rows(labels: NDArray[np.float32], lines: Sequence[int], path: str | Path) -> None:
    """Raise for the first row with a value that is not allowed."""
    classes, boxes = labels[:, 0], labels[:, 1:]
    with np.errstate(invalid="ignore"):
        checks = (
            (~np.isfinite(labels).all(1), "is not finite"),
            ((classes < 0) | (classes != np.floor(classes)), "has a class that is not a whole number from 0"),
            ((boxes < 0).any(1), "has a negative value"),
            ((boxes > 1).any(1), "has a value above 1; centre and size are parts of the picture's sides"),
        )
    for wrong, problem in checks:
        if wrong.any():
            i = int(np.argmax(wrong))
            row = " ".join(f"{value:g}" for value in labels[i])
            raise DataError(f"{path}:{lines[i]}: row '{row}' {problem}")


def _report(entries: Sequence[label_cache.Entry], repeated: int) -> LabelReport:
    counts = {name: sum(entry.status == name for entry in entries) for name in label_cache.STATUSES}
    usable = [entry for entry in entries if entry.usable]
    return LabelReport(
        images=len(entries),
        duplicate_images=repeated,
        duplicate_rows=sum(entry.duplicates for entry in usable),
        boxes=sum(len(entry.labels) for entry in usable),
        messages=tuple(message for entry in entries for message in entry.messages),
        **counts,
    )


def _record(path: Path, entry: label_cache.Entry, single_cls: bool) -> ImageRecord:
    labels = entry.labels
    if single_cls:
        labels = labels.copy()
        labels[:, 0] = 0
    return ImageRecord(path, entry.height, entry.width, labels, entry.segments)


def _check_classes(records: Sequence[ImageRecord], num_classes: int) -> None:
    if np.concatenate([record.labels[:, 0] for record in records]).max(initial=0) < num_classes:
        return
    record = next(record for record in records if record.labels[:, 0].max(initial=0) >= num_classes)
    number = int(record.labels[record.labels[:, 0] >= num_classes][0, 0])
    file = label_path(record.path)
    raise DataError(
        f"{file}:{_line_of_class(file, number)}: class {number}, but the data set has {num_classes} classes;"
        f" allowed are 0-{num_classes - 1}"
    )


def _line_of_class(path: Path, number: int) -> int:
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        first = line.split()[:1]
        if first and math.isclose(float(first[0]), number):
            return i
    return 1
