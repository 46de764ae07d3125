"""Target assignment and the detection loss of YOLOv5. The loss depends on anchors and strides, not on a model.

Letters in comments: B images, A anchors per level, Y and X cells, C classes, T targets, M matches of one level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch.nn import functional as F

from models.losses.base import LossModule, LossOutput
from utils.boxes import bbox_iou
from utils.errors import ConfigError

OBJECTNESS_BALANCE: dict[int, tuple[float, ...]] = {3: (4.0, 1.0, 0.4)}  # by number of levels
OTHER_BALANCE = (4.0, 1.0, 0.25, 0.06, 0.02)
BALANCE_DECAY = 0.9999
BALANCED_STRIDE = 16  # automatic balance keeps the weight of this level at 1
FOCAL_ALPHA = 0.25
NEIGHBOR_REACH = 0.5  # in cells: a center in the nearer half of its cell also claims the neighbor on that side
# Cell steps of the five candidates of a match: the cell itself, then left, up, right, down.
STEPS_XY = ((0, 0), (-1, 0), (0, -1), (1, 0), (0, 1))


@dataclass(frozen=True)
class LossConfig:
    """Gains and switches of the loss, with gains as they are multiplied (scaled already).

    Attributes:
        box, obj, cls: gains of the three parts.
        obj_pw, cls_pw: weights of positives in the binary cross-entropies.
        anchor_t: largest ratio of sides between a target and an anchor that match.
        fl_gamma: focal loss exponent (https://arxiv.org/abs/1708.02002); 0 = plain cross-entropy.
        label_smoothing: epsilon; class targets become 1 - epsilon / 2 and epsilon / 2.
        autobalance: adapt the weights of the levels' objectness losses.
        class_weights: factor on the class loss of each class; None = 1 for all.
    """

    box: float = 0.05
    obj: float = 1.0
    cls: float = 0.5
    obj_pw: float = 1.0
    cls_pw: float = 1.0
    anchor_t: float = 4.0
    fl_gamma: float = 0.0
    label_smoothing: float = 0.0
    autobalance: bool = False
    class_weights: tuple[float, ...] | None = None

    @classmethod
    def from_hyp(
        cls,
        hyp: Mapping[str, Any],
        *,
        num_levels: int,
        num_classes: int,
        imgsz: int,
        label_smoothing: float = 0.0,
    ) -> LossConfig:
        """Return the gains of a hyperparameter file, scaled to levels, classes and image size.

        Args:
            hyp: needs `box`, `obj`, `cls`, `obj_pw`, `cls_pw`, `anchor_t`; `fl_gamma` where it is not 0.
            num_levels: levels of the head; the files are tuned for 3.
            num_classes: the files are tuned for 80.
            imgsz: side of the training images in pixels; the files are tuned for 640.
        """
        share = 3 / num_levels
        return cls(
            box=float(hyp["box"]) * share,
            obj=float(hyp["obj"]) * (imgsz / 640) ** 2 * share,
            cls=float(hyp["cls"]) * num_classes / 80 * share,
            obj_pw=float(hyp["obj_pw"]),
            cls_pw=float(hyp["cls_pw"]),
            anchor_t=float(hyp["anchor_t"]),
            fl_gamma=float(hyp.get("fl_gamma", cls.fl_gamma)),
            label_smoothing=label_smoothing,
        )


class LevelTargets(NamedTuple):
    """Targets assigned to one level, M rows; a later row wins where several claim one cell and anchor.

    Attributes:
        image, anchor, gy, gx, cls: (M,) int64: image, anchor of the level, cell row, cell column, class.
        box: (M, 4) float32: center minus cell corner, width, height; in cells.
        anchor_wh: (M, 2) float32: the matched anchor in cells.
    """

    image: torch.Tensor
    anchor: torch.Tensor
    gy: torch.Tensor
    gx: torch.Tensor
    cls: torch.Tensor
    box: torch.Tensor
    anchor_wh: torch.Tensor


class _Matches(NamedTuple):
    """Targets assigned to all levels: the rows of `LevelTargets`, level by level, and their number per level."""

    rows: LevelTargets
    counts: list[int]


def build_targets(
    targets: torch.Tensor, anchors: torch.Tensor, grids: Sequence[tuple[int, int]], anchor_t: float
) -> list[LevelTargets]:
    """Assign targets to levels, anchors and cells.

    A target matches an anchor when neither side is `anchor_t` times longer or shorter. It claims the cell of its center
    and up to two neighbors: those on whose side the center lies, as long as it is more than one cell from that border.
    Cells are limited to the grid before the offset is taken, so the offsets of targets on a border may leave -0.5..1.5.

    Args:
        targets: (T, 6) image, class, normalized cxcywh. On a CUDA device the
            call waits for the device (the number of matches is data); CPU targets cost no wait.
        anchors: (levels, A, 2) widths and heights in cells of their level.
        grids: (rows, columns) per level.
        anchor_t: above 1.

    Returns:
        one LevelTargets per level, on the device of `targets`; rows are ordered by step, anchor, target.
    """
    rows, counts = _match(targets, anchors, grids, anchor_t)
    return [LevelTargets(*parts) for parts in zip(*(row.split(counts) for row in rows))]


def _match(targets: torch.Tensor, anchors: torch.Tensor, grids: Sequence[tuple[int, int]], anchor_t: float) -> _Matches:
    """Assign targets as `build_targets` describes it, all levels together."""
    targets = targets.float()
    anchors = anchors.to(targets)
    sizes = torch.tensor([(x, y) for y, x in grids], dtype=torch.float32).to(targets.device)  # (L, 2)
    center = targets[None, :, 2:4] * sizes[:, None]  # (L, T, 2) in cells
    sides = targets[None, :, 4:6] * sizes[:, None]
    ratio = sides[:, None] / anchors[:, :, None]  # (L, A, T, 2)
    matched = torch.maximum(ratio, 1 / ratio).amax(-1) < anchor_t  # (L, A, T)
    claimed = _claimed_steps(center, sizes)  # (L, 5, T)
    level, step, anchor, target = (claimed[:, :, None] & matched[:, None]).nonzero(as_tuple=True)
    counts = torch.bincount(level, minlength=len(grids)).tolist()

    steps = torch.tensor(STEPS_XY, dtype=torch.float32).to(targets.device)
    xy = center[level, target]
    cell = (xy + NEIGHBOR_REACH * steps[step]).long()
    cell = torch.minimum(cell.clamp(min=0), sizes[level].long() - 1)
    box = torch.cat((xy - cell, sides[level, target]), 1)
    label = targets[target, 1].long()
    image = targets[target, 0].long()
    return _Matches(LevelTargets(image, anchor, cell[:, 1], cell[:, 0], label, box, anchors[level, anchor]), counts)


def _claimed_steps(center: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Return which of the five steps a center claims: (L, T, 2) and sizes (L, 2) in cells to (L, 5, T) bool."""
    from_end = sizes[:, None] - center
    near_start = (center % 1 < NEIGHBOR_REACH) & (center > 1)
    near_end = (from_end % 1 < NEIGHBOR_REACH) & (from_end > 1)
    own = torch.ones_like(near_start[..., 0])
    return torch.stack((own, *near_start.unbind(-1), *near_end.unbind(-1)), 1)


class DetectionLoss(LossModule):
    """Box (CIoU), objectness and class loss over all levels of an anchor head.

    Args:
        anchors: (levels, A, 2) widths and heights in pixels, or per level a flat list w, h, w, h, ...
        strides: pixels per cell, one per level.
        config: gains and switches.

    Raises:
        ConfigError: anchors and strides that do not belong together, or automatic balance without a level of stride 16.
    """

    names: ClassVar[tuple[str, str, str]] = ("box", "obj", "cls")
    balance: torch.Tensor  # weight of each level's objectness loss
    gains: torch.Tensor  # box, objectness, class
    positive_weights: torch.Tensor  # objectness, class
    class_weights: torch.Tensor | None

    def __init__(
        self,
        anchors: torch.Tensor | Sequence[Sequence[float]],
        strides: torch.Tensor | Sequence[float],
        config: LossConfig,
    ) -> None:
        super().__init__()
        steps = torch.as_tensor(strides, dtype=torch.float32).cpu().view(-1)
        pixels = torch.as_tensor(anchors, dtype=torch.float32).cpu()
        if len(pixels) != len(steps):
            raise ConfigError(f"DetectionLoss: anchors of {len(pixels)} levels for {len(steps)} strides")
        if config.autobalance and BALANCED_STRIDE not in steps:
            raise ConfigError(f"autobalance: needs a level of stride {BALANCED_STRIDE}, this head has {steps.tolist()}")
        weights = list(OBJECTNESS_BALANCE.get(len(steps), OTHER_BALANCE))
        weights += weights[-1:] * (len(steps) - len(weights))
        self.config = config
        self.anchors = pixels.view(len(steps), -1, 2) / steps.view(-1, 1, 1)  # in cells
        self.balanced_level = int((steps == BALANCED_STRIDE).nonzero()[0]) if config.autobalance else 0
        self.register_buffer("balance", torch.tensor(weights[: len(steps)]))
        # Buffers, so that no step copies constants to the device.
        self.register_buffer("gains", torch.tensor((config.box, config.obj, config.cls)), persistent=False)
        self.register_buffer("positive_weights", torch.tensor((config.obj_pw, config.cls_pw)), persistent=False)
        factors = None if config.class_weights is None else torch.tensor(config.class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", factors, persistent=False)

    def forward(self, raw: Sequence[torch.Tensor], targets: torch.Tensor) -> LossOutput:
        """Return the loss of raw head outputs; float32 inside, also under autocast. Eval mode keeps the balance.

        Args:
            raw: per level (B, A, Y, X, 5 + C), before the sigmoid.
            targets: (T, 6) image, class, normalized cxcywh; T may be 0.
                They may stay on the CPU while `raw` is on a GPU: then the assignment does not wait for the GPU.
        """
        device = raw[0].device
        if self.balance.device != device:
            self.to(device)
        grids = [(level.shape[2], level.shape[3]) for level in raw]
        with torch.autocast(device.type, enabled=False):
            matches = _match(targets, self.anchors, grids, self.config.anchor_t)
            box, obj, cls = self._parts(raw, matches)
            parts = torch.stack((box, (obj * self.balance).sum(), cls)) * self.gains
            if self.config.autobalance and self.training:
                self._adapt_balance(obj.detach())
            return LossOutput(parts.sum() * raw[0].shape[0], parts.detach())

    def _parts(self, raw: Sequence[torch.Tensor], matches: _Matches) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the box loss, objectness losses of the levels (L,) and class loss, without gains.

        All levels are computed together, since on a GPU each operator costs a launch: rows of a level with m matches
        have the weight 1 / m, so that a sum over all rows is the sum of the levels' means.
        """
        device = raw[0].device
        cell, place, last, label, boxes = _to(_indices(raw, matches), device)
        read = [_Read.apply(level, own) for level, own in zip(raw, cell.split(matches.counts, 1))]
        objectness = torch.cat([scores for scores, _ in read]).float()  # (sum of B * A * Y * X,)
        rows = torch.cat([rows for _, rows in read]).float()
        target, anchor_wh, weight = boxes.split((4, 2, 1), 1)
        xy, wh = (rows[:, :4].sigmoid() * 2).chunk(2, 1)
        iou = bbox_iou(torch.cat((xy - 0.5, wh**2 * anchor_wh), 1), target, CIoU=True)
        objectness_target = torch.zeros_like(objectness)
        objectness_target[place] = iou.detach().clamp(min=0)[last]
        terms = self._entropy(objectness, objectness_target, self.positive_weights[0])
        obj = torch.stack([part.mean() for part in terms.split([level[..., 4].numel() for level in raw])])
        weight = weight.squeeze(1)
        cls = self._class_loss(rows[:, 5:], label, weight) if rows.shape[1] > 6 else obj.new_zeros(())
        return ((1 - iou) * weight).sum(), obj, cls

    def _class_loss(self, logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        off = 0.5 * self.config.label_smoothing
        target = torch.full_like(logits, off).scatter_(1, labels[:, None], 1 - off)
        terms = self._entropy(logits, target, self.positive_weights[1], self.class_weights)
        return (terms.mean(1) * weight).sum()

    def _entropy(
        self,
        logits: torch.Tensor,
        target: torch.Tensor,
        positive: torch.Tensor,
        class_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return binary cross-entropies, focal if `fl_gamma` is above 0; `class_weights` (C,) multiply the terms."""
        gamma = self.config.fl_gamma
        loss = F.binary_cross_entropy_with_logits(logits, target, class_weights, pos_weight=positive, reduction="none")
        if gamma <= 0:
            return loss
        # 1 - p would be 0 from a logit of 17 on, and the slope of 0 ** gamma is infinite.
        error = target * (-logits).sigmoid() + (1 - target) * logits.sigmoid()
        alpha = target * FOCAL_ALPHA + (1 - target) * (1 - FOCAL_ALPHA)
        return loss * alpha * error.clamp_min(torch.finfo(error.dtype).tiny) ** gamma

    def _adapt_balance(self, obj: torch.Tensor) -> None:
        """Move the levels' weights towards the inverse of their objectness losses (L,)."""
        moved = self.balance * BALANCE_DECAY + (1 - BALANCE_DECAY) / obj
        self.balance = moved / moved[self.balanced_level]


class _Read(torch.autograd.Function):
    """Objectness (B * A * Y * X,) and the rows (M, O) of the cells (4, M) of a level (B, A, Y, X, O).

    Its gradient is written to one tensor of the level's own memory format; that of two indexing operators would be two
    such tensors, their sum, and copies to the format of the convolution.
    """

    @staticmethod
    def forward(ctx: Any, level: torch.Tensor, cell: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
        ctx.save_for_backward(cell)
        ctx.shape, ctx.strides = level.shape, level.stride()
        return level[..., 4].reshape(-1), level[cell.unbind()]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ANN401
        objectness, rows = gradients
        out = objectness.new_empty_strided(ctx.shape, ctx.strides).zero_()
        out[..., 4] = objectness.view(ctx.shape[:4])
        (cell,) = ctx.saved_tensors
        return out.index_put_(cell.unbind(), rows, accumulate=True), None


class _Indices(NamedTuple):
    """What the loss reads and writes for M matches.

    Attributes:
        cell: (4, M) image, anchor, row and column of the match in its level.
        place: (M,) its index among the (B, A, Y, X) cells of all levels.
        last: (M,) for each match the last one with the same place: a write with repeated indices then has one outcome
            on every device.
        label: (M,) class.
        boxes: (M, 7) target box (4), anchor (2), and one divided by the number of matches of the level.
    """

    cell: torch.Tensor
    place: torch.Tensor
    last: torch.Tensor
    label: torch.Tensor
    boxes: torch.Tensor


def _indices(raw: Sequence[torch.Tensor], matches: _Matches) -> _Indices:
    """Compute the indices on the device of the matches."""
    rows, counts = matches
    shapes = torch.tensor([level.shape[1:4] for level in raw]).repeat_interleave(torch.tensor(counts), 0)  # (M, 3)
    sizes = torch.tensor([0, *(level[..., 4].numel() for level in raw[:-1])]).cumsum(0)
    start = sizes.repeat_interleave(torch.tensor(counts))
    share = torch.tensor([1 / max(count, 1) for count in counts]).repeat_interleave(torch.tensor(counts))
    anchors, height, width = shapes.to(rows.image.device).unbind(1)
    place = ((rows.image * anchors + rows.anchor) * height + rows.gy) * width + rows.gx + start.to(anchors.device)
    ordered, order = place.sort(stable=True)
    last = order[torch.searchsorted(ordered, place, right=True) - 1]
    boxes = torch.cat((rows.box, rows.anchor_wh, share.to(rows.box.device)[:, None]), 1)
    cell = torch.stack((rows.image, rows.anchor, rows.gy, rows.gx))
    return _Indices(cell, place, last, rows.cls, boxes)


def _to(indices: _Indices, device: torch.device) -> _Indices:
    """Copy indices to `device` from page-locked memory; other copies would wait for the GPU's queue."""
    if indices.cell.device == device:
        return indices
    places, boxes = torch.cat((indices.cell, torch.stack(indices[1:4]))), indices.boxes  # (7, M), (M, 7)
    if device.type == "cuda":
        places, boxes = places.pin_memory(), boxes.pin_memory()
    places, boxes = places.to(device, non_blocking=True), boxes.to(device, non_blocking=True)
    return _Indices._make((places[:4], *places[4:], boxes))
