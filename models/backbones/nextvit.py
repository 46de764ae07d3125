"""Next-ViT: stages of convolution blocks (NCB) and transformer blocks (NTB).

Paper: "Next-ViT: Next Generation Vision Transformer for Efficient Deployment in Realistic Industrial Scenarios",
Li et al., 2022, https://arxiv.org/abs/2207.05501.
Reference: https://github.com/bytedance/Next-ViT, Apache-2.0. State-dict keys are those of its checkpoints; timm's keys
for the same weights are converted on loading.
Verified: stage outputs of small and base before and after re-parameterization, float32 and float64, against values of
the reference implementation (tests/parity/test_nextvit.py).

Blocks, with the paper's names:

- NCB (Next Convolution Block): z~ = MHCA(z) + z, then z = MLP(z~) + z~.
- NTB (Next Transformer Block): z. = Proj(z), z^ = E-MHSA(z.) + z. on most channels; z~ = Proj(z^), z- = MHCA(z~) + z~
  on the others; z = Concat(z^, z-), then z = MLP(z) + z.
- MHCA (Multi-Head Convolutional Attention): group convolution (a head is a group), BatchNorm, ReLU, 1x1 convolution.
- E-MHSA (Efficient Multi-Head Self-Attention): keys and values are computed from average-pooled tokens.
- NHS (Next Hybrid Strategy): a stage repeats (NCB x N + NTB x 1).

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
from models.backbones.layers import (
    DropPath,
    Mlp,
    batch_norm_affine,
    choose_architecture,
    drop_path_rates,
    require,
    require_integers,
    require_rates,
)

NORM_EPS = 1e-5
HEAD_DIM = 32
NCB_MLP_RATIO = 3
NTB_MLP_RATIO = 2


@dataclass(frozen=True)
class NextViTArchitecture:
    """Configuration of the four stages.

    Attributes:
        depths: number of blocks of each stage.
        conv_channels: channels of the NCBs of each stage.
        out_channels: output channels of each stage: those of its NTBs, or of its NCBs if it has no NTB.
        transformer_every: the last block of a stage, and every n-th block counted back from it, is an NTB; 0 = none.
        reductions: spatial reduction ratio of the keys and values of E-MHSA in each stage.
        stem_channels: channels of the first, second and last two convolutions of the stem.
    """

    depths: tuple[int, int, int, int]
    conv_channels: tuple[int, int, int, int] = (96, 192, 384, 768)
    out_channels: tuple[int, int, int, int] = (96, 256, 512, 1024)
    transformer_every: tuple[int, int, int, int] = (0, 4, 5, 3)
    reductions: tuple[int, int, int, int] = (8, 4, 2, 1)
    stem_channels: tuple[int, int, int] = (64, 32, 64)

    def __post_init__(self) -> None:
        require_integers("NextViT", self, ("depths", "conv_channels", "out_channels", "reductions"))
        require_integers("NextViT", self, ("transformer_every",), minimum=0)
        require_integers("NextViT", self, ("stem_channels",), count=3)
        for i, (conv, out, every) in enumerate(zip(self.conv_channels, self.out_channels, self.transformer_every)):
            channels = f"NextViT: stage {i + 1} of arch has {conv} conv_channels and {out} out_channels"
            require(conv % HEAD_DIM == 0 and out % HEAD_DIM == 0, f"{channels}; allowed: multiples of {HEAD_DIM}")
            require(every > 0 or out == conv, f"{channels}; without an NTB they must be equal")
            require(every == 0 or out >= 2 * HEAD_DIM, f"{channels}; an NTB needs at least {2 * HEAD_DIM}")

    def is_transformer(self, stage: int, block: int) -> bool:
        """Return whether block number `block` of a stage is an NTB."""
        every = self.transformer_every[stage]
        return every > 0 and (self.depths[stage] - 1 - block) % every == 0


ARCHITECTURES: dict[str, NextViTArchitecture] = {
    "small": NextViTArchitecture((3, 4, 10, 3)),
    "base": NextViTArchitecture((3, 4, 20, 3)),
    "large": NextViTArchitecture((3, 4, 30, 3)),
}


# ---- folding --------------------------------------------------------------------------------------------------------


def _set_weights(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor) -> None:
    # The only rounding: everything before is float64, whatever the dtype of the layer.
    dtype, requires_grad = layer.weight.dtype, layer.weight.requires_grad
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=requires_grad)
    layer.bias = nn.Parameter(bias.to(dtype), requires_grad=requires_grad)


def _first_conv(mlp: nn.Module) -> nn.Conv2d:
    conv = mlp.get_submodule("conv1")
    assert isinstance(conv, nn.Conv2d)
    return conv


def fold_norm_before(norm: nn.Module, *layers: nn.Conv2d | nn.Linear) -> nn.Module:
    """Fold `norm` into the 1x1 convolutions or linear layers after it; return the module that replaces `norm`."""
    if isinstance(norm, nn.Identity):
        return norm
    a, b = batch_norm_affine(norm)
    for layer in layers:
        weight = layer.weight.detach().double().flatten(1)  # (outputs, inputs)
        bias = 0 if layer.bias is None else layer.bias.detach().double()
        _set_weights(layer, (weight * a).view_as(layer.weight), weight @ b + bias)
    return nn.Identity()


def fold_norm_after(layer: nn.Conv2d, norm: nn.Module) -> nn.Module:
    """Fold `norm` into the convolution before it; return the module that replaces `norm`."""
    if isinstance(norm, nn.Identity):
        return norm
    a, b = batch_norm_affine(norm)
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
        """Fold the BatchNorm into the convolution."""
        self.norm = fold_norm_after(self.conv, self.norm)


class Projection(nn.Module):
    """Patch embedding: 2x2 average pooling (rounding up) if the stride is 2, 1x1 convolution, BatchNorm."""

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
        """Fold the BatchNorm into the convolution."""
        self.norm = fold_norm_after(self.conv, self.norm)


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Return a `Projection`, or the identity if neither channels nor resolution change."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return Projection(in_channels, out_channels, stride)


class MHCA(nn.Module):
    """Multi-Head Convolutional Attention: a 3x3 group convolution (a head is a group) and a 1x1 projection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.group_conv3x3 = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels // HEAD_DIM, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(channels, eps=NORM_EPS)
        self.projection = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.projection(F.relu(self.norm(self.group_conv3x3(x))))

    def fold(self) -> None:
        """Fold the BatchNorm into the group convolution."""
        self.norm = fold_norm_after(self.group_conv3x3, self.norm)


def _mlp(channels: int, ratio: int, drop_rate: float) -> Mlp:
    return Mlp(channels, channels * ratio, drop_rate, nn.ReLU, ("conv1", "conv2"))


# ---- token mixers ---------------------------------------------------------------------------------------------------


class EMHSA(nn.Module):
    """Efficient Multi-Head Self-Attention as published: keys and values are computed from pooled tokens.

    SA(X) = Attention(X W_Q, P_s(X) W_K, P_s(X) W_V). The average pooling P_s is one-dimensional, over s^2 tokens in
    row-major order: it averages along rows and across their ends, and drops the remainder. The published weights were
    trained with it.

    Args:
        channels: channels of input and output.
        reduction: s, the spatial reduction ratio.
        attn_drop_rate: dropout of attention weights.
        drop_rate: dropout of the output.
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
        """Pool (B, C, H, W) to (B, C, M) with M = floor(H * W / reduction^2)."""
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
        return y_BLC.transpose(1, 2).reshape(x.shape)

    def fold_norm_before(self, norm: nn.Module) -> nn.Module:
        """Fold the norm before E-MHSA, and its own, into the linear layers (pooling commutes with both)."""
        self.norm = fold_norm_before(self.norm, self.k, self.v)
        return fold_norm_before(norm, self.q, self.k, self.v)


def _heads(x_BLC: Tensor) -> Tensor:
    batch, tokens, channels = x_BLC.shape
    return x_BLC.reshape(batch, tokens, channels // HEAD_DIM, HEAD_DIM).transpose(1, 2)  # (B, N, L, D)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _conv(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a linear layer to the channels of (B, C, H, W) as a 1x1 convolution, which needs no transposition."""
    return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)


def _conv_heads(layer: nn.Linear, x: Tensor) -> Tensor:
    y = _conv(layer, x).flatten(2)
    return y.reshape(y.shape[0], -1, HEAD_DIM, y.shape[2])  # (B, N, D, L)


class EMHSA2d(EMHSA):
    """E-MHSA with two-dimensional pooling over reduction x reduction cells; drops no cell. Same parameters."""

    def pooled(self, x: Tensor) -> Tensor:
        """Pool (B, C, H, W) to (B, C, M) with M = ceil(H / reduction) * ceil(W / reduction)."""
        return _pool2d(x, self.reduction).flatten(2)


def _pool2d(x: Tensor, reduction: int) -> Tensor:
    if reduction == 1:
        return x
    return F.avg_pool2d(x, reduction, reduction, ceil_mode=True, count_include_pad=False)


class XCA(EMHSA):
    """Cross-covariance attention (XCiT, https://arxiv.org/abs/2106.09681) with queries and keys of pooled cells.

    A head attends over channels: softmax(q k^T * temperature) v, where the rows of q and k (one per channel, over M
    pooled cells) have unit length and v keeps the full resolution. The cost is linear in the number of cells. The
    parameters are those of `EMHSA` plus a temperature per head.
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
        """Fold as `EMHSA.fold_norm_before`; here queries and keys are computed from pooled cells."""
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


class NCB(nn.Module):
    """Next Convolution Block: z~ = MHCA(z) + z, then z = MLP(z~) + z~."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, options: _BlockOptions) -> None:
        super().__init__()
        self.patch_embed = _projection(in_channels, out_channels, stride)
        self.mhca = MHCA(out_channels)
        self.norm: nn.Module = nn.BatchNorm2d(out_channels, eps=NORM_EPS)
        self.mlp = _mlp(out_channels, NCB_MLP_RATIO, options.drop_rate)
        self.drop_path = DropPath(options.drop_path)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        z = self.patch_embed(z)
        z = z + self.drop_path(self.mhca(z))
        return z + self.drop_path(self.mlp(self.norm(z)))

    def fold(self) -> None:
        """Fold the BatchNorm into the first convolution of the MLP."""
        self.norm = fold_norm_before(self.norm, _first_conv(self.mlp))


class NTB(nn.Module):
    """Next Transformer Block: E-MHSA on three quarters of the channels (shrink ratio r = 0.75), MHCA on the others."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, reduction: int, options: _BlockOptions
    ) -> None:
        super().__init__()
        # Rounded down to a multiple of the head width.
        mhsa_channels = out_channels * 3 // 4 // HEAD_DIM * HEAD_DIM
        mhca_channels = out_channels - mhsa_channels
        self.patch_embed = _projection(in_channels, mhsa_channels, stride)
        self.norm1: nn.Module = nn.BatchNorm2d(mhsa_channels, eps=NORM_EPS)
        mixer = MIXERS[options.mixer]
        self.e_mhsa = mixer(mhsa_channels, reduction, options.attn_drop_rate, options.drop_rate)
        self.projection = _projection(mhsa_channels, mhca_channels, 1)
        self.mhca = MHCA(mhca_channels)
        self.norm2: nn.Module = nn.BatchNorm2d(out_channels, eps=NORM_EPS)
        self.mlp = _mlp(out_channels, NTB_MLP_RATIO, options.drop_rate)
        self.drop_path = DropPath(options.drop_path)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        z = self.patch_embed(z)
        z_mhsa = z + self.drop_path(self.e_mhsa(self.norm1(z)))
        z_mhca = self.projection(z_mhsa)
        z_mhca = z_mhca + self.drop_path(self.mhca(z_mhca))
        z = torch.cat((z_mhsa, z_mhca), dim=1)
        return z + self.drop_path(self.mlp(self.norm2(z)))

    def fold(self) -> None:
        """Fold the BatchNorms into E-MHSA and into the first convolution of the MLP."""
        self.norm1 = self.e_mhsa.fold_norm_before(self.norm1)
        self.norm2 = fold_norm_before(self.norm2, _first_conv(self.mlp))


# ---- the backbone ---------------------------------------------------------------------------------------------------


class NextViT(Backbone):
    """Next-ViT with the outputs of its four stages (strides 4, 8, 16, 32), without a norm on them.

    The classifier (`norm.*`, `proj_head.*`) is ignored. A file written after the published `merge_bn` has the same keys
    as one written before, so the two are indistinguishable: load the published files unmodified.

    Args:
        arch: a name of `ARCHITECTURES`, or a mapping with the fields of `NextViTArchitecture`.
        mixer: "emhsa" (published weights), "emhsa2d" or "xca": see the classes in `MIXERS`.
        drop_path_rate: stochastic depth of the last block; it increases linearly from 0 in the first block.
        drop_rate: dropout after attention and in the MLPs.
        attn_drop_rate: dropout of attention weights.
        frozen_stages, norm_eval: see `Backbone`; the published detection recipe is 1 and true.
        normalize, mean, std: see `Backbone`.

    Raises:
        SpecError: if the architecture, the mixer or a rate is not allowed.
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
        require_rates("NextViT", drop_path_rate=drop_path_rate, drop_rate=drop_rate, attn_drop_rate=attn_drop_rate)
        self.stage_sizes = self.arch.depths
        self.levels = tuple(FeatureLevel(c, 4 << i) for i, c in enumerate(self.arch.out_channels))
        self.size_divisor = 32
        first, second, channels = self.arch.stem_channels
        widths, strides = (3, first, second, channels, channels), (2, 1, 1, 2)
        self.stem = nn.Sequential(*(StemConv(widths[i], widths[i + 1], stride) for i, stride in enumerate(strides)))
        blocks: list[nn.Module] = []
        rates = iter(drop_path_rates(drop_path_rate, sum(self.arch.depths)))
        for stage, depth in enumerate(self.arch.depths):
            for index in range(depth):
                options = _BlockOptions(mixer, drop_rate, attn_drop_rate, next(rates))
                blocks.append(self._block(stage, index, channels, options))
                transformer = self.arch.is_transformer(stage, index)
                channels = (self.arch.out_channels if transformer else self.arch.conv_channels)[stage]
        self.features = nn.ModuleList(blocks)
        self.apply(_init_weights)
        self.hold(frozen_stages, norm_eval)

    def _block(self, stage: int, index: int, in_channels: int, options: _BlockOptions) -> NCB | NTB:
        stride = 2 if stage and not index else 1
        if not self.arch.is_transformer(stage, index):
            return NCB(in_channels, self.arch.conv_channels[stage], stride, options)
        reduction = self.arch.reductions[stage]
        return NTB(in_channels, self.arch.out_channels[stage], stride, reduction, options)

    def forward_features(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the stage outputs (B, C, H / stride, W / stride), rounded up, of a normalized image (B, 3, H, W)."""
        x = self.stem(image)
        outputs, ends = [], list(accumulate(self.arch.depths))
        for number, block in enumerate(self.features, start=1):
            x = block(x)
            if number in ends:
                outputs.append(x)
        return tuple(outputs)

    def reparameterize(self) -> None:
        """Fold every BatchNorm into the layer after or before it, in place.

        BatchNorms and their keys are removed, so state dicts before and after are not interchangeable. Works in
        float16, bfloat16, float32 and float64; idempotent.
        """
        for module in list(self.modules()):
            if isinstance(module, (StemConv, Projection, MHCA, NCB, NTB)):
                module.fold()

    def convert_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state dict in timm's layout with the published keys; any other state dict is returned unchanged."""
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
        """Return 0 for the stem, n + 1 for block n."""
        return 1 + int(name.split(".")[1]) if name.startswith("features.") else 0


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
