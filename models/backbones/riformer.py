"""RIFormer: a vision transformer without token mixer (https://arxiv.org/abs/2304.05659).

In training every block mixes tokens by an affine map alone (scale and shift per channel); for deployment that map folds
into the GroupNorm before it, so the network has no token mixer at all. Key names are those of the published checkpoints
(mmpretrain layout, Apache-2.0, weights at https://github.com/open-mmlab/mmpretrain).

Verified: feature maps of s12 and m36 in training and re-parameterized model, float32 and float64, against numbers of
the
published implementation (tests/parity/test_riformer.py).

Shape legend: B batch, C channels, H and W height and width in cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone, FeatureLevel
from models.backbones.layers import DropPath, Mlp, choose_architecture, require

NORM_EPS = 1e-5
LAYER_SCALE_INIT = 1e-5
STRIDES = (4, 8, 16, 32)


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and value > 0


@dataclass(frozen=True)
class RIFormerArchitecture:
    """Four stages: blocks, channels and width of the MLP (in multiples of the channels) of each."""

    layers: tuple[int, int, int, int]
    embed_dims: tuple[int, int, int, int]
    mlp_ratios: tuple[float, float, float, float] = (4, 4, 4, 4)

    def __post_init__(self) -> None:
        for name in ("layers", "embed_dims", "mlp_ratios"):
            values = getattr(self, name)
            require(
                isinstance(values, tuple) and len(values) == 4 and all(_positive(v) for v in values),
                f"RIFormer: {name} of arch is {values!r}; four positive numbers are needed",
            )


ARCHITECTURES: dict[str, RIFormerArchitecture] = {
    "s12": RIFormerArchitecture((2, 2, 6, 2), (64, 128, 320, 512)),
    "s24": RIFormerArchitecture((4, 4, 12, 4), (64, 128, 320, 512)),
    "s36": RIFormerArchitecture((6, 6, 18, 6), (64, 128, 320, 512)),
    "m36": RIFormerArchitecture((6, 6, 18, 6), (96, 192, 384, 768)),
    "m48": RIFormerArchitecture((8, 8, 24, 8), (96, 192, 384, 768)),
}


class StridedPatchEmbed(nn.Module):
    """One convolution that lowers the resolution: 7x7 stride 4 as the stem, 3x3 stride 2 between stages."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, out_channels, kernel, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class AffineMixer(nn.Module):
    """`affine(x) - x`, where `affine` scales and shifts each channel (PoolFormer has `pool(x) - x` here).

    The parameters are those of a depthwise 1x1 convolution (the published key names and shapes); they are applied as a
    multiply-add, which is the same number and several times faster on a CPU.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.affine = nn.Conv2d(channels, channels, 1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.affine.weight.view(-1, 1, 1)
        assert self.affine.bias is not None
        return torch.addcmul(self.affine.bias.view(-1, 1, 1), x, scale) - x


class RIFormerBlock(nn.Module):
    """Training form: `x + ls1 * (affine(norm1(x)) - norm1(x))`, then `x + ls2 * mlp(norm2(x))`."""

    def __init__(self, channels: int, mlp_ratio: float, drop_rate: float, drop_path: float, init_value: float) -> None:
        super().__init__()
        self.layer_scale_1 = nn.Parameter(torch.full((channels,), init_value))
        self.layer_scale_2 = nn.Parameter(torch.full((channels,), init_value))
        self.norm1 = nn.GroupNorm(1, channels, eps=NORM_EPS)
        self.token_mixer = AffineMixer(channels)
        self.norm2 = nn.GroupNorm(1, channels, eps=NORM_EPS)
        self.mlp = Mlp(channels, int(channels * mlp_ratio), drop_rate)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.layer_scale_1.view(-1, 1, 1) * self.token_mixer(self.norm1(x)))
        return x + self.drop_path(self.layer_scale_2.view(-1, 1, 1) * self.mlp(self.norm2(x)))


class DeployedRIFormerBlock(nn.Module):
    """Re-parameterized model of a block: the norm and the affine map are one norm, `norm_reparam`.

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
        # In float64, so that the one rounding at the end is the only error.
        folded.weight.data.copy_(weight.double() * scale)
        folded.bias.data.copy_(bias.double() * scale + affine.bias.detach().double())
        self.norm_reparam = folded.requires_grad_(norm.weight.requires_grad)
        self.train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.layer_scale_1.view(-1, 1, 1) * self.norm_reparam(x))
        return x + self.drop_path(self.layer_scale_2.view(-1, 1, 1) * self.mlp(self.norm2(x)))


class RIFormer(Backbone):
    """RIFormer with one output per stage (strides 4, 8, 16, 32), each through a GroupNorm of its own.

    `network` holds stages at 0, 2, 4, 6 and the downsampling convolutions between them at 1, 3, 5. The norms of the
    outputs (`norm0`, `norm2`, `norm4`, `norm6`) are not fed onward; published checkpoints hold only `norm6`.

    Args:
        arch: name in `ARCHITECTURES`, or a mapping with `layers`, `embed_dims` and optionally `mlp_ratios`.
        drop_path_rate: stochastic depth of the last block, in [0, 1); rises linearly from 0 at the first.
        drop_rate: dropout inside the MLPs, in [0, 1).
        layer_scale_init_value: initial value of the layer scales; the default is the published one. From random weights
            AdamW lets them grow by themselves (to 1e-3 .. 1e-1 within 300 steps); 1 instead of 1e-5 gained nothing.
        strides: of the maps to return. A map that nobody reads leaves its norm without gradient, which data-parallel
            training refuses.
        frozen_stages: see `Backbone`.
        normalize, mean, std: see `Backbone`.

    Raises:
        SpecError: unknown architecture or a rate outside its range.
    """

    IGNORED_KEYS = ("head.*",)
    NEW_KEYS = ("norm0.*", "norm2.*", "norm4.*")
    DEPLOYED_KEYS = ("*.norm_reparam.*",)

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "s12",
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        layer_scale_init_value: float = LAYER_SCALE_INIT,
        strides: Sequence[int] = STRIDES,
        frozen_stages: int = -1,
        normalize: bool = True,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__(normalize, mean, std)
        for name, rate in (("drop_path_rate", drop_path_rate), ("drop_rate", drop_rate)):
            require(0 <= rate < 1, f"RIFormer: {name} is {rate}; allowed: 0 <= {name} < 1")
        architecture = choose_architecture("RIFormer", arch, ARCHITECTURES)
        widths, depths = architecture.embed_dims, architecture.layers
        require(
            bool(strides) and list(strides) == [s for s in STRIDES if s in strides],
            f"RIFormer: strides are {list(strides)}; allowed: some of {list(STRIDES)}, rising",
        )
        self.levels = tuple(FeatureLevel(width, s) for s, width in zip(STRIDES, widths) if s in strides)
        self.size_divisor = 32
        self.stage_sizes = depths
        total = sum(depths)
        drop_paths = [drop_path_rate * i / max(total - 1, 1) for i in range(total)]
        self.patch_embed = StridedPatchEmbed(3, widths[0], 7, 4, 2)
        network: list[nn.Module] = []
        for stage, (depth, width) in enumerate(zip(depths, widths)):
            if stage:
                network.append(StridedPatchEmbed(widths[stage - 1], width, 3, 2, 1))
            rates = drop_paths[sum(depths[:stage]) :][:depth]
            ratio = architecture.mlp_ratios[stage]
            network.append(
                nn.Sequential(*(RIFormerBlock(width, ratio, drop_rate, rate, layer_scale_init_value) for rate in rates))
            )
        self.network = nn.ModuleList(network)
        for stage, width in enumerate(widths):
            if STRIDES[stage] in strides:
                self.add_module(f"norm{2 * stage}", nn.GroupNorm(1, width, eps=NORM_EPS))
        self.apply(_init_weights)
        self.hold(frozen_stages)

    def forward_features(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the normed stage outputs of a normalized image (B, 3, H, W), H and W at least 32."""
        x = self.patch_embed(image)
        outputs = []
        for index, stage in enumerate(self.network):
            x = stage(x)
            norm = getattr(self, f"norm{index}", None)
            if norm is not None:
                outputs.append(norm(x))
        return tuple(outputs)

    def reparameterize(self) -> None:
        """Fold every affine token mixer into the norm before it (key `norm_reparam`), in place.

        Works in float16, bfloat16, float32 and float64; a second call changes nothing.
        """
        for stage in self.network:
            if isinstance(stage, nn.Sequential):
                for index, block in enumerate(stage):
                    if isinstance(block, RIFormerBlock):
                        stage[index] = DeployedRIFormerBlock(block)

    def param_depth(self, name: str) -> int:
        """0 for the stem, 1 + i for block i (a downsampling counts as the next block), then one more for the norms."""
        parts = name.split(".")
        if parts[0] == "patch_embed":
            return 0
        if parts[0] != "network":
            return sum(self.stage_sizes) + 1
        index = int(parts[1])
        before = sum(self.stage_sizes[: (index + 1) // 2])
        return before + 1 + (int(parts[2]) if index % 2 == 0 else 0)


def _init_weights(module: nn.Module) -> None:
    """Initialize convolutions with a truncated normal (0.02), affine maps as identity (a block starts as its MLP)."""
    if isinstance(module, AffineMixer):
        nn.init.ones_(module.affine.weight)
        nn.init.zeros_(module.affine.bias)  # type: ignore[arg-type]
    elif isinstance(module, (StridedPatchEmbed, Mlp)):
        for child in module.children():
            if isinstance(child, nn.Conv2d):
                nn.init.trunc_normal_(child.weight, std=0.02)
                nn.init.zeros_(child.bias)  # type: ignore[arg-type]
