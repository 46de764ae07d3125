"""RevViT: a reversible vision transformer whose activation memory does not grow with its depth.

Paper: "Reversible Vision Transformers", Mangalam et al., CVPR 2022, https://arxiv.org/abs/2302.04869.
Reference: https://github.com/facebookresearch/SlowFast, Apache-2.0 (REV_VIT_S, REV_VIT_B), and the same weights
converted by mmpretrain, Apache-2.0 (revvit-small, revvit-base): architectures `deit-small` and `deit-base` below.
State-dict keys are those of mmpretrain.
Verified: outputs and gradients in float32 and float64 against values of the reference (tests/parity/test_revvit.py),
and the custom backward pass against ordinary autograd (tests/models/backbones/test_revvit_gradients.py).

A block maps two streams (x_1, x_2) of equal shape to (y_1, y_2). With F = attention(norm) and G = MLP(norm):

    y_1 = x_1 + F(x_2)                                                     (forward)
    y_2 = x_2 + G(y_1)

    x_2 = y_2 - G(y_1)                                                     (inverse)
    x_1 = y_1 - F(x_2)

Backward pass of a block, given y_1, y_2 and the gradients dy_1, dy_2 of the loss (only the outputs of the last block
are stored):

1. Recompute G(y_1) with gradients; x_2 = y_2 - G(y_1).
2. Backpropagate dy_2 through G: parameter gradients of G, and dx_1 = dy_1 + dy_2 dG/dy_1.
3. Recompute F(x_2) with gradients; x_1 = y_1 - F(x_2).
4. Backpropagate dx_1 through F: parameter gradients of F, and dx_2 = dy_2 + dx_1 dF/dx_2.
5. (x_1, x_2) and (dx_1, dx_2) are the outputs and gradients of the block before; continue with step 1.

Shape legend: B batch, L tokens, C embedding channels, N heads, D channels of a head, H and W tokens down and across.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional

from models.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone, FeatureLevel
from models.backbones.layers import (
    AutocastState,
    BranchState,
    DropPath,
    SimpleFeaturePyramid,
    choose_architecture,
    convert_together,
    drop_path_rates,
    require,
    require_rates,
)

NORM_EPS = 1e-6


@dataclass(frozen=True)
class RevViTArchitecture:
    """Channels of each stream, number of blocks, number of attention heads, hidden channels of the MLP."""

    embed_dims: int
    num_layers: int
    num_heads: int
    feedforward_channels: int

    def __post_init__(self) -> None:
        for name in ("embed_dims", "num_layers", "num_heads", "feedforward_channels"):
            value = getattr(self, name)
            valid = isinstance(value, int) and value >= 1
            require(valid, f"RevViT: {name} of arch is {value!r}; allowed: integers >= 1")
        require(
            self.embed_dims % self.num_heads == 0,
            f"RevViT: embed_dims of arch is {self.embed_dims}; allowed: multiples of num_heads, {self.num_heads}",
        )


ARCHITECTURES: dict[str, RevViTArchitecture] = {
    "small": RevViTArchitecture(768, 8, 8, 2304),
    "base": RevViTArchitecture(768, 12, 12, 3072),
    "large": RevViTArchitecture(1024, 24, 16, 4096),
    "huge": RevViTArchitecture(1280, 32, 16, 5120),
    "deit-tiny": RevViTArchitecture(192, 12, 3, 768),
    "deit-small": RevViTArchitecture(384, 12, 6, 1536),
    "deit-base": RevViTArchitecture(768, 12, 12, 3072),
}

FUSION_MODES = ("add", "max", "min", "avg", "concat")

# (SlowFast's key, key of this class). Besides, q, k and v are stacked to qkv, and `norm` becomes `ln1`.
SLOWFAST_NAMES = (
    *(("rev_backbone.", ""), (".F.norm.", ".ln1."), (".F.attn.", ".attn."), (".G.norm.", ".ln2.")),
    *((".G.mlp.fc1.", ".ffn.layers.0.0."), (".G.mlp.fc2.", ".ffn.layers.1."), ("embed.proj.", "embed.projection.")),
)


@dataclass(frozen=True)
class DropRates:
    """Dropout rates of outputs, of attention weights, and of residual branches (stochastic depth)."""

    drop: float = 0.0
    attn: float = 0.0
    path: float = 0.0


class PatchEmbed(nn.Module):
    """Embedding of non-overlapping patches: a convolution whose stride equals its kernel size."""

    def __init__(self, embed_dims: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Conv2d(3, embed_dims, patch_size, patch_size)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, C, H, W); zero-padded at right and bottom to complete patches."""
        height, width = image.shape[-2:]
        image = functional.pad(image, (0, -width % self.patch_size, 0, -height % self.patch_size))
        return self.projection(image)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, embed_dims: int, num_heads: int, qkv_bias: bool, rates: DropRates) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop_rate = rates.attn
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(rates.drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        batch, tokens, channels = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, channels // self.num_heads)
        q_BNLD, k_BNLD, v_BNLD = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        drop = self.attn_drop_rate if self.training else 0.0
        y_BNLD = functional.scaled_dot_product_attention(q_BNLD, k_BNLD, v_BNLD, dropout_p=drop)
        return self.proj_drop(self.proj(y_BNLD.transpose(1, 2).reshape(batch, tokens, channels)))


class FeedForward(nn.Module):
    """Two linear layers with an exact GELU between them; published keys `layers.0.0` and `layers.1`."""

    def __init__(self, embed_dims: int, hidden_channels: int, drop_rate: float) -> None:
        super().__init__()
        first = nn.Sequential(nn.Linear(embed_dims, hidden_channels), nn.GELU(), nn.Dropout(drop_rate))
        self.layers = nn.Sequential(first, nn.Linear(hidden_channels, embed_dims), nn.Dropout(drop_rate))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.layers(x)


class ReversibleBlock(nn.Module):
    """Reversible block with the residual functions F (attention) and G (MLP)."""

    def __init__(self, arch: RevViTArchitecture, rates: DropRates, qkv_bias: bool) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(arch.embed_dims, eps=NORM_EPS)
        self.attn = Attention(arch.embed_dims, arch.num_heads, qkv_bias, rates)
        self.ln2 = nn.LayerNorm(arch.embed_dims, eps=NORM_EPS)
        self.ffn = FeedForward(arch.embed_dims, arch.feedforward_channels, rates.drop)
        self.drop_path = DropPath(rates.path)

    def F(self, x: Tensor) -> Tensor:  # noqa: N802 (the paper's symbol)
        """Apply the attention branch, (B, L, C) -> (B, L, C)."""
        return self.drop_path(self.attn(self.ln1(x)))

    def G(self, x: Tensor) -> Tensor:  # noqa: N802 (the paper's symbol)
        """Apply the MLP branch, (B, L, C) -> (B, L, C)."""
        return self.drop_path(self.ffn(self.ln2(x)))

    def forward(self, x_1: Tensor, x_2: Tensor) -> tuple[Tensor, Tensor]:
        """Map the streams (B, L, C), (B, L, C) to (y_1, y_2) of the same shapes."""
        y_1 = x_1 + self.F(x_2)
        y_2 = x_2 + self.G(y_1)
        return y_1, y_2


class _Branch(nn.Module):
    """F or G of a block as a separate module, so that it can be run with other parameter tensors."""

    def __init__(self, block: ReversibleBlock, branch: str) -> None:
        super().__init__()
        self.block, self.branch = block, branch
        parts = ("block.ln1.", "block.attn.") if branch == "F" else ("block.ln2.", "block.ffn.")
        self.theta = {name: value for name, value in self.named_parameters() if name.startswith(parts)}

    def forward(self, x: Tensor) -> Tensor:
        return self.block.F(x) if self.branch == "F" else self.block.G(x)

    def pull_back(
        self,
        moment: BranchState,
        autocast: AutocastState,
        x: Tensor,
        theta: Sequence[tuple[Tensor, bool]],
        d_out: Tensor,
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Recompute the branch; return its output, the gradient of x, and that of each theta flagged as required."""
        x = x.detach().requires_grad_()
        aliases = [value.detach().requires_grad_(required) for value, required in theta]
        with torch.enable_grad(), autocast.replay(), moment.replay(self.block):
            out = functional_call(self, dict(zip(self.theta, aliases)), (x,))
        required = [alias for alias in aliases if alias.requires_grad]
        d_x, *d_required = torch.autograd.grad(out, [x, *required], d_out.to(out.dtype))
        gradients = iter(d_required)
        return out.detach(), d_x, [next(gradients) if alias.requires_grad else None for alias in aliases]


class ReversibleFunction(torch.autograd.Function):
    """The sequence of blocks as one autograd function that stores only its outputs.

    Every parameter is an input, so that gradients flow through the ordinary graph: parameter hooks, gradient scaling,
    DistributedDataParallel and `torch.autograd.grad` work as with plain blocks. The backward pass uses detached aliases
    of the parameters; with the parameters themselves, hooks would run twice.
    """

    @staticmethod
    def forward(
        ctx: Any, blocks: Sequence[ReversibleBlock], buffered: frozenset[int], x_1: Tensor, x_2: Tensor, *theta: Tensor
    ) -> tuple[Tensor, Tensor]:
        devices = sorted({t.device for t in (x_1, x_2, *theta) if t.device.type == "cuda"}, key=str)
        ctx.blocks = blocks
        ctx.autocast = AutocastState.now(x_1.device)
        ctx.moments = []
        kept: list[Tensor] = []
        ctx.kept_after = {}
        y_1, y_2 = x_1, x_2
        with ctx.autocast.replay():
            for index, block in enumerate(blocks):
                before_F = BranchState.now(block, devices)
                y_1 = y_1 + block.F(y_2)
                before_G = BranchState.now(block, devices)
                y_2 = y_2 + block.G(y_1)
                ctx.moments.append((before_F, before_G))
                if index in buffered and index + 1 < len(blocks):
                    ctx.kept_after[index] = len(kept)
                    kept += [y_1, y_2]
        ctx.num_kept = len(kept)
        ctx.save_for_backward(y_1, y_2, *kept, *theta)
        return y_1, y_2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_1: Tensor, d_y_2: Tensor) -> tuple[Tensor | None, ...]:
        y_1, y_2, *others = ctx.saved_tensors
        kept, needs_theta = others[: ctx.num_kept], ctx.needs_input_grad[4:]
        names = [name for block in ctx.blocks for branch in "FG" for name in _Branch(block, branch).theta]
        theta = list(zip(ctx.autocast.cast_linear(names, others[ctx.num_kept :]), needs_theta))
        d_theta: list[Tensor | None] = [None] * len(theta)
        end = len(theta)
        for index in reversed(range(len(ctx.blocks))):
            if not any(ctx.needs_input_grad[2:4]) and not any(needs_theta[:end]):
                break  # all remaining blocks are frozen
            if index in ctx.kept_after:
                y_1, y_2 = kept[ctx.kept_after[index] :][:2]
            block, (before_F, before_G) = ctx.blocks[index], ctx.moments[index]
            branch = _Branch(block, "G")
            start = end - len(branch.theta)
            # Steps 1 and 2 of the module docstring
            G_y_1, d, d_theta[start:end] = branch.pull_back(before_G, ctx.autocast, y_1, theta[start:end], d_y_2)
            x_2, d_x_1, end = y_2 - G_y_1, d_y_1 + d, start
            branch = _Branch(block, "F")
            start = end - len(branch.theta)
            # Steps 3, 4 and 5
            F_x_2, d, d_theta[start:end] = branch.pull_back(before_F, ctx.autocast, x_2, theta[start:end], d_x_1)
            x_1, d_x_2, end = y_1 - F_x_2, d_y_2 + d, start
            y_1, y_2, d_y_1, d_y_2 = x_1, x_2, d_x_1, d_x_2
        dtypes = [value.dtype for value in others[ctx.num_kept :]]
        return None, None, d_y_1, d_y_2, *convert_together(d_theta, dtypes)


class RevViT(Backbone):
    """RevViT with a simple feature pyramid on its single map.

    Args:
        arch: a name of `ARCHITECTURES`, or a mapping with the fields of `RevViTArchitecture`.
        normalize, mean, std: see `Backbone`.
        img_size: side, or height and width, in pixels, of the image that the position embedding belongs to.
        patch_size: side of a patch in pixels, the stride of the map; a power of two.
        drop_rate: dropout of embedded tokens, of attention outputs and in the MLPs.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: stochastic depth of the last block; it increases linearly from 0 in the first block.
        qkv_bias: whether query, key and value have a bias.
        final_norm: LayerNorm over the channels of both streams before they are fused.
        fusion_mode: how two streams become one map, one of `FUSION_MODES`; "concat" gives 2 C channels, others C.
        frozen_stages: -1 for none; 0 freezes the patch and position embeddings, n also the first n blocks; the
            number of blocks also freezes the final norm. Frozen parts stay in eval mode.
        buffered_layers: indices of blocks whose outputs are stored, so that recomputation restarts from exact values.
        no_custom_backward: train with ordinary autograd, which stores all activations.
        strides: strides of the returned maps.
        widths: channels of the returned maps, or one number for all.

    Raises:
        SpecError: if an argument is not allowed.
    """

    OFFICIAL_PREFIXES = ("backbone.",)
    IGNORED_KEYS = ("head.*",)
    NEW_KEYS = ("pyramid.*",)

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "deit-small",
        *,
        normalize: bool = True,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        qkv_bias: bool = True,
        final_norm: bool = True,
        fusion_mode: str = "concat",
        frozen_stages: int = -1,
        buffered_layers: Sequence[int] = (),
        no_custom_backward: bool = False,
        strides: Sequence[int] = (4, 8, 16, 32),
        widths: int | Sequence[int] = (64, 128, 256, 512),
    ) -> None:
        super().__init__(normalize, mean, std)
        self.arch = choose_architecture("RevViT", arch, ARCHITECTURES)
        require_rates("RevViT", drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate)
        _check_options(self.arch.num_layers, fusion_mode, buffered_layers)
        self.fusion_mode = fusion_mode
        self.buffered_layers = frozenset(buffered_layers)
        self.no_custom_backward = no_custom_backward
        self.size_divisor = max(patch_size, *strides)

        self.grid = _token_grid(img_size, patch_size)
        self.patch_embed = PatchEmbed(self.arch.embed_dims, patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], self.arch.embed_dims))
        self.drop_after_pos = nn.Dropout(drop_rate)
        self.layers = nn.ModuleList(
            ReversibleBlock(self.arch, DropRates(drop_rate, attn_drop_rate, path), qkv_bias)
            for path in drop_path_rates(drop_path_rate, self.arch.num_layers)
        )
        self.ln1 = nn.LayerNorm(2 * self.arch.embed_dims, eps=NORM_EPS) if final_norm else nn.Identity()
        channels = self.arch.embed_dims * (2 if fusion_mode == "concat" else 1)
        self.pyramid = SimpleFeaturePyramid(channels, patch_size, strides, widths)
        self.levels = tuple(FeatureLevel(w, s) for w, s in zip(self.pyramid.widths, self.pyramid.strides))
        self._initialize()
        self.stage_sizes = (1,) * self.arch.num_layers
        self.hold(frozen_stages)

    def _initialize(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for name, value in self.layers.named_parameters():
            if value.ndim == 2:
                nn.init.trunc_normal_(value, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(value)

    def stage_of(self, name: str) -> int:
        """Return the stage of a parameter; each block is a stage, and the final norm belongs to the last one."""
        return len(self.layers) if name.startswith("ln1.") else super().stage_of(name)

    def train(self, mode: bool = True) -> RevViT:
        """Set the mode as `Backbone.train` does; the dropout after frozen position embeddings stays off."""
        super().train(mode)
        if self.frozen_stages >= 0:
            self.drop_after_pos.eval()
        return self

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, height, width), RGB in [0, 1] -> one map per stride; odd sizes round up."""
        return self.pyramid(self.forward_features(self.normalized(image))[0])

    def forward_features(self, image: Tensor) -> tuple[Tensor]:
        """Return the feature map (B, C or 2 C, ceil(H / patch), ceil(W / patch)) of a normalized image (B, 3, H, W)."""
        x = self.patch_embed(image)
        height, width = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # (B, L, C)
        # The streams accumulate many small residuals: under autocast they keep the dtype of the parameters.
        pos_embed = resize_pos_embed(self.pos_embed, self.grid, (height, width))
        x = self.drop_after_pos(x.to(pos_embed.dtype) + pos_embed)
        y_1, y_2 = self._run_layers(x, x)
        y = self._fuse(self.ln1(torch.cat((y_1, y_2), dim=-1)))
        return (y.transpose(1, 2).reshape(y.shape[0], -1, height, width),)  # (B, C, H, W)

    def _run_layers(self, x_1: Tensor, x_2: Tensor) -> tuple[Tensor, Tensor]:
        # 16-bit streams are too inexact to recompute inputs from; under autocast the streams are float32.
        reversible = self.training and not self.no_custom_backward and x_1.dtype in (torch.float32, torch.float64)
        if reversible and torch.is_grad_enabled():
            blocks = cast(tuple[ReversibleBlock, ...], tuple(self.layers))
            theta = [value for block in blocks for branch in "FG" for value in _Branch(block, branch).theta.values()]
            if theta:  # the replicas of nn.DataParallel have no parameters of their own
                return ReversibleFunction.apply(blocks, self.buffered_layers, x_1, x_2, *theta)
        for block in self.layers:
            x_1, x_2 = block(x_1, x_2)
        return x_1, x_2

    def _fuse(self, y_BL2C: Tensor) -> Tensor:
        if self.fusion_mode == "concat":
            return y_BL2C
        y_1, y_2 = y_BL2C.chunk(2, dim=-1)
        if self.fusion_mode in ("max", "min"):
            return torch.maximum(y_1, y_2) if self.fusion_mode == "max" else torch.minimum(y_1, y_2)
        return (y_1 + y_2) / (2 if self.fusion_mode == "avg" else 1)

    def convert_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert a state dict in SlowFast's layout to mmpretrain's keys; any other is returned unchanged."""
        if not any(key.startswith("rev_backbone.") for key in state):
            return dict(state)
        ours = {}
        for key, value in state.items():
            key = f"ln1.{key[5:]}" if key.startswith("norm.") else key
            for theirs, name in SLOWFAST_NAMES:
                key = key.replace(theirs, name)
            ours[key] = value
        for key in [key for key in ours if ".attn.q." in key]:
            qkv = [key.replace(".q.", f".{part}.") for part in "qkv"]
            if all(part in ours for part in qkv):
                ours[key.replace(".q.", ".qkv.")] = torch.cat([ours.pop(part) for part in qkv])
        return ours

    def resize_official(self, key: str, tensor: Tensor, target_shape: Sequence[int]) -> Tensor:
        """Resize a published position embedding (1, L, C) of a square grid; SpecError for other keys or shapes."""
        side = round(tensor.shape[1] ** 0.5) if tensor.ndim == 3 else 0
        fits = key == "pos_embed" and side > 0 and tensor.shape[1:] == (side * side, target_shape[-1])
        require(fits, f"{key}: shape {tuple(tensor.shape)} cannot become {tuple(target_shape)}")
        return resize_pos_embed(tensor, (side, side), self.grid)

    def param_depth(self, name: str) -> int:
        """Return 0 for the embeddings, n + 1 for block n, and one more than the last block for later layers."""
        if name.startswith(("pos_embed", "patch_embed.")):
            return 0
        return 1 + (int(name.split(".")[1]) if name.startswith("layers.") else len(self.layers))


def _check_options(depth: int, fusion_mode: str, buffered_layers: Sequence[int]) -> None:
    allowed = f"allowed: {', '.join(FUSION_MODES)}"
    require(fusion_mode in FUSION_MODES, f"RevViT: fusion_mode is {fusion_mode!r}; {allowed}")
    for index in buffered_layers:
        require(0 <= index < depth, f"RevViT: buffered_layers holds {index}; allowed: 0 to {depth - 1}")


def _token_grid(img_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """Return the number of tokens down and across of an image of the nominal size."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    power_of_two = patch_size >= 1 and patch_size & (patch_size - 1) == 0
    require(power_of_two, f"RevViT: patch_size is {patch_size}; allowed: powers of two")
    require(min(height, width) >= 1, f"RevViT: img_size is {img_size}; allowed: one or two positive numbers")
    return -(-height // patch_size), -(-width // patch_size)


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resize a position embedding (1, H * W, C) of a grid (H, W) to another grid: bicubic, computed in float32."""
    if grid == new_grid:
        return pos_embed
    table = pos_embed.float().transpose(1, 2).reshape(1, -1, *grid)  # (1, C, H, W)
    table = functional.interpolate(table, size=new_grid, mode="bicubic", align_corners=False)
    return table.flatten(2).transpose(1, 2).to(pos_embed.dtype)
