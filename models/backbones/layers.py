"""Layers that several backbones share, and checks of their constructor arguments.

Shape legend: B batch, C channels, H and W height and width of a feature map in cells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones.base import FeatureLevel
from utils.errors import SpecError, did_you_mean

Architecture = TypeVar("Architecture")


def require(condition: bool, message: str) -> None:
    """Raise `SpecError(message)` if `condition` is false."""
    if not condition:
        raise SpecError(message)


def require_rates(family: str, **rates: float) -> None:
    """Raise SpecError if a dropout or drop-path rate is outside [0, 1)."""
    for name, rate in rates.items():
        require(0 <= rate < 1, f"{family}: {name} is {rate}; allowed: 0 <= {name} < 1")


def require_integers(family: str, arch: object, names: Sequence[str], count: int = 4, minimum: int = 1) -> None:
    """Raise SpecError unless each named field of an architecture is a tuple of `count` integers >= `minimum`."""
    for name in names:
        values = getattr(arch, name)
        valid = isinstance(values, tuple) and len(values) == count
        valid = valid and all(isinstance(value, int) and value >= minimum for value in values)
        shown = list(values) if isinstance(values, tuple) else values
        require(valid, f"{family}: {name} of arch is {shown!r}; allowed: {count} integers >= {minimum}")


def find_architecture(name: str, table: Mapping[str, Architecture]) -> Architecture | None:
    """Return the architecture of a name, ignoring case, or None."""
    return next((value for key, value in table.items() if key.lower() == name.lower()), None)


def choose_architecture(
    family: str,
    arch: str | Mapping[str, Any],
    table: Mapping[str, Architecture],
    aliases: Mapping[str, str] | None = None,
) -> Architecture:
    """Return the architecture of a name, or build one from a mapping of its fields.

    Args:
        family: name of the backbone class, for error messages.
        arch: a key of `table`, or the fields of its dataclass (lists become tuples; fields with a default are
            optional).
        table: the known architectures, frozen dataclasses of one type.
        aliases: published names of fields.

    Raises:
        SpecError: if the name or a field is unknown, or a required field is missing.
    """
    if isinstance(arch, str):
        known = find_architecture(arch, table)
        if known is None:
            raise SpecError(f"{family}: unknown arch '{arch}'; allowed: {', '.join(table)}{did_you_mean(arch, table)}")
        return known
    if not isinstance(arch, Mapping):
        raise SpecError(f"{family}: arch is {arch!r}; allowed: a name ({', '.join(table)}) or a mapping of its fields")
    arch = {(aliases or {}).get(key, key): value for key, value in arch.items()}
    cls: Any = type(next(iter(table.values())))
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in arch:
        if key not in fields:
            raise SpecError(
                f"{family}: unknown field '{key}' of arch; allowed: {', '.join(fields)}{did_you_mean(key, fields)}"
            )
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in arch]
    if missing:
        raise SpecError(f"{family}: arch lacks {', '.join(missing)}; required: {', '.join(fields)}")
    built: Architecture = cls(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in arch.items()}
    )
    return built


def choose_outputs(
    family: str,
    levels: Sequence[FeatureLevel],
    strides: Sequence[int] | None,
    out_indices: int | Sequence[int] | None,
) -> tuple[int, ...]:
    """Return the indices of the returned maps: those of `out_indices`, or the last map of each of `strides`.

    Args:
        family: name of the backbone class, for error messages.
        levels: level of every map that can be returned.
        strides: strides to return, increasing; None = all.
        out_indices: published argument, an integer or several; negative ones count from the end.

    Raises:
        SpecError: if both are given, an index or stride does not exist, or two maps have one stride.
    """
    last = {level.stride: index for index, level in enumerate(levels)}
    if out_indices is None:
        wanted = list(last if strides is None else strides)
        increasing = bool(wanted) and wanted == [stride for stride in last if stride in wanted]
        require(increasing, f"{family}: strides are {wanted}; allowed: some of {list(last)}, increasing")
        return tuple(last[stride] for stride in wanted)
    require(strides is None, f"{family}: strides and out_indices are given; allowed: one of them")
    count = len(levels)
    given = [out_indices] if isinstance(out_indices, int) else list(out_indices)
    valid = bool(given) and all(-count <= index < count for index in given)
    require(valid, f"{family}: out_indices is {out_indices}; allowed: {-count} to {count - 1}")
    chosen = sorted({index % count for index in given})
    found = [levels[index].stride for index in chosen]
    unique = len(set(found)) == len(found)
    require(unique, f"{family}: out_indices {given} are maps of strides {found}; allowed: one map of each stride")
    return tuple(chosen)


ACTIVATIONS: dict[str, type[nn.Module]] = {
    **{"GELU": nn.GELU, "ReLU": nn.ReLU, "ReLU6": nn.ReLU6, "LeakyReLU": nn.LeakyReLU, "ELU": nn.ELU, "Mish": nn.Mish},
    **{"SiLU": nn.SiLU, "Swish": nn.SiLU, "Hardswish": nn.Hardswish, "HSwish": nn.Hardswish, "Tanh": nn.Tanh},
}


def activation_from_cfg(family: str, cfg: Mapping[str, Any] | None, default: type[nn.Module]) -> type[nn.Module]:
    """Return the activation class of a published `act_cfg`, such as {type: GELU}.

    Raises:
        SpecError: if the type is unknown or there are further fields.
    """
    if cfg is None:
        return default
    kind = cfg.get("type")
    if kind not in ACTIVATIONS or set(cfg) - {"type", "inplace"}:
        near = did_you_mean(str(kind), ACTIVATIONS)
        raise SpecError(
            f"{family}: act_cfg is {dict(cfg)!r}; allowed: {{type: NAME}} of {', '.join(ACTIVATIONS)}{near}"
        )
    return ACTIVATIONS[kind]


def norm_eps(family: str, cfg: Mapping[str, Any] | None, published: Mapping[str, Any], default: float) -> float:
    """Check a published `norm_cfg` and return the eps of its norms.

    Args:
        family: name of the backbone class, for error messages.
        cfg: {type: ...}, optionally with `eps` and `requires_grad`; None for the published one.
        published: fields that must be equal, such as {type: GN, num_groups: 1}: blocks are re-parameterized with them.
        default: eps if `cfg` has none.

    Raises:
        SpecError: if another norm is requested.
    """
    cfg = {"requires_grad": True, **(cfg or published)}
    eps = cfg.pop("eps", default)
    trained = cfg.pop("requires_grad") is True
    valid = isinstance(eps, float) and eps > 0 and trained and {**published, **cfg} == dict(published)
    form = ", ".join(f"{key}: {value}" for key, value in published.items())
    require(valid, f"{family}: norm_cfg is {cfg!r}; allowed: {{{form}}}, optionally with eps")
    return float(eps)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Return the drop-path rate of each of `depth` blocks, increasing linearly from 0 to `rate`."""
    return [rate * index / max(depth - 1, 1) for index in range(depth)]


def batch_norm_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return (C,) float64 tensors `scale`, `shift` with norm(x) = scale * x + shift for a BatchNorm in eval mode."""
    assert isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d))
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:  # affine
        scale = norm.weight.detach().double() * scale
    shift = -scale * norm.running_mean.double()
    return scale, shift if norm.bias is None else norm.bias.detach().double() + shift


def fused_weights(conv: nn.Conv2d | nn.ConvTranspose2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a convolution fused with the BatchNorm after it.

    With scale s and shift t of the norm: s (W x + b) + t = (s W) x + (s b + t), computed in float64.

    Returns:
        Weight of the shape of `conv.weight` and bias (c_out,), in the dtype of the weight.
    """
    with torch.no_grad():
        scale, shift = batch_norm_affine(norm)
        weight = conv.weight.double() * _broadcast_to_weight(scale, conv)
        bias = shift if conv.bias is None else shift + scale * conv.bias.double()
        return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)


def _broadcast_to_weight(scale: Tensor, conv: nn.Conv2d | nn.ConvTranspose2d) -> Tensor:
    """Reshape `scale` (c_out,) for multiplication with `conv.weight`."""
    if isinstance(conv, nn.Conv2d):
        return scale.reshape(-1, 1, 1, 1)  # (c_out, 1, 1, 1)
    # The weight is (c_in, c_out / groups, kh, kw); the inputs of group j produce the outputs of group j.
    repeats = conv.in_channels // conv.groups
    return scale.reshape(conv.groups, -1).repeat_interleave(repeats, 0)[:, :, None, None]  # (c_in, c_out/groups, 1, 1)


def fold_norm_after(conv: nn.Conv2d, norm: nn.Module) -> nn.Module:
    """Fold `norm` into the convolution before it; return the module that replaces `norm`."""
    if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
        _set_weights(conv, *fused_weights(conv, norm))
    return nn.Identity()


def fold_norm_before(norm: nn.Module, *layers: nn.Conv2d | nn.Linear) -> nn.Module:
    """Fold `norm` into the 1x1 convolutions or linear layers after it; return the module that replaces `norm`.

    With scale s and shift t of the norm: W (s x + t) + b = (W s) x + (W t + b), computed in float64.
    """
    if isinstance(norm, nn.Identity):
        return norm
    scale, shift = batch_norm_affine(norm)
    for layer in layers:
        weight = layer.weight.detach().double().flatten(1)  # (c_out, c_in)
        bias = 0 if layer.bias is None else layer.bias.detach().double()
        _set_weights(layer, (weight * scale).view_as(layer.weight), weight @ shift + bias)
    return nn.Identity()


def _set_weights(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor) -> None:
    dtype, requires_grad = layer.weight.dtype, layer.weight.requires_grad
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=requires_grad)
    layer.bias = nn.Parameter(bias.to(dtype), requires_grad=requires_grad)


class DropPath(nn.Module):
    """Stochastic depth per sample (https://arxiv.org/abs/1603.09382): zero a residual branch for whole samples.

    Args:
        drop_prob: probability in [0, 1) that the branch of a sample is zeroed in training mode. Remaining branches are
            divided by ``1 - drop_prob``, which keeps the expected value. In eval mode, and with probability zero, the
            input is returned unchanged.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = float(drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> the same shape and dtype."""
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
        return x * mask.div_(keep_prob)

    def extra_repr(self) -> str:
        """Return the arguments shown by `repr`."""
        return f"drop_prob={self.drop_prob:g}"


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of each cell of a (B, C, H, W) map.

    The output has the dtype of the input. A float16 or bfloat16 input is converted to float32 and back, unless
    `fast_norm` is set: PyTorch's kernels accumulate the statistics in float32 anyway, and only rounding differs.
    """

    def __init__(self, num_channels: int, eps: float = 1e-6, fast_norm: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.fast_norm = fast_norm
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x_BHWC = x.permute(0, 2, 3, 1)
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if x.dtype in (torch.float16, torch.bfloat16):
            if self.fast_norm:
                with torch.autocast(x.device.type, enabled=False):
                    y = F.layer_norm(x_BHWC, weight.shape, weight.to(x.dtype), bias.to(x.dtype), self.eps)
                return y.permute(0, 3, 1, 2)
            x_BHWC, weight, bias = x_BHWC.float(), weight.float(), bias.float()
        y_BHWC = F.layer_norm(x_BHWC, weight.shape, weight, bias, self.eps)
        return y_BHWC.to(x.dtype).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        """Return the arguments shown by `repr`."""
        return f"{self.weight.numel()}, eps={self.eps:g}"


class Mlp(nn.Module):
    """Two 1x1 convolutions with an activation between them, on (B, C, H, W) maps.

    Args:
        in_channels: channels of the input and of the output.
        hidden_channels: channels between the two convolutions.
        drop_rate: dropout after the activation and after the second convolution.
        act_layer: activation module; the default is the exact GELU.
        names: submodule names of the two convolutions, as in the published state dict.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        drop_rate: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        names: tuple[str, str] = ("fc1", "fc2"),
    ) -> None:
        super().__init__()
        self.names = names
        self.add_module(names[0], nn.Conv2d(in_channels, hidden_channels, 1))
        self.act = act_layer()
        self.add_module(names[1], nn.Conv2d(hidden_channels, in_channels, 1))
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        first, second = (self.get_submodule(name) for name in self.names)
        return self.drop(second(self.drop(self.act(first(x)))))


class SimpleFeaturePyramid(nn.Module):
    """Several resolutions from the single map of a plain network (ViTDet, https://arxiv.org/abs/2203.16527, section 3).

    All levels are computed from the same map. Finer levels use transposed convolutions of stride 2 that halve the
    channels, with a channel-wise LayerNorm and GELU between them; coarser levels use max-pooling. A 1x1 and a 3x3
    convolution, each followed by a channel-wise LayerNorm, map every level to its width.

    Args:
        in_channels: channels of the input map.
        in_stride: stride of the input map in input pixels per cell.
        strides: strides of the levels, high resolution first; each is `in_stride` times a power of two.
        widths: channels of each level, or one number for all levels.
        fast_norm: see `LayerNorm2d`.

    Raises:
        SpecError: if strides are not increasing, a stride is unreachable, or the number of widths differs.
    """

    def __init__(
        self,
        in_channels: int,
        in_stride: int = 16,
        strides: Sequence[int] = (4, 8, 16, 32),
        widths: int | Sequence[int] = 256,
        fast_norm: bool = False,
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.widths = (widths,) * len(self.strides) if isinstance(widths, int) else tuple(widths)
        increasing = bool(self.strides) and list(self.strides) == sorted(set(self.strides))
        require(increasing, f"feature pyramid: strides {list(strides)}; they must increase, as in [4, 8, 16, 32]")
        require(
            len(self.widths) == len(self.strides),
            f"feature pyramid: {len(self.widths)} widths for {len(self.strides)} strides; give one width per stride, "
            "or one number for all",
        )
        require(min(self.widths) >= 1, f"feature pyramid: widths are {list(self.widths)}; allowed: integers >= 1")
        self.levels = nn.ModuleList(
            _pyramid_level(in_channels, in_stride, stride, width, fast_norm)
            for stride, width in zip(self.strides, self.widths)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, in_channels, H, W) -> one (B, width, ceil(H * in_stride / stride), ...) per level."""
        return tuple(level(x) for level in self.levels)


def _pyramid_level(in_channels: int, in_stride: int, stride: int, width: int, fast_norm: bool) -> nn.Sequential:
    """Resample from `in_stride` to `stride`, then apply the 1x1 and the 3x3 convolution."""
    layers: list[nn.Module] = []
    channels, at = in_channels, in_stride
    while at > stride and at % 2 == 0:
        if layers:
            layers += [LayerNorm2d(channels, fast_norm=fast_norm), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, stride=2))
        channels, at = channels // 2, at // 2
    while at < stride:
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
        at *= 2
    require(at == stride, f"feature pyramid: stride {stride} is unreachable from stride {in_stride} by factors of two")
    layers += [nn.Conv2d(channels, width, 1, bias=False), LayerNorm2d(width, fast_norm=fast_norm)]
    layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width, fast_norm=fast_norm)]
    return nn.Sequential(*layers)
