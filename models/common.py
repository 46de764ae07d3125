"""Layers of YOLOv5's model YAMLs, under YOLOv5's names.

Shapes: every layer maps (B, c1, H, W) to (B, c2, H', W') unless it says otherwise; `c1` and `c2` are input and output
channels, `k`, `s`, `p`, `g`, `d` kernel, stride, padding, groups and dilation, `n` the number of inner blocks and `e`
the ratio of hidden channels to `c2`. The names of submodules and their order are YOLOv5's, so that the state-dict
keys of its checkpoints match. YAML rows are checked against the annotations of the constructors.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# A size for both directions, or (height, width).
Size = int | tuple[int, int]


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Return a batch norm with YOLOv5's settings: eps 1e-3, momentum 0.03."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.03)


def autopad(k: Size, p: Size | None = None, d: int = 1) -> Size:
    """Return the padding that keeps the size at stride 1 (half of the dilated kernel), unless `p` is given."""
    if p is not None:
        return p
    if isinstance(k, int):
        return (d * (k - 1) + 1) // 2
    return (d * (k[0] - 1) + 1) // 2, (d * (k[1] - 1) + 1) // 2


class Conv(nn.Module):
    """Convolution without bias, batch norm, activation.

    Args:
        act: True = the model's default activation (SiLU, or the YAML's `activation:`), False = none, or a module.
    """

    def __init__(
        self,
        c1: int,
        c2: int,
        k: Size = 1,
        s: Size = 1,
        p: Size | None = None,
        g: int = 1,
        d: int = 1,
        act: bool | nn.Module = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, autopad(k, p, d), groups=g, dilation=d, bias=False)
        self.bn = batch_norm(c2)
        self.has_default_act = act is True
        self.act: nn.Module = act if isinstance(act, nn.Module) else nn.SiLU() if act else nn.Identity()

    def use_default_activation(self, activation: nn.Module) -> None:
        """Take a copy of `activation`, unless this layer was given one of its own."""
        if self.has_default_act:
            self.act = copy.deepcopy(activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class DWConv(Conv):
    """Depth-wise Conv with gcd(c1, c2) groups."""

    def __init__(self, c1: int, c2: int, k: Size = 1, s: Size = 1, d: int = 1, act: bool | nn.Module = True) -> None:
        super().__init__(c1, c2, k, s, g=math.gcd(c1, c2), d=d, act=act)


class DWConvTranspose2d(nn.ConvTranspose2d):
    """Depth-wise transposed convolution with bias; `p1` padding, `p2` output padding."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, p1: int = 0, p2: int = 0) -> None:
        super().__init__(c1, c2, k, s, p1, p2, groups=math.gcd(c1, c2))


class TransformerLayer(nn.Module):
    """Self-attention and a linear pair, each with a shortcut, without layer norms.

    Maps (N, B, c) tokens to (N, B, c).
    """

    def __init__(self, c: int, num_heads: int) -> None:
        super().__init__()
        self.q = nn.Linear(c, c, bias=False)
        self.k = nn.Linear(c, c, bias=False)
        self.v = nn.Linear(c, c, bias=False)
        self.ma = nn.MultiheadAttention(embed_dim=c, num_heads=num_heads)
        self.fc1 = nn.Linear(c, c, bias=False)
        self.fc2 = nn.Linear(c, c, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        attended, _ = self.ma(self.q(x), self.k(x), self.v(x), need_weights=False)
        x = attended + x
        return self.fc2(self.fc1(x)) + x


class TransformerBlock(nn.Module):
    """Transformer layers over all cells of a map; the position term is a learned linear map of the tokens.

    Paper: https://arxiv.org/abs/2010.11929
    """

    def __init__(self, c1: int, c2: int, num_heads: int, num_layers: int) -> None:
        super().__init__()
        self.conv = Conv(c1, c2) if c1 != c2 else None
        self.linear = nn.Linear(c2, c2)
        self.tr = nn.Sequential(*(TransformerLayer(c2, num_heads) for _ in range(num_layers)))

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            x = self.conv(x)
        tokens = x.flatten(2).permute(2, 0, 1)  # (H*W, B, c2)
        tokens = self.tr(tokens + self.linear(tokens))
        return tokens.permute(1, 2, 0).reshape(x.shape)


class Bottleneck(nn.Module):
    """1x1 and 3x3 Conv, with a shortcut where c1 == c2."""

    def __init__(self, c1: int, c2: int, shortcut: bool = True, g: int = 1, e: float = 0.5) -> None:
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden, 1, 1)
        self.cv2 = Conv(hidden, c2, 3, 1, g=g)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        out = self.cv2(self.cv1(x))
        return x + out if self.add else out


class BottleneckCSP(nn.Module):
    """Cross-stage partial block of YOLOv5's first releases: norm and activation after the two branches are joined.

    Paper: https://arxiv.org/abs/1911.11929
    """

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5) -> None:
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden, 1, 1)
        self.cv2 = nn.Conv2d(c1, hidden, 1, 1, bias=False)
        self.cv3 = nn.Conv2d(hidden, hidden, 1, 1, bias=False)
        self.cv4 = Conv(2 * hidden, c2, 1, 1)
        self.bn = batch_norm(2 * hidden)
        self.act = nn.SiLU()
        self.m = nn.Sequential(*(Bottleneck(hidden, hidden, shortcut, g, e=1.0) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat((self.cv3(self.m(self.cv1(x))), self.cv2(x)), 1)
        return self.cv4(self.act(self.bn(joined)))


class CrossConv(nn.Module):
    """1 x k, then k x 1 Conv, with an optional shortcut where c1 == c2."""

    def __init__(
        self, c1: int, c2: int, k: int = 3, s: int = 1, g: int = 1, e: float = 1.0, shortcut: bool = False
    ) -> None:
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden, (1, k), (1, s))
        self.cv2 = Conv(hidden, c2, (k, 1), (s, 1), g=g)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        out = self.cv2(self.cv1(x))
        return x + out if self.add else out


class C3(nn.Module):
    """Cross-stage partial block with three convolutions: `n` bottlenecks on one of two branches."""

    m: nn.Module

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5) -> None:
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden, 1, 1)
        self.cv2 = Conv(c1, hidden, 1, 1)
        self.cv3 = Conv(2 * hidden, c2, 1)
        self.m = nn.Sequential(*(Bottleneck(hidden, hidden, shortcut, g, e=1.0) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class C3x(C3):
    """C3 with cross convolutions as inner blocks."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5) -> None:
        super().__init__(c1, c2, 0, shortcut, g, e)
        hidden = int(c2 * e)
        self.m = nn.Sequential(*(CrossConv(hidden, hidden, 3, 1, g, 1.0, shortcut) for _ in range(n)))


class C3TR(C3):
    """C3 with a transformer of `n` layers and 4 heads as inner block."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5) -> None:
        super().__init__(c1, c2, 0, shortcut, g, e)
        hidden = int(c2 * e)
        self.m = TransformerBlock(hidden, hidden, 4, n)


class C3SPP(C3):
    """C3 with spatial pyramid pooling as inner block."""

    def __init__(
        self,
        c1: int,
        c2: int,
        k: tuple[int, ...] = (5, 9, 13),
        n: int = 1,  # noqa: ARG002 (position of YOLOv5's signature)
        shortcut: bool = True,
        g: int = 1,
        e: float = 0.5,
    ) -> None:
        super().__init__(c1, c2, 0, shortcut, g, e)
        hidden = int(c2 * e)
        self.m = SPP(hidden, hidden, k)


class C3Ghost(C3):
    """C3 with ghost bottlenecks as inner blocks."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5) -> None:
        super().__init__(c1, c2, 0, shortcut, g, e)
        hidden = int(c2 * e)
        self.m = nn.Sequential(*(GhostBottleneck(hidden, hidden) for _ in range(n)))


class SPP(nn.Module):
    """Spatial pyramid pooling: concatenate the map and its max-poolings at stride 1, one per kernel size.

    Paper: https://arxiv.org/abs/1406.4729
    """

    def __init__(self, c1: int, c2: int, k: tuple[int, ...] = (5, 9, 13)) -> None:
        super().__init__()
        hidden = c1 // 2
        self.cv1 = Conv(c1, hidden, 1, 1)
        self.cv2 = Conv(hidden * (len(k) + 1), c2, 1, 1)
        self.m = nn.ModuleList(nn.MaxPool2d(size, stride=1, padding=size // 2) for size in k)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return self.cv2(torch.cat([x, *(pool(x) for pool in self.m)], 1))


class SPPF(nn.Module):
    """SPP with one max-pooling applied three times: k = 5 is equivalent to SPP with 5, 9 and 13."""

    def __init__(self, c1: int, c2: int, k: int = 5) -> None:
        super().__init__()
        hidden = c1 // 2
        self.cv1 = Conv(c1, hidden, 1, 1)
        self.cv2 = Conv(hidden * 4, c2, 1, 1)
        self.m = nn.MaxPool2d(kernel_size=k, stride=1, padding=k // 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.cv1(x)]
        for _ in range(3):
            maps.append(self.m(maps[-1]))
        return self.cv2(torch.cat(maps, 1))


class Focus(nn.Module):
    """Move the four pixels of every 2x2 square into the channels, then apply a Conv; halves height and width.

    Order of the squares' pixels (row, column): (0, 0), (1, 0), (0, 1), (1, 1).
    """

    def __init__(
        self,
        c1: int,
        c2: int,
        k: Size = 1,
        s: Size = 1,
        p: Size | None = None,
        g: int = 1,
        act: bool | nn.Module = True,
    ) -> None:
        super().__init__()
        self.conv = Conv(c1 * 4, c2, k, s, p, g, act=act)

    def forward(self, x: Tensor) -> Tensor:
        pixels = [x[..., row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.conv(torch.cat(pixels, 1))


class GhostConv(nn.Module):
    """Compute half of the channels by a Conv, the other half by a cheap 5x5 depth-wise Conv of the first half.

    Paper: https://arxiv.org/abs/1911.11907
    """

    def __init__(self, c1: int, c2: int, k: Size = 1, s: Size = 1, g: int = 1, act: bool | nn.Module = True) -> None:
        super().__init__()
        hidden = c2 // 2
        self.cv1 = Conv(c1, hidden, k, s, None, g, act=act)
        self.cv2 = Conv(hidden, hidden, 5, 1, None, hidden, act=act)

    def forward(self, x: Tensor) -> Tensor:
        half = self.cv1(x)
        return torch.cat((half, self.cv2(half)), 1)


class GhostBottleneck(nn.Module):
    """Two ghost convolutions with a shortcut; at stride 2 a depth-wise Conv between them and one on the shortcut.

    Paper: https://arxiv.org/abs/1911.11907
    """

    def __init__(self, c1: int, c2: int, k: int = 3, s: int = 1) -> None:
        super().__init__()
        if s not in (1, 2):
            raise ValueError(f"s is {s}; the stride of a ghost bottleneck is 1 or 2")
        if s == 1 and c1 != c2:
            raise ValueError(f"{c1} input and {c2} output channels; at stride 1 the shortcut needs equal numbers")
        hidden = c2 // 2
        between = DWConv(hidden, hidden, k, s, act=False) if s == 2 else nn.Identity()
        self.conv = nn.Sequential(GhostConv(c1, hidden, 1, 1), between, GhostConv(hidden, c2, 1, 1, act=False))
        self.shortcut: nn.Module = nn.Identity()
        if s == 2:
            self.shortcut = nn.Sequential(DWConv(c1, c1, k, s, act=False), Conv(c1, c2, 1, 1, act=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.shortcut(x)


class MixConv2d(nn.Module):
    """Parallel convolutions of several kernel sizes, one group of output channels each, then norm and activation.

    Paper: https://arxiv.org/abs/1907.09595

    Args:
        equal_ch: equally many channels per kernel size; else about equally many weights.
    """

    def __init__(self, c1: int, c2: int, k: tuple[int, ...] = (1, 3), s: int = 1, equal_ch: bool = True) -> None:
        super().__init__()
        parts = _mix_channels(c2, k, equal_ch)
        if min(parts) < 1:
            raise ValueError(f"{c2} output channels are too few for {len(k)} kernel sizes")
        self.m = nn.ModuleList(
            nn.Conv2d(c1, part, size, s, size // 2, groups=math.gcd(c1, part), bias=False)
            for size, part in zip(k, parts, strict=True)
        )
        self.bn = batch_norm(c2)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(torch.cat([conv(x) for conv in self.m], 1)))


def _mix_channels(c2: int, k: Sequence[int], equal_ch: bool) -> list[int]:
    """Return the output channels of each kernel size; they sum to c2."""
    if equal_ch:
        # Channel j of 0 ... c2 - 1 goes to the part that c2 - 1 equal steps from 0 to just below len(k) put it in.
        edges = [0, *(i * (c2 - 1) // len(k) + 1 for i in range(1, len(k))), c2]
        return [end - start for start, end in itertools.pairwise(edges)]
    share = [1 / size**2 for size in k]
    parts = [round(c2 * part / sum(share)) for part in share]
    parts[0] += c2 - sum(parts)  # the first one gets the remainder
    return parts


class Contract(nn.Module):
    """Space to depth with block size gain: (B, c, H, W) -> (B, c * gain**2, H / gain, W / gain)."""

    def __init__(self, gain: int = 2) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        s = self.gain
        x = x.reshape(b, c, h // s, s, w // s, s)
        return x.permute(0, 3, 5, 1, 2, 4).reshape(b, c * s * s, h // s, w // s)


class Expand(nn.Module):
    """Depth to space with block size gain: (B, c, H, W) -> (B, c / gain**2, H * gain, W * gain)."""

    def __init__(self, gain: int = 2) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        s = self.gain
        x = x.reshape(b, s, s, c // s**2, h, w)
        return x.permute(0, 3, 4, 1, 5, 2).reshape(b, c // s**2, h * s, w * s)


class Concat(nn.Module):
    """Concatenate maps of one size along dimension `d` (1 = channels)."""

    def __init__(self, dimension: int = 1) -> None:
        super().__init__()
        self.d = dimension

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(maps), self.d)
