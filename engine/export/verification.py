"""Verification that two forms of a detector give the same output: decoded rows, and boxes after NMS.

Stages: training model -> re-parameterized model -> exported file. Each is compared with the one before, so a
difference names the step that caused it.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.export.config import ExportConfig
from engine.export.samples import ImageSource, as_images, random_images
from engine.export.wrapper import ExportGraph, GraphShape
from engine.runtimes.exported import ExportedRuntime
from engine.runtimes.onnxruntime import OnnxRuntime
from models.yolo import DetectionModel
from utils.boxes import box_iou
from utils.errors import ExportError
from utils.files import atomic_path
from utils.nms import non_max_suppression

LOGGER = logging.getLogger(__name__)
DEFAULT_CONF = 0.25
CANDIDATES = 100  # minimum rows per image above the confidence threshold, which is lowered until there are that many
IOU_THRES = 0.45
MAX_DET = 1000
SAME_PX = 0.05  # boxes with sides this close match, however thin they are
IMAGES, NOISES = 4, 2
FREE_SIZES = (
    " (made with --dynamic: a model whose operations depend on the size, such as RepMLPNet with tile_order published, "
    "cannot be exported with free sizes; leave --dynamic out)"
)

Detector = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tolerance:
    """Differences up to which two forms count as the same.

    Attributes:
        row_px: largest difference of a box's center, width or height, in input pixels; None: only reported.
        row_score: largest difference of an objectness or class score; None: only reported.
        iou: boxes after NMS match if their IoU is at least this ...
        score: ... and their confidences differ by at most this.
        matched: fraction of the boxes after NMS that must have a match, on both sides.
        edge_iou, edge_score: this close to a threshold, or to one another, rounding may decide either way.
    """

    row_px: float | None
    row_score: float | None
    iou: float
    score: float
    matched: float
    edge_iou: float
    edge_score: float


TOLERANCES: dict[str, Tolerance] = {
    "float32": Tolerance(row_px=0.05, row_score=5e-4, iou=0.9, score=5e-4, matched=1.0, edge_iou=1e-3, edge_score=5e-4),
    # 11 bits of mantissa: a logit of 8 is known to 1/256, a width of 300 pixels to about one pixel.
    "float16": Tolerance(
        row_px=None, row_score=0.05, iou=0.9, score=0.03, matched=0.98, edge_iou=0.02, edge_score=0.02
    ),
    "int8": Tolerance(None, None, iou=0.5, score=0.25, matched=0.8, edge_iou=0.1, edge_score=0.1),
}


@dataclass(frozen=True)
class OutputDifference:
    """Difference of two forms.

    Attributes:
        stage: the newer form.
        row_px, row_score: largest differences over all rows; infinite when something is not finite; None when the file
            returns boxes only.
        mean_px: mean difference of box centers, widths and heights over all rows.
        reference, found: number of boxes after NMS of the older and the newer form.
        matched: number of pairs among them.
        edge: boxes without a match on a threshold, where rounding decides.
        problems: differences beyond the tolerance; empty = none.
    """

    stage: str
    row_px: float | None = None
    row_score: float | None = None
    mean_px: float | None = None
    reference: int = 0
    found: int = 0
    matched: int = 0
    edge: int = 0
    problems: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, infinities as strings."""
        return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class NmsRule:
    """Settings of an NMS: those of `non_max_suppression`, and a limit per class."""

    conf: float
    iou: float = IOU_THRES
    agnostic: bool = False
    per_class: int = MAX_DET
    per_image: int = MAX_DET

    def apply(self, rows: Tensor) -> list[Tensor]:
        """Return the boxes (n, 6) per image of rows (B, N, 5 + nc)."""
        # The limit per class comes before the limit per image.
        kept = non_max_suppression(rows, self.conf, self.iou, agnostic=self.agnostic, max_det=rows.shape[1])
        return [self._limited(boxes) for boxes in kept]

    def _limited(self, boxes: Tensor) -> Tensor:
        if self.per_class < len(boxes):
            same = (boxes[:, None, 5] == boxes[None, :, 5]) | self.agnostic
            rank = same.tril(-1).sum(1)  # boxes of its class with a higher confidence
            boxes = boxes[rank < self.per_class]
        return boxes[: self.per_image]


def choose_conf(rows: Sequence[Tensor]) -> float:
    """Return a confidence threshold, at most 0.25, that keeps enough boxes of `rows` (B, N, 5 + nc) to compare."""
    scores = torch.cat([(r[..., 4:5] * r[..., 5:]).amax(2).flatten() for r in rows])
    count = min(CANDIDATES * sum(len(r) for r in rows), len(scores))
    value = float(scores.sort(descending=True).values[count - 1])
    return min(DEFAULT_CONF, value) if math.isfinite(value) else DEFAULT_CONF


def compare_rows(
    stage: str, reference: Sequence[Tensor], found: Sequence[Tensor], tolerance: Tolerance, conf: float
) -> OutputDifference:
    """Compare decoded rows, and the boxes that NMS keeps of them.

    Args:
        stage: name of the newer form.
        reference, found: (B, N, 5 + nc) per input.
        tolerance: see `Tolerance`.
        conf: confidence threshold of the NMS.
    """
    if [r.shape for r in reference] != [f.shape for f in found]:
        shapes = f"shapes {[tuple(f.shape) for f in found]} instead of {[tuple(r.shape) for r in reference]}"
        return OutputDifference(stage, math.inf, math.inf, math.inf, problems=(shapes,))
    gaps = [(r.double() - f.double()).abs() for r, f in zip(reference, found)]
    row_px = _largest([gap[..., :4] for gap in gaps])
    row_score = _largest([gap[..., 4:] for gap in gaps])
    finite = math.isfinite(row_px + row_score)
    problems = []
    if tolerance.row_px is not None and not row_px <= tolerance.row_px:
        problems.append(f"boxes are up to {row_px:.3g} px apart (allowed {tolerance.row_px:g})")
    if not finite:
        problems.append("some values are not finite")
    elif tolerance.row_score is not None and row_score > tolerance.row_score:
        problems.append(f"scores are up to {row_score:.3g} apart (allowed {tolerance.row_score:g})")
    boxes = OutputDifference(stage)
    if finite:
        rule = NmsRule(conf)
        boxes = compare_boxes(stage, reference, [rule.apply(f) for f in found], tolerance, rule)
    mean_px = float(torch.cat([gap[..., :4].flatten() for gap in gaps]).mean())
    problems += boxes.problems
    return replace(boxes, row_px=row_px, row_score=row_score, mean_px=mean_px, problems=tuple(problems))


def compare_boxes(
    stage: str,
    reference: Sequence[Tensor],
    found: Sequence[Sequence[Tensor]],
    tolerance: Tolerance,
    nms: NmsRule,
) -> OutputDifference:
    """Match boxes one to one.

    Args:
        stage: name of the newer form.
        reference: rows (B, N, 5 + nc) per input.
        found: boxes after NMS (n, 6) per image, per input.
        tolerance: see `Tolerance`.
        nms: NMS settings for the reference, equal to those of the newer form.
    """
    total = made = matched = edge = 0
    for rows, boxes_per_image in zip(reference, found):
        for old, new in zip(nms.apply(rows), boxes_per_image):
            old_matched, new_matched = match(old, new, tolerance)
            total, made, matched = total + len(old), made + len(new), matched + int(old_matched.sum())
            edge += int(on_edge(old, old_matched, new, new_matched, tolerance, nms).sum())
            edge += int(on_edge(new, new_matched, old, old_matched, tolerance, nms).sum())
    lost = total + made - 2 * matched - edge
    problems: tuple[str, ...] = ()
    if lost > (1 - tolerance.matched) * (total + made):
        allowed = f"{1 - tolerance.matched:.0%}"
        problems = (f"of {total} boxes before and {made} after, {lost} have no match (allowed {allowed})",)
    return OutputDifference(stage, None, None, None, total, made, matched, edge, problems)


def on_edge(
    boxes: Tensor, matched: Tensor, others: Tensor, others_matched: Tensor, tolerance: Tolerance, nms: NmsRule
) -> Tensor:
    """Return the boxes without a match that the other form may lack because of rounding.

    Either the confidence is at the threshold, or below all boxes of the other form where that reached its limit; or the
    other form kept a box that suppresses it and has no lower confidence. That box must have no match (two boxes of
    nearly the same confidence, of which NMS may keep either), or an IoU close to the threshold.

    Args:
        boxes, others: (n, 6) and (m, 6) boxes of the two forms.
        matched, others_matched: (n,) and (m,) bool, from `match`.

    Returns:
        (n,) bool.
    """
    doubtful = boxes[:, 4] <= nms.conf + tolerance.edge_score
    if len(others) >= min(nms.per_image, nms.per_class) and len(others):
        doubtful |= boxes[:, 4] <= others[:, 4].min() + tolerance.edge_score
    if len(boxes) and len(others):
        iou = box_iou(boxes[:, :4], others[:, :4])
        suppressed = iou >= nms.iou - tolerance.edge_iou
        suppressed &= others[None, :, 4] >= boxes[:, None, 4] - tolerance.edge_score
        suppressed &= (boxes[:, None, 5] == others[None, :, 5]) | nms.agnostic
        doubtful |= (suppressed & (~others_matched[None, :] | (iou <= nms.iou + tolerance.edge_iou))).any(1)
    return doubtful & ~matched


def match(a: Tensor, b: Tensor, tolerance: Tolerance) -> tuple[Tensor, Tensor]:
    """Pair boxes (n, 6) and (m, 6) of one class, the best IoU first; return which have a match, (n,) and (m,) bool."""
    matched_a, matched_b = torch.zeros(len(a), dtype=torch.bool), torch.zeros(len(b), dtype=torch.bool)
    if not len(a) or not len(b):
        return matched_a, matched_b
    gap = (a[:, None, :4] - b[None, :, :4]).abs().amax(2)
    iou = torch.where(gap <= SAME_PX, 1.0, box_iou(a[:, :4], b[:, :4]))  # a box without height has no IoU with itself
    allowed = (a[:, None, 5] == b[None, :, 5]) & ((a[:, None, 4] - b[None, :, 4]).abs() <= tolerance.score)
    allowed &= iou >= tolerance.iou
    first, second = allowed.nonzero(as_tuple=True)
    for k in iou[first, second].argsort(descending=True).tolist():
        i, j = int(first[k]), int(second[k])
        if not matched_a[i] and not matched_b[j]:
            matched_a[i] = matched_b[j] = True
    return matched_a, matched_b


def _largest(gaps: Sequence[Tensor]) -> float:
    values = [float(gap.max()) for gap in gaps if gap.numel()]
    return max((v if math.isfinite(v) else math.inf for v in values), default=0.0)


def verification_inputs(source: ImageSource, shape: GraphShape) -> list[Tensor]:
    """Return real images and random images, (b, 3, h, w) float32 in [0, 1] each.

    With free sizes, also at smaller sizes, square and rectangular, in batches of 1 to 3.
    """
    images = source.load(IMAGES, shape.height, shape.width)
    inputs = [as_images(images), random_images(NOISES, images, shape.height, shape.width)]
    if shape.dynamic:
        grid = shape.grid
        cells = shape.height // grid, shape.width // grid
        others = [(1, cells[0], max(cells[1] // 2, 1)), (3, max(cells[0] // 2, 1), max(cells[1] * 3 // 4, 1))]
        others += [(2, 2, 2), (1, cells[0] + 1, cells[1])]
        for batch, rows, columns in others:
            inputs.append(as_images(source.load(batch, rows * grid, columns * grid)))
    return inputs


class Verification:
    """Compares the forms of one detector.

    Args:
        model: training form, in evaluation mode.
        deployed: re-parameterized model.
        inputs: images from `verification_inputs`.
        origin: description of the images.
        device: device of the models.

    Raises:
        ExportError: the outputs of the re-parameterized model differ from those of the training form.
    """

    def __init__(
        self,
        model: DetectionModel,
        deployed: DetectionModel,
        inputs: Sequence[Tensor],
        origin: str,
        device: torch.device,
    ) -> None:
        self.inputs, self.origin, self.device = list(inputs), origin, device
        training = self._run(lambda images: ExportGraph(model).eval()(images.to(device)))
        self.rows = self._run(lambda images: ExportGraph(deployed).eval()(images.to(device)))
        self.conf = self.file_conf = choose_conf(training)
        self.deployment = compare_rows("re-parameterized model", training, self.rows, TOLERANCES["float32"], self.conf)
        if self.deployment.problems:
            raise ExportError(
                "verification failed at stage 1, training model -> re-parameterized model: "
                + "; ".join(self.deployment.problems)
            )

    @torch.no_grad()
    def _run(self, detector: Detector, batch: int | None = None) -> list[Tensor]:
        """Return the output for every input on the CPU, in batches of at most `batch` images."""
        outputs = [[detector(part) for part in images.split(batch or len(images))] for images in self.inputs]
        return [torch.cat(parts).float().cpu() for parts in outputs]

    def of_file(self, name: str, runtime: ExportedRuntime, config: ExportConfig) -> OutputDifference:
        """Compare an exported file with the re-parameterized model.

        Raises:
            ExportError: the outputs differ.
        """
        stage, tolerance = f"{name} file", TOLERANCES[precision(config)]
        if config.nms:
            comparison = self._compare_boxes(stage, runtime, config)
        else:
            rows = self.rows
            if config.layout == "v8":  # without objectness
                rows = [torch.cat((r[..., :4], torch.ones_like(r[..., :1]), r[..., 4:5] * r[..., 5:]), 2) for r in rows]
            comparison = compare_rows(stage, rows, self._run(runtime, runtime.fixed_batch), tolerance, self.conf)
        if comparison.problems:
            raise ExportError(
                f"{name}: verification failed at stage 2, re-parameterized model -> exported file: "
                f"{'; '.join(comparison.problems)}" + (FREE_SIZES if config.dynamic else "")
            )
        return comparison

    def _compare_boxes(self, stage: str, runtime: ExportedRuntime, config: ExportConfig) -> OutputDifference:
        conf = config.conf_thres
        if isinstance(runtime, OnnxRuntime):  # accepts a threshold low enough to compare boxes
            conf = min(conf, self.conf)
            runtime.overrides["conf_thres"] = torch.tensor([conf]).numpy()
        self.file_conf = conf
        found = self._run(runtime.output, runtime.fixed_batch)
        boxes = [[image[image[:, 4] > 0] for image in batch] for batch in found]
        nms = NmsRule(conf, config.iou_thres, config.agnostic_nms, config.topk_per_class, config.topk_all)
        comparison = compare_boxes(stage, self.rows, boxes, TOLERANCES[precision(config)], nms)
        if not comparison.reference:
            LOGGER.warning("%s: no box above --conf-thres %g: the verification compared none", stage, conf)
        return comparison

    def write(
        self,
        path: Path,
        exported_file: str,
        comparison: OutputDifference,
        config: ExportConfig,
        about: Mapping[str, Any],
    ) -> None:
        """Write the record of a verification as JSON."""
        kind = precision(config)
        record = {
            "exported file": exported_file,
            "date": datetime.datetime.now().isoformat(timespec="seconds"),
            "precision": kind,
            **about,
            "inputs": {
                "images": self.origin,
                "shapes": [list(images.shape) for images in self.inputs],
                "random": f"{NOISES} images with the images' mean and deviation per channel",
            },
            "NMS": {"conf": self.conf, "iou": IOU_THRES},
            **({"NMS of the file": {"conf": self.file_conf, "iou": config.iou_thres}} if config.nms else {}),
            "tolerance": {"re-parameterized model": asdict(TOLERANCES["float32"]), "file": asdict(TOLERANCES[kind])},
            "stages": [self.deployment.to_dict(), comparison.to_dict()],
        }
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def precision(config: ExportConfig) -> str:
    """Return the key of `TOLERANCES` for the exported precision."""
    return "int8" if config.int8 else "float16" if config.half else "float32"
