"""A dataset YAML for a folder or an annotation file that has none: the splits and class names found there."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.config import MAX_CLASSES, DataConfig, load_data_config
from data.formats.detect_format import AnnotatedSource, recognize
from data.images import IMAGE_SUFFIXES
from data.labels.labels import load_annotations, refuse_unreadable
from utils.errors import DataError
from utils.files import read_text
from utils.yaml_lines import dump_yaml

_WORDS = {"train": "train(?:ing|val)?", "val": "val(?:id|idation)?", "test": "test(?:ing)?"}
_PLACES = (  # of a split called {}, the preferred ones first; * = any name of a folder
    r"(?:.*/)?annotations/instances_{}\d*\.json", r"(?:.*/)?annotations/[^/]*{}\d*\.json", r"{}\d*/[^/]*\.json",
    r"[^/]*{}\d*\.json", r"(?:.*/)?imagesets/(?:main/)?{}\.txt", r"(?:.*/)?images/{}\d*/", r"{}\d*/images/", r"{}\d*/",
    r"{}\.txt",
)  # fmt: skip
_NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels", "labels.txt")


def suggested_config(path: Path, file: Path) -> DataConfig:
    """Load the dataset YAML of a folder; or write one for a folder or a COCO .json file without, and load that.

    Args:
        path: the folder or the annotation file.
        file: YAML to write where there is none.

    Raises:
        DataError: no images or annotations there.
    """
    for own in sorted(path.glob("*.yaml")):
        with contextlib.suppress(DataError):  # another kind of YAML
            return load_data_config(own)
    dump_yaml(file, suggest(path.absolute()))
    return load_data_config(file)


def suggest(path: Path) -> dict[str, Any]:
    """Return the content of a dataset YAML for an absolute path: `path`, the splits and, for YOLO text, `names`.

    Raises:
        DataError: no images or annotations there.
    """
    if os.path.isfile(path):
        root = path.parent.parent if path.parent.name.lower() == "annotations" else path.parent
        return {"path": str(root), "train": path.relative_to(root).as_posix()}
    entries = sorted(_entries(path), key=lambda entry: (entry.count("/"), entry))
    splits = {}
    for split, word in _WORDS.items():
        matches = (e for place in _PLACES for e in entries if re.fullmatch(place.format(word), e, re.IGNORECASE))
        found = next((entry for entry in matches if _usable(path / entry)), None)
        if found is not None:
            splits[split] = found.rstrip("/")
    if "train" not in splits:
        whole = [entry for entry in entries if entry.endswith(".json")]
        splits = {"train": next((entry for entry in whole if _usable(path / entry)), "."), **splits}
    content = {"path": str(path), **splits}
    source = recognize(path / splits["train"], root=path, split="train")
    return content if isinstance(source, AnnotatedSource) else {**content, "names": _names(path, source)}


def _entries(root: Path) -> Iterator[str]:
    """Yield folders (with a slash at the end), .json and .txt files up to four levels below, relative to the root."""
    for base, folders, files in os.walk(root, onerror=refuse_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = os.path.relpath(base, root).replace(os.sep, "/")
        head = "" if relative == "." else f"{relative}/"
        yield from (f"{head}{name}/" for name in folders)
        lists = not head or "imagesets" in head.lower()
        yield from (head + name for name in files if name.endswith(".json") or (lists and name.endswith(".txt")))
        if head.count("/") == 4:
            folders.clear()


def _usable(path: Path) -> bool:
    """Return whether a path holds images, is a COCO file or a list of images."""
    if os.path.isdir(path):
        return any(Path(name).suffix.lower() in IMAGE_SUFFIXES for *_, files in os.walk(path) for name in files)
    if isinstance(recognize(path), AnnotatedSource) and path.suffix.lower() != ".json":
        return True
    try:
        text = read_text(path, limit=2**33)
    except DataError:  # no text: a file of something else
        return False
    if path.suffix.lower() == ".json":
        return '"images"' in text and '"categories"' in text
    return any(Path(line.strip()).suffix.lower() in IMAGE_SUFFIXES for line in text.splitlines()[:10])


def _names(root: Path, source: Path) -> list[str]:
    """Return class names of a list beside YOLO labels; else class0, class1, ... up to the largest label."""
    for folder in (root, source if os.path.isdir(source) else source.parent, root / "labels"):
        for name in _NAME_FILES:
            if os.path.isfile(folder / name):
                lines = [line.strip() for line in read_text(folder / name).splitlines()]
                return [line for line in lines if line]
    records = load_annotations([source], MAX_CLASSES).records
    largest = max((int(record.labels[:, 0].max(initial=0)) for record in records), default=0)
    return [f"class{number}" for number in range(largest + 1)]
