"""Layer rules: for each module name of a model YAML, its arguments, construction, output channels and stride.

Rules raise SpecError without a location; `models.build.builder` prepends file, line and row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

from torch import nn

from models import common
from models.arguments import LARGEST, Arguments, bind, construct, parameters
from models.backbones.base import FeatureLevel
from models.build.spec import ModelSpec
from models.heads import AnchorFreeDetect, Detect
from models.registry import Registry
from utils.errors import SpecError, did_you_mean

MAX_BINS = 64
UPSAMPLE_MODES = ("nearest", "nearest-exact", "bilinear", "bicubic", "area")

Layers = tuple[type[nn.Module], ...]


@dataclass(frozen=True)
class Row:
    """Input of a rule: a YAML row.

    Attributes:
        spec: model specification.
        args: positional arguments, with `nc` and `anchors` substituted.
        repeats: number of repeats after `depth_multiple`.
    """

    spec: ModelSpec
    args: tuple[Any, ...]
    repeats: int


@dataclass(frozen=True)
class Built:
    """Module of a row, its arguments as shown in the layer table, and its output level (None for predictions)."""

    module: nn.Module
    arguments: tuple[Any, ...]
    level: FeatureLevel | None


class Rule(Protocol):
    """Checks and builds the rows of one module name."""

    @property
    def takes_list(self) -> bool:
        """Whether `forward` of the module takes a list of feature maps."""

    def check(self, row: Row) -> None:
        """Check the arguments independently of the inputs.

        Raises:
            SpecError: the number, type or value of an argument is not valid.
        """

    def build(self, row: Row, inputs: Sequence[FeatureLevel]) -> Built:
        """Build the module for the given inputs.

        Raises:
            SpecError: the arguments are inconsistent with each other or with the inputs.
        """


# ---- strides --------------------------------------------------------------------------------------------------------


def _one(value: float | tuple[float, ...], name: str) -> Fraction:
    """Return a stride or factor, which must be equal in both directions."""
    if isinstance(value, tuple):
        if len(set(value)) != 1:
            raise SpecError(f"{name} is {list(value)}; height and width need the same value")
        value = value[0]
    if value <= 0:
        raise SpecError(f"{name} is {value}; a number above 0 is needed")
    return Fraction(value).limit_denominator(1024)


def _keeps(_: Arguments) -> Fraction:
    return Fraction(1)


def _by_s(bound: Arguments) -> Fraction:
    return _one(bound["s"], "s")


def _by_twice_s(bound: Arguments) -> Fraction:
    return 2 * _one(bound["s"], "s")


def _upscaled_by_s(bound: Arguments) -> Fraction:
    return 1 / _one(bound["s"], "s")


def _upscaled_by_stride(bound: Arguments) -> Fraction:
    return 1 / _one(bound["stride"], "stride")


def _pooled(bound: Arguments) -> Fraction:
    stride = bound["stride"]
    return _one(bound["kernel_size"] if stride is None else stride, "stride")


def _upsampled(bound: Arguments) -> Fraction:
    if bound["size"] is not None or bound["scale_factor"] is None:
        raise SpecError("a fixed size has no defined stride; give a scale_factor, as in [None, 2, nearest]")
    if bound["mode"] not in UPSAMPLE_MODES:
        near = did_you_mean(bound["mode"], UPSAMPLE_MODES)
        raise SpecError(f"mode is '{bound['mode']}'; allowed: {', '.join(UPSAMPLE_MODES)}{near}")
    return 1 / _one(bound["scale_factor"], "scale_factor")


def _after(level: FeatureLevel, factor: Fraction, channels: int) -> FeatureLevel:
    stride = level.stride * factor
    if stride.denominator != 1:
        raise SpecError(f"the input has stride {level.stride}; the output would have stride {float(stride):g}")
    return FeatureLevel(channels, stride.numerator)


# ---- the rules ------------------------------------------------------------------------------------------------------


def scaled_width(channels: int, spec: ModelSpec) -> int:
    """Return the output channels after `width_multiple`, rounded up to a multiple of `channel_multiple`.

    A width equal to the number of outputs of the head is not scaled, as in YOLOv5.
    """
    if channels == spec.anchors_per_level * (spec.num_classes + 5):
        return channels
    width = math.ceil(channels * spec.width_multiple / spec.channel_multiple) * spec.channel_multiple
    if width > LARGEST:
        raise SpecError(f"{width} output channels; allowed: up to {LARGEST}")
    return width


def _only_input(inputs: Sequence[FeatureLevel]) -> FeatureLevel:
    if len(inputs) != 1:
        raise SpecError(f"from refers to {len(inputs)} slots; exactly one is needed")
    return inputs[0]


def _stack(copies: list[nn.Module]) -> nn.Module:
    return copies[0] if len(copies) == 1 else nn.Sequential(*copies)


@dataclass(frozen=True)
class ScaledRule:
    """Layers whose first arguments are input channels and (width-scaled) output channels.

    Attributes:
        layer: class with a constructor (c1, c2, ...) or, with `inner_repeats`, (c1, c2, n, ...).
        stride: returns the stride factor for the bound arguments.
        inner_repeats: the row number is passed to the layer as `n` instead of stacking copies.
    """

    layer: type[nn.Module]
    stride: Callable[[Arguments], Fraction] = _keeps
    inner_repeats: bool = False
    takes_list: bool = False

    def check(self, row: Row) -> None:
        self._bound(row)

    def _bound(self, row: Row) -> tuple[str, Arguments]:
        """Return the name of the output-channel parameter and the arguments with that parameter width-scaled."""
        bound = bind(self.layer, row.args, (0, 2) if self.inner_repeats else (0,))
        c2 = next(iter(bound))
        if bound[c2] < 1:
            raise SpecError(f"argument 1 ({c2}) is {bound[c2]}; an integer of at least 1 is needed")
        return c2, bound | {c2: scaled_width(bound[c2], row.spec)}

    def build(self, row: Row, inputs: Sequence[FeatureLevel]) -> Built:
        level = _only_input(inputs)
        c2, bound = self._bound(row)
        names = [parameter.name for parameter, _ in parameters(self.layer)]
        inner = {names[2]: row.repeats} if self.inner_repeats else {}
        shown = (level.channels, bound[c2], *inner.values(), *row.args[1:])
        copies: list[nn.Module] = []
        for _ in range(1 if self.inner_repeats else row.repeats):
            copies.append(construct(self.layer, {names[0]: level.channels, **bound, **inner}))
            level = _after(level, self.stride(bound), bound[c2])
        return Built(_stack(copies), shown, level)


@dataclass(frozen=True)
class SameChannelsRule:
    """Layers without channel arguments: pooling, padding, upsampling."""

    layer: type[nn.Module]
    stride: Callable[[Arguments], Fraction] = _keeps
    takes_list: bool = False

    def check(self, row: Row) -> None:
        self.stride(bind(self.layer, row.args))

    def build(self, row: Row, inputs: Sequence[FeatureLevel]) -> Built:
        level = _only_input(inputs)
        bound = bind(self.layer, row.args)
        copies: list[nn.Module] = []
        for _ in range(row.repeats):
            copies.append(construct(self.layer, bound))
            level = _after(level, self.stride(bound), level.channels)
        return Built(_stack(copies), row.args, level)


@dataclass(frozen=True)
class BatchNormRule:
    """`nn.BatchNorm2d`: the number of channels is that of the input."""

    takes_list: bool = False

    def check(self, row: Row) -> None:
        if len(row.args) > 1:
            raise SpecError(f"{len(row.args)} arguments are given; it takes none (the channels are those of the input)")

    def build(self, row: Row, inputs: Sequence[FeatureLevel]) -> Built:
        level = _only_input(inputs)
        copies: list[nn.Module] = [common.batch_norm(level.channels) for _ in range(row.repeats)]
        return Built(_stack(copies), (level.channels,), level)


@dataclass(frozen=True)
class TransformerRule:
    """`TransformerBlock` with [c2, heads, layers], or as in YOLOv5 [c1, c2, heads, layers] without width scaling."""

    takes_list: bool = False

    def check(self, row: Row) -> None:
        bind(common.TransformerBlock, row.args, (0,) if len(row.args) < 4 else ())

    def build(self, row: Row, inputs: Sequence[FeatureLevel]) -> Built:
        level = _only_input(inputs)
        if len(row.args) < 4:
            return ScaledRule(common.TransformerBlock).build(row, inputs)
        bound = bind(common.TransformerBlock, row.args)
        if bound["c1"] != level.channels:
            raise SpecError(f"argument 1 (c1) is {bound['c1']}; the input has {level.channels} channels")
        module = construct(common.TransformerBlock, bound)
        return Built(module, row.args, FeatureLevel(bound["c2"], level.stride))


@dataclass(frozen=True)
class SpaceToDepthRule:
    """`Contract` and `Expand`: space to depth and depth to space with block size `gain`."""

    layer: type[nn.Module]
    contracts: bool
    takes_list: bool = False

    def check(self, row: Row) -> None:
        if (gain := bind(self.layer, row.args)["gain"]) < 1:
            raise SpecError(f"argument 1 (gain) is {gain}; an integer of at least 1 is needed")

    def build(self, row: Row, inputs: Sequence[FeatureLevel]) -> Built:
        level = _only_input(inputs)
        bound = bind(self.layer, row.args)
        gain = bound["gain"]
        if not self.contracts and level.channels % gain**2:
            raise SpecError(f"{level.channels} input channels; a multiple of {gain**2} is needed for gain {gain}")
        channels = level.channels * gain**2 if self.contracts else level.channels // gain**2
        after = _after(level, Fraction(gain) if self.contracts else Fraction(1, gain), channels)
        return Built(construct(self.layer, bound), row.args, after)


@dataclass(frozen=True)
class ConcatRule:
    """`Concat`: concatenation of feature maps of equal stride along the channels."""

    takes_list: bool = True

    def check(self, row: Row) -> None:
        if (dimension := bind(common.Concat, row.args)["dimension"]) != 1:
            raise SpecError(f"argument 1 (dimension) is {dimension}; allowed: 1 (channels)")

    def build(self, row: Row, inputs: Sequence[FeatureLevel]) -> Built:
        if len({level.stride for level in inputs}) > 1:
            listed = ", ".join(str(level.stride) for level in inputs)
            raise SpecError(f"the inputs have strides {listed}; equal strides are needed")
        level = FeatureLevel(sum(level.channels for level in inputs), inputs[0].stride)
        return Built(common.Concat(1), row.args, level)


@dataclass(frozen=True)
class DetectRule:
    """`Detect` with [nc, anchors]."""

    takes_list: bool = True

    def check(self, row: Row) -> None:
        if row.spec.anchors is None:
            raise SpecError(
                "the file has no key 'anchors'; add it, or use AnchorFreeDetect with [nc], which needs none"
            )
        if len(row.args) != 2:
            raise SpecError(f"{len(row.args)} arguments are given; it takes [nc, anchors]")
        _check_classes(row)
        if row.args[1] != row.spec.anchors:
            raise SpecError("argument 2 (anchors) differs from the key 'anchors' of the file; write anchors")

    def build(self, row: Row, inputs: Sequence[FeatureLevel]) -> Built:
        anchors = row.spec.anchors
        assert anchors is not None, "checked before"
        if isinstance(anchors, int):
            # Placeholders as in YOLOv5; auto-anchor fits them to the dataset before the first epoch.
            anchors = (tuple(range(2 * anchors)),) * len(inputs)
        if len(anchors) != len(inputs):
            raise SpecError(
                f"{len(inputs)} input levels but {len(anchors)} rows of anchors; one row per level is needed"
            )
        channels = tuple(level.channels for level in inputs)
        strides = tuple(level.stride for level in inputs)
        head = Detect(row.spec.num_classes, anchors, channels, strides)
        return Built(head, (row.spec.num_classes, anchors, channels), None)


@dataclass(frozen=True)
class AnchorFreeRule:
    """`AnchorFreeDetect` with [nc], [nc, reg_max] or [nc, {reg_max: ...}]."""

    takes_list: bool = True

    def check(self, row: Row) -> None:
        _check_classes(row)
        reg_max = _reg_max(row.args)
        if not isinstance(reg_max, int) or isinstance(reg_max, bool) or not 1 <= reg_max <= MAX_BINS:
            raise SpecError(f"reg_max is {reg_max!r}; allowed: integers from 1 to {MAX_BINS}, by default 16")

    def build(self, row: Row, inputs: Sequence[FeatureLevel]) -> Built:
        channels = tuple(level.channels for level in inputs)
        strides = tuple(level.stride for level in inputs)
        reg_max = _reg_max(row.args)
        head = AnchorFreeDetect(row.spec.num_classes, channels, strides, reg_max)
        return Built(head, (row.spec.num_classes, reg_max, channels), None)


def _reg_max(args: Sequence[Any]) -> int:
    if len(args) > 2:
        raise SpecError(f"{len(args)} arguments are given; it takes [nc] or [nc, {{reg_max: 16}}]")
    given = args[1] if len(args) == 2 else {}
    if not isinstance(given, Mapping):
        return given
    for key in given:
        if key != "reg_max":
            raise SpecError(f"unknown argument '{key}'; allowed: reg_max{did_you_mean(key, ('reg_max',))}")
    return given.get("reg_max", 16)


def _check_classes(row: Row) -> None:
    if not row.args or row.args[0] != row.spec.num_classes:
        found = repr(row.args[0]) if row.args else "missing"
        raise SpecError(f"argument 1 (nc) is {found}; the model has {row.spec.num_classes} classes; write nc")


def _table() -> Registry[Rule]:
    table: Registry[Rule] = Registry("module")
    strided: Layers = (common.Conv, common.DWConv, common.GhostConv, common.CrossConv, common.MixConv2d)
    for layer in strided:
        table.register(layer.__name__, ScaledRule(layer, _by_s))
    unstrided: Layers = (common.Bottleneck, common.SPP, common.SPPF, common.C3SPP)
    for layer in unstrided:
        table.register(layer.__name__, ScaledRule(layer))
    repeating: Layers = (common.C3, common.C3x, common.C3TR, common.C3Ghost, common.BottleneckCSP)
    for layer in repeating:
        table.register(layer.__name__, ScaledRule(layer, inner_repeats=True))
    table.register("GhostBottleneck", ScaledRule(common.GhostBottleneck, _by_s))
    table.register("Focus", ScaledRule(common.Focus, _by_twice_s))
    table.register("DWConvTranspose2d", ScaledRule(common.DWConvTranspose2d, _upscaled_by_s))
    table.register("nn.ConvTranspose2d", ScaledRule(nn.ConvTranspose2d, _upscaled_by_stride))
    table.register("TransformerBlock", TransformerRule())
    table.register("nn.BatchNorm2d", BatchNormRule())
    table.register("nn.Upsample", SameChannelsRule(nn.Upsample, _upsampled))
    table.register("nn.MaxPool2d", SameChannelsRule(nn.MaxPool2d, _pooled))
    table.register("nn.AvgPool2d", SameChannelsRule(nn.AvgPool2d, _pooled))
    table.register("nn.ZeroPad2d", SameChannelsRule(nn.ZeroPad2d))
    table.register("nn.Identity", SameChannelsRule(nn.Identity))
    table.register("Contract", SpaceToDepthRule(common.Contract, contracts=True))
    table.register("Expand", SpaceToDepthRule(common.Expand, contracts=False))
    table.register("Concat", ConcatRule())
    table.register("Detect", DetectRule())
    table.register("AnchorFreeDetect", AnchorFreeRule())
    return table


LAYERS = _table()
