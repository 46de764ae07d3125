"""Dataset YAMLs: where the images are, class names, and how to generate or download the dataset.

The keys are YOLOv5's (`path`, `train`, `val`, `test`, `names`, `nc`, `download`), `generate` for the dataset that is
generated on first use, and `images` for the images of COCO and VOC annotations (docs/datasets.md). Names and paths are
strings, whatever they look like (`02146`, `no`, `2024_01`). YOLOv5's format:
https://docs.ultralytics.com/yolov5/tutorials/train_custom_data
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data.download import DownloadRecipe, fetch, parse_recipe, recipe_from_url
from data.formats.detect_format import AnnotatedSource, Source, class_names, recognize
from data.shapes import ShapesRecipe, ensure, parse_shapes
from utils.errors import DataError, did_you_mean, listed, shown
from utils.files import ROOT, expand_user, find_file, folder_names, name_problem
from utils.yaml_lines import LineDict, LineList, load_yaml, text_of

LOGGER = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
_OWN_KEYS = ("path", *SPLITS, "names", "nc", "images", "download", "generate")
MAX_CLASSES = 100_000
_EXTRA_KEYS = ("roboflow", "license", "author", "description", "version", "date", "info", "yaml_file", "channels",
               "kpt_shape", "flip_idx", "kpt_names")  # fmt: skip
"""Keys that exporters write; they do not concern boxes and are ignored."""


@dataclass(frozen=True)
class DataConfig:
    """A dataset as its YAML describes it. Reading the YAML opens no image; `split` downloads or generates missing ones.

    Attributes:
        file: the YAML.
        root: absolute folder that the splits are relative to.
        names: class number -> name, numbers 0..n-1 without gaps.
        splits: split name -> folders, list and annotation files, absolute, in the YAML's order; they may be missing on
            disk.
        download: text of a foreign YAML's `download:` (a script or URL), None if there is none.
        recipe: our own download step, None if there is none.
        shapes: how to generate the dataset, None for datasets that are not generated.
        roots: all folders that `path` can mean, in the order in which they were tried.
        lines: line of every key in the YAML.
        classes: names that annotations are read by; those of the YAML, whatever `names` is replaced by later.
        images: split name -> folder of the images of its annotations, where the YAML names one.
    """

    file: Path
    root: Path
    names: dict[int, str]
    splits: Mapping[str, tuple[Path, ...]]
    download: str | None = None
    recipe: DownloadRecipe | None = None
    shapes: ShapesRecipe | None = None
    roots: tuple[Path, ...] = ()
    lines: Mapping[str, int] | None = None
    classes: tuple[str, ...] | None = None
    images: Mapping[str, Path] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.names)

    def split(self, name: str) -> tuple[Source, ...]:
        """Return the sources of a split; missing ones are generated or downloaded first where the YAML says how.

        Args:
            name: 'train', 'val' or 'test'.

        Raises:
            DataError: the YAML has no such split, or one of its files is missing and cannot be made.
        """
        if name not in self.splits:
            hint = f"; 'python -m data.convert {self.file} FOLDER --to yolo --split 0.8 0.2' makes one"
            raise DataError(
                f"{self.file}: has no split '{name}'; it has {', '.join(self.splits) or 'none'}"
                f"{hint if name == 'val' and self.splits else ''}"
            )
        if self.shapes is not None:
            ensure(self.root, self.shapes)
        paths = self.splits[name]
        if self.recipe is not None and not all(os.path.exists(p) for p in paths):
            fetch(self.recipe, self.root)
        missing = [p for p in paths if not os.path.exists(p)]
        if missing:
            raise DataError(self._missing(name, missing))
        folders = [self.images[name]] if self.images and name in self.images else []
        return tuple(recognize(path, self.classes, folders, self.root, name) for path in paths)

    def _missing(self, name: str, missing: list[Path]) -> str:
        where = f"{self.file}:{(self.lines or {}).get(name, 1)}"
        text = f"{where}: split '{name}': no such folder, list or annotation file: {', '.join(map(str, missing))}"
        text += _first_missing(missing[0])
        beside = [folder for folder in (self.file.parent, *self.file.parents[1:2]) if folder != self.root]
        entries = [os.path.relpath(path, self.root) for path in self.splits[name]]
        near = next((folder for folder in beside if all(os.path.exists(folder / entry) for entry in entries)), None)
        others = [str(root) for root in self.roots if root != self.root]
        if near is not None:
            text += f"; it is in {near}: write 'path: {os.path.relpath(near, self.file.parent)}'"
        elif others:
            text += f" (nothing below {', '.join(others)} either)"
        if self.download:
            line = (self.lines or {}).get("download", 1)
            text += (
                f"; the script under 'download:' (line {line}) is never run: read it, run it yourself, and put the"
                f" result at {self.root}"
            )
        return text


def _first_missing(path: Path) -> str:
    """Return the ending of a message: the first part of a path that is missing, and the nearest name there."""
    above = next((folder for folder in path.parents if os.path.isdir(folder)), None)
    if above is None:
        return ""
    part = path.relative_to(above).parts[0]
    try:
        entries = [name for name in folder_names(above) if not name.startswith(".")]
    except DataError as error:
        return f"; {error}"
    there = f"; there are {listed(entries)}" if entries else "; it is empty"
    return f"; {above} has no {shown(part)}{did_you_mean(part, entries) or there}"


def load_data_config(path: str | Path) -> DataConfig:
    """Read a dataset YAML.

    A relative `path:` means, in this order: below the YAML's folder, below the project's root, below the current
    folder; the first place where a split is found counts (the first of all when none is there yet). Without `path:` the
    splits themselves are looked for in these places.

    Args:
        path: the YAML, or the name of one in the project's `data` folder (`coco128`, `coco128.yaml`).

    Raises:
        DataError: all mistakes of the file at once, each with file:line; or annotations that should name the classes
            and cannot be read.
    """
    if os.path.isdir(path) or Path(path).suffix.lower() == ".json":
        raise DataError(f"{path}: a dataset YAML is needed; 'python -m data.check {path}' suggests one")
    file = find_file(path, "data", error=DataError)
    data = load_yaml(file, DataError)
    problems: list[str] = []
    _check_keys(data, file, problems)
    names = _names(data, file, problems)
    entries = {name: _entries(data, name, file, problems) for name in SPLITS}
    entries = {name: found for name, found in entries.items() if found}
    if not entries and "names" in data:
        problems.append(f"{file}: names no split; 'train:' and 'val:' with folders of images are needed")
    script = data.get("download") if isinstance(data.get("download"), str) else None
    recipe = recipe_from_url(script) if script else None
    if script is None and data.get("download"):
        recipe = parse_recipe(data["download"], names, f"{file}:{data.lines['download']}", problems)
    shapes = None
    if data.get("generate") is not None:
        shapes = parse_shapes(data["generate"], names, f"{file}:{data.lines['generate']}", problems)
    roots = _roots(data, file, problems)
    root = _choose_root(roots, entries)
    splits = {name: tuple(_locate(root, entry) for entry in found) for name, found in entries.items()}
    images = _images(data, root, file, problems)
    annotated = _annotated(splits, images) if "names" not in data else []
    if not names and not annotated and "names" not in data:
        problems.append(f"{file}: 'names:' is missing; a list of class names is needed")
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise DataError("; ".join([*problems[:10], *more]))
    if annotated:
        count, names = len(names), dict(enumerate(class_names(annotated)))
        if "nc" in data and count != len(names):
            raise DataError(
                f"{file}:{data.lines['nc']}: nc is {count}, but {annotated[0]} has {len(names)} classes:"
                f" {listed([*names.values()])}; leave out nc"
            )
    return DataConfig(
        file, root, names, splits, script, recipe, shapes, roots, dict(data.lines), tuple(names.values()), images
    )


def _check_keys(data: LineDict, file: Path, problems: list[str]) -> None:
    for key, line in data.lines.items():
        if key in _EXTRA_KEYS:
            LOGGER.debug("%s:%d: '%s' is ignored", file, line, key)
        elif key not in _OWN_KEYS:
            hint = did_you_mean(key, _OWN_KEYS) or f"; known keys are {', '.join(_OWN_KEYS)}"
            problems.append(f"{file}:{line}: unknown key {shown(key)}{hint}")


def _names(data: LineDict, file: Path, problems: list[str]) -> dict[int, str]:
    """Return class names by number; with `nc` alone they are class0, class1, ..., as YOLOv5 calls them."""
    count = data.get("nc")
    if count is not None and (type(count) is not int or not 1 <= count <= MAX_CLASSES):
        problems.append(
            f"{file}:{data.lines['nc']}: nc is {shown(count)}; an integer from 1 to {MAX_CLASSES} is needed"
        )
        count = None
    given = data.get("names")
    if given is None:
        if count is None and "nc" in data:
            return {0: ""}  # reported above
        return {i: f"class{i}" for i in range(count or 0)}
    where = f"{file}:{data.lines['names']}"
    if not isinstance(given, (LineDict, LineList)) or not given:
        file_name = isinstance(given, str) and given.endswith((".txt", ".names"))
        hint = "; 'python -m data.check FOLDER' makes one of that file" if file_name else ""
        problems.append(f"{where}: names is {shown(given)}; a list or a mapping 'number: name' is needed{hint}")
        return {}
    keys = list(given) if isinstance(given, LineDict) else list(range(len(given)))
    names = {key: text_of(given, key) for key in keys}
    wrong = [key for key in keys if type(key) is not int]
    gaps = [] if wrong else sorted(set(range(len(names))) - set(names))
    empty = [key for key, name in names.items() if not isinstance(name, str) or not name.strip()]
    if wrong:
        problems.append(f"{where}: names: {shown(wrong[0])} is not a class number; numbers 0, 1, 2, ... are needed")
    elif gaps:
        hint = "; do the labels count from 1 too? then name a class 0 that no object has: {0: unused, 1: ...}"
        problems.append(
            f"{where}: {len(names)} names, but number {gaps[0]} is missing; numbers 0, 1, 2, ... are needed"
            f"{hint if gaps[0] == 0 else ''}"
        )
    elif empty:
        problems.append(f"{where}: names: class {empty[0]} is {shown(names[empty[0]])}; a word is needed")
    elif len(names) > MAX_CLASSES:
        problems.append(f"{where}: {len(names)} names; at most {MAX_CLASSES} are allowed")
    elif len(set(names.values())) < len(names):
        repeated = [name for name, count in Counter(names.values()).items() if count > 1][:5]
        numbers = {name: [str(key) for key in sorted(names) if names[key] == name][:5] for name in repeated}
        texts = [f"{shown(name)} (classes {', '.join(found)})" for name, found in numbers.items()]
        LOGGER.warning("%s: the same name for different classes: %s", where, "; ".join(texts))
    if count is not None and count != len(names):
        problems.append(f"{file}:{data.lines['nc']}: nc is {count}, but there are {len(names)} names; leave out nc")
    return {key: str(names[key]) for key in (keys if wrong else sorted(keys))}


def _annotated(splits: Mapping[str, tuple[Path, ...]], images: Mapping[str, Path]) -> list[AnnotatedSource]:
    """Return the sources whose annotations name their classes."""
    found = [recognize(p, None, [images[name]] if name in images else ()) for name in splits for p in splits[name]]
    return [source for source in found if isinstance(source, AnnotatedSource)]


def _images(data: LineDict, root: Path, file: Path, problems: list[str]) -> dict[str, Path]:
    """Return the folder of the images per split: one for all, or a mapping."""
    if data.get("images") is None:
        return {}
    value, line = text_of(data, "images"), data.lines["images"]
    table = {key: text_of(value, key) for key in value} if isinstance(value, LineDict) else dict.fromkeys(SPLITS, value)
    for key, folder in table.items():
        if key not in SPLITS:
            hint = did_you_mean(key, SPLITS) or f"; splits are {', '.join(SPLITS)}"
            problems.append(f"{file}:{line}: images: unknown split {shown(key)}{hint}")
        elif not _is_path(folder):
            problems.append(
                f"{file}:{line}: images is {_shown_path(folder)}; a folder, or a mapping 'split: folder', is needed"
            )
    if problems:
        return {}
    found = {key: _locate(root, str(folder).strip()) for key, folder in table.items()}
    missing = [str(path) for path in dict.fromkeys(found.values()) if not os.path.isdir(path)]
    if missing and "download" not in data:
        problems.append(f"{file}:{line}: images: no such folder: {', '.join(missing)}")
    return found


def _is_path(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and not name_problem(value)


def _shown_path(value: object) -> str:
    problem = name_problem(value) if isinstance(value, str) else ""
    return f"{shown(value)}, which {problem}" if problem else shown(value)


def _entries(data: LineDict, split: str, file: Path, problems: list[str]) -> tuple[str, ...]:
    if data.get(split) in (None, ""):
        return ()
    value = text_of(data, split)
    entries = [text_of(value, i) for i in range(len(value))] if isinstance(value, LineList) else [value]
    if not all(_is_path(entry) for entry in entries):
        problems.append(
            f"{file}:{data.lines[split]}: {split} is {_shown_path(value)}; a folder, a .txt list, a COCO .json or"
            " several are needed"
        )
        return ()
    return tuple(str(expand_user(entry.strip(), DataError)) for entry in entries)


def _roots(data: LineDict, file: Path, problems: list[str]) -> tuple[Path, ...]:
    value = "" if data.get("path") in (None, "") else text_of(data, "path")
    if value != "" and not _is_path(value):
        problems.append(f"{file}:{data.lines['path']}: path is {_shown_path(value)}; a folder is needed")
        value = ""
    folder = expand_user(value, DataError)
    candidates = [Path(os.path.abspath(base / folder)) for base in (file.parent, ROOT, Path.cwd())]
    if "\\" in value:  # a relative path written on Windows
        candidates += [Path(os.path.abspath(base / value.replace("\\", "/"))) for base in (file.parent, Path.cwd())]
    return tuple(dict.fromkeys(candidates))


def _choose_root(roots: tuple[Path, ...], entries: Mapping[str, tuple[str, ...]]) -> Path:
    for root in roots:
        if any(os.path.exists(_locate(root, entry)) for found in entries.values() for entry in found):
            return root
    return roots[0]


def _locate(root: Path, entry: str) -> Path:
    """Return the absolute path of a split's entry, links kept as given.

    Exporters write `../train/images` for a folder beside the YAML, and backslashes on Windows.
    """
    readings = [entry, *([entry[3:]] if entry.startswith("../") else [])]
    readings += [text.replace("\\", "/") for text in readings if "\\" in text]
    paths = [Path(os.path.abspath(root / text)) for text in readings]
    return next((path for path in paths if os.path.exists(path)), paths[0])
