"""RepMLPNet: a hierarchical vision MLP whose convolutions are merged into fully connected layers.

Paper: "RepMLPNet: Hierarchical Vision MLP with Re-parameterized Locality", Ding et al., CVPR 2022,
https://arxiv.org/abs/2112.11081.
Reference: https://github.com/DingXiaoH/RepMLP, MIT. State-dict keys are those of its checkpoints; mmpretrain's keys
(Apache-2.0) for the same entries are mapped by `OFFICIAL_KEY_RULES`.
Verified: stage outputs of T224, B256 and mmpretrain's base before and after re-parameterization, float32 and float64,
against values of the reference implementations (tests/parity/test_repmlp.py).

A RepMLP block is the product of two parts:

- Global Perceptron: one factor per channel, from global average pooling and two 1x1 layers.
- Channel Perceptron (Partition Perceptron in RepMLP, https://arxiv.org/abs/2105.01883): the map is split into
  partitions of h x w cells, and every partition is the input of one fully connected layer, FC3, shared by groups of
  channels (set sharing, S "share sets").
- Local Perceptron (training only): depthwise k x k convolutions and BatchNorms parallel to FC3, added to its output.
  Locality Injection merges them into FC3.

The partition size belongs to the weights (h w = side of the matrix of FC3), not to the image: every block pads its map
with zeros at right and bottom to complete partitions and crops the result, while the Global Perceptron pools the
unpadded map. The reference raises an error for sizes that are not a multiple of the nominal size.

For multiples larger than the nominal size the reference merges partitions in another order than it splits them: the
result of tile t, channel c is stored at the position of (t, c) read as (c', t'), which mixes tiles and channels.
`tile_order="published"` (default, equal to the published values) does the same for complete partitions;
`tile_order="spatial"` restores every tile to its position at any size, as a detector needs it and as the YAMLs of this
project specify. With one partition both are equal.

Shape legend: B batch, C channels, S share sets, P and Q partitions down and across, h and w cells of a partition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone, FeatureLevel
from models.backbones.layers import (
    batch_norm_affine,
    choose_architecture,
    choose_outputs,
    norm_eps,
    require,
    require_integers,
)

BN_EPS = 1e-5
TILE_ORDERS = ("published", "spatial")

# (mmpretrain's spelling, the authors' spelling)
OFFICIAL_KEY_RULES: tuple[tuple[str, str], ...] = (
    ("patch_embed.projection.", "conv_embedding.conv."),
    ("patch_embed.norm.", "conv_embedding.bn."),
    (".gp.conv1.conv.", ".gp.fc1."),
    (".gp.conv2.conv.", ".gp.fc2."),
    (".norm1.", ".prebn1."),
    (".norm2.", ".prebn2."),
    ("downsample_layers.", "embeds."),
    ("final_norm.", "head_norm."),
    ("head.fc.", "head."),
)


@dataclass(frozen=True)
class RepMLPNetArchitecture:
    """Configuration of the stages.

    Attributes:
        channels, depths, share_sets: channels C, number of blocks and share sets S of each stage.
        nominal: side, or (height, width), of the training image; a partition of stage i has
            nominal / (patch_size * 2^i) cells.
        kernels: kernel sizes of the Local Perceptron.
        patch_size: side of the patches of the embedding, its stride; a power of two.
    """

    channels: tuple[int, ...]
    depths: tuple[int, ...]
    share_sets: tuple[int, ...]
    nominal: int | tuple[int, int] = 224
    kernels: tuple[int, ...] = (1, 3)
    patch_size: int = 4

    def __post_init__(self) -> None:
        count = len(self.channels) if isinstance(self.channels, tuple) else 4
        require_integers("RepMLPNet", self, ("channels", "depths", "share_sets"), count=max(count, 1))
        size = self.patch_size
        power_of_two = isinstance(size, int) and size >= 1 and size & (size - 1) == 0
        require(power_of_two, f"RepMLPNet: patch_size is {size!r}; allowed: powers of two")
        for c, s in zip(self.channels, self.share_sets):
            require(
                c % s == 0, f"RepMLPNet: {c} channels cannot be divided into {s} share sets; allowed: divisors of {c}"
            )
        sides = self.sides
        require(
            all(isinstance(v, int) and v > 0 and v % self.stride == 0 for v in sides),
            f"RepMLPNet: nominal is {self.nominal!r}; allowed: multiples of {self.stride}",
        )
        require(
            all(isinstance(k, int) and k > 0 and k % 2 == 1 for k in self.kernels),
            f"RepMLPNet: kernels are {self.kernels!r}; allowed: odd numbers",
        )

    @property
    def sides(self) -> tuple[int, int]:
        """Nominal (height, width)."""
        return (self.nominal, self.nominal) if isinstance(self.nominal, int) else self.nominal

    @property
    def stride(self) -> int:
        """Stride of the last stage."""
        return self.patch_size << (len(self.channels) - 1)


ARCHITECTURES: dict[str, RepMLPNetArchitecture] = {
    "T224": RepMLPNetArchitecture((64, 128, 256, 512), (2, 2, 6, 2), (1, 4, 16, 128), 224),
    "B224": RepMLPNetArchitecture((96, 192, 384, 768), (2, 2, 12, 2), (1, 4, 32, 128), 224),
    "T256": RepMLPNetArchitecture((64, 128, 256, 512), (2, 2, 6, 2), (1, 4, 16, 128), 256),
    "B256": RepMLPNetArchitecture((96, 192, 384, 768), (2, 2, 12, 2), (1, 4, 32, 128), 256),
    "D256": RepMLPNetArchitecture((80, 160, 320, 640), (2, 2, 18, 2), (1, 4, 16, 128), 256),
    "L256": RepMLPNetArchitecture((96, 192, 384, 768), (2, 2, 18, 2), (1, 4, 32, 256), 256),
}
ARCHITECTURES |= {name.lower(): architecture for name, architecture in ARCHITECTURES.items()}
# mmpretrain's `base` is B224 or B256, by its image size
ARCHITECTURES |= {"base": ARCHITECTURES["B224"], "b": ARCHITECTURES["B224"], "base-256": ARCHITECTURES["B256"]}


class ConvBN(nn.Module):
    """Convolution without bias, followed by BatchNorm."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=BN_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        return self.bn(self.conv(x))


class GlobalPerceptron(nn.Module):
    """Global Perceptron: one factor in (0, 1) per channel, from the mean over the map."""

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden_channels, 1)
        self.fc2 = nn.Conv2d(hidden_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 1, 1)."""
        return self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class RepMLPBlock(nn.Module):
    """Block during training: (Channel Perceptron + Local Perceptron) * Global Perceptron.

    Args:
        channels: C.
        share_sets: S; channel c uses matrix c mod S of FC3.
        partition: (h, w) in cells.
        kernels: kernel sizes of the Local Perceptron.
        tile_order: "published" or "spatial"; see the module docstring.
        hidden_channels: of the Global Perceptron.
    """

    def __init__(
        self,
        channels: int,
        share_sets: int,
        partition: tuple[int, int],
        kernels: Sequence[int],
        tile_order: str,
        hidden_channels: int,
    ) -> None:
        super().__init__()
        self.share_sets, self.partition, self.kernels = share_sets, partition, tuple(kernels)
        self.tile_order = tile_order
        h, w = partition
        self.gp = GlobalPerceptron(channels, hidden_channels)
        self.fc3 = nn.Conv2d(share_sets * h * w, share_sets * h * w, 1, groups=share_sets, bias=False)
        self.fc3_bn = nn.BatchNorm2d(share_sets, eps=BN_EPS)
        for k in self.kernels:
            self.add_module(f"repconv{k}", ConvBN(share_sets, share_sets, k, groups=share_sets))

    def perceive(self, x_NShw: Tensor) -> Tensor:
        """Return Channel Perceptron + Local Perceptron of N = B P Q C / S partitions, (N, S, h, w)."""
        n, s, h, w = x_NShw.shape
        out: Tensor = self.fc3_bn(self.fc3(x_NShw.reshape(n, s * h * w, 1, 1)).reshape(n, s, h, w))
        for k in self.kernels:
            out = out + self.get_submodule(f"repconv{k}")(x_NShw)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return by_partitions(self.perceive, x, self) * self.gp(x)


class DeployedRepMLPBlock(nn.Module):
    """Re-parameterized block: FC3 with bias includes the Local Perceptron and all BatchNorms."""

    def __init__(self, block: RepMLPBlock) -> None:
        super().__init__()
        self.share_sets, self.partition, self.tile_order = block.share_sets, block.partition, block.tile_order
        self.gp = block.gp
        weight, bias = folded_fc3(block)
        old = block.fc3.weight
        side = old.shape[0]
        self.fc3 = nn.Conv2d(side, side, 1, groups=block.share_sets, device=old.device, dtype=old.dtype)
        self.fc3.weight.data.copy_(weight)
        assert self.fc3.bias is not None
        self.fc3.bias.data.copy_(bias)
        self.train(block.training)

    def perceive(self, x_NShw: Tensor) -> Tensor:
        """Return FC3 of N = B P Q C / S partitions, (N, S, h, w)."""
        n, s, h, w = x_NShw.shape
        out: Tensor = self.fc3(x_NShw.reshape(n, s * h * w, 1, 1))
        return out.reshape(n, s, h, w)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return by_partitions(self.perceive, x, self) * self.gp(x)


def by_partitions(perceive: Callable[[Tensor], Tensor], x: Tensor, block: RepMLPBlock | DeployedRepMLPBlock) -> Tensor:
    """Apply `perceive` to every h x w partition of a map, padded with zeros to complete partitions and then cropped.

    Args:
        perceive: (N, S, h, w) -> the same shape.
        x: (B, C, H, W), any H and W.
        block: defines the partition (h, w), S (a divisor of C) and the order in which partitions are merged.

    Returns:
        (B, C, H, W).
    """
    (b, c, height, width), (h, w), s = x.shape, block.partition, block.share_sets
    whole = height % h == 0 and width % w == 0
    if not whole:
        x = F.pad(x, (0, -width % w, 0, -height % h))
    p, q = x.shape[2] // h, x.shape[3] // w
    out = perceive(x.reshape(b, c, p, h, q, w).permute(0, 2, 4, 1, 3, 5).reshape(-1, s, h, w))  # (B P Q C/S) S h w
    if whole and block.tile_order == "published":
        out = out.reshape(-1, p, q, s, h, w).permute(0, 3, 1, 4, 2, 5)  # (B C/S) S P h Q w: tiles and channels mixed
    else:
        out = out.reshape(b, p, q, c, h, w).permute(0, 3, 1, 4, 2, 5)  # B C P h Q w
    out = out.reshape(b, c, p * h, q * w)
    return out if whole else out[:, :, :height, :width]


def folded_fc3(block: RepMLPBlock) -> tuple[Tensor, Tensor]:
    """Return weight (S h w, h w, 1, 1) and bias (S h w), float64, of the merged FC3 (Locality Injection).

    A convolution over an h x w partition is a matrix whose column i is its output for the i-th unit image. All is
    computed in float64, so that the rounding at the end is the only error.
    """
    s, (h, w) = block.share_sets, block.partition
    with torch.no_grad():
        scale_S, shift_S = batch_norm_affine(block.fc3_bn)
        weight_Soi = block.fc3.weight.double().reshape(s, h * w, h * w) * scale_S.view(-1, 1, 1)
        units = torch.eye(h * w, dtype=torch.float64, device=weight_Soi.device).reshape(h * w, 1, h, w)
        for k in block.kernels:
            branch = block.get_submodule(f"repconv{k}")
            assert isinstance(branch, ConvBN)
            scale, shift = batch_norm_affine(branch.bn)
            kernel = branch.conv.weight.double() * scale.view(-1, 1, 1, 1)  # S 1 k k
            images = F.conv2d(units.expand(-1, s, -1, -1), kernel, padding=k // 2, groups=s)  # i S h w
            weight_Soi = weight_Soi + images.reshape(h * w, s, h * w).permute(1, 2, 0)
            shift_S = shift_S + shift
        return weight_Soi.reshape(s * h * w, h * w, 1, 1), shift_S.repeat_interleave(h * w)


class FFN(nn.Module):
    """Feed-forward network: two 1x1 convolutions with BatchNorm and a GELU between them, expansion 4."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.ffn_fc1 = ConvBN(channels, channels * 4, 1)
        self.ffn_fc2 = ConvBN(channels * 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.ffn_fc2(F.gelu(self.ffn_fc1(x)))


class RepMLPUnit(nn.Module):
    """x = x + RepMLP(bn1(x)), then x = x + FFN(bn2(x))."""

    def __init__(self, channels: int, block: RepMLPBlock) -> None:
        super().__init__()
        self.repmlp_block: nn.Module = block
        self.ffn_block = FFN(channels)
        self.prebn1 = nn.BatchNorm2d(channels, eps=BN_EPS)
        self.prebn2 = nn.BatchNorm2d(channels, eps=BN_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x + self.repmlp_block(self.prebn1(x))
        return x + self.ffn_block(self.prebn2(x))


class RepMLPNet(Backbone):
    """RepMLPNet with the outputs of its stages (strides 4, 8, 16, 32), before the downsampling after each stage.

    Fine-tune before `reparameterize()`, as the authors recommend. The classifier (`head.*`) is ignored, and so is its
    norm (`head_norm.*`) without `final_norm`.

    Args:
        arch: name in `ARCHITECTURES` or a mapping with `channels`, `depths`, `share_sets` (published name:
            `sharesets_nums`) and optionally `nominal`, `kernels`, `patch_size`; any number of stages.
        img_size, patch_size, reparam_conv_kernels: override `nominal`, `patch_size`, `kernels` of the architecture.
        in_channels: channels of the input.
        tile_order: "published" or "spatial"; see the module docstring.
        strides: strides of the returned maps; None = all.
        out_indices: the same by stage, an integer or several; negative ones count from the end.
        after_downsampling: take each output after the downsampling that follows the stage, as mmpretrain does.
        globalperceptron_ratio: reduction of the Global Perceptron, with the width rounded to a multiple of 8 as in
            mmpretrain; None = a quarter of the channels, as in the authors' code.
        final_norm: apply a BatchNorm to the output of the last stage.
        norm_cfg: {type: BN}, optionally with `eps`.
        frozen_stages, norm_eval: see `Backbone`.
        deploy: build the re-parameterized model, for weights in that form.
        normalize, mean, std: see `Backbone`.

    Raises:
        SpecError: if the architecture, one of its fields or another argument is not allowed.
    """

    OFFICIAL_PREFIXES = ("backbone.", "module.")
    IGNORED_KEYS: tuple[str, ...] = ("head.*", "head_norm.*")
    DEPLOYED_KEYS = ("*.fc3.bias",)
    REFUSED: ClassVar[Mapping[str, str]] = {
        "init_cfg": "weights are loaded with `weights`",
        "conv_cfg": "re-parameterization needs plain convolutions",
        "patch_cfg": "give the size of the patches as `patch_size`",
        "num_classes": "the classifier is not built",
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "T224",
        img_size: int | Sequence[int] | None = None,
        in_channels: int = 3,
        patch_size: int | None = None,
        out_indices: int | Sequence[int] | None = None,
        reparam_conv_kernels: Sequence[int] | None = None,
        globalperceptron_ratio: int | None = None,
        norm_cfg: Mapping[str, Any] | None = None,
        final_norm: bool = False,
        deploy: bool = False,
        *,
        tile_order: str = "published",
        strides: Sequence[int] | None = None,
        after_downsampling: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        normalize: bool = True,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__(normalize, mean, std, in_channels)
        require(
            tile_order in TILE_ORDERS, f"RepMLPNet: tile_order is '{tile_order}'; allowed: {', '.join(TILE_ORDERS)}"
        )
        eps = norm_eps("RepMLPNet", norm_cfg, {"type": "BN"}, BN_EPS)
        a = choose_architecture("RepMLPNet", arch, ARCHITECTURES, {"sharesets_nums": "share_sets"})
        changes: dict[str, Any] = {"nominal": img_size, "patch_size": patch_size, "kernels": reparam_conv_kernels}
        changes = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in changes.items() if v is not None}
        a = replace(a, **changes)
        self.size_divisor = a.stride
        self.stage_sizes = a.depths
        self.conv_embedding = ConvBN(in_channels, a.channels[0], a.patch_size, stride=a.patch_size)
        self.stages = nn.ModuleList(_stages(a, tile_order, globalperceptron_ratio))
        self.embeds = nn.ModuleList(ConvBN(c, d, 2, stride=2) for c, d in pairwise(a.channels))
        self.after_downsampling = after_downsampling
        levels = [_level(a, stage, after_downsampling) for stage in range(len(a.channels))]
        self.out_indices = choose_outputs("RepMLPNet", levels, strides, out_indices)
        self.levels = tuple(levels[stage] for stage in self.out_indices)
        self.head_norm = nn.BatchNorm2d(a.channels[-1]) if final_norm else None
        if final_norm:
            self.IGNORED_KEYS = ("head.*",)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = eps
        self.hold(frozen_stages, norm_eval)
        if deploy:
            self.reparameterize()

    def forward_features(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the stage outputs (B, C, H / stride, W / stride) of a normalized image (B, 3, H, W)."""
        x = F.relu(self.conv_embedding(image))
        outputs = []
        for stage, units in enumerate(self.stages):
            for unit in units:  # type: ignore[attr-defined]
                x = unit(x)
            y = x
            if stage < len(self.embeds):
                x = F.relu(self.embeds[stage](x))
                y = x if self.after_downsampling else y
            elif self.head_norm is not None:
                y = self.head_norm(y)
            if stage in self.out_indices:
                outputs.append(y)
        return tuple(outputs)

    def reparameterize(self) -> None:
        """Merge the convolutions and BatchNorms of every block into its FC3 (Locality Injection), in place.

        Works in float16, bfloat16, float32 and float64; idempotent.
        """
        for module in self.modules():
            if isinstance(module, RepMLPUnit) and isinstance(module.repmlp_block, RepMLPBlock):
                module.repmlp_block = DeployedRepMLPBlock(module.repmlp_block)

    def switch_to_deploy(self) -> None:
        """Call `reparameterize`; the published name."""
        self.reparameterize()

    def local_inject(self) -> None:
        """Call `reparameterize`; the published name of Locality Injection."""
        self.reparameterize()

    def official_key(self, key: str) -> str:
        """Return the key of this class (as in the reference) for a key of either published layout."""
        for theirs, ours in OFFICIAL_KEY_RULES:
            key = key.replace(theirs, ours)
        return key

    def param_depth(self, name: str) -> int:
        """Return 0 for the embedding, 1 + i for unit i and the downsampling before it, one more for the final norm."""
        parts = name.split(".")
        if parts[0] == "stages":
            return 1 + sum(self.stage_sizes[: int(parts[1])]) + int(parts[2])
        if parts[0] == "embeds":
            return 1 + sum(self.stage_sizes[: int(parts[1]) + 1])
        return 1 + sum(self.stage_sizes) if parts[0] == "head_norm" else 0


def _stages(arch: RepMLPNetArchitecture, tile_order: str, ratio: int | None) -> list[nn.ModuleList]:
    stages = []
    for i, (c, depth, s) in enumerate(zip(arch.channels, arch.depths, arch.share_sets)):
        stride = arch.patch_size << i
        partition = (arch.sides[0] // stride, arch.sides[1] // stride)
        hidden = c // 4 if ratio is None else _make_divisible(c // ratio)
        blocks = [RepMLPBlock(c, s, partition, arch.kernels, tile_order, hidden) for _ in range(depth)]
        stages.append(nn.ModuleList([RepMLPUnit(c, block) for block in blocks]))
    return stages


def _make_divisible(value: int, divisor: int = 8) -> int:
    """Round to a multiple of `divisor`, by at most 10 % down, as mmpretrain does."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def _level(arch: RepMLPNetArchitecture, stage: int, after_downsampling: bool) -> FeatureLevel:
    """Return the level of the output of a stage."""
    index = min(stage + 1, len(arch.channels) - 1) if after_downsampling else stage
    return FeatureLevel(arch.channels[index], arch.patch_size << index)
