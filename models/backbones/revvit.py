"""RevViT: a vision transformer whose training memory does not grow with its depth.

Paper: "Reversible Vision Transformers", Mangalam et al., CVPR 2022, https://arxiv.org/abs/2302.04869.
Published weights: REV_VIT_S and REV_VIT_B of SlowFast, and the same two converted by mmpretrain ("revvit-small" and
"revvit-base"); their architectures are `deit-small` and `deit-base` of the table below. Keys are those of mmpretrain.
Verified against numbers of the published model: outputs and gradients in float32 and float64 (tests/parity).

Two streams I1, I2 of equal shape run through the blocks. With F = attention(norm) and G = MLP(norm), a block computes

    O1 = I1 + F(I2)                                                        (forward)
    O2 = I2 + G(O1)

and is inverted without solving anything:

    I2 = O2 - G(O1)                                                        (inverse)
    I1 = O1 - F(I2)

so the backward pass needs only the last outputs: it recomputes one block's inputs at a time, from the end to the start.

Shape legend: B batch, L tokens, C embedding channels, N heads, D channels of a head, H and W tokens down and across.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional

from models.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone, FeatureLevel
from models.backbones.layers import DropPath, SimpleFeaturePyramid, choose_architecture, require

NORM_EPS = 1e-6


@dataclass(frozen=True)
class RevViTArchitecture:
    """Channels of each stream, blocks, attention heads (they share `embed_dims`), hidden channels of the MLP."""

    embed_dims: int
    num_layers: int
    num_heads: int
    feedforward_channels: int

    def __post_init__(self) -> None:
        for name in ("embed_dims", "num_layers", "num_heads", "feedforward_channels"):
            value = getattr(self, name)
            whole = isinstance(value, int) and value >= 1
            require(whole, f"RevViT: {name} of arch is {value!r}; allowed: integers from 1 on")
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

# Parts of SlowFast's key names, and what they are called here. Its q, k and v are stacked to qkv, its `norm` is `ln1`.
SLOWFAST_NAMES = (
    *(("rev_backbone.", ""), (".F.norm.", ".ln1."), (".F.attn.", ".attn."), (".G.norm.", ".ln2.")),
    *((".G.mlp.fc1.", ".ffn.layers.0.0."), (".G.mlp.fc2.", ".ffn.layers.1."), ("embed.proj.", "embed.projection.")),
)


@dataclass(frozen=True)
class DropRates:
    """Probabilities of zeroing in training: values after projections, attention weights, whole branches."""

    drop: float = 0.0
    attn: float = 0.0
    path: float = 0.0


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: a convolution whose stride is its kernel."""

    def __init__(self, embed_dims: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Conv2d(3, embed_dims, patch_size, patch_size)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, C, H, W); zeros fill up the right and the bottom to whole patches."""
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
    """Two linear layers with an exact GELU between them, under the published key names `layers.0.0` and `layers.1`."""

    def __init__(self, embed_dims: int, hidden_channels: int, drop_rate: float) -> None:
        super().__init__()
        first = nn.Sequential(nn.Linear(embed_dims, hidden_channels), nn.GELU(), nn.Dropout(drop_rate))
        self.layers = nn.Sequential(first, nn.Linear(hidden_channels, embed_dims), nn.Dropout(drop_rate))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.layers(x)


class ReversibleBlock(nn.Module):
    """One block of the paper, with its two residual functions F and G."""

    def __init__(self, arch: RevViTArchitecture, rates: DropRates, qkv_bias: bool) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(arch.embed_dims, eps=NORM_EPS)
        self.attn = Attention(arch.embed_dims, arch.num_heads, qkv_bias, rates)
        self.ln2 = nn.LayerNorm(arch.embed_dims, eps=NORM_EPS)
        self.ffn = FeedForward(arch.embed_dims, arch.feedforward_channels, rates.drop)
        self.drop_path = DropPath(rates.path)

    def F(self, x: Tensor) -> Tensor:  # noqa: N802 (the paper\'s name)
        """Attention branch, (B, L, C) -> (B, L, C)."""
        return self.drop_path(self.attn(self.ln1(x)))

    def G(self, x: Tensor) -> Tensor:  # noqa: N802 (the paper\'s name)
        """MLP branch, (B, L, C) -> (B, L, C)."""
        return self.drop_path(self.ffn(self.ln2(x)))

    def forward(self, I1: Tensor, I2: Tensor) -> tuple[Tensor, Tensor]:
        """Streams (B, L, C), (B, L, C) -> the same shapes."""
        O1 = I1 + self.F(I2)
        O2 = I2 + self.G(O1)
        return O1, O2


# ---- the reversible sequence ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Autocast:
    """The autocast state of a moment."""

    device_type: str
    dtype: torch.dtype
    enabled: bool

    @classmethod
    def now(cls, device: torch.device) -> _Autocast:
        kind = device.type
        return cls(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def replay(self) -> torch.autocast:
        # Without the cache: weights cast while gradients are off must not be found again by code that wants gradients.
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


@dataclass(frozen=True)
class _Moment:
    """What a branch depends on besides input and parameters: random generators and training modes of its modules."""

    modes: tuple[bool, ...]
    cpu_state: Tensor | None = None
    cuda_states: dict[torch.device, Tensor] = field(default_factory=dict)

    @classmethod
    def now(cls, block: ReversibleBlock, devices: Sequence[torch.device]) -> _Moment:
        modes = tuple(module.training for module in block.modules())
        if not any(modes):
            return cls(modes)  # nothing is drawn
        return cls(modes, torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices})

    @contextmanager
    def replay(self, block: ReversibleBlock) -> Iterator[None]:
        """Replay the recorded random state inside the block and restore the global generators afterwards."""
        modules = list(block.modules())
        modes = [module.training for module in modules]
        with torch.random.fork_rng(list(self.cuda_states), enabled=self.cpu_state is not None):
            if self.cpu_state is not None:
                torch.set_rng_state(self.cpu_state)
            for device, state in self.cuda_states.items():
                torch.cuda.set_rng_state(state, device)
            try:
                for module, mode in zip(modules, self.modes):
                    module.training = mode
                yield
            finally:
                for module, mode in zip(modules, modes):
                    module.training = mode


class _Branch(nn.Module):
    """F or G of a block as a module of its own, so that it can be run again with other parameter tensors."""

    def __init__(self, block: ReversibleBlock, branch: str) -> None:
        super().__init__()
        self.block, self.branch = block, branch
        parts = ("block.ln1.", "block.attn.") if branch == "F" else ("block.ln2.", "block.ffn.")
        self.theta = {name: value for name, value in self.named_parameters() if name.startswith(parts)}

    def forward(self, x: Tensor) -> Tensor:
        return self.block.F(x) if self.branch == "F" else self.block.G(x)

    def pull_back(
        self, moment: _Moment, autocast: _Autocast, x: Tensor, theta: Sequence[tuple[Tensor, bool]], d_out: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Run again as at a past moment: the output, the gradient of x, and of each theta whose flag asks for one."""
        x = x.detach().requires_grad_()
        aliases = [value.detach().requires_grad_(wanted) for value, wanted in theta]
        with torch.enable_grad(), autocast.replay(), moment.replay(self.block):
            out = functional_call(self, dict(zip(self.theta, aliases)), (x,))
        wanted = [alias for alias in aliases if alias.requires_grad]
        d_x, *d_wanted = torch.autograd.grad(out, [x, *wanted], d_out.to(out.dtype))
        gradients = iter(d_wanted)
        return out.detach(), d_x, [next(gradients) if alias.requires_grad else None for alias in aliases]


class ReversibleFunction(torch.autograd.Function):
    """The whole sequence of blocks as one step of autograd that keeps its outputs and nothing else of the data.

    Every parameter is an input, so gradients leave through the ordinary graph: hooks on parameters, gradient scaling,
    DistributedDataParallel and `torch.autograd.grad` meet what they would meet with plain blocks. The backward pass
    works on detached aliases of the parameters; on the parameters themselves, hooks would run twice.
    """

    @staticmethod
    def forward(
        ctx: Any, blocks: Sequence[ReversibleBlock], buffered: frozenset[int], I1: Tensor, I2: Tensor, *theta: Tensor
    ) -> tuple[Tensor, Tensor]:
        devices = sorted({t.device for t in (I1, I2, *theta) if t.device.type == "cuda"}, key=str)
        ctx.blocks = blocks
        ctx.autocast = _Autocast.now(I1.device)
        ctx.moments = []
        kept: list[Tensor] = []
        ctx.kept_after = {}
        O1, O2 = I1, I2
        with ctx.autocast.replay():
            for index, block in enumerate(blocks):
                before_F = _Moment.now(block, devices)
                O1 = O1 + block.F(O2)
                before_G = _Moment.now(block, devices)
                O2 = O2 + block.G(O1)
                ctx.moments.append((before_F, before_G))
                if index in buffered and index + 1 < len(blocks):
                    ctx.kept_after[index] = len(kept)
                    kept += [O1, O2]
        ctx.num_kept = len(kept)
        ctx.save_for_backward(O1, O2, *kept, *theta)
        return O1, O2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dO1: Tensor, dO2: Tensor) -> tuple[Tensor | None, ...]:
        O1, O2, *others = ctx.saved_tensors
        kept, needs_theta = others[: ctx.num_kept], ctx.needs_input_grad[4:]
        theta = list(zip(others[ctx.num_kept :], needs_theta))
        d_theta: list[Tensor | None] = [None] * len(theta)
        end = len(theta)
        for index in reversed(range(len(ctx.blocks))):
            if not any(ctx.needs_input_grad[2:4]) and not any(needs_theta[:end]):
                break  # all that is left is frozen
            if index in ctx.kept_after:
                O1, O2 = kept[ctx.kept_after[index] :][:2]
            block, (before_F, before_G) = ctx.blocks[index], ctx.moments[index]
            branch = _Branch(block, "G")
            start = end - len(branch.theta)
            G, d, d_theta[start:end] = branch.pull_back(before_G, ctx.autocast, O1, theta[start:end], dO2)
            I2, dO1, end = O2 - G, dO1 + d, start
            branch = _Branch(block, "F")
            start = end - len(branch.theta)
            F, d, d_theta[start:end] = branch.pull_back(before_F, ctx.autocast, I2, theta[start:end], dO1)
            I1, dO2, end = O1 - F, dO2 + d, start
            O1, O2 = I1, I2
        return None, None, dO1, dO2, *d_theta


# ---- the backbone ---------------------------------------------------------------------------------------------------


class RevViT(Backbone):
    """RevViT with a simple feature pyramid on its stride-16 map.

    Args:
        arch: a name of `ARCHITECTURES`, or a mapping with the fields of `RevViTArchitecture`.
        normalize, mean, std: see `Backbone`.
        img_size: height and width, or the side, in pixels, that the position embedding is stored for.
        patch_size: side of a patch, the stride of the transformer's map; a power of two.
        drop_rate: dropout of embedded tokens, of attention outputs and in the MLPs.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: stochastic depth of the last block; it rises linearly from zero in the first.
        qkv_bias: whether query, key and value have a bias.
        final_norm: LayerNorm over the channels of both streams before they are fused.
        fusion_mode: how two streams become one map, one of `FUSION_MODES`; "concat" gives 2 C channels, others C.
        frozen_stages: -1 for none; 0 freezes the patch and position embeddings, n also the first n blocks, as many
            as there are blocks also the final norm. Frozen parts stay in evaluation mode.
        buffered_layers: indices of blocks whose outputs are kept, so that recomputation starts there from exact data.
        no_custom_backward: train by plain autograd, with its memory.
        strides: strides of the returned maps.
        widths: channels of the returned maps, or one number for all.
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
        for name, rate in zip(
            ("drop_rate", "attn_drop_rate", "drop_path_rate"), (drop_rate, attn_drop_rate, drop_path_rate)
        ):
            require(0 <= rate < 1, f"RevViT: {name} is {rate}; allowed: 0 <= {name} < 1")
        _check_options(self.arch.num_layers, fusion_mode, buffered_layers)
        self.fusion_mode = fusion_mode
        self.buffered_layers = frozenset(buffered_layers)
        self.no_custom_backward = no_custom_backward
        self.size_divisor = max(patch_size, *strides)

        self.grid = _token_grid(img_size, patch_size)
        self.patch_embed = PatchEmbed(self.arch.embed_dims, patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], self.arch.embed_dims))
        self.drop_after_pos = nn.Dropout(drop_rate)
        last = max(self.arch.num_layers - 1, 1)
        path_rates = [drop_path_rate * index / last for index in range(self.arch.num_layers)]
        self.layers = nn.ModuleList(
            ReversibleBlock(self.arch, DropRates(drop_rate, attn_drop_rate, path), qkv_bias) for path in path_rates
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
        """As `Backbone.stage_of`, each block a stage; the final norm belongs to the last one."""
        return len(self.layers) if name.startswith("ln1.") else super().stage_of(name)

    def train(self, mode: bool = True) -> RevViT:
        """As `Backbone.train`; the dropout behind frozen position embeddings is still, too."""
        super().train(mode)
        if self.frozen_stages >= 0:
            self.drop_after_pos.eval()
        return self

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, height, width), RGB in [0, 1] -> one map per stride; odd sizes round up."""
        return self.pyramid(self.forward_features(self.normalized(image))[0])

    def forward_features(self, image: Tensor) -> tuple[Tensor]:
        """Return the published network's map (B, 2 C or C, ceil(H / patch), ceil(W / patch))."""
        x = self.patch_embed(image)
        height, width = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # (B, L, C)
        # The streams add up many small residuals: they stay as wide as the parameters when autocast narrows the layers.
        pos_embed = resize_pos_embed(self.pos_embed, self.grid, (height, width))
        x = self.drop_after_pos(x.to(pos_embed.dtype) + pos_embed)
        O1, O2 = self._run_layers(x, x)
        y = self._fuse(self.ln1(torch.cat((O1, O2), dim=-1)))
        return (y.transpose(1, 2).unflatten(2, (height, width)),)  # (B, C, H, W)

    def _run_layers(self, I1: Tensor, I2: Tensor) -> tuple[Tensor, Tensor]:
        # Rounding in 16 bit would not let the inputs be recomputed; autocast is fine, its streams are float32.
        reversible = self.training and not self.no_custom_backward and I1.dtype in (torch.float32, torch.float64)
        if reversible and torch.is_grad_enabled():
            blocks = cast(tuple[ReversibleBlock, ...], tuple(self.layers))
            theta = [value for block in blocks for branch in "FG" for value in _Branch(block, branch).theta.values()]
            if theta:  # the replicas of nn.DataParallel have no parameters of their own
                return ReversibleFunction.apply(blocks, self.buffered_layers, I1, I2, *theta)
        for block in self.layers:
            I1, I2 = block(I1, I2)
        return I1, I2

    def _fuse(self, y_BL2C: Tensor) -> Tensor:
        if self.fusion_mode == "concat":
            return y_BL2C
        O1, O2 = y_BL2C.chunk(2, dim=-1)
        if self.fusion_mode in ("max", "min"):
            return torch.maximum(O1, O2) if self.fusion_mode == "max" else torch.minimum(O1, O2)
        return (O1 + O2) / (2 if self.fusion_mode == "avg" else 1)

    def convert_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert a state dict in SlowFast's layout to mmpretrain's names; any other is returned unchanged."""
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
        """Resize a published position embedding from another (square) grid; SpecError for other keys or shapes."""
        side = round(tensor.shape[1] ** 0.5) if tensor.ndim == 3 else 0
        fits = key == "pos_embed" and side > 0 and tensor.shape[1:] == (side * side, target_shape[-1])
        require(fits, f"{key}: shape {tuple(tensor.shape)} cannot become {tuple(target_shape)}")
        return resize_pos_embed(tensor, (side, side), self.grid)

    def param_depth(self, name: str) -> int:
        """0 for the embeddings, n + 1 for block n, one more than the last block for what follows."""
        if name.startswith(("pos_embed", "patch_embed.")):
            return 0
        return 1 + (int(name.split(".")[1]) if name.startswith("layers.") else len(self.layers))


def _check_options(depth: int, fusion_mode: str, buffered_layers: Sequence[int]) -> None:
    modes = ", ".join(FUSION_MODES)
    require(fusion_mode in FUSION_MODES, f"RevViT: fusion_mode is {fusion_mode!r}; allowed: {modes}")
    for index in buffered_layers:
        require(0 <= index < depth, f"RevViT: buffered_layers holds {index}; allowed: 0 to {depth - 1}")


def _token_grid(img_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """Tokens down and across of an image of the nominal size."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    power_of_two = patch_size >= 1 and patch_size & (patch_size - 1) == 0
    require(power_of_two, f"RevViT: patch_size is {patch_size}; allowed: powers of two")
    require(min(height, width) >= 1, f"RevViT: img_size is {img_size}; allowed: one or two positive numbers")
    return -(-height // patch_size), -(-width // patch_size)


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Position embedding (1, H * W, C) of a grid (H, W) for another: bicubic, in float32 as published; dtype stays."""
    if grid == new_grid:
        return pos_embed
    table = pos_embed.float().transpose(1, 2).unflatten(2, grid)  # (1, C, H, W)
    table = functional.interpolate(table, size=new_grid, mode="bicubic", align_corners=False)
    return table.flatten(2).transpose(1, 2).to(pos_embed.dtype)
