"""RIFormer: a vision backbone whose blocks have no token mixer at inference.

Paper: "RIFormer: Keep Your Vision Backbone Effective But Removing Token Mixer", Wang et al., CVPR 2023,
https://arxiv.org/abs/2304.05659.
Reference: https://github.com/open-mmlab/mmpretrain, Apache-2.0. State-dict keys are those of its checkpoints.
Verified: feature maps of s12 and m36 before and after re-parameterization, float32 and float64, against values of the
reference implementation (tests/parity/test_riformer.py).

During training an affine operator (scale and shift per channel) replaces the token mixer; for inference it is merged
into the GroupNorm before it. The published weights were trained with module imitation (distillation in which the
affine operator imitates the token mixer of a teacher block); this file contains the student network.

Shape legend: B batch, C channels, H and W height and width in cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone, FeatureLevel
from models.backbones.layers import (
    DropPath,
    Mlp,
    activation_from_cfg,
    choose_architecture,
    choose_outputs,
    drop_path_rates,
    norm_eps,
    require,
    require_integers,
    require_rates,
)

NORM_EPS = 1e-5
PUBLISHED_NORM = {"type": "GN", "num_groups": 1}


@dataclass(frozen=True)
class RIFormerArchitecture:
    """Configuration of the four stages.

    Attributes:
        layers, embed_dims, mlp_ratios: number of blocks, channels and MLP expansion ratio of each stage.
        layer_scale_init_value: initial value of the layer scales; None = the argument of `RIFormer`.
    """

    layers: tuple[int, int, int, int]
    embed_dims: tuple[int, int, int, int]
    mlp_ratios: tuple[float, float, float, float] = (4, 4, 4, 4)
    layer_scale_init_value: float | None = None

    def __post_init__(self) -> None:
        require_integers("RIFormer", self, ("layers", "embed_dims"))
        ratios = self.mlp_ratios
        valid = isinstance(ratios, tuple) and len(ratios) == 4
        valid = valid and all(isinstance(ratio, (int, float)) and ratio > 0 for ratio in ratios)
        require(valid, f"RIFormer: mlp_ratios of arch is {ratios!r}; allowed: 4 positive numbers")
        value = self.layer_scale_init_value
        valid = value is None or (isinstance(value, (int, float)) and value > 0)
        require(valid, f"RIFormer: layer_scale_init_value of arch is {value!r}; allowed: a positive number")


ARCHITECTURES: dict[str, RIFormerArchitecture] = {
    "s12": RIFormerArchitecture((2, 2, 6, 2), (64, 128, 320, 512)),
    "s24": RIFormerArchitecture((4, 4, 12, 4), (64, 128, 320, 512)),
    "s36": RIFormerArchitecture((6, 6, 18, 6), (64, 128, 320, 512), layer_scale_init_value=1e-6),
    "m36": RIFormerArchitecture((6, 6, 18, 6), (96, 192, 384, 768), layer_scale_init_value=1e-6),
    "m48": RIFormerArchitecture((8, 8, 24, 8), (96, 192, 384, 768), layer_scale_init_value=1e-6),
}


@dataclass(frozen=True)
class _BlockOptions:
    drop_rate: float
    layer_scale_init_value: float
    act_layer: type[nn.Module]
    eps: float


class StridedPatchEmbed(nn.Module):
    """Downsampling convolution: 7x7 with stride 4 as the stem, 3x3 with stride 2 between stages."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, out_channels, kernel, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        return self.proj(x)


class AffineMixer(nn.Module):
    """Affine operator in place of the token mixer: affine(x) - x (PoolFormer computes pool(x) - x).

    The parameters are those of a depthwise 1x1 convolution (published keys and shapes). They are applied as a
    multiply-add, which gives the same values and is several times faster on a CPU.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.affine = nn.Conv2d(channels, channels, 1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        scale = self.affine.weight.view(-1, 1, 1)
        assert self.affine.bias is not None
        return torch.addcmul(self.affine.bias.view(-1, 1, 1), x, scale) - x


class RIFormerBlock(nn.Module):
    """Block during training: x = x + ls_1 * (affine(norm1(x)) - norm1(x)), then x = x + ls_2 * mlp(norm2(x))."""

    def __init__(self, channels: int, mlp_ratio: float, drop_path: float, options: _BlockOptions) -> None:
        super().__init__()
        self.layer_scale_1 = nn.Parameter(torch.full((channels,), options.layer_scale_init_value))
        self.layer_scale_2 = nn.Parameter(torch.full((channels,), options.layer_scale_init_value))
        self.norm1 = nn.GroupNorm(1, channels, eps=options.eps)
        self.token_mixer = AffineMixer(channels)
        self.norm2 = nn.GroupNorm(1, channels, eps=options.eps)
        self.mlp = Mlp(channels, int(channels * mlp_ratio), options.drop_rate, options.act_layer)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x + self.drop_path(self.layer_scale_1.view(-1, 1, 1) * self.token_mixer(self.norm1(x)))
        return x + self.drop_path(self.layer_scale_2.view(-1, 1, 1) * self.mlp(self.norm2(x)))


class DeployedRIFormerBlock(nn.Module):
    """Re-parameterized block: norm and affine operator are merged into one norm, `norm_reparam`.

    With norm(x) = g * n + b and affine(y) = a * y + c:  affine(norm(x)) - norm(x) = g (a - 1) * n + (b (a - 1) + c).
    """

    def __init__(self, block: RIFormerBlock) -> None:
        super().__init__()
        self.layer_scale_1, self.layer_scale_2 = block.layer_scale_1, block.layer_scale_2
        self.norm2, self.mlp, self.drop_path = block.norm2, block.mlp, block.drop_path
        norm, affine = block.norm1, block.token_mixer.affine
        assert affine.bias is not None
        scale = affine.weight.detach().flatten().double() - 1
        weight, bias = norm.weight.detach(), norm.bias.detach()
        folded = nn.GroupNorm(1, norm.num_channels, eps=norm.eps, device=weight.device, dtype=weight.dtype)
        # Computed in float64, so that the rounding at the end is the only error.
        folded.weight.data.copy_(weight.double() * scale)
        folded.bias.data.copy_(bias.double() * scale + affine.bias.detach().double())
        self.norm_reparam = folded.requires_grad_(norm.weight.requires_grad)
        self.train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x + self.drop_path(self.layer_scale_1.view(-1, 1, 1) * self.norm_reparam(x))
        return x + self.drop_path(self.layer_scale_2.view(-1, 1, 1) * self.mlp(self.norm2(x)))


class RIFormer(Backbone):
    """RIFormer with one output per stage (strides 4, 8, 16, 32), each normalized by its own GroupNorm.

    `network` contains the stages at 0, 2, 4, 6 and the downsampling convolutions between them at 1, 3, 5; as published,
    there is no downsampling between stages of equal width. The output norms (`norm0`, `norm2`, `norm4`, `norm6`) apply
    to the outputs only; published checkpoints contain only `norm6`.

    Args:
        arch: name in `ARCHITECTURES`, or a mapping with `layers`, `embed_dims` and optionally `mlp_ratios`,
            `layer_scale_init_value`.
        in_channels: channels of the input.
        in_patch_size, in_stride, in_pad: kernel size, stride and padding of the stem.
        down_patch_size, down_stride, down_pad: the same for the downsampling convolutions.
        norm_cfg: {type: GN, num_groups: 1}, optionally with `eps`.
        act_cfg: activation of the MLPs, as {type: GELU}.
        drop_rate: dropout inside the MLPs, in [0, 1).
        drop_path_rate: stochastic depth of the last block, in [0, 1); it increases linearly from 0 in the first block.
        layer_scale_init_value: initial value of the layer scales, unless the architecture has its own (s36, m36, m48:
            1e-6). From random weights AdamW increases them (to 1e-3 .. 1e-1 within 300 steps); 1 instead of 1e-5 gave
            no improvement.
        strides: strides of the returned maps; None = all. The norm of an unused map has no gradient, which is an error
            in distributed data-parallel training.
        out_indices: the same by index in `network`, an integer or several; negative ones count from the end.
        frozen_stages: see `Backbone`.
        deploy: build the re-parameterized model, for weights in that form.
        normalize, mean, std: see `Backbone`.

    Raises:
        SpecError: if the architecture is unknown, or another argument is not allowed.
    """

    IGNORED_KEYS = ("head.*",)
    NEW_KEYS = ("norm0.*", "norm1.*", "norm2.*", "norm3.*", "norm4.*", "norm5.*")
    DEPLOYED_KEYS = ("*.norm_reparam.*",)
    REFUSED: ClassVar[Mapping[str, str]] = {"init_cfg": "weights are loaded with `weights`"}

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "s12",
        in_channels: int = 3,
        norm_cfg: Mapping[str, Any] | None = None,
        act_cfg: Mapping[str, Any] | None = None,
        in_patch_size: int = 7,
        in_stride: int = 4,
        in_pad: int = 2,
        down_patch_size: int = 3,
        down_stride: int = 2,
        down_pad: int = 1,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-5,
        strides: Sequence[int] | None = None,
        out_indices: int | Sequence[int] | None = None,
        frozen_stages: int = -1,
        deploy: bool = False,
        normalize: bool = True,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__(normalize, mean, std, in_channels)
        require_rates("RIFormer", drop_path_rate=drop_path_rate, drop_rate=drop_rate)
        architecture = choose_architecture("RIFormer", arch, ARCHITECTURES)
        init_value = architecture.layer_scale_init_value or layer_scale_init_value
        eps = norm_eps("RIFormer", norm_cfg, PUBLISHED_NORM, NORM_EPS)
        options = _BlockOptions(drop_rate, init_value, activation_from_cfg("RIFormer", act_cfg, nn.GELU), eps)
        self.stage_sizes = architecture.layers
        self.patch_embed = StridedPatchEmbed(in_channels, architecture.embed_dims[0], in_patch_size, in_stride, in_pad)
        down = (down_patch_size, down_stride, down_pad)
        network, levels, self.depths = _network(architecture, in_stride, down, drop_path_rate, options)
        self.network = nn.ModuleList(network)
        self.out_indices = choose_outputs("RIFormer", levels, strides, out_indices)
        self.levels = tuple(levels[index] for index in self.out_indices)
        self.size_divisor = levels[-1].stride
        for index, level in zip(self.out_indices, self.levels):
            self.add_module(f"norm{index}", nn.GroupNorm(1, level.channels, eps=eps))
        self.apply(_init_weights)
        self.hold(frozen_stages)
        if deploy:
            self.reparameterize()

    def forward_features(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the normalized stage outputs (B, C, H / stride, W / stride) of a normalized image (B, 3, H, W)."""
        x = self.patch_embed(image)
        outputs = []
        for index, stage in enumerate(self.network[: self.out_indices[-1] + 1]):
            x = stage(x)
            if index in self.out_indices:
                outputs.append(self.get_submodule(f"norm{index}")(x))
        return tuple(outputs)

    def reparameterize(self) -> None:
        """Merge every affine operator into the norm before it (key `norm_reparam`), in place.

        Works in float16, bfloat16, float32 and float64; idempotent.
        """
        for stage in self.network:
            if isinstance(stage, nn.Sequential):
                for index, block in enumerate(stage):
                    if isinstance(block, RIFormerBlock):
                        stage[index] = DeployedRIFormerBlock(block)

    def param_depth(self, name: str) -> int:
        """Return 0 for the stem, 1 + i for block i and the downsampling before it, one more for the output norms."""
        parts = name.split(".")
        if parts[0] == "patch_embed":
            return 0
        if parts[0] != "network":
            return sum(self.stage_sizes) + 1
        return self.depths[int(parts[1])] + (int(parts[2]) if parts[2].isdecimal() else 0)


def _network(
    arch: RIFormerArchitecture,
    in_stride: int,
    down: tuple[int, int, int],
    drop_path_rate: float,
    options: _BlockOptions,
) -> tuple[list[nn.Module], list[FeatureLevel], list[int]]:
    """Return stages and downsampling convolutions with their output level and the depth of their first parameter."""
    network: list[nn.Module] = []
    levels: list[FeatureLevel] = []
    depths: list[int] = []
    rates = drop_path_rates(drop_path_rate, sum(arch.layers))
    stride = in_stride
    for stage, (depth, width) in enumerate(zip(arch.layers, arch.embed_dims)):
        before = sum(arch.layers[:stage])
        if stage and width != arch.embed_dims[stage - 1]:
            stride *= down[1]
            network.append(StridedPatchEmbed(arch.embed_dims[stage - 1], width, *down))
            levels.append(FeatureLevel(width, stride))
            depths.append(before + 1)
        ratio = arch.mlp_ratios[stage]
        blocks = (RIFormerBlock(width, ratio, rate, options) for rate in rates[before : before + depth])
        network.append(nn.Sequential(*blocks))
        levels.append(FeatureLevel(width, stride))
        depths.append(before + 1)
    return network, levels, depths


def _init_weights(module: nn.Module) -> None:
    """Initialize convolutions from N(0, 0.02), truncated, and affine operators as the identity."""
    if isinstance(module, AffineMixer):
        nn.init.ones_(module.affine.weight)
        nn.init.zeros_(module.affine.bias)  # type: ignore[arg-type]
    elif isinstance(module, (StridedPatchEmbed, Mlp)):
        for child in module.children():
            if isinstance(child, nn.Conv2d):
                nn.init.trunc_normal_(child.weight, std=0.02)
                nn.init.zeros_(child.bias)  # type: ignore[arg-type]
