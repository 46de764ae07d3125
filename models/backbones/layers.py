"""Layers that several backbones share, and that are no part of the detector.

Shape legend: B batch, C channels, H and W height and width of a feature map in cells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.errors import SpecError, did_you_mean

Architecture = TypeVar("Architecture")


def require(condition: bool, sentence: str) -> None:
    """Raise SpecError(sentence) unless `condition` holds: a wrong argument in a model YAML."""
    if not condition:
        raise SpecError(sentence)


def choose_architecture(family: str, arch: str | Mapping[str, Any], table: Mapping[str, Architecture]) -> Architecture:
    """Look an architecture up by name, or build one from a mapping of its fields.

    Args:
        family: name of the backbone class, for error sentences.
        arch: a key of `table`, or the fields of its dataclass (lists become tuples; fields with a default may be left
            out).
        table: the known architectures, frozen dataclasses of one type.

    Raises:
        SpecError: unknown name or field, or a field that is missing.
    """
    if isinstance(arch, str):
        if arch not in table:
            raise SpecError(f"{family}: unknown arch '{arch}'; allowed: {', '.join(table)}{did_you_mean(arch, table)}")
        return table[arch]
    if not isinstance(arch, Mapping):
        raise SpecError(f"{family}: arch is {arch!r}; allowed: a name ({', '.join(table)}) or a mapping of its fields")
    kind: Any = type(next(iter(table.values())))
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in arch:
        if key not in fields:
            raise SpecError(
                f"{family}: unknown field '{key}' of arch; allowed: {', '.join(fields)}{did_you_mean(key, fields)}"
            )
    needed = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in arch]
    if needed:
        raise SpecError(f"{family}: arch lacks {', '.join(needed)}; it needs {', '.join(fields)}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in arch.items()})


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


class SimpleFeaturePyramid(nn.Module):
    """Several resolutions from the single map of a plain network (ViTDet, https://arxiv.org/abs/2203.16527, section 3).

    Finer levels come from transposed convolutions of stride 2 that halve the channels (channel-wise LayerNorm and GELU
    between two of them), coarser ones from max-pooling; every level starts from the same map. A 1x1 and a 3x3
    convolution, each followed by a channel-wise LayerNorm, then bring each level to its width.

    Args:
        in_channels: channels of the map.
        in_stride: its stride, input pixels per cell.
        strides: strides of the levels, high resolution first; each `in_stride` times a power of two.
        widths: channels of each level, or one number for all.
    """

    def __init__(
        self,
        in_channels: int,
        in_stride: int = 16,
        strides: Sequence[int] = (4, 8, 16, 32),
        widths: int | Sequence[int] = 256,
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.widths = (widths,) * len(self.strides) if isinstance(widths, int) else tuple(widths)
        if list(self.strides) != sorted(set(self.strides)) or not self.strides:
            raise SpecError(f"feature pyramid: strides {list(strides)}; they must rise, as in [4, 8, 16, 32]")
        if len(self.widths) != len(self.strides):
            raise SpecError(
                f"feature pyramid: {len(self.widths)} widths for {len(self.strides)} strides; give one for each, "
                "or one number for all"
            )
        self.levels = nn.ModuleList(
            _pyramid_level(in_channels, in_stride, stride, width) for stride, width in zip(self.strides, self.widths)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, in_channels, H, W) -> one (B, width, ceil(H * in_stride / stride), ...) per level."""
        return tuple(level(x) for level in self.levels)


def _pyramid_level(in_channels: int, in_stride: int, stride: int, width: int) -> nn.Sequential:
    """Resampling from `in_stride` to `stride`, then the 1x1 and the 3x3 convolution."""
    layers: list[nn.Module] = []
    channels, at = in_channels, in_stride
    while at > stride and at % 2 == 0:
        if layers:
            layers += [LayerNorm2d(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, stride=2))
        channels, at = channels // 2, at // 2
    while at < stride:
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
        at *= 2
    if at != stride:
        raise SpecError(f"feature pyramid: stride {stride} cannot be reached from stride {in_stride} by factors of two")
    layers += [nn.Conv2d(channels, width, 1, bias=False), LayerNorm2d(width)]
    layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width)]
    return nn.Sequential(*layers)
