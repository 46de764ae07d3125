"""Stored results, each under a hash of everything that it depends on, so an interrupted comparison can continue."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data.config import DataConfig
from data.labels.labels import load_annotations
from utils.files import ROOT, atomic_path, make_folder

LOGGER = logging.getLogger(__name__)
VERSION = 4  # raise it when the content of stored results changes
HEX = 16
# Source files that can change the result of a training or a measurement; plots and reports are left out.
TRAINING_CODE = ("models", "data", "utils", "engine/cli", "engine/devices", "engine/evaluate", "engine/train")
MEASURING_CODE = (*TRAINING_CODE, "engine/runtimes", "engine/export", "engine/compare")
REPORTING = ("table.py", "outputs.py", "plots.py", "pareto.py", "runner.py", "config.py", "store.py")


def digest(value: object) -> str:
    """Return a hash of plain values or bytes; equal values give equal hashes."""
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()[:HEX]
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:HEX]


def stat_key(path: Path) -> list[Any]:
    """Return name, size and modification time of a file."""
    try:
        stat = path.stat()
    except OSError:
        return [path.name, -1, -1]
    return [path.name, stat.st_size, stat.st_mtime_ns]


def data_key(data: DataConfig, splits: Iterable[str]) -> str:
    """Return a hash of the classes, images (names, sizes, times) and labels of some splits."""
    found: list[Any] = [sorted(data.names.items())]
    for name in splits:
        for record in load_annotations(data.split(name), len(data.names), require_labels=False).records:
            place = record.path.relative_to(data.root) if record.path.is_relative_to(data.root) else record.path
            shapes = b"".join(part.tobytes() for part in (record.labels, *record.segments))
            found.append([name, place.as_posix(), stat_key(record.path), digest(shapes)])
    return digest(found)


def code_key(folders: Sequence[str], skipped: Sequence[str] = ()) -> str:
    """Return a key of the source files below some folders.

    Args:
        folders: below the project's root.
        skipped: file names that do not count.
    """
    files: set[Path] = set()
    for name in folders:
        files |= set((ROOT / name).rglob("*.py"))
    left_out = {ROOT / "engine/compare" / name for name in skipped}
    listed = sorted((p.relative_to(ROOT).as_posix(), p) for p in files - left_out)
    return digest([[name, digest(path.read_bytes())] for name, path in listed])


class Store:
    """Finished results as JSON files, one per key.

    Args:
        folder: folder of the files; created when needed.
        fresh: ignore stored results.
    """

    def __init__(self, folder: Path, fresh: bool = False) -> None:
        self.folder, self.fresh = folder, fresh

    def find(self, kind: str, key: str) -> dict[str, Any] | None:
        """Return the result stored under a key, or None if there is no readable one."""
        path = self._path(kind, key)
        if self.fresh or not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return content["result"] if content["version"] == VERSION else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            LOGGER.warning("%s: not readable, repeated (%s)", path, error)
            return None

    def save(self, kind: str, key: str, result: object, about: object = None) -> None:
        """Store plain values under a key.

        Args:
            kind: first part of the file's name.
            key: hash of everything that the result depends on.
            result: plain values.
            about: description for readers of the file.
        """
        make_folder(self.folder)
        content = {"version": VERSION, "kind": kind, "about": about, "result": result}
        with atomic_path(self._path(kind, key)) as part:
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / f"{kind}-{key}.json"
