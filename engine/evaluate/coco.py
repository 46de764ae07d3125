"""COCO result files and their COCO metrics.

Formats: https://cocodataset.org/#format-results and https://cocodataset.org/#format-data
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from utils.boxes import xyxy2xywh
from utils.errors import ConfigError, DataError
from utils.files import atomic_path

LOGGER = logging.getLogger(__name__)
STATISTICS = 12  # of COCO's summary for boxes; faster-coco-eval appends others

# COCO numbers its categories 1..90 and leaves ten of them out; detectors number the remaining eighty 0..79.
UNUSED_COCO_CATEGORIES = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_CATEGORIES = tuple(k for k in range(1, 91) if k not in UNUSED_COCO_CATEGORIES)
OFFICIAL_ANNOTATIONS = "annotations/instances_val2017.json"


def coco_package() -> tuple[Any, Any]:
    """Return the classes COCO and COCOeval of faster-coco-eval, or of pycocotools where it is not installed."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, COCOeval_faster
    except ImportError:
        LOGGER.info("COCO evaluation by pycocotools (several times faster: pip install faster-coco-eval)")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval


def coco_installed() -> bool:
    """Return whether a package for COCO metrics is installed."""
    return any(importlib.util.find_spec(name) is not None for name in ("faster_coco_eval", "pycocotools"))


def require_coco() -> None:
    """Raise ConfigError, before any work is done, if no package for COCO metrics is installed."""
    if not coco_installed():
        raise ConfigError("--save-json: needs faster-coco-eval or pycocotools: pip install faster-coco-eval")


def image_numbers(paths: Sequence[str | Path]) -> dict[str, int]:
    """Return COCO image ids by path: the file names if they are distinct integers, else 1, 2, 3, ..."""
    stems = [Path(path).stem for path in paths]
    numeric = all(stem.isascii() and stem.isdigit() for stem in stems)
    if numeric and len(set(map(int, stems))) == len(stems):
        return {str(path): int(stem) for path, stem in zip(paths, stems)}
    return {str(path): number for number, path in enumerate(paths, 1)}


def result_rows(detections: torch.Tensor, image_id: int, categories: Sequence[int]) -> list[dict[str, Any]]:
    """Return one entry per detection of an image.

    Args:
        detections: (n, 6) xyxy in pixels of the original image, confidence, class.
        image_id: id of the image.
        categories: category id of each class.
    """
    boxes = xyxy2xywh(detections[:, :4])
    boxes[:, :2] -= boxes[:, 2:] / 2  # COCO boxes start at the upper left corner, not the center
    return [
        {
            "image_id": image_id,
            "category_id": categories[int(label)],
            "bbox": [round(value, 3) for value in box],
            "score": round(confidence, 5),
        }
        for box, confidence, label in zip(boxes.tolist(), detections[:, 4].tolist(), detections[:, 5].tolist())
    ]


def write_json(path: str | Path, content: object) -> None:
    """Write a JSON file atomically."""
    with atomic_path(path) as part, open(part, "w", encoding="utf-8") as stream:
        json.dump(content, stream)


def score(truth: Path | Mapping[str, Any], results: Sequence[Mapping[str, Any]], ids: Sequence[int]) -> list[float]:
    """Return COCO's twelve statistics of detections; mAP50-95 first, mAP50 second.

    Args:
        truth: annotation file, or its content.
        results: entries from `result_rows`.
        ids: ids of the evaluated images.

    Raises:
        DataError: an annotation file that cannot be read, or that lacks images.
    """
    coco_class, eval_class = coco_package()
    with _captured() as output:
        known = coco_class()
        known.dataset = dict(truth) if isinstance(truth, Mapping) else _read(truth)
        known.createIndex()
        _check_images(truth, known.getImgIds(), ids)
        if not results:  # neither package reads an empty list
            LOGGER.info("COCO: no detections, all metrics are 0")
            return [0.0] * STATISTICS
        evaluation = eval_class(known, known.loadRes([dict(row) for row in results]), "bbox")
        evaluation.params.imgIds = sorted(ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    table = [line for line in output.getvalue().splitlines() if line.lstrip().startswith("Average")]
    LOGGER.info("COCO evaluation:\n%s", "\n".join(table[:STATISTICS]))
    return [max(0.0, float(value)) for value in evaluation.stats[:STATISTICS]]


def check_truth(path: Path, ids: Sequence[int]) -> None:
    """Raise DataError, before any work is done, for an annotation file that `score` would refuse."""
    _check_images(path, [image.get("id") for image in _read(path)["images"]], ids)


def _check_images(truth: Path | Mapping[str, Any], known: Sequence[int], ids: Sequence[int]) -> None:
    strangers = set(ids) - set(known)
    if strangers:
        where = truth if isinstance(truth, Path) else "ground truth"
        raise DataError(f"{where}: lacks {len(strangers)} of the images, such as id {min(strangers)}")


@contextlib.contextmanager
def _captured() -> Iterator[io.StringIO]:
    """Collect what pycocotools prints and faster-coco-eval logs, instead of showing it."""
    output = io.StringIO()
    logger, handler = logging.getLogger("faster_coco_eval"), logging.StreamHandler(output)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        with contextlib.redirect_stdout(output):
            yield output
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _read(path: Path) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a COCO annotation file: {error}") from error
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= set(content):
        raise DataError(f"{path}: not a COCO annotation file; images, annotations and categories are needed")
    return content
