"""Layers that several backbones share, and that are no part of the detector.

Shape legend: B batch, C channels, H and W height and width of a feature map in cells.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DropPath(nn.Module):
    """Stochastic depth per sample (https://arxiv.org/abs/1603.09382): drops a residual branch for whole samples.

    Args:
        drop_prob: probability in [0, 1) that the branch of one sample is zeroed in training mode. The branches that
            stay are divided by ``1 - drop_prob``, so the expected value does not change. In evaluation mode, and with
            probability zero, the input is returned as it is.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = float(drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> the same shape and dtype."""
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of each cell of a (B, C, H, W) map.

    The statistics are taken in float32 when the input is float16 or bfloat16; the result has the input's dtype.
    """

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x_BHWC = x.permute(0, 2, 3, 1)
        if x.dtype in (torch.float16, torch.bfloat16):
            y_BHWC = F.layer_norm(
                x_BHWC.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps
            ).to(x.dtype)
        else:
            y_BHWC = F.layer_norm(x_BHWC, self.weight.shape, self.weight, self.bias, self.eps)
        return y_BHWC.permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps:g}"


class Mlp(nn.Module):
    """Two 1x1 convolutions with an exact GELU between them, on (B, C, H, W) maps.

    Args:
        in_channels: channels of the input and of the output.
        hidden_channels: channels between the two convolutions.
        drop_rate: dropout after the activation and after the second convolution.
    """

    def __init__(self, in_channels: int, hidden_channels: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(in_channels, hidden_channels, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden_channels, in_channels, 1)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
