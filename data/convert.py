"""Convert datasets between YOLO text, COCO JSON and Pascal VOC XML, and split them.

    python -m data.convert SOURCE TARGET --to {yolo,coco,voc} [--split 0.8 0.1 0.1 [--seed 0]] [--link]

SOURCE is a dataset YAML, a COCO .json file or a folder; TARGET a new folder, which gets the images, the labels and a
`data.yaml`; it is complete or absent. Images and objects that training leaves out (damaged images, repetitions,
groups, difficult objects) are left out here too, and counted. `--split` merges all splits of the source and splits
the images again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data import command
from data.check.near_duplicates import group_near_duplicates, thumbnails
from data.check.suggest import suggested_config
from data.config import load_data_config
from data.formats import coco, voc
from data.formats.yolo import ImageRecord, enclosing_box, to_pixels
from data.labels.labels import load_annotations
from data.split import check_fractions, split_records
from utils.boxes import xywh2xyxy
from utils.errors import DataError, shown
from utils.files import is_vacant, new_folder, unique_names
from utils.yaml_lines import dump_yaml

LOGGER = logging.getLogger(__name__)

POLYGON_TOLERANCE = 0.1
"""Pixels by which the box around a polygon may differ from the label's; COCO rounds both to hundredths."""


@dataclass(frozen=True)
class LoadedSet:
    """A dataset in memory: class names by number, and the usable images of each split."""

    names: tuple[str, ...]
    splits: Mapping[str, Sequence[ImageRecord]]


def load_set(source: str | Path) -> LoadedSet:
    """Load all splits of a dataset YAML, or what `data.check.suggest` finds in a folder or annotation file.

    Raises:
        DataError: a split cannot be used.
    """
    path = Path(source)
    if os.path.isdir(path) or path.suffix.lower() == ".json":
        with tempfile.TemporaryDirectory() as folder:
            config = suggested_config(path, Path(folder) / "data.yaml")
    else:
        config = load_data_config(path)
    splits = {}
    for name in config.splits:
        loaded = load_annotations(config.split(name), config.num_classes, require_labels=False)
        LOGGER.info("%s: %s", name, loaded.report.summary())
        splits[name] = loaded.records
    return LoadedSet(tuple(config.names.values()), splits)


def resplit(loaded: LoadedSet, fractions: Sequence[float], seed: int, divide_duplicates: bool) -> LoadedSet:
    """Merge all splits and split the images again, see `data.split`.

    Raises:
        DataError: a split would be empty.
    """
    records = list({record.path: record for part in loaded.splits.values() for record in part}.values())
    groups = np.arange(len(records)) if divide_duplicates else group_near_duplicates(thumbnails(records))
    if (count := len(records) - len(np.unique(groups))) > 0:
        LOGGER.info("%d of %d images are near-duplicates of another one and stay with it", count, len(records))
    return LoadedSet(loaded.names, split_records(records, fractions, groups, len(loaded.names), seed))


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    link: bool = False,
    split: Sequence[float] = (),
    seed: int = 0,
    divide_duplicates: bool = False,
) -> LoadedSet:
    """Write a dataset in another format.

    Args:
        source: dataset YAML, COCO .json or folder.
        target: new folder.
        to: "yolo", "coco" or "voc".
        link: make symbolic links to the images instead of copies.
        split: fractions of train, val and, with three of them, test; empty keeps the splits of the source.
        seed: of the new splits.
        divide_duplicates: near-duplicates may go to different splits.

    Returns:
        What was written.

    Raises:
        ConfigError: fractions that do not sum to 1.
        DataError: the target already exists, or the source cannot be used.
    """
    if split:
        check_fractions(split, seed)
    final = Path(target).absolute()
    if not is_vacant(final):
        raise DataError(f"{target}: already exists; give a new folder")
    loaded = load_set(source)
    if split:
        loaded = resplit(loaded, split, seed, divide_duplicates)
    try:
        with new_folder(final) as build:
            _WRITERS[to](loaded, _ImageWriter(build, link))
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror or error}") from error
    return loaded


@dataclass(frozen=True)
class _ImageWriter:
    """Puts images into the new folder `root`."""

    root: Path
    link: bool

    def put(self, record: ImageRecord, place: str) -> None:
        """Copy (or link) an image to `place` below the root."""
        target = self.root / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.link:
            target.symlink_to(record.path.absolute())
        else:
            shutil.copy2(record.path, target)

    def write(self, place: str, text: str) -> None:
        """Write a text file below the root."""
        target = self.root / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")

    def bar(self, records: Sequence[ImageRecord], split: str) -> Iterable[ImageRecord]:
        """Iterate over the records with a progress bar."""
        return tqdm(records, desc=f"converting {split}", unit="image", mininterval=0.5, disable=None)

    def describe(self, names: Sequence[str], splits: Mapping[str, str]) -> None:
        """Write `data.yaml`."""
        dump_yaml(self.root / "data.yaml", {"path": ".", **splits, "names": dict(enumerate(names))})


def _write_yolo(loaded: LoadedSet, images: _ImageWriter) -> None:
    dropped = 0
    for split, part in loaded.splits.items():
        names = file_names([record.path for record in part])
        for record in images.bar(part, split):
            name = names[record.path]
            images.put(record, f"images/{split}/{name}")
            images.write(f"labels/{split}/{Path(name).with_suffix('.txt')}", label_rows(record))
            dropped += int((~_fits(record)).sum())
    if dropped:
        LOGGER.warning(
            "%d polygons differ from their boxes by more than %g pixels; only the boxes are written",
            dropped,
            POLYGON_TOLERANCE,
        )
    images.describe(loaded.names, {split: f"images/{split}" for split in loaded.splits})


def _write_coco(loaded: LoadedSet, sources: _ImageWriter) -> None:
    _check_distinct(loaded.names, "coco")
    for split, part in loaded.splits.items():
        names = file_names([record.path for record in part])
        for record in sources.bar(part, split):
            sources.put(record, f"images/{split}/{names[record.path]}")
        images = [(number, names[record.path], record) for number, record in enumerate(part, 1)]
        classes = dict(enumerate(loaded.names))
        content = coco.annotation_file(images, range(1, len(classes) + 1), classes, digits=4)
        sources.write(f"annotations/{split}.json", json.dumps(content))
    sources.describe(loaded.names, {split: f"annotations/{split}.json" for split in loaded.splits})


def _check_distinct(names: Sequence[str], to: str) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(
            f"--to {to}: classes are distinguished by name there, and {len(repeated)} names are given twice, such as"
            f" {shown(repeated[0])}; rename them in the dataset YAML"
        )


def _write_voc(loaded: LoadedSet, images: _ImageWriter) -> None:
    _check_distinct(loaded.names, "voc")
    names = file_names([record.path for part in loaded.splits.values() for record in part], spaces=False)
    written: set[Path] = set()
    for split, part in loaded.splits.items():
        for record in images.bar(part, split):
            if record.path in written:
                continue
            written.add(record.path)
            name = names[record.path]
            images.put(record, f"JPEGImages/{name}")
            objects = [(loaded.names[int(c)], box, polygon) for c, box, polygon in to_pixels(record)]
            text = voc.annotation(name, (record.height, record.width), objects)
            images.write(f"Annotations/{Path(name).with_suffix('.xml')}", text)
        stems = [Path(names[record.path]).stem for record in part]
        images.write(f"ImageSets/Main/{split}.txt", "".join(f"{stem}\n" for stem in stems))
    images.describe(loaded.names, {split: f"ImageSets/Main/{split}.txt" for split in loaded.splits})


_WRITERS: Mapping[str, Callable[[LoadedSet, _ImageWriter], None]] = {
    "yolo": _write_yolo,
    "coco": _write_coco,
    "voc": _write_voc,
}


def label_rows(record: ImageRecord) -> str:
    """Write a YOLO label file that reads back as the same float32 values; polygons where they fit their boxes."""
    lines = []
    fits = _fits(record)
    for i, row in enumerate(record.labels):
        polygon = record.segments[i] if record.segments and fits[i] else None
        inside = polygon is not None and ((polygon >= 0) & (polygon <= 1)).all()  # not the corners of a box beyond it
        values = polygon.reshape(-1) if polygon is not None and inside else row[1:]
        lines.append(" ".join([f"{int(row[0])}", *(np.format_float_positional(v, trim="-") for v in values)]))
    return "".join(f"{line}\n" for line in lines)


def _fits(record: ImageRecord) -> NDArray[np.bool_]:
    """Return (n,) whether the box around each polygon is that of the label; True without polygons."""
    if not record.segments:
        return np.ones(len(record.labels), bool)
    around = xywh2xyxy(np.array([enclosing_box(points) for points in record.segments], np.float64))
    off = np.abs(around - xywh2xyxy(record.labels[:, 1:].astype(np.float64))) * ((record.width, record.height) * 2)
    return off.max(1) <= POLYGON_TOLERANCE


def file_names(paths: Sequence[Path], spaces: bool = True) -> dict[Path, str]:
    """Return a unique file name for each image, see `unique_names`.

    Args:
        paths: the images.
        spaces: whether names may hold spaces; VOC's lists may not.
    """

    def clean(name: str) -> str:
        name = re.sub("[\ud800-\udfff]", "_", name)  # bytes that are not UTF-8
        return name if spaces else "_".join(name.split())

    return unique_names(paths, clean)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = command.DataParser(prog="convert", description="convert a dataset between YOLO, COCO and Pascal VOC")
    parser.add_argument("source", help="dataset YAML, COCO .json file or folder")
    parser.add_argument("target", help="new folder")
    parser.add_argument("--to", required=True, choices=sorted(_WRITERS), help="format to write")
    parser.add_argument(
        "--split",
        type=float,
        nargs="+",
        default=(),
        metavar="F",
        help="fractions of train, val (and test): 0.8 0.1 0.1",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --split (0)")
    parser.add_argument("--split-duplicates", action="store_true", help="--split may separate near-duplicates")
    parser.add_argument("--link", action="store_true", help="symbolic links to the images instead of copies")
    return command.run(parser, _convert, argv)


def _convert(arguments: argparse.Namespace) -> None:
    loaded = convert(
        arguments.source, arguments.target, arguments.to, link=arguments.link, split=arguments.split,
        seed=arguments.seed, divide_duplicates=arguments.split_duplicates,
    )  # fmt: skip
    counts = [f"{len(part)} images in {name}" for name, part in loaded.splits.items()]
    LOGGER.info("written: %s: %s", Path(arguments.target) / "data.yaml", ", ".join(counts))
    if "val" not in loaded.splits:
        LOGGER.warning("there is no split 'val', which training needs; --split 0.8 0.2 makes one from the images")


if __name__ == "__main__":
    sys.exit(main())
