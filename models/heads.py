"""Detection head: one 1x1 convolution per level, and the arithmetic from its output to boxes.

Shape legend: B images, A anchors per level, H and W height and width of a level in cells, O = 5 + number of classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Detect(nn.Module):
    """YOLOv5's anchor head.

    Args:
        nc: number of classes.
        anchors: per level width, height, width, height ... in input pixels.
        channels: input channels per level.
        strides: input pixels per cell, per level.

    The buffer `anchors` is (levels, A, 2) in cells of its level, as in YOLOv5's checkpoints.
    """

    anchors: Tensor

    def __init__(
        self, nc: int, anchors: Sequence[Sequence[float]], channels: Sequence[int], strides: Sequence[int]
    ) -> None:
        super().__init__()
        self.nc = nc
        self.no = nc + 5
        self.nl = len(anchors)
        self.na = len(anchors[0]) // 2
        self.strides = tuple(strides)
        cells = [
            [[row[2 * a] / stride, row[2 * a + 1] / stride] for a in range(self.na)]
            for row, stride in zip(ordered_anchors(anchors, strides), strides, strict=True)
        ]
        self.register_buffer("anchors", torch.tensor(cells, dtype=torch.float32))
        self.m = nn.ModuleList(nn.Conv2d(c, self.no * self.na, 1) for c in channels)
        self.reset_biases()

    @property
    def stride(self) -> Tensor:
        """Return the stride of each level, shape (levels,), in input pixels per cell; float32 on the CPU."""
        return torch.tensor(self.strides, dtype=torch.float32, device="cpu")

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

    def forward(self, features: Sequence[Tensor]) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Predictions for the feature maps.

        Args:
            features: one (B, channels[i], H_i, W_i) per level.

        Returns:
            In training mode the raw levels, (B, A, H_i, W_i, O) each: x, y, w, h, objectness and class logits.
            In evaluation mode (decoded, raw levels), with decoded as `decode` gives it.
        """
        raw = [self._raw(conv(x)) for conv, x in zip(self.m, features, strict=True)]
        return raw if self.training else (self.decode(raw), raw)

    def decode(self, raw: Sequence[Tensor]) -> Tensor:
        """Boxes and scores in the image's own frame.

        Args:
            raw: (B, A, H_i, W_i, O) per level.

        Returns:
            (B, N, O), rows in the order level, anchor, y, x: box center x, y, width, height in input pixels, then
            objectness and class scores in [0, 1]. float32 (float64 for float64 input): float16 holds pixel positions
            above 1024 only to a whole pixel.
        """
        return torch.cat([self._decode_level(level, i) for i, level in enumerate(raw)], 1)

    def _raw(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        return x.reshape(b, self.na, self.no, h, w).permute(0, 1, 3, 4, 2).contiguous()  # (B, A, H, W, O)

    def _decode_level(self, level: Tensor, i: int) -> Tensor:
        b, a, h, w, o = level.shape
        stride = self.strides[i]
        scores = level.to(torch.promote_types(level.dtype, torch.float32)).sigmoid()
        xy, wh, rest = scores.split((2, 2, o - 4), dim=4)
        xy = (xy * 2 + cell_offsets(scores)) * stride
        wh = (wh * 2) ** 2 * (self.anchors[i].to(scores.dtype) * stride).view(1, a, 1, 1, 2)
        return torch.cat((xy, wh, rest), 4).reshape(b, a * h * w, o)


def cell_offsets(level: Tensor) -> Tensor:
    """Return the x and y index of every cell of a level (B, A, H, W, O), less one half: (H, W, 2) of its dtype.

    They are counted with `cumsum`, since `arange` would store the device in traced graphs.
    """
    y = torch.ones_like(level[0, 0, :, 0, 0]).cumsum(0) - 1.5
    x = torch.ones_like(level[0, 0, 0, :, 0]).cumsum(0) - 1.5
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((grid_x, grid_y), 2)


def ordered_anchors(anchors: Sequence[Sequence[float]], strides: Sequence[int]) -> list[Sequence[float]]:
    """Return the anchors in the order of the strides: reversed if they shrink while the stride grows."""

    def mean_area(row: Sequence[float]) -> float:
        return sum(w * h for w, h in zip(row[::2], row[1::2], strict=True)) / (len(row) // 2)

    area_step = mean_area(anchors[-1]) - mean_area(anchors[0])
    if area_step * (strides[-1] - strides[0]) < 0:
        return list(reversed(anchors))
    return list(anchors)
