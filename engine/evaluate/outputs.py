"""Output files of a validation besides plots: label files, a COCO result file, and the run folder itself."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.config import DataConfig
from data.formats.coco import annotation_file
from data.formats.detect_format import AnnotatedSource, Source, coco_ids
from data.labels.labels import Annotations
from engine.evaluate import coco as coco_eval
from engine.evaluate.accumulator import ImageOutcome
from utils.boxes import xyxy2xywhn
from utils.files import atomic_path, increment_path, make_folder, unique_names, warn_of_earlier_files

LOGGER = logging.getLogger(__name__)


# ---- run folder -----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """An incomplete run folder.

    Attributes:
        folder: temporary folder to write to.
        final: final path, set when the run succeeds: `wanted`, or the next free name.
    """

    folder: Path
    final: Path


@contextmanager
def run_folder(wanted: Path, exist_ok: bool = False) -> Iterator[Run]:
    """Yield a temporary folder; rename it when the block succeeds, else remove it with its files.

    Args:
        wanted: such as `runs/val/exp`; if it exists, the next free number is appended.
        exist_ok: move the files into `wanted` itself and overwrite those of the same name.
    """
    make_folder(wanted.parent)
    folder = Path(tempfile.mkdtemp(prefix=f".{wanted.name}.", dir=wanted.parent))
    run = Run(folder, wanted)
    try:
        yield run
        folder.chmod(0o777 & ~_umask())  # mkdtemp makes folders private
        run.final = increment_path(wanted, exist_ok)
        if run.final.exists():
            _move_into(folder, run.final)
        else:
            os.replace(folder, run.final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move_into(source: Path, target: Path) -> None:
    places = {path: target / path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    for path, place in places.items():
        make_folder(place.parent)
        os.replace(path, place)
    warn_of_earlier_files(target, set(places.values()))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---- label files ----------------------------------------------------------------------------------------------------


@dataclass
class TextSink:
    """Collects detections as YOLO label files: `class x y w h [confidence]`, normalized by the original image's size.

    Attributes:
        confidence: append the confidence as sixth value.
    """

    confidence: bool = False
    lines: dict[str, list[str]] = field(default_factory=dict)

    def __call__(self, outcome: ImageOutcome) -> None:
        """Add the detections of one image."""
        height, width = outcome.shape
        found = outcome.detections
        boxes = xyxy2xywhn(found[:, :4], w=width, h=height)
        columns = (found[:, 5:], boxes, found[:, 4:5]) if self.confidence else (found[:, 5:], boxes)
        self.lines[outcome.path] = [" ".join(f"{v:g}" for v in row) for row in torch.cat(columns, 1).tolist()]

    def write(self, folder: Path) -> None:
        """Write one file per image, an empty one without detections."""
        make_folder(folder)
        names = unique_names(map(Path, self.lines))
        for path, lines in self.lines.items():
            with atomic_path(folder / f"{Path(names[Path(path)]).stem}.txt") as part:
                part.write_text("".join(line + "\n" for line in lines))
        LOGGER.info("%d label files", len(self.lines))


# ---- COCO -----------------------------------------------------------------------------------------------------------


def _ids_of_file(
    sources: Sequence[Source], ids: dict[str, int], categories: tuple[int, ...]
) -> tuple[dict[str, int], tuple[int, ...]]:
    """Return image ids by path and category ids by class as a single COCO file has them, else those given."""
    if len(sources) != 1 or not isinstance(sources[0], AnnotatedSource) or sources[0].kind != "coco":
        return ids, categories
    images, classes = coco_ids(sources[0])
    if not all(isinstance(image_id, int) for image_id in images.values()):
        return ids, categories  # COCO's metrics need integers
    unused = max(classes.values(), default=0) + 1  # classes that the file has no category for
    return (
        {path: images[Path(path)] for path in ids},
        tuple(classes.get(number, unused + number) for number in categories),
    )


@dataclass
class CocoSink:
    """Collects detections for a COCO result file and evaluates them.

    Attributes:
        ids: COCO image id by path.
        categories: category id by class.
        truth: COCO ground truth or its file; None without labels.
    """

    ids: Mapping[str, int]
    categories: Sequence[int]
    truth: Mapping[str, Any] | Path | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def check() -> None:
        """Raise ConfigError if no package for COCO metrics is installed."""
        coco_eval.require_coco()

    @classmethod
    def for_data(
        cls, data: DataConfig, annotations: Annotations, names: Mapping[int, str], sources: Sequence[Source] = ()
    ) -> CocoSink:
        """Return the sink of a dataset: COCO's own ids and annotations for COCO, generated ones otherwise.

        Args:
            data, annotations: the dataset and the images of the split.
            names: class names by number.
            sources: sources of the split (none with --single-cls); the ids of a single COCO file are kept.
        """
        records = annotations.records
        ids = coco_eval.image_numbers([record.path for record in records])
        is_coco = data.file.name == "coco.yaml" and len(names) == len(coco_eval.COCO_CATEGORIES)
        categories = coco_eval.COCO_CATEGORIES if is_coco else tuple(range(len(names)))
        if not is_coco:
            ids, categories = _ids_of_file(sources, ids, categories)
        official = data.root / coco_eval.OFFICIAL_ANNOTATIONS
        truth: Mapping[str, Any] | Path | None = None
        if is_coco and official.is_file() and all("val2017" in record.path.parts for record in records):
            coco_eval.check_truth(official, list(ids.values()))
            truth = official
        elif annotations.report.boxes:
            images = [(ids[str(record.path)], record.path.name, record) for record in records]
            truth = annotation_file(images, categories, names, polygons=False)
        return cls(ids, categories, truth)

    def __call__(self, outcome: ImageOutcome) -> None:
        """Add the detections of one image."""
        self.rows += coco_eval.result_rows(outcome.detections, self.ids[outcome.path], self.categories)

    def write(self, path: Path) -> tuple[float, ...] | None:
        """Write the results (and a generated ground truth beside them), and evaluate them.

        Returns:
            COCO's twelve metrics, mAP50-95 and mAP50 first; None without labels.
        """
        coco_eval.write_json(path, self.rows)
        if self.truth is None:
            LOGGER.warning("%s: written, but not evaluated: this split has no labels", path.name)
            return None
        if not isinstance(self.truth, Path):
            coco_eval.write_json(path.with_name("ground_truth.json"), self.truth)
        return tuple(coco_eval.score(self.truth, self.rows, list(self.ids.values())))
