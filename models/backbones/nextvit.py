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

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone, FeatureLevel
from models.backbones.layers import (
    DropPath,
    Mlp,
    choose_architecture,
    drop_path_rates,
    fold_norm_after,
    fold_norm_before,
    norm_eps,
    require,
    require_integers,
    require_rates,
)
from models.backbones.nextvit_attention import HEAD_DIM, MIXERS, NORM_EPS, AttentionOptions, with_linear_attention

MIX_BLOCK_RATIO = 0.75
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
        strides: stride of the first block of each stage.
        head_dim: channels of a head.
        mix_block_ratio: fraction of the channels of an NTB on which E-MHSA works; MHCA works on the others.
    """

    depths: tuple[int, int, int, int]
    conv_channels: tuple[int, int, int, int] = (96, 192, 384, 768)
    out_channels: tuple[int, int, int, int] = (96, 256, 512, 1024)
    transformer_every: tuple[int, int, int, int] = (0, 4, 5, 3)
    reductions: tuple[int, int, int, int] = (8, 4, 2, 1)
    stem_channels: tuple[int, int, int] = (64, 32, 64)
    strides: tuple[int, int, int, int] = (1, 2, 2, 2)
    head_dim: int = HEAD_DIM
    mix_block_ratio: float = MIX_BLOCK_RATIO

    def __post_init__(self) -> None:
        require_integers("NextViT", self, ("depths", "conv_channels", "out_channels", "reductions"))
        require_integers("NextViT", self, ("transformer_every",), minimum=0)
        require_integers("NextViT", self, ("stem_channels",), count=3)
        require_integers("NextViT", self, ("strides",))
        require(max(self.strides) <= 2, f"NextViT: strides of arch is {list(self.strides)}; allowed: 1 or 2 per stage")
        dim = self.head_dim
        require(isinstance(dim, int) and dim >= 1, f"NextViT: head_dim is {dim!r}; allowed: integers >= 1")
        ratio = self.mix_block_ratio
        require(0 < ratio < 1, f"NextViT: mix_block_ratio is {ratio!r}; allowed: above 0 and below 1")
        for i, (conv, out, every) in enumerate(zip(self.conv_channels, self.out_channels, self.transformer_every)):
            channels = f"NextViT: stage {i + 1} of arch has {conv} conv_channels and {out} out_channels"
            require(conv % dim == 0 and out % dim == 0, f"{channels}; allowed: multiples of {dim}")
            require(every > 0 or out == conv, f"{channels}; without an NTB they must be equal")
            require(every == 0 or out >= 2 * dim, f"{channels}; an NTB needs at least {2 * dim}")
            mhsa = self.mhsa_channels(out)
            fits = every == 0 or (mhsa % dim == 0 and (out - mhsa) % dim == 0)
            require(fits, f"{channels}; an NTB splits them {mhsa} : {out - mhsa}, and both need multiples of {dim}")

    def mhsa_channels(self, out_channels: int) -> int:
        """Return the channels of E-MHSA in an NTB: the ratio, rounded to a multiple of 32 as in the reference.

        Where that would leave none for MHCA, one head less.
        """
        target = int(out_channels * self.mix_block_ratio)
        rounded = max(32, (target + 16) // 32 * 32)
        rounded += 32 if rounded < 0.9 * target else 0
        return rounded if rounded < out_channels else out_channels - self.head_dim

    def is_transformer(self, stage: int, block: int) -> bool:
        """Return whether block number `block` of a stage is an NTB."""
        every = self.transformer_every[stage]
        return every > 0 and (self.depths[stage] - 1 - block) % every == 0


ARCHITECTURES: dict[str, NextViTArchitecture] = {
    "small": NextViTArchitecture((3, 4, 10, 3)),
    "base": NextViTArchitecture((3, 4, 20, 3)),
    "large": NextViTArchitecture((3, 4, 30, 3)),
}


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

    def __init__(self, channels: int, head_dim: int = HEAD_DIM) -> None:
        super().__init__()
        self.group_conv3x3 = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels // head_dim, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(channels, eps=NORM_EPS)
        self.projection = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.projection(F.relu(self.norm(self.group_conv3x3(x))))

    def fold(self) -> None:
        """Fold the BatchNorm into the group convolution."""
        self.norm = fold_norm_after(self.group_conv3x3, self.norm)


def _first_conv(mlp: nn.Module) -> nn.Conv2d:
    conv = mlp.get_submodule("conv1")
    assert isinstance(conv, nn.Conv2d)
    return conv


def _mlp(channels: int, ratio: int, drop_rate: float) -> Mlp:
    return Mlp(channels, channels * ratio, drop_rate, nn.ReLU, ("conv1", "conv2"))


# ---- blocks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _BlockOptions:
    arch: NextViTArchitecture
    mixer: str
    drop_rate: float
    attention: AttentionOptions


class NCB(nn.Module):
    """Next Convolution Block: z~ = MHCA(z) + z, then z = MLP(z~) + z~."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, drop_path: float, options: _BlockOptions
    ) -> None:
        super().__init__()
        self.patch_embed = _projection(in_channels, out_channels, stride)
        self.mhca = MHCA(out_channels, options.arch.head_dim)
        self.norm: nn.Module = nn.BatchNorm2d(out_channels, eps=NORM_EPS)
        self.mlp = _mlp(out_channels, NCB_MLP_RATIO, options.drop_rate)
        self.drop_path = DropPath(drop_path)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        z = self.patch_embed(z)
        z = z + self.drop_path(self.mhca(z))
        return z + self.drop_path(self.mlp(self.norm(z)))

    def fold(self) -> None:
        """Fold the BatchNorm into the first convolution of the MLP."""
        self.norm = fold_norm_before(self.norm, _first_conv(self.mlp))


class NTB(nn.Module):
    """Next Transformer Block: E-MHSA on the fraction r (shrink ratio, 0.75) of the channels, MHCA on the others.

    Drop-path rates are those of the reference: r times the rate of the block on E-MHSA, 1 - r times on MHCA, the rate
    itself on the MLP.
    """

    def __init__(self, in_channels: int, stage: int, stride: int, drop_path: float, options: _BlockOptions) -> None:
        super().__init__()
        arch, ratio = options.arch, options.arch.mix_block_ratio
        out_channels = arch.out_channels[stage]
        mhsa_channels = arch.mhsa_channels(out_channels)
        mhca_channels = out_channels - mhsa_channels
        self.patch_embed = _projection(in_channels, mhsa_channels, stride)
        self.norm1: nn.Module = nn.BatchNorm2d(mhsa_channels, eps=NORM_EPS)
        self.e_mhsa = MIXERS[options.mixer](mhsa_channels, arch.reductions[stage], options.attention)
        self.mhsa_drop_path = DropPath(drop_path * ratio)
        self.projection = _projection(mhsa_channels, mhca_channels, 1)
        self.mhca = MHCA(mhca_channels, arch.head_dim)
        self.mhca_drop_path = DropPath(drop_path * (1 - ratio))
        self.norm2: nn.Module = nn.BatchNorm2d(out_channels, eps=NORM_EPS)
        self.mlp = _mlp(out_channels, NTB_MLP_RATIO, options.drop_rate)
        self.mlp_drop_path = DropPath(drop_path)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        z = self.patch_embed(z)
        z_mhsa = z + self.mhsa_drop_path(self.e_mhsa(self.norm1(z)))
        z_mhca = self.projection(z_mhsa)
        z_mhca = z_mhca + self.mhca_drop_path(self.mhca(z_mhca))
        z = torch.cat((z_mhsa, z_mhca), dim=1)
        return z + self.mlp_drop_path(self.mlp(self.norm2(z)))

    def fold(self) -> None:
        """Fold the BatchNorms into E-MHSA and into the first convolution of the MLP."""
        self.norm1 = self.e_mhsa.fold_norm_before(self.norm1)
        self.norm2 = fold_norm_before(self.norm2, _first_conv(self.mlp))


# ---- the backbone ---------------------------------------------------------------------------------------------------


class NextViT(Backbone):
    """Next-ViT with the outputs of its four stages (strides 4, 8, 16, 32).

    The classifier (`norm.*`, `proj_head.*`) is ignored. A file written after the published `merge_bn` has the same keys
    as one written before, so the two are indistinguishable: load the published files unmodified.

    Args:
        arch: a name of `ARCHITECTURES`, or a mapping with the fields of `NextViTArchitecture`.
        mixer: "emhsa" (published weights), "emhsa2d" or "xca": see the classes in `MIXERS`.
        in_channels: channels of the input.
        depths, stem_chs, strides, sr_ratios, head_dim, mix_block_ratio: override the fields `depths`, `stem_channels`,
            `strides`, `reductions`, `head_dim` and `mix_block_ratio` of the architecture.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: factor on q k^T in E-MHSA; None = head_dim^-0.5.
        drop_path_rate: stochastic depth of the last block; it increases linearly from 0 in the first block.
        drop_rate: dropout after attention and in the MLPs.
        attn_drop_rate: dropout of attention weights.
        with_extra_norm: apply a BatchNorm to each output, as in the published detectors.
        use_checkpoint: recompute each block in the backward pass instead of storing its activations.
        frozen_stages, norm_eval: see `Backbone`; the published detection recipe is 1 and true.
        norm_cfg: {type: BN}, optionally with `eps`: {type: SyncBN} is `train.py --sync-bn`.
        deploy: build the re-parameterized model, for weights in that form.
        normalize, mean, std: see `Backbone`.

    Raises:
        SpecError: if the architecture, the mixer, a rate or another argument is not allowed.
    """

    OFFICIAL_PREFIXES = ("backbone.", "module.")
    IGNORED_KEYS = ("norm.*", "proj_head.*", "head.*")
    NEW_KEYS = ("*.e_mhsa.temperature", "extra_norm_list.*")
    ALIASES: ClassVar[Mapping[str, str]] = {
        "path_dropout": "drop_path_rate",
        "attn_drop": "attn_drop_rate",
        "drop": "drop_rate",
    }
    REFUSED: ClassVar[Mapping[str, str]] = {
        "num_classes": "the classifier is not built",
        "resume": "weights are loaded with `weights`",
        "pretrained_cfg": "weights are loaded with `weights`",
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "small",
        *,
        mixer: str = "emhsa",
        in_channels: int = 3,
        depths: Sequence[int] | None = None,
        stem_chs: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        sr_ratios: Sequence[int] | None = None,
        head_dim: int | None = None,
        mix_block_ratio: float | None = None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        with_extra_norm: bool = False,
        use_checkpoint: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        norm_cfg: Mapping[str, Any] | None = None,
        deploy: bool = False,
        normalize: bool = True,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__(normalize, mean, std, in_channels)
        fields = {"depths": depths, "stem_channels": stem_chs, "strides": strides, "reductions": sr_ratios}
        changes: dict[str, Any] = {key: tuple(value) for key, value in fields.items() if value is not None}
        changes |= {} if head_dim is None else {"head_dim": head_dim}
        changes |= {} if mix_block_ratio is None else {"mix_block_ratio": mix_block_ratio}
        self.arch = replace(choose_architecture("NextViT", arch, ARCHITECTURES), **changes)
        require(mixer in MIXERS, f"NextViT: mixer is {mixer!r}; allowed: {', '.join(MIXERS)}")
        require_rates("NextViT", drop_path_rate=drop_path_rate, drop_rate=drop_rate, attn_drop_rate=attn_drop_rate)
        eps = norm_eps("NextViT", norm_cfg, {"type": "BN"}, NORM_EPS)
        self.mixer = MIXERS[mixer]
        self.use_checkpoint = use_checkpoint
        self.stage_sizes = self.arch.depths
        first, second, channels = self.arch.stem_channels
        widths, steps = (in_channels, first, second, channels, channels), (2, 1, 1, 2)
        self.stem = nn.Sequential(*(StemConv(widths[i], widths[i + 1], stride) for i, stride in enumerate(steps)))
        attention = AttentionOptions(attn_drop_rate, drop_rate, self.arch.head_dim, qkv_bias, qk_scale)
        options = _BlockOptions(self.arch, mixer, drop_rate, attention)
        self.features = nn.ModuleList(_blocks(channels, drop_path_rate, options))
        self._set_levels()
        norms = [nn.BatchNorm2d(c) for c in self.arch.out_channels] if with_extra_norm else []
        self.extra_norm_list = nn.ModuleList(norms)
        self.apply(_init_weights)
        for module in self.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.eps = eps
        self.hold(frozen_stages, norm_eval)
        if deploy:
            self.reparameterize()

    def _set_levels(self) -> None:
        """Declare the last output of each stride."""
        stride, by_stride = 4, {}
        for stage, channels in enumerate(self.arch.out_channels):
            stride *= self.arch.strides[stage]
            by_stride[stride] = (stage, FeatureLevel(channels, stride))
        self.out_stages = tuple(stage for stage, _ in by_stride.values())
        self.levels = tuple(level for _, level in by_stride.values())
        self.size_divisor = stride

    def forward_features(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the stage outputs (B, C, H / stride, W / stride), rounded up, of a normalized image (B, 3, H, W)."""
        x = self.stem(image)
        outputs, ends = [], list(accumulate(self.arch.depths))
        recompute = self.use_checkpoint and self.training and torch.is_grad_enabled()
        for number, block in enumerate(self.features, start=1):
            x = _recomputed(block, x) if recompute else block(x)
            if number in ends and ends.index(number) in self.out_stages:
                stage = ends.index(number)
                outputs.append(self.extra_norm_list[stage](x) if len(self.extra_norm_list) else x)
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
        """Return a state dict with the published keys.

        Converts timm's layout, 1x1 convolutions in place of the linear layers of E-MHSA, and fused `qk` or `qkv`.
        """
        state = with_linear_attention(state, self.mixer)
        if not any(key.startswith("stages.0.blocks.") for key in state):
            return state
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
        """Return 0 for the stem, n + 1 for block n, and one more than the last block for the output norms."""
        if name.startswith("stem."):
            return 0
        return 1 + (int(name.split(".")[1]) if name.startswith("features.") else sum(self.stage_sizes))


def _recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """Run a block whose activations are computed again in the backward pass."""
    if torch.compiler.is_compiling():  # whose graph updates the statistics once
        return checkpoint(block, x, use_reentrant=False)
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _fixed_statistics(block)))


@contextmanager
def _fixed_statistics(block: nn.Module) -> Iterator[None]:
    """Run a block in training mode without an update of its BatchNorm statistics."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _blocks(channels: int, drop_path_rate: float, options: _BlockOptions) -> list[nn.Module]:
    arch = options.arch
    blocks: list[nn.Module] = []
    rates = iter(drop_path_rates(drop_path_rate, sum(arch.depths)))
    for stage, depth in enumerate(arch.depths):
        for index in range(depth):
            stride = 1 if index else arch.strides[stage]
            if arch.is_transformer(stage, index):
                blocks.append(NTB(channels, stage, stride, next(rates), options))
                channels = arch.out_channels[stage]
            else:
                blocks.append(NCB(channels, arch.conv_channels[stage], stride, next(rates), options))
                channels = arch.conv_channels[stage]
    return blocks


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
