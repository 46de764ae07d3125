"""RevViT: a reversible vision transformer whose activation memory does not grow with its depth.

Paper: "Reversible Vision Transformers", Mangalam et al., CVPR 2022, https://arxiv.org/abs/2302.04869.
Reference: https://github.com/facebookresearch/SlowFast, Apache-2.0 (REV_VIT_S, REV_VIT_B), and the same weights
converted by mmpretrain, Apache-2.0 (revvit-small, revvit-base): architectures `deit-small` and `deit-base` below.
State-dict keys are those of mmpretrain.
Verified: outputs and gradients in float32 and float64 against values of the reference (tests/parity/test_revvit.py),
and the custom backward pass against ordinary autograd (tests/models/backbones/test_revvit_gradients.py).

The reversible blocks and the numbered backward algorithm are in `models.backbones.reversible`.

Shape legend: B batch, L tokens, C embedding channels, N heads, D channels of a head, H and W tokens down and across.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone, FeatureLevel, SpecError, did_you_mean
from models.backbones.layers import (
    SimpleFeaturePyramid,
    activation_from_cfg,
    choose_architecture,
    drop_path_rates,
    norm_eps,
    require,
    require_rates,
)
from models.backbones.reversible import (
    NORM_EPS,
    BlockOptions,
    Branch,
    DropRates,
    FeedForward,
    ReversibleBlock,
    ReversibleFunction,
)


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
ARCHITECTURES |= {
    short: ARCHITECTURES[name]
    for short, name in (
        *(("s", "small"), ("b", "base"), ("l", "large"), ("h", "huge")),
        *(("deit-t", "deit-tiny"), ("deit-s", "deit-small"), ("deit-b", "deit-base")),
    )
}
OUT_TYPES = ("featmap", "raw", "cls_token", "avg_featmap")
INTERPOLATE_MODES = ("bicubic", "bilinear", "nearest")
LAYER_CFGS = ("drop_rate", "attn_drop_rate", "drop_path_rate", "qkv_bias", "num_fcs", "act_cfg", "norm_cfg")

FUSION_MODES = ("add", "max", "min", "avg", "concat")

# (SlowFast's key, key of this class). Besides, q, k and v are stacked to qkv, and `norm` becomes `ln1`.
SLOWFAST_NAMES = (
    *(("rev_backbone.", ""), (".F.norm.", ".ln1."), (".F.attn.", ".attn."), (".G.norm.", ".ln2.")),
    *((".G.mlp.fc1.", ".ffn.layers.0.0."), (".G.mlp.fc2.", ".ffn.layers.1."), ("embed.proj.", "embed.projection.")),
)


class PatchEmbed(nn.Module):
    """Embedding of non-overlapping patches: a convolution whose stride equals its kernel size."""

    def __init__(self, in_channels: int, embed_dims: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Conv2d(in_channels, embed_dims, patch_size, patch_size)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C', height, width) -> (B, C, H, W); zero-padded at right and bottom to complete patches."""
        height, width = image.shape[-2:]
        image = functional.pad(image, (0, -width % self.patch_size, 0, -height % self.patch_size))
        return self.projection(image)


class RevViT(Backbone):
    """RevViT with a simple feature pyramid on its single map.

    Args:
        arch: a name of `ARCHITECTURES`, or a mapping with the fields of `RevViTArchitecture`.
        img_size: side, or height and width, in pixels, of the image that the position embedding belongs to.
        patch_size: side of a patch in pixels (or two equal sides), the stride of the map; a power of two.
        patch_cfg: the same as {kernel_size, stride}.
        in_channels: channels of the input.
        drop_rate: dropout of embedded tokens, of attention outputs and in the MLPs.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: stochastic depth of the last block; it increases linearly from 0 in the first block.
        shared_drop_path: drop both branches of a block for the same samples, as published, or independently.
        qkv_bias: whether query, key and value have a bias.
        norm_cfg: {type: LN}, optionally with `eps`.
        act_cfg: activation of the MLPs, as {type: GELU}.
        num_fcs: number of linear layers of an MLP.
        final_norm: LayerNorm over the channels of both streams before they are fused.
        out_type: result of `forward_features`: "featmap" (the map), "raw" (all tokens), "cls_token" or "avg_featmap".
            The pyramid is always computed from the map.
        with_cls_token: prepend a class token.
        frozen_stages: above 0, freezes the embeddings and the first n blocks.
        interpolate_mode: "bicubic", "bilinear" or "nearest" resizing of the position embedding.
        layer_cfgs: any of drop_rate, attn_drop_rate, drop_path_rate, qkv_bias, num_fcs, act_cfg and norm_cfg, for the
            blocks only.
        fusion_mode: "concat", "add", "max", "min" or "avg" of the two streams.
        buffered_layers: blocks whose outputs are stored in addition; the backward pass restarts from stored values.
        no_custom_backward: train with ordinary autograd, which stores all activations.
        strides: strides of the returned maps.
        widths: channels of the returned maps, or one number for all.
        fast_norm: norms of the pyramid compute float16 and bfloat16 without conversion to float32.
        normalize, mean, std: see `Backbone`.

    Raises:
        SpecError: if an argument is not allowed.
    """

    OFFICIAL_PREFIXES = ("backbone.",)
    IGNORED_KEYS = ("head.*", "cls_token")
    NEW_KEYS = ("pyramid.*",)
    REFUSED: ClassVar[Mapping[str, str]] = {
        "init_cfg": "weights are loaded with `weights`",
        "out_indices": "the network has one map; choose levels with `strides`",
    }

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "deit-small",
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_channels: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        qkv_bias: bool = True,
        norm_cfg: Mapping[str, Any] | None = None,
        final_norm: bool = True,
        out_type: str = "featmap",
        with_cls_token: bool = False,
        frozen_stages: int = -1,
        interpolate_mode: str = "bicubic",
        layer_cfgs: Mapping[str, Any] | None = None,
        patch_cfg: Mapping[str, Any] | None = None,
        fusion_mode: str = "concat",
        no_custom_backward: bool = False,
        *,
        attn_drop_rate: float = 0.0,
        shared_drop_path: bool = True,
        act_cfg: Mapping[str, Any] | None = None,
        num_fcs: int = 2,
        buffered_layers: Sequence[int] = (),
        strides: Sequence[int] = (4, 8, 16, 32),
        widths: int | Sequence[int] = (64, 128, 256, 512),
        fast_norm: bool = False,
        normalize: bool = True,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__(normalize, mean, std, in_channels)
        self.arch = choose_architecture("RevViT", arch, ARCHITECTURES)
        patch = _patch_side(patch_size, patch_cfg)
        _check_options(self.arch.num_layers, fusion_mode, buffered_layers)
        _check_choice("out_type", out_type, OUT_TYPES)
        _check_choice("interpolate_mode", interpolate_mode, INTERPOLATE_MODES)
        require(out_type != "cls_token" or with_cls_token, "RevViT: out_type is 'cls_token'; with_cls_token is needed")
        self.fusion_mode, self.out_type, self.interpolate_mode = fusion_mode, out_type, interpolate_mode
        self.buffered_layers = frozenset(buffered_layers)
        self.no_custom_backward = no_custom_backward
        self.size_divisor = max(patch, *strides)
        eps = norm_eps("RevViT", norm_cfg, {"type": "LN"}, NORM_EPS)
        layer = {
            **{"drop_rate": drop_rate, "attn_drop_rate": attn_drop_rate, "drop_path_rate": drop_path_rate},
            **{"qkv_bias": qkv_bias, "num_fcs": num_fcs, "act_cfg": act_cfg, "norm_cfg": {"type": "LN", "eps": eps}},
            **_checked_layer_cfgs(layer_cfgs),
        }

        width = self.arch.embed_dims
        self.grid = _token_grid(img_size, patch)
        self.patch_embed = PatchEmbed(in_channels, width, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if with_cls_token else None
        self.num_extra_tokens = int(with_cls_token)
        tokens = self.grid[0] * self.grid[1] + self.num_extra_tokens
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.drop_after_pos = nn.Dropout(drop_rate)
        self.layers = nn.ModuleList(_blocks(self.arch, layer, shared_drop_path))
        self.ln1 = nn.LayerNorm(2 * width, eps=eps) if final_norm else nn.Identity()
        self.pyramid = SimpleFeaturePyramid(
            width * (2 if fusion_mode == "concat" else 1), patch, strides, widths, fast_norm
        )
        self.levels = tuple(FeatureLevel(w, s) for w, s in zip(self.pyramid.widths, self.pyramid.strides))
        self._initialize()
        self.stage_sizes = (1,) * self.arch.num_layers
        self.hold(frozen_stages if frozen_stages > 0 else -1)

    def _initialize(self) -> None:
        """Initialize as published: MLPs Xavier uniform with biases N(0, 1e-6), other layers PyTorch's default."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.layers.modules():
            if isinstance(module, FeedForward):
                for linear in module.modules():
                    if isinstance(linear, nn.Linear):
                        nn.init.xavier_uniform_(linear.weight)
                        nn.init.normal_(linear.bias, std=1e-6)

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
        tokens, grid = self._tokens(self.normalized(image))
        return self.pyramid(_as_map(tokens[:, self.num_extra_tokens :], grid))

    def forward_features(self, image: Tensor) -> tuple[Tensor]:
        """Return the output selected by `out_type` for a normalized image (B, 3, H, W).

        Returns:
            "featmap": (B, C or 2 C, ceil(H / patch), ceil(W / patch)); "raw": tokens (B, L, C or 2 C) including the
            class token; "cls_token" and "avg_featmap": (B, C or 2 C).
        """
        tokens, grid = self._tokens(image)
        patches = tokens[:, self.num_extra_tokens :]
        if self.out_type == "raw":
            return (tokens,)
        if self.out_type == "cls_token":
            return (tokens[:, 0],)
        return (patches.mean(1),) if self.out_type == "avg_featmap" else (_as_map(patches, grid),)

    def _tokens(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the fused tokens (B, L, C or 2 C) of a normalized image and the grid of its patches."""
        x = self.patch_embed(image)
        grid = (x.shape[-2], x.shape[-1])
        x = x.flatten(2).transpose(1, 2)  # (B, L, C)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(len(x), -1, -1).to(x.dtype), x), dim=1)
        # The streams accumulate many small residuals: under autocast they keep the dtype of the parameters.
        pos_embed = resize_pos_embed(self.pos_embed, self.grid, grid, self.num_extra_tokens, self.interpolate_mode)
        x = self.drop_after_pos(x.to(pos_embed.dtype) + pos_embed)
        y_1, y_2 = self._run_layers(x, x)
        return self._fuse(self.ln1(torch.cat((y_1, y_2), dim=-1))), grid

    def _run_layers(self, x_1: Tensor, x_2: Tensor) -> tuple[Tensor, Tensor]:
        # 16-bit streams are too imprecise to recompute inputs from; under autocast the streams are float32.
        reversible = self.training and not self.no_custom_backward and x_1.dtype in (torch.float32, torch.float64)
        if reversible and torch.is_grad_enabled():
            blocks = cast(tuple[ReversibleBlock, ...], tuple(self.layers))
            theta = [value for block in blocks for branch in "FG" for value in Branch(block, branch).theta.values()]
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
        """Resize a position embedding (1, L, C) of another image size; SpecError for other keys or shapes.

        A class token in the file is dropped if the model has none. The grid of the file is a square, or has the aspect
        ratio of this model's grid.
        """
        require(key == "pos_embed" and tensor.ndim == 3, f"{key}: {tuple(tensor.shape)} cannot become {target_shape}")
        for extra in (self.num_extra_tokens, 1 - self.num_extra_tokens):
            grid = _grid_of(tensor.shape[1] - extra, self.grid)
            if grid is not None and tensor.shape[2] == target_shape[-1] and extra >= self.num_extra_tokens:
                table = tensor[:, extra - self.num_extra_tokens :]
                return resize_pos_embed(table, grid, self.grid, self.num_extra_tokens, self.interpolate_mode)
        raise SpecError(f"{key}: shape {tuple(tensor.shape)} cannot become {tuple(target_shape)}")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Resize the position embedding of a state dict from another image size, as the published class does."""
        key = f"{prefix}pos_embed"
        value = state_dict.get(key)
        if isinstance(value, Tensor) and value.shape != self.pos_embed.shape:
            with suppress(SpecError):  # PyTorch then reports the shapes
                state_dict[key] = self.resize_official("pos_embed", value, self.pos_embed.shape)
        if self.cls_token is None:
            state_dict.pop(f"{prefix}cls_token", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def param_depth(self, name: str) -> int:
        """Return 0 for the embeddings, n + 1 for block n, and one more than the last block for later layers."""
        if name.startswith(("pos_embed", "patch_embed.", "cls_token")):
            return 0
        return 1 + (int(name.split(".")[1]) if name.startswith("layers.") else len(self.layers))


def _check_options(depth: int, fusion_mode: str, buffered_layers: Sequence[int]) -> None:
    allowed = f"allowed: {', '.join(FUSION_MODES)}"
    require(fusion_mode in FUSION_MODES, f"RevViT: fusion_mode is {fusion_mode!r}; {allowed}")
    for index in buffered_layers:
        require(0 <= index < depth, f"RevViT: buffered_layers holds {index}; allowed: 0 to {depth - 1}")


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    require(
        value in allowed, f"RevViT: {name} is {value!r}; allowed: {', '.join(allowed)}{did_you_mean(value, allowed)}"
    )


def _checked_layer_cfgs(cfgs: Mapping[str, Any] | None) -> dict[str, Any]:
    for key in cfgs or {}:
        near = did_you_mean(key, LAYER_CFGS)
        require(
            key in LAYER_CFGS, f"RevViT: unknown field '{key}' of layer_cfgs; allowed: {', '.join(LAYER_CFGS)}{near}"
        )
    return dict(cfgs or {})


def _blocks(arch: RevViTArchitecture, layer: Mapping[str, Any], shared_drop_path: bool) -> list[ReversibleBlock]:
    """Build the blocks from the options of a layer (see `LAYER_CFGS`)."""
    rates = {name: layer[name] for name in ("drop_rate", "attn_drop_rate", "drop_path_rate")}
    require_rates("RevViT", **rates)
    num_fcs = layer["num_fcs"]
    require(isinstance(num_fcs, int) and num_fcs >= 2, f"RevViT: num_fcs is {num_fcs!r}; allowed: integers >= 2")
    act_layer = activation_from_cfg("RevViT", layer["act_cfg"], nn.GELU)
    eps = norm_eps("RevViT", layer["norm_cfg"], {"type": "LN"}, NORM_EPS)
    sizes = (arch.embed_dims, arch.num_heads, arch.feedforward_channels)
    blocks = []
    for path in drop_path_rates(rates["drop_path_rate"], arch.num_layers):
        drops = DropRates(rates["drop_rate"], rates["attn_drop_rate"], path)
        options = BlockOptions(drops, layer["qkv_bias"], num_fcs, act_layer, eps, shared_drop_path)
        blocks.append(ReversibleBlock(*sizes, options))
    return blocks


def _patch_side(patch_size: int | Sequence[int], cfg: Mapping[str, Any] | None) -> int:
    """Return the side of the patches; `cfg` may give it as kernel_size and stride, as the published patch_cfg."""
    given = {"kernel_size": patch_size, "stride": patch_size, **(cfg or {})}
    sides = {(v, v) if isinstance(v, int) else tuple(v) for v in (given["kernel_size"], given["stride"])}
    square = len(sides) == 1 and len(set(next(iter(sides)))) == 1 and set(given) == {"kernel_size", "stride"}
    require(
        square,
        f"RevViT: patches of patch_size {patch_size} and patch_cfg {dict(cfg or {})}; allowed: squares whose stride "
        "equals their size",
    )
    side = next(iter(sides))[0]
    power_of_two = isinstance(side, int) and side >= 1 and side & (side - 1) == 0
    require(power_of_two, f"RevViT: patch_size is {side}; allowed: powers of two")
    return side


def _token_grid(img_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """Return the number of tokens down and across of an image of the nominal size."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    require(min(height, width) >= 1, f"RevViT: img_size is {img_size}; allowed: one or two positive numbers")
    return -(-height // patch_size), -(-width // patch_size)


def _grid_of(tokens: int, like: tuple[int, int]) -> tuple[int, int] | None:
    """Return the grid (H, W) of a number of tokens: a square, or of the aspect ratio of `like`; None if neither."""
    side = round(max(tokens, 0) ** 0.5)
    if tokens > 0 and side * side == tokens:
        return side, side
    height = round((max(tokens, 0) * like[0] / like[1]) ** 0.5)
    width = tokens // height if height else 0
    return (height, width) if height and height * width == tokens and height * like[1] == width * like[0] else None


def _as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *grid)  # (B, C, H, W)


def resize_pos_embed(
    pos_embed: Tensor, grid: tuple[int, int], new_grid: tuple[int, int], extra: int = 0, mode: str = "bicubic"
) -> Tensor:
    """Resize a position embedding from one grid to another, computed in float32.

    Args:
        pos_embed: (1, extra + H * W, C).
        grid, new_grid: (H, W) before and after.
        extra: leading tokens without a position, which are kept.
        mode: "bicubic", "bilinear" or "nearest".

    Returns:
        (1, extra + H' * W', C).
    """
    if grid == new_grid:
        return pos_embed
    table = pos_embed[:, extra:].float().transpose(1, 2).reshape(1, -1, *grid)  # (1, C, H, W)
    align = None if mode == "nearest" else False
    table = functional.interpolate(table, size=new_grid, mode=mode, align_corners=align)
    table = table.flatten(2).transpose(1, 2).to(pos_embed.dtype)
    return torch.cat((pos_embed[:, :extra], table), dim=1) if extra else table
