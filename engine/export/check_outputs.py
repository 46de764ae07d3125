"""Verification that two forms of a detector compute the same: rows in pixels and probability, and boxes after NMS.

Stages: training form -> re-parameterized model -> exported file. Each is compared with the one before it, so a
difference names
the step that made it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from utils.boxes import box_iou
from utils.nms import non_max_suppression

DEFAULT_CONF = 0.25
CANDIDATES = 100  # rows per image above the threshold, at least: it is lowered until there are so many
IOU_THRES = 0.45
MAX_DET = 1000
SAME_PX = 0.05  # boxes whose sides are so near are one, however thin they are

Detector = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tolerance:
    """What counts as the same.

    Attributes:
        row_px: largest difference of a box's center, width or height over all rows, in input pixels; None: only
        reported.
        row_score: largest difference of an objectness or class score over all rows; None: only reported.
        iou: boxes after NMS are the same if they overlap at least so much ...
        score: ... and their scores differ by no more than this.
        matched: share of the boxes after NMS that must have their partner, on both sides.
        edge_iou, edge_score: so near to a threshold, or to one another, rounding may decide either way.
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
    """How far two forms are apart.

    Attributes:
        stage: what was compared with the form before it.
        row_px, row_score: largest differences over all rows; infinite when something is not finite; None when the file
            gives boxes only.
        mean_px: mean difference of box centers, widths and heights of rows.
        reference, found: boxes after NMS of either.
        matched: pairs among them.
        edge: boxes without partner that lie on a threshold, so that rounding decides.
        problems: what is beyond the tolerance, in words; empty = the same.
    """

    stage: str
    row_px: float | None
    row_score: float | None
    mean_px: float | None
    reference: int
    found: int
    matched: int
    edge: int
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: infinities as text."""
        return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


@torch.no_grad()
def run(detector: Detector, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Rows (B, N, 5 + nc) of every input (B, 3, H, W), on the CPU."""
    return [detector(images).float().cpu() for images in inputs]


def choose_conf(rows: Sequence[Tensor]) -> float:
    """Return a confidence threshold, at most 0.25, that keeps enough boxes of `rows` (B, N, 5 + nc) to compare."""
    scores = torch.cat([(r[..., 4:5] * r[..., 5:]).amax(2).flatten() for r in rows])
    wanted = min(CANDIDATES * sum(len(r) for r in rows), len(scores))
    value = float(scores.sort(descending=True).values[wanted - 1])
    return min(DEFAULT_CONF, value) if math.isfinite(value) else DEFAULT_CONF


def compare_rows(
    stage: str, reference: Sequence[Tensor], found: Sequence[Tensor], tolerance: Tolerance, conf: float
) -> OutputDifference:
    """Compare decoded rows, and what NMS leaves of them.

    Args:
        stage: name of the newer form.
        reference, found: (B, N, 5 + nc) per input.
        tolerance: see `Tolerance`.
        conf: score threshold of the NMS.
    """
    if [r.shape for r in reference] != [f.shape for f in found]:
        shapes = f"shapes {[tuple(f.shape) for f in found]} instead of {[tuple(r.shape) for r in reference]}"
        return OutputDifference(stage, math.inf, math.inf, math.inf, 0, 0, 0, 0, (shapes,))
    gaps = [(r.double() - f.double()).abs() for r, f in zip(reference, found)]
    row_px = _largest([gap[..., :4] for gap in gaps])
    row_score = _largest([gap[..., 4:] for gap in gaps])
    mean_px = float(torch.cat([gap[..., :4].flatten() for gap in gaps]).mean())
    problems = []
    if tolerance.row_px is not None and not row_px <= tolerance.row_px:
        problems.append(f"boxes are up to {row_px:.3g} px apart (allowed {tolerance.row_px:g})")
    if not math.isfinite(row_px + row_score):
        problems.append("some numbers are not finite")
    elif tolerance.row_score is not None and row_score > tolerance.row_score:
        problems.append(f"scores are up to {row_score:.3g} apart (allowed {tolerance.row_score:g})")
    if not math.isfinite(row_px + row_score):
        return OutputDifference(stage, row_px, row_score, mean_px, 0, 0, 0, 0, tuple(problems))
    kept = [non_max_suppression(f, conf, IOU_THRES, max_det=MAX_DET) for f in found]
    boxes = compare_boxes(stage, reference, kept, tolerance, NmsRule(conf, IOU_THRES))
    problems += boxes.problems
    counts = boxes.reference, boxes.found, boxes.matched, boxes.edge
    return OutputDifference(stage, row_px, row_score, mean_px, *counts, tuple(problems))


@dataclass(frozen=True)
class NmsRule:
    """Settings of a NMS: as `non_max_suppression`, and a limit per class."""

    conf: float
    iou: float
    agnostic: bool = False
    per_class: int = MAX_DET
    per_image: int = MAX_DET

    def apply(self, rows: Tensor) -> list[Tensor]:
        """Boxes (n, 6) per image."""
        kept = non_max_suppression(rows, self.conf, self.iou, agnostic=self.agnostic, max_det=MAX_DET)
        return [self._limited(boxes) for boxes in kept]

    def _limited(self, boxes: Tensor) -> Tensor:
        if self.per_class < len(boxes):
            same = (boxes[:, None, 5] == boxes[None, :, 5]) | self.agnostic
            rank = same.tril(-1).sum(1)  # boxes of its class with a higher score
            boxes = boxes[rank < self.per_class]
        return boxes[: self.per_image]


def compare_boxes(
    stage: str,
    reference: Sequence[Tensor],
    found: Sequence[Sequence[Tensor]],
    tolerance: Tolerance,
    nms_time: NmsRule,
) -> OutputDifference:
    """Match boxes one to one.

    Args:
        stage: name of the newer form.
        reference: rows (B, N, 5 + nc) per input.
        found: boxes after NMS (n, 6) per image, per input.
        tolerance: see `Tolerance`.
        NMS: how boxes are made from the reference, and were made on the other side.
    """
    total = made = matched = edge = 0
    for rows, boxes_of in zip(reference, found):
        for want, got in zip(nms_time.apply(rows), boxes_of):
            partner_want, partner_got = match(want, got, tolerance)
            total, made, matched = total + len(want), made + len(got), matched + int(partner_want.sum())
            edge += int(on_edge(want, partner_want, got, partner_got, tolerance, nms_time).sum())
            edge += int(on_edge(got, partner_got, want, partner_want, tolerance, nms_time).sum())
    lost = total + made - 2 * matched - edge
    problems: tuple[str, ...] = ()
    if lost > (1 - tolerance.matched) * (total + made):
        allowed = f"{1 - tolerance.matched:.0%}"
        problems = (f"of {total} boxes before and {made} after, {lost} have no partner (allowed {allowed})",)
    return OutputDifference(stage, None, None, None, total, made, matched, edge, problems)


def on_edge(boxes: Tensor, partner: Tensor, others: Tensor, others_partner: Tensor, t: Tolerance, s: NmsRule) -> Tensor:
    """Which boxes without partner the other side may rightly not have, because rounding decided there.

    Either the score lies on the threshold, or below all that the other side kept where it kept as many as it may; or
    the other side kept a box that suppresses it and whose score is not lower. That one must have no partner here (two
    boxes of nearly the same score of which either may win), or overlap by just about the threshold.

    Args:
        boxes, others: (n, 6) and (m, 6), what either side kept.
        partner, others_partner: (n,) and (m,) bool, from `match`.

    Returns:
        (n,) bool.
    """
    doubtful = boxes[:, 4] <= s.conf + t.edge_score
    if len(others) >= min(s.per_image, s.per_class) and len(others):
        doubtful |= boxes[:, 4] <= others[:, 4].min() + t.edge_score
    if len(boxes) and len(others):
        overlap = box_iou(boxes[:, :4], others[:, :4])
        after_nms = (overlap >= s.iou - t.edge_iou) & (others[None, :, 4] >= boxes[:, None, 4] - t.edge_score)
        after_nms &= (boxes[:, None, 5] == others[None, :, 5]) | s.agnostic
        doubtful |= (after_nms & (~others_partner[None, :] | (overlap <= s.iou + t.edge_iou))).any(1)
    return doubtful & ~partner


def match(a: Tensor, b: Tensor, tolerance: Tolerance) -> tuple[Tensor, Tensor]:
    """Pair boxes (n, 6) and (m, 6) of one class, the best overlap first; who has a partner, (n,) and (m,) bool."""
    has_a, has_b = torch.zeros(len(a), dtype=torch.bool), torch.zeros(len(b), dtype=torch.bool)
    if not len(a) or not len(b):
        return has_a, has_b
    overlap = box_iou(a[:, :4], b[:, :4])
    gap = (a[:, None, :4] - b[None, :, :4]).abs().amax(2)
    overlap = torch.where(gap <= SAME_PX, 1.0, overlap)  # a box without height overlaps nothing, not even itself
    allowed = (a[:, None, 5] == b[None, :, 5]) & ((a[:, None, 4] - b[None, :, 4]).abs() <= tolerance.score)
    allowed &= overlap >= tolerance.iou
    first, second = allowed.nonzero(as_tuple=True)
    for k in overlap[first, second].argsort(descending=True).tolist():
        i, j = int(first[k]), int(second[k])
        if not has_a[i] and not has_b[j]:
            has_a[i] = has_b[j] = True
    return has_a, has_b


def _largest(gaps: Sequence[Tensor]) -> float:
    values = [float(gap.max()) for gap in gaps if gap.numel()]
    return max((v if math.isfinite(v) else math.inf for v in values), default=0.0)
