"""Next-ViT: convolution blocks, with a transformer block at the end of a stage or of every fifth block.

Paper: "Next-ViT: Next Generation Vision Transformer for Efficient Deployment in Realistic Industrial Scenarios",
Li et al., https://arxiv.org/abs/2207.05501. Key names are those of the published checkpoints (bytedance/Next-ViT); the
names timm gives the same weights are read too. Verified: stage outputs of small and base in training and deployed form,
float32 and float64, against numbers of the published implementation (tests/parity/test_nextvit.py).

A convolution block computes x = x + MHCA(x), then x = x + MLP(norm(x)). A transformer block runs attention on most of
its channels, x = x + mixer(norm1(x)), derives the others from them, z = P(x), z = z + MHCA(z), and joins both,
y = [x, z], y = y + MLP(norm2(y)).

Shape legend: B batch, C channels, H and W height and width in cells, L = H * W tokens in row-major order, M tokens
after pooling, N heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone, FeatureLevel
from models.backbones.layers import DropPath, choose_architecture, require

NORM_EPS = 1e-5
HEAD_DIM = 32
CONV_MLP_RATIO = 3
TRANSFORMER_MLP_RATIO = 2


@dataclass(frozen=True)
class NextViTArchitecture:
    """Four stages.

    Attributes:
        depths: blocks of each stage.
        conv_channels: channels of the convolution blocks of each stage.
        out_channels: channels of each stage's output; those of its transformer blocks where it has any, else those of
            its convolution blocks. Three quarters of a transformer block's channels go through attention.
        transformer_every: a stage's last block, and from there back every so many-th, is a transformer block; 0: none.
        reductions: stride of the pooling of keys and values in each stage.
        stem_channels: channels of the first, second and last two convolutions of the stem.
    """

    depths: tuple[int, int, int, int]
    conv_channels: tuple[int, int, int, int] = (96, 192, 384, 768)
    out_channels: tuple[int, int, int, int] = (96, 256, 512, 1024)
    transformer_every: tuple[int, int, int, int] = (0, 4, 5, 3)
    reductions: tuple[int, int, int, int] = (8, 4, 2, 1)
    stem_channels: tuple[int, int, int] = (64, 32, 64)

    def __post_init__(self) -> None:
        for name, count in (("depths", 4), ("conv_channels", 4), ("out_channels", 4), ("reductions", 4)):
            self._check(name, count, 1)
        self._check("transformer_every", 4, 0)
        self._check("stem_channels", 3, 1)
        for i, (conv, out, every) in enumerate(zip(self.conv_channels, self.out_channels, self.transformer_every)):
            channels = f"NextViT: stage {i + 1} of arch has {conv} conv_channels and {out} out_channels"
            require(conv % HEAD_DIM == 0 and out % HEAD_DIM == 0, f"{channels}; allowed: multiples of {HEAD_DIM}")
            require(every > 0 or out == conv, f"{channels}; without a transformer block they must be equal")
            require(every == 0 or out >= 2 * HEAD_DIM, f"{channels}; a transformer block needs at least {2 * HEAD_DIM}")

    def _check(self, name: str, count: int, least: int) -> None:
        values = getattr(self, name)
        right = isinstance(values, tuple) and len(values) == count
        right = right and all(isinstance(value, int) and value >= least for value in values)
        shown = list(values) if isinstance(values, tuple) else values
        require(right, f"NextViT: {name} of arch is {shown!r}; allowed: {count} whole numbers from {least} on")

    def is_transformer(self, stage: int, block: int) -> bool:
        """Whether block number `block` of a stage is a transformer block."""
        every = self.transformer_every[stage]
        return every > 0 and (self.depths[stage] - 1 - block) % every == 0


ARCHITECTURES: dict[str, NextViTArchitecture] = {
    "small": NextViTArchitecture((3, 4, 10, 3)),
    "base": NextViTArchitecture((3, 4, 20, 3)),
    "large": NextViTArchitecture((3, 4, 30, 3)),
}


# ---- folding --------------------------------------------------------------------------------------------------------


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """A BatchNorm in evaluation mode as `a * x + b`, both float64."""
    assert isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)) and norm.running_mean is not None
    assert norm.running_var is not None
    a = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    return a, norm.bias.detach().double() - a * norm.running_mean.double()


def _set_weights(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor) -> None:
    # Rounded once, here: all that comes before is float64, whatever the layer's own type.
    dtype, learns = layer.weight.dtype, layer.weight.requires_grad
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=learns)
    layer.bias = nn.Parameter(bias.to(dtype), requires_grad=learns)


def fold_norm_before(norm: nn.Module, *layers: nn.Conv2d | nn.Linear) -> nn.Module:
    """Give each layer (1x1 convolution or linear) the effect of `norm` on its input; returns what replaces the norm."""
    if isinstance(norm, nn.Identity):
        return norm
    a, b = _affine(norm)
    for layer in layers:
        weight = layer.weight.detach().double().flatten(1)  # (outputs, inputs)
        bias = 0 if layer.bias is None else layer.bias.detach().double()
        _set_weights(layer, (weight * a).view_as(layer.weight), weight @ b + bias)
    return nn.Identity()


def fold_norm_after(layer: nn.Conv2d, norm: nn.Module) -> nn.Module:
    """Give the convolution the effect of `norm` on its output; returns what replaces the norm."""
    if isinstance(norm, nn.Identity):
        return norm
    a, b = _affine(norm)
    bias = 0 if layer.bias is None else layer.bias.detach().double()
    _set_weights(layer, layer.weight.detach().double() * a.view(-1, 1, 1, 1), a * bias + b)
    return nn.Identity()


# ---- layers ---------------------------------------------------------------------------------------------------------


class StemConv(nn.Module):
    """3x3 convolution, BatchNorm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(out_channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        return F.relu(self.norm(self.conv(x)))

    def fold(self) -> None:
        self.norm = fold_norm_after(self.conv, self.norm)


class Projection(nn.Module):
    """To other channels and half the resolution: 2x2 average (rounding up), 1x1 convolution, BatchNorm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
        self.pool = pool if stride == 2 else nn.Identity()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(out_channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        return self.norm(self.conv(self.pool(x)))

    def fold(self) -> None:
        self.norm = fold_norm_after(self.conv, self.norm)


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """A `Projection` where anything changes."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return Projection(in_channels, out_channels, stride)


class MHCA(nn.Module):
    """Multi-head convolutional attention: a grouped 3x3 convolution (a head is a group) and a 1x1 projection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.group_conv3x3 = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels // HEAD_DIM, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(channels, eps=NORM_EPS)
        self.projection = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.projection(F.relu(self.norm(self.group_conv3x3(x))))

    def fold(self) -> None:
        self.norm = fold_norm_after(self.group_conv3x3, self.norm)


class Mlp(nn.Module):
    """1x1 convolution, ReLU, 1x1 convolution."""

    def __init__(self, channels: int, ratio: int, drop_rate: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels * ratio, 1)
        self.conv2 = nn.Conv2d(channels * ratio, channels, 1)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.drop(self.conv2(self.drop(F.relu(self.conv1(x)))))


# ---- token mixers ---------------------------------------------------------------------------------------------------


class EMHSA(nn.Module):
    """Efficient multi-head self-attention as published: keys and values of pooled tokens.

    The pooling is one-dimensional, over reduction^2 tokens in row-major order: it averages along rows (and across their
    ends), and drops the tail. Published weights were trained with it.
    """

    def __init__(self, channels: int, reduction: int, attn_drop_rate: float, drop_rate: float) -> None:
        super().__init__()
        self.reduction = reduction
        self.attn_drop_rate = attn_drop_rate
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.proj = nn.Linear(channels, channels)
        self.proj_drop = nn.Dropout(drop_rate)
        self.norm: nn.Module = nn.BatchNorm1d(channels, eps=NORM_EPS) if reduction > 1 else nn.Identity()

    def pooled(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, M) with M = floor(H * W / reduction^2)."""
        tokens = x.flatten(2)
        return F.avg_pool1d(tokens, self.reduction**2) if self.reduction > 1 else tokens

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x_BLC = x.flatten(2).transpose(1, 2)
        m_BMC = self.norm(self.pooled(x)).transpose(1, 2)
        q_BNLD, k_BNMD, v_BNMD = (_heads(f(t)) for f, t in ((self.q, x_BLC), (self.k, m_BMC), (self.v, m_BMC)))
        drop = self.attn_drop_rate if self.training else 0.0
        y_BNLD = F.scaled_dot_product_attention(q_BNLD, k_BNMD, v_BNMD, dropout_p=drop)
        y_BLC = self.proj_drop(self.proj(y_BNLD.transpose(1, 2).flatten(2)))
        return y_BLC.transpose(1, 2).unflatten(2, x.shape[2:])

    def fold_norm_before(self, norm: nn.Module) -> nn.Module:
        """Fold the norm before the mixer, and the mixer's own, into the linear layers. Pooling commutes with both."""
        self.norm = fold_norm_before(self.norm, self.k, self.v)
        return fold_norm_before(norm, self.q, self.k, self.v)


def _heads(x_BLC: Tensor) -> Tensor:
    return x_BLC.unflatten(2, (-1, HEAD_DIM)).transpose(1, 2)  # (B, N, L, D)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _conv(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer over the channels of (B, C, H, W): as a 1x1 convolution, no map has to be transposed."""
    return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)


def _conv_heads(layer: nn.Linear, x: Tensor) -> Tensor:
    return _conv(layer, x).flatten(2).unflatten(1, (-1, HEAD_DIM))  # (B, N, D, L)


class EMHSA2d(EMHSA):
    """E-MHSA with a pooling over reduction x reduction cells of the map; no cell is dropped. Same parameters."""

    def pooled(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, M) with M = ceil(H / reduction) * ceil(W / reduction)."""
        return _pool2d(x, self.reduction).flatten(2)


def _pool2d(x: Tensor, reduction: int) -> Tensor:
    if reduction == 1:
        return x
    return F.avg_pool2d(x, reduction, reduction, ceil_mode=True, count_include_pad=False)


class XCA(EMHSA):
    """Cross-covariance attention (XCiT, https://arxiv.org/abs/2106.09681) with queries and keys of pooled cells.

    A head attends from channel to channel: softmax(q k^T * temperature) v, where the rows of q and k (one per channel,
    over M pooled cells) have unit length and v keeps the full resolution. The cost is linear in the number of cells.
    Same parameters as `EMHSA`, and a temperature per head.
    """

    def __init__(self, channels: int, reduction: int, attn_drop_rate: float, drop_rate: float) -> None:
        super().__init__(channels, reduction, attn_drop_rate, drop_rate)
        self.temperature = nn.Parameter(torch.ones(channels // HEAD_DIM, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        pooled = self.norm(_pool2d(x, self.reduction).flatten(2)).unsqueeze(3)  # (B, C, M, 1)
        q_BNDM, k_BNDM, v_BNDL = (_conv_heads(f, t) for f, t in ((self.q, pooled), (self.k, pooled), (self.v, x)))
        q_BNDM, k_BNDM = F.normalize(_wide(q_BNDM), dim=3), F.normalize(_wide(k_BNDM), dim=3)
        weights_BNDD = (q_BNDM @ k_BNDM.transpose(2, 3) * self.temperature).softmax(dim=3).to(v_BNDL.dtype)
        weights_BNDD = F.dropout(weights_BNDD, self.attn_drop_rate, self.training)
        return self.proj_drop(_conv(self.proj, (weights_BNDD @ v_BNDL).reshape(x.shape)))

    def fold_norm_before(self, norm: nn.Module) -> nn.Module:
        """As `EMHSA.fold_norm_before`; here queries and keys are of pooled cells."""
        self.norm = fold_norm_before(self.norm, self.q, self.k)
        return fold_norm_before(norm, self.q, self.k, self.v)


MIXERS: dict[str, type[EMHSA]] = {"emhsa": EMHSA, "emhsa2d": EMHSA2d, "xca": XCA}


# ---- blocks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _BlockOptions:
    mixer: str
    drop_rate: float
    attn_drop_rate: float
    drop_path: float


class ConvBlock(nn.Module):
    """Next convolution block."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, options: _BlockOptions) -> None:
        super().__init__()
        self.patch_embed = _projection(in_channels, out_channels, stride)
        self.mhca = MHCA(out_channels)
        self.norm: nn.Module = nn.BatchNorm2d(out_channels, eps=NORM_EPS)
        self.mlp = Mlp(out_channels, CONV_MLP_RATIO, options.drop_rate)
        self.drop_path = DropPath(options.drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = x + self.drop_path(self.mhca(x))
        return x + self.drop_path(self.mlp(self.norm(x)))

    def fold(self) -> None:
        self.norm = fold_norm_before(self.norm, self.mlp.conv1)


class TransformerBlock(nn.Module):
    """Next transformer block: attention on three quarters of the channels, convolution for the others."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, reduction: int, options: _BlockOptions
    ) -> None:
        super().__init__()
        # Three quarters, in whole heads.
        attention_channels = out_channels * 3 // 4 // HEAD_DIM * HEAD_DIM
        conv_channels = out_channels - attention_channels
        self.patch_embed = _projection(in_channels, attention_channels, stride)
        self.norm1: nn.Module = nn.BatchNorm2d(attention_channels, eps=NORM_EPS)
        mixer = MIXERS[options.mixer]
        self.e_mhsa = mixer(attention_channels, reduction, options.attn_drop_rate, options.drop_rate)
        self.projection = _projection(attention_channels, conv_channels, 1)
        self.mhca = MHCA(conv_channels)
        self.norm2: nn.Module = nn.BatchNorm2d(out_channels, eps=NORM_EPS)
        self.mlp = Mlp(out_channels, TRANSFORMER_MLP_RATIO, options.drop_rate)
        self.drop_path = DropPath(options.drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = x + self.drop_path(self.e_mhsa(self.norm1(x)))
        z = self.projection(x)
        z = z + self.drop_path(self.mhca(z))
        y = torch.cat((x, z), dim=1)
        return y + self.drop_path(self.mlp(self.norm2(y)))

    def fold(self) -> None:
        self.norm1 = self.e_mhsa.fold_norm_before(self.norm1)
        self.norm2 = fold_norm_before(self.norm2, self.mlp.conv1)


# ---- the backbone ---------------------------------------------------------------------------------------------------


class NextViT(Backbone):
    """Next-ViT with the outputs of its four stages (strides 4, 8, 16, 32), without a norm on them.

    The classifier (`norm.*`, `proj_head.*`) is known and unused. A file written after the published `merge_bn` has the
    same keys as one written before, so it cannot be told apart: load the published files as they are.

    Args:
        arch: a name of `ARCHITECTURES`, or a mapping with the fields of `NextViTArchitecture`.
        mixer: "emhsa" (published weights), "emhsa2d" or "xca": see the classes in `MIXERS`.
        drop_path_rate: stochastic depth of the last block; it rises linearly from zero in the first.
        drop_rate: dropout after attention and in the MLPs.
        attn_drop_rate: dropout of attention weights.
        frozen_stages, norm_eval: see `Backbone`; the published detection recipe is 1 and true.
        normalize, mean, std: see `Backbone`.
    """

    OFFICIAL_PREFIXES = ("backbone.", "module.")
    IGNORED_KEYS = ("norm.*", "proj_head.*", "head.*")
    NEW_KEYS = ("*.e_mhsa.temperature",)

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "small",
        *,
        mixer: str = "emhsa",
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        normalize: bool = True,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__(normalize, mean, std)
        self.arch = choose_architecture("NextViT", arch, ARCHITECTURES)
        require(mixer in MIXERS, f"NextViT: mixer is {mixer!r}; allowed: {', '.join(MIXERS)}")
        rates = {"drop_path_rate": drop_path_rate, "drop_rate": drop_rate, "attn_drop_rate": attn_drop_rate}
        for name, rate in rates.items():
            require(0 <= rate < 1, f"NextViT: {name} is {rate}; allowed: 0 <= {name} < 1")
        self.stage_sizes = self.arch.depths
        self.levels = tuple(FeatureLevel(c, 4 << i) for i, c in enumerate(self.arch.out_channels))
        self.size_divisor = 32
        first, second, channels = self.arch.stem_channels
        widths, strides = (3, first, second, channels, channels), (2, 1, 1, 2)
        self.stem = nn.Sequential(*(StemConv(widths[i], widths[i + 1], stride) for i, stride in enumerate(strides)))
        blocks: list[nn.Module] = []
        last = max(sum(self.arch.depths) - 1, 1)
        for stage, depth in enumerate(self.arch.depths):
            for index in range(depth):
                options = _BlockOptions(mixer, drop_rate, attn_drop_rate, drop_path_rate * len(blocks) / last)
                blocks.append(self._block(stage, index, channels, options))
                transformer = self.arch.is_transformer(stage, index)
                channels = (self.arch.out_channels if transformer else self.arch.conv_channels)[stage]
        self.features = nn.ModuleList(blocks)
        self.apply(_init_weights)
        self.hold(frozen_stages, norm_eval)

    def _block(self, stage: int, index: int, in_channels: int, options: _BlockOptions) -> ConvBlock | TransformerBlock:
        stride = 2 if stage and not index else 1
        if not self.arch.is_transformer(stage, index):
            return ConvBlock(in_channels, self.arch.conv_channels[stage], stride, options)
        reduction = self.arch.reductions[stage]
        return TransformerBlock(in_channels, self.arch.out_channels[stage], stride, reduction, options)

    def forward_features(self, image: Tensor) -> tuple[Tensor, ...]:
        """The four stage outputs of a normalised image (B, 3, H, W); sides that are no multiple of 32 round up."""
        x = self.stem(image)
        outputs, ends = [], list(accumulate(self.arch.depths))
        for number, block in enumerate(self.features, start=1):
            x = block(x)
            if number in ends:
                outputs.append(x)
        return tuple(outputs)

    def reparameterize(self) -> None:
        """Fold every BatchNorm into the layer after or before it, in place; none is left, nor are its keys.

        So the state dict of a deployed model fits no model in training form, and the other way round. Works in float16,
        bfloat16, float32 and float64; a second call changes nothing.
        """
        for module in list(self.modules()):
            if isinstance(module, (StemConv, Projection, MHCA, ConvBlock, TransformerBlock)):
                module.fold()

    def convert_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict in timm's layout under the published names; any other is returned as it is."""
        if not any(key.startswith("stages.0.blocks.") for key in state):
            return dict(state)
        starts = [0, *accumulate(self.arch.depths)]
        published = {}
        for key, value in state.items():
            parts = key.split(".")
            if parts[0] == "stages" and int(parts[1]) < 4:
                parts = ["features", str(starts[int(parts[1])] + int(parts[3])), *parts[4:]]
            name = ".".join(parts).replace(".mlp.fc1.", ".mlp.conv1.").replace(".mlp.fc2.", ".mlp.conv2.")
            published[name] = value
        return published

    def param_depth(self, name: str) -> int:
        """0 for the stem, n + 1 for block n."""
        return 1 + int(name.split(".")[1]) if name.startswith("features.") else 0


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
