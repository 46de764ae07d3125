"""Statistics and problems of a dataset.

    python -m data.check data.yaml [--imgsz 640] [--cfg models/yolov5n.yaml] [--out FOLDER] [--strict]

Counts, classes per split, sizes of boxes against anchors and strides, label errors, boxes that look wrong, and images
that are nearly the same in different splits. A folder or a COCO .json is accepted too: a YAML for it is suggested.
Printed in short; FOLDER (runs/check/exp) gets all of it as check.txt, and check.png. Exit status 0 regardless of the
findings; 2 when the dataset cannot be used, or with --strict when labels or images are wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data import command
from data.anchors import anchor_fit
from data.check.near_duplicates import Pair, find_pairs, thumbnails
from data.check.plots import draw
from data.check.statistics import SplitStatistics, below, doubled, gather, level_shares, outside
from data.check.suggest import suggested_config
from data.config import DataConfig, load_data_config
from data.images import decoding_problem
from data.labels.labels import load_annotations
from utils.errors import ConfigError, DataError, printable, shown
from utils.files import atomic_path, find_file, increment_path, make_folder
from utils.log import aligned, fitted
from utils.yaml_lines import load_yaml

SHOWN = 10  # lines of a list on the terminal; check.txt has all
RARE = 0.01  # fraction of all boxes below which a class is reported as rare
FINEST_STRIDE = 8
MAX_IMGSZ = 16384
ANCHOR_T = 4.0  # of the hyperparameter files

Anchors = NDArray[np.float64]


@dataclass(frozen=True)
class Section:
    """A part of the report: title, lines that are always shown, findings, and whether `--strict` refuses them."""

    title: str
    lines: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()
    strict: bool = False

    def text(self, most: int | None = None) -> str:
        """Return the section as text, with at most `most` findings."""
        shown = self.findings if most is None else self.findings[:most]
        rest = len(self.findings) - len(shown)
        more = [f"  ... and {rest} more"] if rest else []
        return printable("\n".join([self.title, *self.lines, *(f"  - {finding}" for finding in shown), *more]))


def inspect(config: DataConfig, imgsz: int, *, progress: bool = True) -> list[SplitStatistics]:
    """Load all splits of a dataset and compute their statistics.

    Raises:
        DataError: a split cannot be used.
    """
    return [
        gather(
            name,
            load_annotations(config.split(name), config.num_classes, progress=progress, require_labels=name == "train"),
            config.num_classes,
            imgsz,
        )
        for name in config.splits
    ]


def report(
    splits: Sequence[SplitStatistics],
    names: Mapping[int, str],
    pairs: Sequence[Pair],
    anchors: Anchors | None,
    imgsz: int,
) -> list[Section]:
    """Return all sections of the report.

    Args:
        splits: result of `inspect`.
        names: class names by number.
        pairs: near-duplicates.
        anchors: (levels, anchors per level, 2) in pixels; None leaves them out.
        imgsz: longer side of the network's input.
    """
    return [
        _counts(splits),
        _classes(splits, names),
        _sizes(splits, names, imgsz),
        *([_anchors(splits, anchors, imgsz)] if anchors is not None else []),
        _errors(splits, names),
        _duplicates(splits, pairs),
    ]


def table(rows: Iterable[Sequence[object]]) -> tuple[str, ...]:
    """Return the lines of a table, indented."""
    return tuple(f"  {line}" for line in aligned(rows))


def read_anchors(cfg: str | Path) -> Anchors | None:
    """Return the anchors of a model YAML, (levels, anchors per level, 2) in pixels; None where it gives no sizes.

    Raises:
        ConfigError: no such file, or no lists of numbers.
    """
    path = find_file(cfg, "models", "models/hub")
    data = load_yaml(path)
    given = data.get("anchors")
    if not isinstance(given, list):
        return None
    try:
        anchors = np.array(given, np.float64).reshape(len(given), -1, 2)
    except (TypeError, ValueError, OverflowError):
        anchors = np.zeros((1, 1, 2))
    if not anchors.size or not ((anchors > 0) & (anchors <= MAX_IMGSZ)).all():
        where = f"{path}:{data.lines['anchors']}"
        raise ConfigError(
            f"{where}: anchors is {shown(given)}; lists of widths and heights, above 0 to {MAX_IMGSZ}, are needed"
        )
    return anchors


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"


def _counts(splits: Sequence[SplitStatistics]) -> Section:
    head = ("split", "images", "with labels", "background", "left out", "boxes", "per image")
    columns: list[Sequence[object]] = [(*head, "repeated", "crowd", "difficult")]
    for split in splits:
        r = split.annotations.report
        counts = (r.images, r.labeled, r.missing + r.empty, r.corrupt, r.boxes)
        mean = f"{r.boxes / len(split.records):.1f}"
        columns.append((split.name, *counts, mean, r.duplicate_rows, r.crowd, r.difficult))
    return Section("Images and boxes", table(zip(*columns)))


def _classes(splits: Sequence[SplitStatistics], names: Mapping[int, str]) -> Section:
    rows: list[Sequence[object]] = [("class", *(word for split in splits for word in (split.name, "share", "images")))]
    findings = []
    for number, name in names.items():
        row: list[object] = [name]
        for split in splits:
            total = split.boxes.sum()
            row += [split.boxes[number], _percent(split.boxes[number], total), split.images[number]]
            if total and not split.boxes[number]:
                findings.append(f"{split.name}: no object of class {number} '{name}'")
            elif split.boxes[number] < RARE * total:
                findings.append(
                    f"{split.name}: class {number} '{name}' is rare: {split.boxes[number]} of {total} boxes"
                )
        rows.append(row)
    return Section("Classes: boxes, share of the boxes and images of each split", table(rows), tuple(findings))


def _sizes(splits: Sequence[SplitStatistics], names: Mapping[int, str], imgsz: int) -> Section:
    head = ("split", "shorter side: 1%", "10%", "median", "90%", "99%", "longest", f"below {FINEST_STRIDE} px")
    rows: list[Sequence[object]] = [head]
    findings = []
    for split in splits:
        if not len(split.sizes):
            continue
        shorter = split.sizes.min(1)
        tiny = below(split, FINEST_STRIDE)
        cells = [f"{value:.0f}" for value in np.quantile(shorter, (0.01, 0.1, 0.5, 0.9, 0.99))]
        share = f"{len(tiny)} ({_percent(len(tiny), len(shorter))})"
        rows.append((split.name, *cells, f"{split.sizes.max():.0f}", share))
        for i in tiny.tolist():
            w, h = split.sizes[i]
            path = split.records[split.owners[i]].path
            findings.append(f"{path} ({split.name}): '{names[int(split.classes[i])]}' is {w:.1f} x {h:.1f} pixels")
    title = f"Sizes of boxes in pixels at --imgsz {imgsz}"
    if findings:
        title += f"; {len(findings)} have a side below the finest stride ({FINEST_STRIDE}), the smallest first"
    return Section(title, table(rows), tuple(findings))


def _anchors(splits: Sequence[SplitStatistics], anchors: Anchors, imgsz: int) -> Section:
    strides = [FINEST_STRIDE * 2**level for level in range(len(anchors))]
    rows: list[Sequence[object]] = [("split", "best recall", "anchors/box", *(f"stride {s}" for s in strides))]
    findings = []
    for split in splits:
        sizes = split.sizes[(split.sizes > 0).all(1)]  # as in training, boxes without area do not count
        if not len(sizes):
            continue
        fit = anchor_fit(sizes, anchors, ANCHOR_T)
        shares = [f"{100 * share:.1f}%" for share in level_shares(sizes, anchors, ANCHOR_T)]
        rows.append((split.name, f"{fit.best_possible_recall:.4f}", f"{fit.anchors_past_thr:.2f}", *shares))
        if split.name == "train" and fit.is_poor:
            findings.append("train: a poor fit; training looks for better anchors (unless --noautoanchor)")
    return Section(f"Anchors: boxes that they match at --imgsz {imgsz}, per level", table(rows), tuple(findings))


def _errors(splits: Sequence[SplitStatistics], names: Mapping[int, str]) -> Section:
    findings = [f"{split.name}: {message}" for split in splits for message in split.annotations.report.messages]
    for split in splits:
        repeated = split.annotations.report.duplicate_images
        if repeated:
            findings.append(f"{split.name}: {repeated} images are listed more than once")
        found = [(i, row, f"extends {over:.0f} pixels beyond the border") for i, row, over in outside(split.records)]
        found += [(i, row, f"duplicates another (IoU {iou:.2f})") for i, row, _, iou in doubled(split.records)]
        for i, row, problem in found:
            record = split.records[i]
            findings.append(f"{record.path} ({split.name}): box of '{names[int(record.labels[row, 0])]}' {problem}")
    return Section(f"Label errors and doubtful boxes: {len(findings) or 'none'}", (), tuple(findings), strict=True)


def _damaged(splits: Sequence[SplitStatistics]) -> Section:
    """List JPEG files with an end marker but damaged data: decoders fill the rest with gray."""
    findings = [
        f"{record.path} ({split.name}): {problem}"
        for split in splits
        for record in tqdm(split.records, desc=f"decoding {split.name}", unit="image")
        if (problem := decoding_problem(record.path))
    ]
    return Section(f"Images with damaged data: {len(findings) or 'none'}", (), tuple(findings), strict=True)


def _duplicates(splits: Sequence[SplitStatistics], pairs: Sequence[Pair]) -> Section:
    findings = []
    files = {split.name: {record.path for record in split.records} for split in splits}
    order = list(files)
    for i, one in enumerate(order):
        for two in order[i + 1 :]:
            same = len(files[one] & files[two])
            if same:
                findings.append(f"{one} and {two} share {same} files")
    title = f"Nearly the same image in different splits: {len(pairs) or 'no'} pairs"
    return Section(title, (), (*findings, *map(str, pairs)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = command.DataParser(prog="check", description="statistics and problems of a dataset")
    parser.add_argument("data", help="dataset YAML; or a folder or COCO .json, for which a YAML is suggested")
    parser.add_argument("--imgsz", "--img", "--img-size", type=int, default=640, help="longer side of the input (640)")
    parser.add_argument("--cfg", default="models/yolov5n.yaml", help="model YAML whose anchors are checked (yolov5n)")
    parser.add_argument("--strict", action="store_true", help="decode every image; exit status 2 if anything is wrong")
    parser.add_argument("--out", help="folder for check.txt and check.png (runs/check/exp, counted up)")
    return command.run(parser, _check, argv)


def _check(arguments: argparse.Namespace) -> None:
    imgsz = arguments.imgsz
    if not 32 <= imgsz <= MAX_IMGSZ:
        raise ConfigError(f"--imgsz: {imgsz} is out of range; allowed: 32 to {MAX_IMGSZ}")
    anchors = read_anchors(arguments.cfg)
    folder = Path(arguments.out or increment_path("runs/check/exp"))
    path = Path(arguments.data)
    if os.path.isdir(path) or path.suffix.lower() == ".json":
        config = suggested_config(path, folder / "data.yaml")
        print(f"Suggested dataset YAML ({config.file}):\n\n{printable(config.file.read_text('utf-8'))}")
    else:
        config = load_data_config(path)
    splits = inspect(config, imgsz)
    records = {split.name: split.records for split in splits}
    pairs = find_pairs(records, {name: thumbnails(part, name=name) for name, part in records.items()})
    sections = report(splits, config.names, pairs, anchors, imgsz)
    if arguments.strict:
        sections.append(_damaged(splits))
    make_folder(folder)
    with atomic_path(folder / "check.txt") as part:
        part.write_text("\n\n".join(section.text() for section in sections) + "\n", encoding="utf-8")
    draw(folder / "check.png", splits, config.names, anchors, imgsz)
    text = "\n\n".join(section.text(SHOWN) for section in sections)
    print(fitted(printable(f"{text}\n\nAll of it: {folder / 'check.txt'}; charts: {folder / 'check.png'}"), sys.stdout))
    wrong = sum(len(section.findings) for section in sections if section.strict)
    if arguments.strict and wrong:
        raise DataError(f"{arguments.data}: {wrong} findings; {folder / 'check.txt'} lists them")
