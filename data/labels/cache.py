"""The label cache: verified images and labels of a split in one .npz file, without pickle.

An entry counts as long as size and modification time of its image and label file are unchanged; entries are kept one
by one, so a changed file costs the verification of that file only. A SHA-256 digest follows the archive. A cache
that is damaged, of another version or not writable is no error: it is written again, or not used.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.formats.yolo import LabelFile
from utils.errors import UserError
from utils.files import atomic_path, is_writable

LOGGER = logging.getLogger(__name__)

VERSION = 4
"""Raise it whenever the verification or this layout changes: older caches are then written again."""

STATUSES = ("labelled", "missing", "empty", "corrupt")


@dataclass(frozen=True, eq=False)
class Entry:
    """What is known about one image.

    Attributes:
        stamp: size and modification time (ns) of the image, then of its label file; -1 = missing, -2 =
            cannot be read.
        height, width: pixels, upright; 0 if unknown.
        status: one of STATUSES.
        found: the labels, and what is odd about them.
    """

    stamp: tuple[int, int, int, int]
    height: int
    width: int
    status: str
    found: LabelFile

    @property
    def usable(self) -> bool:
        """Whether the image takes part."""
        return self.status != "corrupt"


def stamp(image: Path, label: Path) -> tuple[int, int, int, int]:
    """Size and modification time in ns of the image and of its label file; see `Entry.stamp`."""
    return (*_stat(image), *_stat(label))


def short_hash(texts: Iterable[str]) -> str:
    """Eight hex digits that differ for different texts."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()[:8]


def write(path: Path, images: Sequence[str], entries: Sequence[Entry]) -> None:
    """Write the cache in one step (the last of several writers wins); a folder that is not writable is only logged."""
    header = {
        "version": VERSION,
        "images": list(images),
        "messages": {i: entry.found.notes for i, entry in enumerate(entries) if entry.found.notes},
    }
    segments = [segment for entry in entries for segment in entry.found.segments]
    arrays = {
        "header": np.frombuffer(json.dumps(header).encode("ascii"), np.uint8),
        "stamps": np.array([entry.stamp for entry in entries], np.int64).reshape(-1, 4),
        "numbers": np.array([_numbers(entry) for entry in entries], np.int64).reshape(-1, 8),
        "labels": np.concatenate([np.zeros((0, 5), np.float32), *(entry.found.labels for entry in entries)]),
        "segment_lengths": np.array([len(segment) for segment in segments], np.int64),
        "segment_points": np.concatenate([np.zeros((0, 2), np.float32), *segments]),
    }
    try:
        if not is_writable(path.parent):
            raise OSError("the folder is read-only")
        archive = io.BytesIO()
        np.savez(archive, **arrays)  # type: ignore[arg-type]
        with atomic_path(path) as temporary, open(temporary, "wb") as stream:
            stream.write(archive.getbuffer())
            stream.write(hashlib.sha256(archive.getbuffer()).digest())
    except (OSError, UserError) as error:
        LOGGER.info("%s: labels are not cached: %s", path, error)


def read(path: Path) -> dict[str, Entry]:
    """Entries by image; empty when there is no cache that can be used."""
    if not os.path.isfile(path):
        return {}
    try:
        data = path.read_bytes()
        content, digest = data[:-_DIGEST], data[-_DIGEST:]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError("damaged, or of another version")
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return _entries({name: archive[name] for name in archive.files})
    except (OSError, ValueError) as error:
        LOGGER.info("%s: label cache is not usable and is written again: %s", path, error)
        return {}


_DIGEST = hashlib.sha256().digest_size


def _numbers(entry: Entry) -> tuple[int, ...]:
    found = entry.found
    counts = (len(found.labels), len(found.segments), found.duplicates, found.crowd, found.difficult)
    return (entry.height, entry.width, STATUSES.index(entry.status), *counts)


def _entries(arrays: dict[str, NDArray[Any]]) -> dict[str, Entry]:
    header = json.loads(arrays["header"].tobytes())
    if header.get("version") != VERSION:
        raise ValueError(f"version {header.get('version')}, not {VERSION}")
    images, numbers, labels = header["images"], arrays["numbers"], arrays["labels"]
    points = np.split(arrays["segment_points"], np.cumsum(arrays["segment_lengths"])[:-1])
    found: dict[str, Entry] = {}
    label_at = segment_at = 0
    messages = header["messages"]
    for i, (image, stamps, row) in enumerate(zip(images, arrays["stamps"].tolist(), numbers.tolist())):
        height, width, status, count, polygons, duplicates, crowd, difficult = row
        rows, parts = labels[label_at : label_at + count], points[segment_at : segment_at + polygons]
        notes = tuple(messages.get(str(i), ()))
        file = LabelFile(rows, tuple(parts), duplicates, notes, crowd, difficult)
        found[image] = Entry(tuple(stamps), height, width, STATUSES[status], file)
        label_at += count
        segment_at += polygons
    return found


def _stat(path: Path) -> tuple[int, int]:
    try:
        info = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return (-2, -2) if os.path.islink(path) else (-1, -1)
    except (OSError, ValueError):  # no permission, a loop of links, a name that no file can have
        return -2, -2
    return info.st_size, info.st_mtime_ns
