"""Detection heads: the layers on each level, and the arithmetic from their outputs to boxes.

Shape legend: B images, A predictions per cell, H and W height and width of a level in cells, O = values per
prediction, R = bins per distance.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.common import Conv, DWConv
from models.losses.anchor_based import DetectionLoss, LossConfig
from models.losses.anchor_free import AnchorFreeLoss, AnchorFreeLossConfig
from models.losses.base import LossModule, LossOptions
from models.points import boxes_around, cell_centers, cell_offsets, distances


class Head(nn.Module):
    """Last row of a detector: predictions from the feature maps of several levels.

    Args:
        nc: number of classes.
        strides: input pixels per cell, per level.

    Attributes:
        kind: value of `--head`.
        unused: hyperparameters and options of the loss that have no effect with this head.
    """

    kind: ClassVar[str]
    unused: ClassVar[tuple[str, ...]] = ()

    def __init__(self, nc: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.nc = nc
        self.nl = len(strides)
        self.strides = tuple(strides)

    @property
    def stride(self) -> Tensor:
        """Return the stride of each level, shape (levels,), in input pixels per cell; float32 on the CPU."""
        return torch.tensor(self.strides, dtype=torch.float32, device="cpu")

    @property
    def anchor_sizes(self) -> Tensor | None:
        """Return widths and heights of the anchors in pixels (levels, A, 2), or None for a head without anchors."""
        return None

    def set_anchor_sizes(self, sizes: Tensor) -> None:
        """Replace the anchors by sizes in pixels (levels, A, 2)."""
        raise NotImplementedError(f"{type(self).__name__} has no anchors")

    def forward(self, features: Sequence[Tensor]) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Predict on the feature maps.

        Args:
            features: (B, channels[i], H_i, W_i) per level.

        Returns:
            In training mode the raw levels, (B, A, H_i, W_i, O) each. In evaluation mode (decoded, raw levels), with
            decoded as returned by `decode`.
        """
        raw = self.raw(features)
        if self.training:
            return raw
        device = raw[0].device.type
        # Box distances are a matrix product, which autocast would round. There is no autocast for `meta`.
        with torch.autocast(device, enabled=False) if device != "meta" else nullcontext():
            return self.decode(raw), raw

    @abstractmethod
    def reset_biases(self) -> None:
        """Set the biases to the priors of the first training step."""

    @abstractmethod
    def raw(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the raw predictions (B, A, H_i, W_i, O) of each level."""

    @abstractmethod
    def decode(self, raw: Sequence[Tensor]) -> Tensor:
        """Convert raw levels to boxes and confidences in the frame of the input image.

        Args:
            raw: (B, A, H_i, W_i, O) per level.

        Returns:
            (B, N, 5 + nc), rows in the order level, prediction, y, x: box cxcywh in input pixels, then objectness
            and class confidences in [0, 1]. float32 (float64 for float64 input): float16 resolves pixel positions
            above 1024 only to whole pixels.
        """

    @abstractmethod
    def loss(self, hyp: Mapping[str, Any], options: LossOptions) -> LossModule:
        """Return the loss of this head.

        Args:
            hyp: hyperparameters.
            options: image size and switches of the training.
        """


class Detect(Head):
    """YOLOv5's anchor head: one 1x1 convolution per level.

    Args:
        nc: number of classes.
        anchors: per level width, height, width, height ... in input pixels.
        channels: input channels per level.
        strides: input pixels per cell, per level.

    The buffer `anchors` is (levels, A, 2) in cells of its level, as in YOLOv5's checkpoints.
    """

    kind = "anchor"
    anchors: Tensor

    def __init__(
        self, nc: int, anchors: Sequence[Sequence[float]], channels: Sequence[int], strides: Sequence[int]
    ) -> None:
        super().__init__(nc, strides)
        self.no = nc + 5
        self.na = len(anchors[0]) // 2
        cells = [
            [[row[2 * a] / stride, row[2 * a + 1] / stride] for a in range(self.na)]
            for row, stride in zip(ordered_anchors(anchors, strides), strides, strict=True)
        ]
        self.register_buffer("anchors", torch.tensor(cells, dtype=torch.float32))
        self.m = nn.ModuleList(nn.Conv2d(c, self.no * self.na, 1) for c in channels)
        self.reset_biases()

    @property
    def anchor_sizes(self) -> Tensor:
        """See `Head`."""
        return self.anchors * self.stride.view(-1, 1, 1).to(self.anchors)

    def set_anchor_sizes(self, sizes: Tensor) -> None:
        """See `Head`."""
        self.anchors.copy_(sizes.to(self.anchors) / self.stride.view(-1, 1, 1).to(self.anchors))

    def reset_biases(self) -> None:
        """Add priors to the biases: 8 objects per image of 640 x 640 pixels, class probabilities of 0.6 / classes.

        See the focal loss paper, https://arxiv.org/abs/1708.02002, section 3.3.
        """
        for conv, stride in zip(self.m, self.strides, strict=True):
            assert isinstance(conv, nn.Conv2d) and conv.bias is not None
            with torch.no_grad():
                bias = conv.bias.view(self.na, self.no)
                bias[:, 4] += math.log(8 / (640 / stride) ** 2)
                bias[:, 5:] += math.log(0.6 / (self.nc - 0.99999))

    def raw(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return x, y, w, h, objectness and class logits of every anchor, (B, A, H_i, W_i, 5 + nc) per level."""
        return [self._raw(conv(x)) for conv, x in zip(self.m, features, strict=True)]

    def decode(self, raw: Sequence[Tensor]) -> Tensor:
        """See `Head`."""
        return torch.cat([self._decode_level(level, i) for i, level in enumerate(raw)], 1)

    def _raw(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        raw = x.reshape(b, self.na, self.no, h, w).permute(0, 1, 3, 4, 2)  # (B, A, H, W, O)
        return raw if self.training else raw.contiguous()  # the loss reads few of the values where they are

    def _decode_level(self, level: Tensor, i: int) -> Tensor:
        b, a, h, w, o = level.shape
        stride = self.strides[i]
        scores = level.to(torch.promote_types(level.dtype, torch.float32)).sigmoid()
        xy, wh, rest = scores.split((2, 2, o - 4), dim=4)
        xy = (xy * 2 + cell_offsets(scores)) * stride
        wh = (wh * 2) ** 2 * (self.anchors[i].to(scores.dtype) * stride).view(1, a, 1, 1, 2)
        return torch.cat((xy, wh, rest), 4).reshape(b, a * h * w, o)

    def loss(self, hyp: Mapping[str, Any], options: LossOptions) -> DetectionLoss:
        """See `Head`."""
        config = LossConfig.from_hyp(
            hyp, num_levels=self.nl, num_classes=self.nc, imgsz=options.imgsz, label_smoothing=options.label_smoothing
        )
        return DetectionLoss(self.anchor_sizes, self.stride, replace(config, class_weights=options.class_weights))


class AnchorFreeDetect(Head):
    """Anchor-free head: distances from every cell's center to the sides of a box, and class confidences.

    Separate branches for boxes and classes, without objectness (YOLOX, https://arxiv.org/abs/2107.08430; YOLOv6,
    https://arxiv.org/abs/2209.02976). A distance is the expectation of a distribution over R bins (GFL,
    https://arxiv.org/abs/2006.04388). The class branch uses depth-wise convolutions.

    Args:
        nc: number of classes.
        channels: input channels per level.
        strides: input pixels per cell, per level.
        reg_max: number of bins R; distances go up to R - 1 cells. 1 = distances without a distribution.
    """

    bins: Tensor
    kind = "free"
    unused = ("box", "cls", "obj", "cls_pw", "obj_pw", "iou_t", "anchor_t", "fl_gamma", "anchors", "--label-smoothing")

    def __init__(self, nc: int, channels: Sequence[int], strides: Sequence[int], reg_max: int = 16) -> None:
        super().__init__(nc, strides)
        self.reg_max = reg_max
        self.register_buffer("bins", torch.arange(reg_max, dtype=torch.float32), persistent=False)
        box_width = max(16, channels[0] // 4, 4 * reg_max)
        class_width = max(channels[0], min(nc, 100))
        self.box = nn.ModuleList(
            nn.Sequential(Conv(c, box_width, 3), Conv(box_width, box_width, 3), nn.Conv2d(box_width, 4 * reg_max, 1))
            for c in channels
        )
        self.cls = nn.ModuleList(
            nn.Sequential(
                *(DWConv(c, c, 3), Conv(c, class_width, 1)),
                *(DWConv(class_width, class_width, 3), Conv(class_width, class_width, 1)),
                nn.Conv2d(class_width, nc, 1),
            )
            for c in channels
        )
        self.reset_biases()

    @torch.no_grad()
    def reset_biases(self) -> None:
        """Set priors: 5 / nc objects of each class per image of 640 x 640 pixels, and distances of about 1.5 cells.

        Equal bins would start every distance at (R - 1) / 2 cells: boxes so large that small targets have an IoU of
        nearly 0 with all of them, and get no positive. Bin k starts with the logit -k / 2 instead.
        """
        for box, cls, stride in zip(self.box, self.cls, self.strides, strict=True):
            bins = -0.5 * torch.arange(self.reg_max) if self.reg_max > 1 else torch.tensor([2.0])
            box[-1].bias.copy_(bins.repeat(4))  # type: ignore[index]
            cls[-1].bias.fill_(math.log(5 / self.nc / (640 / stride) ** 2))  # type: ignore[index]

    def raw(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return distance logits and class logits of every cell, (B, 1, H_i, W_i, 4 * R + nc) per level."""
        return [
            torch.cat((box(x), cls(x)), 1).permute(0, 2, 3, 1).unsqueeze(1)
            for box, cls, x in zip(self.box, self.cls, features, strict=True)
        ]

    def decode(self, raw: Sequence[Tensor]) -> Tensor:
        """See `Head`; the product of objectness and a class column is the confidence of that class.

        Objectness is the largest class confidence and the class columns are relative to it, so consumers of YOLOv5's
        output, and those that threshold objectness alone, work unchanged.
        """
        return torch.cat([self._decode_level(level, s) for level, s in zip(raw, self.strides, strict=True)], 1)

    def _decode_level(self, level: Tensor, stride: int) -> Tensor:
        level = level.to(torch.promote_types(level.dtype, torch.float32))
        logits, classes = level.flatten(1, 3).split((4 * self.reg_max, self.nc), dim=2)  # (B, H * W, ...)
        boxes = boxes_around(cell_centers(level, stride), distances(logits, self.bins) * stride)
        top_left, bottom_right = boxes.split(2, dim=2)
        # With the largest logit m, sigmoid(z) / sigmoid(m) is e (a + b) / (b + a e) for e = exp(z - m), a / b = exp(m):
        # exact for tiny confidences, where some runtimes compute sigmoid with an absolute error of 1e-7, and without
        # overflow where they compute in float16.
        largest = classes.amax(2, keepdim=True)
        bounded = largest.clamp(-60, 60)
        a, b = (-(-bounded).relu()).exp(), (-bounded.relu()).exp()
        e = (classes - largest).exp()
        center, size = (top_left + bottom_right) / 2, bottom_right - top_left
        return torch.cat((center, size, a / (a + b), e * (a + b) / (b + a * e)), 2)

    def loss(self, hyp: Mapping[str, Any], options: LossOptions) -> AnchorFreeLoss:
        """See `Head`."""
        config = AnchorFreeLossConfig.from_hyp(hyp, options.class_weights)
        return AnchorFreeLoss(self.strides, self.nc, self.reg_max, config, options.mean, options.processes)


def ordered_anchors(anchors: Sequence[Sequence[float]], strides: Sequence[int]) -> list[Sequence[float]]:
    """Return the anchors in the order of the strides: reversed if they shrink while the stride grows."""

    def mean_area(row: Sequence[float]) -> float:
        return sum(w * h for w, h in zip(row[::2], row[1::2], strict=True)) / (len(row) // 2)

    area_step = mean_area(anchors[-1]) - mean_area(anchors[0])
    if area_step * (strides[-1] - strides[0]) < 0:
        return list(reversed(anchors))
    return list(anchors)
