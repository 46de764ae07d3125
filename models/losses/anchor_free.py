"""Task-aligned assignment of targets to grid points, and the loss of the anchor-free head.

Sources: TOOD (https://arxiv.org/abs/2108.07755) for assignment and soft targets, GFL (https://arxiv.org/abs/2006.04388)
for the distribution focal loss, CIoU (https://arxiv.org/abs/1911.08287).

Letters in comments: B images, N points of all levels, R bins per distance, C classes, M targets, P candidates (pairs of
a target and a point inside it), K candidates of the highest rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.losses.base import LossModule, LossOutput
from models.points import boxes_around, distances
from utils.boxes import bbox_iou, xywh2xyxy

TOP_K = 10  # points per target
ALPHA, BETA = 0.5, 6.0  # exponents of class confidence and IoU in the alignment metric
MIN_SIDE = 8.0  # pixels: smaller targets are widened to it when their candidates are collected
MIN_IOU = 1e-9


@dataclass(frozen=True)
class AnchorFreeLossConfig:
    """Gains of the loss.

    Attributes:
        box, cls, dfl: gains of the three parts (`free_box`, `free_cls`, `free_dfl` in hyperparameter files).
        class_weights: factor on the class loss of the positives of each class; None = 1 for all.
    """

    box: float = 7.5
    cls: float = 0.5
    dfl: float = 1.5
    class_weights: tuple[float, ...] | None = None

    @classmethod
    def from_hyp(cls, hyp: Mapping[str, Any], class_weights: tuple[float, ...] | None = None) -> AnchorFreeLossConfig:
        """Read the gains of a hyperparameter file; those that it does not set keep their defaults."""
        gains = {name: float(hyp[f"free_{name}"]) for name in ("box", "cls", "dfl") if f"free_{name}" in hyp}
        return cls(**gains, class_weights=class_weights)


class Candidates(NamedTuple):
    """Pairs of a target and a point, P rows grouped by target.

    Attributes:
        target, image, point, cls: (P,) int64: target, its image, point among those of all levels, class of the target.
        box: (P, 4) float32 target xyxy in pixels.
        center: (P, 2) float32 the point in pixels.
        stride: (P, 1) float32 stride of its level in pixels.
    """

    target: Tensor
    image: Tensor
    point: Tensor
    cls: Tensor
    box: Tensor
    center: Tensor
    stride: Tensor

    def take(self, rows: Tensor) -> Candidates:
        """Return the candidates of the given rows (k,)."""
        return Candidates(*(column[rows] for column in self))

    def to(self, device: torch.device) -> Candidates:
        """Copy to a device; to a GPU from page-locked memory, without waiting for its queue."""
        if self.target.device == device:
            return self
        integers, floats = torch.stack(self[:4]), torch.cat(self[4:], 1)  # (4, P), (P, 7)
        if device.type == "cuda":
            integers, floats = integers.pin_memory(), floats.pin_memory()
        integers, floats = (values.to(device, non_blocking=True) for values in (integers, floats))
        return Candidates(*integers, *floats.split((4, 2, 1), dim=1))


def find_candidates(
    targets: Tensor, sizes: Sequence[tuple[int, int]], strides: Sequence[int], min_side: float = MIN_SIDE
) -> Candidates:
    """Collect the points inside each target by ranges of cells, never as a matrix of targets and points.

    Args:
        targets: (M, 6) float32 image, class, xyxy in pixels, on the CPU.
        sizes: height and width of each level in cells.
        strides: pixels per cell, per level.
        min_side: sides below are widened to it around the center of the target.

    Returns:
        The candidates, ordered by target, level, y, x.
    """
    boxes = targets[:, 2:]
    center, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).clamp(min=min_side) / 2
    parts, first = [], 0
    for (height, width), stride in zip(sizes, strides, strict=True):
        # Point i is inside if low < (i + 0.5) * stride < high.
        start = ((center - half) / stride - 0.5).floor().long().add(1).clamp(min=0)
        end = ((center + half) / stride - 0.5).ceil().long()
        end = torch.minimum(end, torch.tensor([width, height]))
        extent = (end - start).clamp(min=0)
        count = extent.prod(1)
        target = torch.arange(len(targets)).repeat_interleave(count)
        within = torch.arange(len(target)) - (count.cumsum(0) - count)[target]
        columns = extent[target, 0]
        x, y = start[target, 0] + within % columns, start[target, 1] + within // columns
        at = torch.stack((x, y), 1)
        parts.append((target, first + y * width + x, (at + 0.5) * stride, torch.full((len(target), 1), float(stride))))
        first += height * width
    target, point, xy, stride_column = (torch.cat(columns) for columns in zip(*parts, strict=True))
    order = target.argsort(stable=True)
    target = target[order]
    image, label = targets[target, :2].long().unbind(1)
    return Candidates(target, image, point[order], label, boxes[target], xy[order].float(), stride_column[order])


class Assignment(NamedTuple):
    """Positives with their soft targets.

    Attributes:
        rows: K candidates, at most `TOP_K` per target.
        weight: (K,) float32 soft target of the class in [0, 1]; 0 for a point that was given to another target.
    """

    rows: Candidates
    weight: Tensor


@torch.no_grad()
def assign(raw: Tensor, candidates: Candidates, num_targets: int, bins: Tensor) -> Assignment:
    """Choose the points of each target by alignment of class and box (TOOD, equations 1 and 2).

    With u = max(CIoU, 0) the metric is t = s^0.5 * u^6, computed as a logarithm, since it would underflow. The ten
    candidates of the highest rank are chosen, without a threshold; a point chosen by several targets goes to the one
    of the larger u. The soft target is t / max t * max u over the points of the target.

    Args:
        raw: (B, N, 4R + C) distance and class logits.
        candidates: grouped by target, on the CPU. Counts are taken from them: a GPU is not waited for.
        num_targets: M.
        bins: (R,) 0, 1, ..., R - 1.
    """
    count = torch.bincount(candidates.target, minlength=num_targets)
    rank = torch.arange(len(candidates.target)) - (count.cumsum(0) - count)[candidates.target]
    among_best = (rank < TOP_K).nonzero()[:, 0].to(raw.device, non_blocking=True)
    rows = candidates.to(raw.device)
    boxes = _boxes(raw[rows.image, rows.point, : 4 * len(bins)], rows, bins)
    iou = bbox_iou(boxes, rows.box, xywh=False, CIoU=True).clamp(min=0)
    logit = raw[rows.image, rows.point, 4 * len(bins) + rows.cls].float()
    metric = ALPHA * F.logsigmoid(logit) + BETA * iou.clamp(min=MIN_IOU).log()
    chosen = _sorted(rows.target, metric)[among_best]
    rows, iou, metric = rows.take(chosen), iou[chosen], metric[chosen]

    point = rows.image * raw.shape[1] + rows.point
    order = _sorted(point, iou)
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = point[order][1:] != point[order][:-1]
    won = torch.zeros_like(first).index_put_((order,), first)
    best_metric = metric.new_full((num_targets,), -torch.inf).scatter_reduce(
        0, rows.target, torch.where(won, metric, -torch.inf), "amax"
    )
    best_iou = iou.new_zeros(num_targets).scatter_reduce(0, rows.target, torch.where(won, iou, 0.0), "amax")
    weight = (metric - best_metric[rows.target]).exp() * best_iou[rows.target]
    return Assignment(rows, torch.where(won, weight, 0.0))


def _sorted(group: Tensor, value: Tensor) -> Tensor:
    """Return the order by group, and by falling value within each; equal values keep their order."""
    order = value.argsort(descending=True, stable=True)
    return order[group[order].argsort(stable=True)]


def _boxes(logits: Tensor, rows: Candidates, bins: Tensor) -> Tensor:
    """Decode distance logits (K, 4R) at the points of candidates to xyxy in pixels, float32."""
    return boxes_around(rows.center, distances(logits.float(), bins) * rows.stride)


class AnchorFreeLoss(LossModule):
    """Box (CIoU), class (binary cross-entropy on soft targets) and distribution focal loss of the anchor-free head.

    Each part is a sum over the batch divided by Z = max(sum of soft targets, 1). In a distributed training the sum is
    averaged over the processes, so that the gradients equal those of one process with the whole batch.

    Args:
        strides: pixels per cell, per level.
        num_classes: C.
        reg_max: bins per distance R; the third part is 0 for R = 1.
        config: gains.
        mean: mean of a 0-d tensor over the processes, applied in training mode.
    """

    names: ClassVar[tuple[str, str, str]] = ("box", "cls", "dfl")
    bins: Tensor
    gains: Tensor
    class_weights: Tensor | None

    def __init__(
        self,
        strides: Sequence[int],
        num_classes: int,
        reg_max: int,
        config: AnchorFreeLossConfig,
        mean: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.strides, self.num_classes, self.reg_max, self.mean = tuple(strides), num_classes, reg_max, mean
        weights = None if config.class_weights is None else torch.tensor(config.class_weights)
        # Buffers, so that no step copies constants to the device.
        self.register_buffer("bins", torch.arange(reg_max, dtype=torch.float32), persistent=False)
        self.register_buffer("gains", torch.tensor((config.box, config.cls, config.dfl)), persistent=False)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, raw: Sequence[Tensor], targets: Tensor) -> LossOutput:
        """See `LossModule`; `raw` is (B, 1, H_i, W_i, 4R + C) per level.

        Equal targets count once, and the order of the targets has no effect.
        """
        device = raw[0].device
        if self.gains.device != device:
            self.to(device)
        sizes = [(level.shape[2], level.shape[3]) for level in raw]
        width, height = sizes[0][1] * self.strides[0], sizes[0][0] * self.strides[0]
        targets = targets.detach().cpu().float().unique(dim=0)
        boxes = xywh2xyxy(targets[:, 2:] * torch.tensor([width, height, width, height]))
        targets = torch.cat((targets[:, :2], boxes), 1)
        with torch.autocast(device.type, enabled=False):
            flat = torch.cat([level.flatten(1, 3) for level in raw], 1)  # (B, N, 4R + C)
            candidates = find_candidates(targets, sizes, self.strides)
            rows, weight = assign(flat.detach(), candidates, len(targets), self.bins)
            parts = self._parts(flat, rows, weight) * self.gains
            return LossOutput(parts.sum() * len(flat), parts.detach())

    def _parts(self, flat: Tensor, rows: Candidates, weight: Tensor) -> Tensor:
        """Return box, class and distribution focal loss (3,), without gains."""
        total = weight.sum()
        if self.mean is not None and self.training:
            total = self.mean(total)
        picked = flat[rows.image, rows.point].float()  # (K, 4R + C)
        logits, classes = picked.split((4 * self.reg_max, self.num_classes), dim=1)
        iou = bbox_iou(_boxes(logits, rows, self.bins), rows.box, xywh=False, CIoU=True)
        box = ((1 - iou) * weight).sum()
        # Binary cross-entropy of logit z and soft target y: softplus(z) - y z; only positives have y > 0.
        logit = classes.gather(1, rows.cls[:, None])[:, 0]
        cls = F.softplus(flat[..., 4 * self.reg_max :].float()).sum() - (weight * logit).sum()
        if self.class_weights is not None:
            extra = (self.class_weights[rows.cls] - 1) * (weight > 0)
            cls = cls + (extra * (F.softplus(logit) - weight * logit)).sum()
        dfl = (self._focal(logits, rows) * weight).sum() if self.reg_max > 1 else torch.zeros_like(box)
        return torch.stack((box, cls, dfl)) / total.clamp(min=1)

    def _focal(self, logits: Tensor, rows: Candidates) -> Tensor:
        """Return the distribution focal loss (K,), mean over the four distances (GFL, equation 6)."""
        ltrb = torch.cat((rows.center - rows.box[:, :2], rows.box[:, 2:] - rows.center), 1) / rows.stride
        ltrb = ltrb.clamp(0, self.reg_max - 1.01)
        low = ltrb.long()
        upper = ltrb - low  # weight of bin low + 1
        log_p = logits.unflatten(1, (4, self.reg_max)).log_softmax(-1)
        at_low, at_high = (log_p.gather(-1, bins[..., None])[..., 0] for bins in (low, low + 1))
        return -((1 - upper) * at_low + upper * at_high).mean(1)
