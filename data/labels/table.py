"""Sizes and labels of images in columns: a dataset of any size is a few arrays, which worker processes share.

A Python object per image would be copied by every worker sooner or later, since reading an object writes its reference
count, and with it the page of memory that the processes share until then.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from data.formats.yolo import ImageRecord, LabelFile

STATUSES = ("labeled", "missing", "empty", "corrupt")

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Entry:
    """Size, labels and status of one image.

    Attributes:
        stamp: size and modification time (ns) of the image, then of its label file; -1 = missing, -2 =
            cannot be read.
        height, width: pixels, upright; 0 if image or labels could not be read.
        status: one of STATUSES.
        found: the labels, and notes on them.
    """

    stamp: tuple[int, int, int, int]
    height: int
    width: int
    status: str
    found: LabelFile


@dataclass(frozen=True, eq=False)
class ImageTable:
    """Entries of n images in columns.

    Attributes:
        stamps: (n, 4) int64, see `Entry.stamp`.
        numbers: (n, 8) int64: height, width, index of the status in STATUSES, then the number of labels, polygons,
            duplicates, groups (crowd) and difficult objects.
        labels: (N, 5) float32, those of all images one after another.
        lengths: (S,) int64 points of each polygon.
        points: (P, 2) float32, those of all polygons one after another.
        notes: messages by image number.
    """

    stamps: NDArray[np.int64]
    numbers: NDArray[np.int64]
    labels: NDArray[np.float32]
    lengths: NDArray[np.int64]
    points: NDArray[np.float32]
    notes: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.stamps)

    @property
    def usable(self) -> NDArray[np.bool_]:
        """(n,) whether an image takes part."""
        return self.numbers[:, 2] != STATUSES.index("corrupt")

    def take(self, rows: Rows) -> ImageTable:
        """Return the table of some images (m,), in that order."""
        if np.array_equal(rows, np.arange(len(self))):
            return self
        points = _sums(self.lengths, self.numbers[:, 4])
        notes = {i: self.notes[row] for i, row in enumerate(rows.tolist()) if row in self.notes} if self.notes else {}
        return ImageTable(
            self.stamps[rows],
            self.numbers[rows],
            _gather(self.labels, self.numbers[:, 3], rows),
            _gather(self.lengths, self.numbers[:, 4], rows),
            _gather(self.points, points, rows),
            notes,
        )


def pack(entries: Sequence[Entry]) -> ImageTable:
    """Return entries as a table."""
    segments = [segment for entry in entries for segment in entry.found.segments]
    return ImageTable(
        np.array([entry.stamp for entry in entries], np.int64).reshape(-1, 4),
        np.array([_numbers(entry) for entry in entries], np.int64).reshape(-1, 8),
        np.concatenate([np.zeros((0, 5), np.float32), *(entry.found.labels for entry in entries)]),
        np.array([len(segment) for segment in segments], np.int64),
        np.concatenate([np.zeros((0, 2), np.float32), *segments]),
        {i: entry.found.notes for i, entry in enumerate(entries) if entry.found.notes},
    )


def join(tables: Sequence[ImageTable]) -> ImageTable:
    """Return one table of the images of several, at least one."""
    notes: dict[int, tuple[str, ...]] = {}
    start = 0
    for table in tables:
        notes |= {start + i: found for i, found in table.notes.items()}
        start += len(table)
    return ImageTable(
        np.concatenate([table.stamps for table in tables]),
        np.concatenate([table.numbers for table in tables]),
        np.concatenate([table.labels for table in tables]),
        np.concatenate([table.lengths for table in tables]),
        np.concatenate([table.points for table in tables]),
        notes,
    )


class ImageRecords(Sequence[ImageRecord]):
    """The images of a split: a sequence of ImageRecord, each created on access.

    Args:
        paths: the images, n.
        table: their entries.
        single_cls: turn every class into 0.
    """

    def __init__(self, paths: Iterable[Path], table: ImageTable, single_cls: bool = False) -> None:
        names = [os.fsencode(path) for path in paths]
        self._names = b"".join(names)
        self._name_ends = _ends(np.array([len(name) for name in names], np.int64))
        self.sizes = np.ascontiguousarray(table.numbers[:, :2])
        self.labels = table.labels
        if single_cls:
            self.labels = np.concatenate((np.zeros_like(self.labels[:, :1]), self.labels[:, 1:]), 1)
        self._label_ends, self._polygon_ends = _ends(table.numbers[:, 3]), _ends(table.numbers[:, 4])
        self._points, self._point_ends = table.points, _ends(table.lengths)

    @classmethod
    def of(cls, records: Sequence[ImageRecord]) -> ImageRecords:
        """Return records in columns."""
        if isinstance(records, ImageRecords):
            return records
        nothing = (0, 0, 0, 0)
        files = [LabelFile(record.labels, record.segments) for record in records]
        entries = [Entry(nothing, r.height, r.width, "labeled", file) for r, file in zip(records, files)]
        return cls([record.path for record in records], pack(entries))

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageRecord]: ...
    def __getitem__(self, index: int | slice) -> ImageRecord | list[ImageRecord]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        height, width = self.sizes[index].tolist()  # IndexError where there is none
        index %= len(self)
        return ImageRecord(Path(self.name_of(index)), height, width, self.labels_of(index), self.segments_of(index))

    def __iter__(self) -> Iterator[ImageRecord]:
        return (self[i] for i in range(len(self)))

    def name_of(self, index: int) -> str:
        """Return the path of an image as text, which takes a tenth of the time of a Path."""
        return os.fsdecode(_part(self._names, self._name_ends, index))

    def segments_of(self, index: int) -> tuple[NDArray[np.float32], ...]:
        """Return the polygons (k, 2) of an image, as many as labels or none."""
        first, last = _span(self._polygon_ends, index)
        return tuple(_part(self._points, self._point_ends, i) for i in range(first, last))

    def labels_of(self, index: int) -> NDArray[np.float32]:
        """Return the labels (k, 5) of an image."""
        return _part(self.labels, self._label_ends, index)


def _numbers(entry: Entry) -> tuple[int, ...]:
    found = entry.found
    counts = (len(found.labels), len(found.segments), found.duplicates, found.crowd, found.difficult)
    return (entry.height, entry.width, STATUSES.index(entry.status), *counts)


def _ends(counts: NDArray[np.int64]) -> Rows:
    """Return (n + 1,) ends of parts of the given lengths (n,), with 0 in front."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(counts)))


def _span(ends: Rows, index: int) -> tuple[int, int]:
    return int(ends[index]), int(ends[index + 1])


def _part(values: Any, ends: Rows, index: int) -> Any:  # noqa: ANN401
    first, last = _span(ends, index)
    return values[first:last]


def _sums(values: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return (n,) sums of parts of `values` with the given lengths (n,)."""
    return np.diff(_ends(values)[_ends(counts)])


def _gather(values: NDArray[Any], counts: NDArray[np.int64], rows: Rows) -> NDArray[Any]:
    """Concatenate the parts `rows` of `values`, which has parts of lengths `counts`."""
    wanted = counts[rows]
    starts = _ends(counts)[rows] - _ends(wanted)[:-1]
    return values[np.repeat(starts, wanted) + np.arange(wanted.sum())]
