"""Task-aligned assignment of targets to grid points, and the loss of the anchor-free head.

Sources: TOOD (https://arxiv.org/abs/2108.07755) for assignment and soft targets, GFL (https://arxiv.org/abs/2006.04388)
for the distribution focal loss, CIoU (https://arxiv.org/abs/1911.08287).

Letters in comments: B images, N points of all levels, R bins per distance, C classes, M targets, P candidates (pairs of
a target and a point inside it). Everything that depends on the candidates alone is computed on the CPU, so that the
host never waits for a GPU. The rest is one pass over the P candidates on a GPU, most of which get the weight 0.
Distances are decoded once per point, however many targets contain it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.losses.base import LossModule, LossOutput
from models.points import distances
from utils.boxes import xywh2xyxy

TOP_K = 10  # points per target
ALPHA, BETA = 0.5, 6.0  # exponents of class confidence and IoU in the alignment metric
MIN_SIDE = 8.0  # pixels: smaller targets are widened to it, or to the finest stride, to collect their candidates
TIE = 0.01  # pixels more, so that a target of this side in the middle of grid points contains them all, not none
MIN_IOU = 1e-9
EPS = 1e-7  # added to denominators of the CIoU, as in `utils.boxes`
METRIC_RANGE = 2048  # more than the span of the logarithm of the metric


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


def find_candidates(targets: Tensor, sizes: Sequence[tuple[int, int]], strides: Sequence[int]) -> Candidates:
    """Collect the points inside each target by ranges of cells, never as a matrix of targets and points.

    Every target whose center is inside the image has at least one: sides below `MIN_SIDE` and below the finest stride
    are widened around the center.

    Args:
        targets: (M, 6) float32 image, class, xyxy in pixels, on the CPU.
        sizes: height and width of each level in cells.
        strides: pixels per cell, per level.

    Returns:
        The candidates, ordered by target, level, y, x.
    """
    boxes = targets[:, 2:]
    min_side = max(MIN_SIDE, min(strides)) + TIE
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


class Pairs(NamedTuple):
    """Candidates prepared for the loss: all that does not depend on the network.

    A box is given by its signed corners (-x1, -y1, x2, y2): the sum of opposite ones is a side.

    Attributes:
        place, cls, target: (P,) int64 row among the B * N predictions, class, target.
        row: (P,) int64 row among the distinct places.
        sort_key: (P,) int64 target times `METRIC_RANGE`.
        is_best: (P,) int64 1 where the rank within the target, after sorting, is below `TOP_K`, else 0.
        reverse_row: (P,) int64 2^31 - 1 - row.
        bins: (P, 4, 2) int64 positions of the two bins around each distance among the logits of the distinct places.
        corners: (P, 4) float32 target in pixels.
        sides: (P, 2) float32 its width and height.
        area: (P,) float32 its area, plus `EPS`.
        angle: (P,) float32 2 / pi times the arc tangent of width / height.
        center: (P, 4) float32 the point, as a box without area.
        stride: (P, 1) float32 pixels per cell.
        bin_weight: (P, 4, 2) float32 weight of the two bins in the mean over four distances.
    """

    place: Tensor
    cls: Tensor
    target: Tensor
    row: Tensor
    sort_key: Tensor
    is_best: Tensor
    reverse_row: Tensor
    bins: Tensor
    corners: Tensor
    sides: Tensor
    area: Tensor
    angle: Tensor
    center: Tensor
    stride: Tensor
    bin_weight: Tensor


def prepare(candidates: Candidates, shape: tuple[int, int], reg_max: int, device: torch.device) -> tuple[Pairs, Tensor]:
    """Compute what the loss needs of candidates, on the CPU, and copy it in three tensors without waiting.

    Args:
        candidates: P of them.
        shape: B, N.
        reg_max: R.
        device: of the predictions.

    Returns:
        The pairs, and the distinct places (U,) int64 in ascending order.
    """
    target, image, point, cls, box, center, stride = candidates
    row = torch.arange(len(target))
    count = torch.bincount(target)
    rank = row - (count.cumsum(0) - count)[target]
    place, sort_key = image * shape[1] + point, target * METRIC_RANGE
    taken = torch.zeros(shape[0] * shape[1], dtype=torch.bool).index_fill_(0, place, True)
    places, distinct_row = taken.nonzero()[:, 0], (taken.cumsum(0) - 1)[place]
    integers = torch.stack((place, cls, target, distinct_row, sort_key, rank < TOP_K, 2**31 - 1 - row), 1)

    corners, centers = torch.cat((-box[:, :2], box[:, 2:]), 1), torch.cat((-center, center), 1)
    sides = box[:, 2:] - box[:, :2]
    angle = torch.atan2(*sides.split(1, dim=1)) * (2 / math.pi)
    ltrb = ((corners - centers) / stride).clamp(0, max(reg_max - 1.01, 0))
    low = ltrb.floor()
    upper = ltrb - low  # weight of bin low + 1 (GFL, equation 6)
    bins, bin_weight = (torch.stack(columns, 2).flatten(1) for columns in ((low, low + 1), (1 - upper, upper)))

    side = torch.arange(4).repeat_interleave(2)
    integers = torch.cat((integers, bins.long() + (4 * distinct_row[:, None] + side) * reg_max), 1)
    floats = torch.cat((corners, sides, sides.prod(1, keepdim=True) + EPS, angle, centers, stride, bin_weight / 4), 1)
    if device.type == "cuda":
        integers, floats, places = integers.pin_memory(), floats.pin_memory(), places.pin_memory()
    integers, floats, places = (values.to(device, non_blocking=True) for values in (integers, floats, places))
    corners, sides, area, angle, centers, stride, bin_weight = floats.split((4, 2, 1, 1, 4, 1, 8), dim=1)
    columns = [*integers[:, :7].unbind(1), integers[:, 7:].unflatten(1, (4, 2))]
    columns += [corners, sides, area[:, 0], angle[:, 0], centers, stride, bin_weight.unflatten(1, (4, 2))]
    return Pairs(*columns), places


def _opposite_sums(corners: Tensor) -> Tensor:
    """Return the sums of opposite signed corners (P, 4): width and height (P, 2)."""
    low, high = corners.split(2, dim=1)
    return low + high


def paired_ciou(corners: Tensor, pairs: Pairs) -> Tensor:
    """Compute the CIoU (P,) of predicted boxes, as signed corners (P, 4), and their targets; float32.

    The same as `utils.boxes.bbox_iou` in half the operations (each is a kernel launch), since the targets are prepared
    and with r = max(g - p, 0) the corners of the intersection are g - r, those of the hull p + r.
    """
    gap = pairs.corners - corners
    beyond = _opposite_sums(gap.relu())
    sides = _opposite_sums(corners)
    width, height = sides.unbind(1)
    inter_w, inter_h = (pairs.sides - beyond).relu().unbind(1)
    intersection = inter_w * inter_h
    iou = intersection / (torch.addcmul(pairs.area, width, height) - intersection)
    low, high = gap.split(2, dim=1)
    squares = torch.stack((high - low, sides + beyond), 1).square().sum(2)
    center_distance2, diagonal2 = squares.unbind(1)  # the first one times 4
    v = torch.sub(pairs.angle, torch.atan2(width, height + EPS), alpha=2 / math.pi).square()
    with torch.no_grad():
        alpha = v / (v - iou + (1 + EPS))
    return torch.addcdiv(torch.addcmul(iou, alpha, v, value=-1), center_distance2, diagonal2 + EPS, value=-0.25)


@torch.no_grad()
def assign(iou: Tensor, logit: Tensor, pairs: Pairs, num_targets: int, num_places: int) -> Tensor:
    """Choose the points of each target by alignment of class and box (TOOD, equations 1 and 2).

    With u = max(CIoU, 0) the metric is t = s^0.5 * u^6, computed as a logarithm, since it would underflow. The ten
    candidates of the highest rank are chosen, without a threshold; a point chosen by several targets goes to the one
    of the larger u, the first of equal ones.

    Args:
        iou: (P,) float32 CIoU of the predicted box and the target.
        logit: (P,) float32 class logit of the point for the class of the target.
        pairs: the candidates.
        num_targets: M.
        num_places: B * N.

    Returns:
        (P,) float32 soft targets: t / max t * max u over the points of the target; 0 for candidates not chosen.
    """
    u = iou.clamp(min=MIN_IOU)
    metric = torch.add(ALPHA * F.logsigmoid(logit), u.log(), alpha=BETA)
    # Sorted by target, then by descending metric: in float64 both fit into one key.
    order = (pairs.sort_key - metric.clamp(min=-METRIC_RANGE / 2).double()).argsort(stable=True)
    chosen = torch.empty_like(order).scatter_(0, order, pairs.is_best)

    # The bits of a positive float32 are ordered like its value: u and the row fit into one int64.
    claim = torch.add(pairs.reverse_row, u.view(torch.int32), alpha=2**31) * chosen
    largest = claim.new_ones(num_places).scatter_reduce_(0, pairs.place, claim, "amax")
    lost = claim != largest[pairs.place]

    values = torch.stack((metric, u), 1).masked_fill_(lost[:, None], -METRIC_RANGE)
    target = pairs.target[:, None].expand(-1, 2)
    best = values.new_full((num_targets, 2), -METRIC_RANGE).scatter_reduce_(0, target, values, "amax")
    best_metric, best_u = best[pairs.target].unbind(1)
    return ((metric - best_metric).exp() * best_u).masked_fill_(lost, 0)


class AnchorFreeLoss(LossModule):
    """Box (CIoU), class (binary cross-entropy on soft targets) and distribution focal loss of the anchor-free head.

    Each part is a sum over the batch divided by Z = max(sum of soft targets, 1). With W processes Z is that of all of
    them divided by W, so that the averaged gradients times W equal those of one process with the whole batch.

    Args:
        strides: pixels per cell, per level.
        num_classes: C.
        reg_max: bins per distance R; the third part is 0 for R = 1.
        config: gains.
        mean: mean of a 0-d tensor over the processes, applied in training mode.
        processes: number of processes that `mean` is over.
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
        processes: int = 1,
    ) -> None:
        super().__init__()
        self.strides, self.num_classes, self.reg_max = tuple(strides), num_classes, reg_max
        self.mean, self.processes = mean, processes
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
        shape = len(raw[0]), sum(h * w for h, w in sizes)
        pairs, places = prepare(find_candidates(targets, sizes, self.strides), shape, self.reg_max, device)
        with torch.autocast(device.type, enabled=False):
            flat = torch.cat([level.flatten(1, 3) for level in raw], 1).flatten(0, 1)  # (B * N, 4R + C)
            parts = self._parts(flat, pairs, places, len(targets)) * self.gains
            return LossOutput(parts.sum() * len(raw[0]), parts.detach())

    def _parts(self, flat: Tensor, pairs: Pairs, places: Tensor, num_targets: int) -> Tensor:
        """Return box, class and distribution focal loss (3,), without gains."""
        box_logits, cls_logits = flat.split((4 * self.reg_max, self.num_classes), dim=1)
        cls_logits = cls_logits.float()
        on_cpu = flat.device.type == "cpu"
        with torch.set_grad_enabled(not on_cpu and torch.is_grad_enabled()):
            picked, logit, iou = self._predictions(box_logits[places], cls_logits, pairs)
        weight = assign(iou, logit, pairs, num_targets, len(flat))
        if on_cpu:  # nothing to wait for: a second pass over the positives alone costs less than gradients of all pairs
            positive = weight.nonzero()[:, 0]
            pairs, weight = Pairs(*(column[positive] for column in pairs)), weight[positive]
            row = torch.arange(len(positive))
            pairs = pairs._replace(row=row, bins=pairs.bins + 4 * self.reg_max * (row - pairs.row)[:, None, None])
            picked, logit, iou = self._predictions(box_logits[pairs.place], cls_logits, pairs)
        total = weight.sum()
        # Binary cross-entropy of logit z and soft target y: softplus(z) - y z; only positives have y > 0.
        cls = F.softplus(cls_logits).sum()
        if self.class_weights is not None:
            extra = (self.class_weights[pairs.cls] - 1) * (weight > 0)
            cls = cls + extra.dot(F.softplus(logit) - weight * logit)
        likelihood = self._log_likelihood(picked, pairs) if self.reg_max > 1 else torch.zeros_like(iou)
        # `bins[0]` is 0.
        sums = torch.stack((total, cls, self.bins[0])) - torch.stack((iou, logit, likelihood)) @ weight
        z = total if self.mean is None or not self.training else self.mean(total)
        return sums / z.clamp(min=1 / self.processes if self.training else 1)

    def _predictions(self, logits: Tensor, cls_logits: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """Decode the distances of distinct points, and pair them with targets.

        Args:
            logits: (U, 4R) distance logits; `pairs.row` are rows of it.
            cls_logits: (B * N, C) float32.
            pairs: P of them.

        Returns:
            The distance logits (U, 4R) float32, the logit of the target's class (P,) and the CIoU (P,) of the pairs.
        """
        logits = logits.float()
        corners = torch.addcmul(pairs.center, distances(logits, self.bins).index_select(0, pairs.row), pairs.stride)
        return logits, cls_logits[pairs.place, pairs.cls], paired_ciou(corners, pairs)

    def _log_likelihood(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Return the negative distribution focal loss (P,), mean over the four distances (GFL, equation 6)."""
        log_p = logits.unflatten(1, (4, self.reg_max)).log_softmax(-1).flatten()
        picked = log_p.index_select(0, pairs.bins.flatten()).view_as(pairs.bin_weight)
        return (picked * pairs.bin_weight).sum((1, 2))
