"""Results that are kept, each by a key of everything that it depends on: nothing is done twice, nothing is stale.

A key is a hash of plain values. What an interrupted comparison has finished is found again by the same command.
"""

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
VERSION = 2  # raise it when the content of stored results changes
HEX = 16
# Source files that can change what a training or a measurement gives. What draws and reports is left out: a nicer
# table is no reason to train again.
TRAINING_CODE = ("models", "data", "utils", "engine/cli", "engine/devices", "engine/evaluate", "engine/train")
MEASURING_CODE = (*TRAINING_CODE, "engine/runtimes", "engine/export", "engine/compare")
REPORTING = ("table.py", "outputs.py", "plots.py", "pareto.py", "runner.py", "config.py", "store.py")


def digest(value: Any) -> str:
    """Hex digits of plain values (of bytes: of their content); equal values give equal digits."""
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()[:HEX]
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:HEX]


def stat_key(path: Path) -> list[Any]:
    """Name, size and time of a file; stands for its content."""
    try:
        stat = path.stat()
    except OSError:
        return [path.name, -1, -1]
    return [path.name, stat.st_size, stat.st_mtime_ns]


def data_key(data: DataConfig, splits: Iterable[str]) -> str:
    """Stands for the classes, images (names, sizes, times) and labels of some splits, in whatever format they are."""
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
        folder: of the files; made when something is kept.
        fresh: find nothing (but keep what is new).
    """

    def __init__(self, folder: Path, fresh: bool = False) -> None:
        self.folder, self.fresh = folder, fresh

    def find(self, kind: str, key: str) -> Any | None:
        """Return the result stored under a key, or None if there is no readable one."""
        path = self._path(kind, key)
        if self.fresh or not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return content["result"] if content["version"] == VERSION else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            LOGGER.warning("%s: cannot be used, made again (%s)", path, error)
            return None

    def keep(self, kind: str, key: str, result: Any, about: Any = None) -> None:
        """Keep plain values under a key.

        Args:
            kind: first part of the file's name.
            key: of everything that the result depends on.
            result: plain values.
            about: what the key was made of, for who reads the file.
        """
        make_folder(self.folder)
        content = {"version": VERSION, "kind": kind, "about": about, "result": result}
        with atomic_path(self._path(kind, key)) as part:
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / f"{kind}-{key}.json"
