"""The label cache: sizes and labels of the images of a split in one .npz file, without pickle.

An entry is valid as long as size and modification time of its image and label file are unchanged; entries are kept one
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
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.labels.table import ImageTable, pack
from utils.errors import UserError
from utils.files import atomic_path, is_writable

LOGGER = logging.getLogger(__name__)

VERSION = 6
"""Raise it whenever the verification or this layout changes: older caches are then written again."""


def stamp(image: Path, label: Path) -> tuple[int, int, int, int]:
    """Return size and modification time in ns of the image and of its label file; see `data.labels.table.Entry`."""
    return (*_stat(image), *_stat(label))


def short_hash(texts: Iterable[str]) -> str:
    """Return eight hex digits that differ for different strings."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()[:8]


def write(path: Path, images: Sequence[str], table: ImageTable) -> None:
    """Write the cache in one step (the last of several writers wins); a folder that is not writable is only logged."""
    header = {"version": VERSION, "images": list(images), "messages": table.notes}
    arrays = {
        "header": np.frombuffer(json.dumps(header).encode("ascii"), np.uint8),
        "stamps": table.stamps,
        "numbers": table.numbers,
        "labels": table.labels,
        "segment_lengths": table.lengths,
        "segment_points": table.points,
    }
    try:
        if not is_writable(path.parent):
            raise OSError("the folder does not exist" if not path.parent.is_dir() else "the folder is read-only")
        archive = io.BytesIO()
        np.savez(archive, **arrays)  # type: ignore[arg-type]
        with atomic_path(path) as temporary, open(temporary, "wb") as stream:
            stream.write(archive.getbuffer())
            stream.write(hashlib.sha256(archive.getbuffer()).digest())
    except (OSError, UserError) as error:
        LOGGER.info("%s: labels are not cached: %s", path, error)


def read(path: Path) -> tuple[list[str], ImageTable]:
    """Return the images and their table; empty when there is no cache that can be used."""
    if not os.path.isfile(path):
        return [], pack(())
    try:
        data = path.read_bytes()
        content, digest = data[:-_DIGEST], data[-_DIGEST:]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError("damaged, or of another version")
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return _table({name: archive[name] for name in archive.files})
    except (OSError, ValueError) as error:
        LOGGER.info("%s: label cache is not usable and is written again: %s", path, error)
        return [], pack(())


_DIGEST = hashlib.sha256().digest_size


def _table(arrays: dict[str, NDArray[Any]]) -> tuple[list[str], ImageTable]:
    header = json.loads(arrays["header"].tobytes())
    if header.get("version") != VERSION:
        raise ValueError(f"version {header.get('version')}, not {VERSION}")
    notes = {int(i): tuple(found) for i, found in header["messages"].items()}
    stamps, numbers, labels = arrays["stamps"], arrays["numbers"], arrays["labels"]
    return header["images"], ImageTable(
        stamps, numbers, labels, arrays["segment_lengths"], arrays["segment_points"], notes
    )


def _stat(path: Path) -> tuple[int, int]:
    try:
        info = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return (-2, -2) if os.path.islink(path) else (-1, -1)
    except (OSError, ValueError):  # no permission, a loop of links, a name that no file can have
        return -2, -2
    return info.st_size, info.st_mtime_ns
