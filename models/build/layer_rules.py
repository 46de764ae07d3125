"""One rule per module name of a model YAML: which arguments it takes, how it is built, what comes out.

A rule raises SpecError with a sentence that lacks the place; `models.build.builder` puts file, line and row before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

from torch import nn

from models import common
from models.arguments import Arguments, bind, construct, parameters
from models.backbones.base import FeatureLevel
from models.build.spec import ModelSpec
from models.heads import Detect
from models.registry import Registry
from utils.errors import SpecError, did_you_mean

UPSAMPLE_MODES = ("nearest", "nearest-exact", "bilinear", "bicubic", "area")

Layers = tuple[type[nn.Module], ...]


@dataclass(frozen=True)
class Row:
    """A YAML row as a rule sees it.

    Attributes:
        spec: of the model.
        args: positional arguments, with `nc` and `anchors` filled in.
        repeats: number of repeats after `depth_multiple`.
    """

    spec: ModelSpec
    args: tuple[Any, ...]
    repeats: int


@dataclass(frozen=True)
class Built:
    """A row's module, what it was built with (for the table), and its output (None: predictions)."""

    module: nn.Module
    arguments: tuple[Any, ...]
    level: FeatureLevel | None


class Rule(Protocol):
    """How the rows of one module name are checked and built."""

    @property
    def takes_list(self) -> bool:
        """Whether the module's forward takes a list of maps."""

    def check(self, row: Row) -> None:
        """Check the arguments as far as that goes without knowing the inputs.

        Raises:
            SpecError: wrong count, type or value.
        """

    def build(self, row: Row, inputs: Sequence[FeatureLevel]) -> Built:
        """Build the module for its inputs.

        Raises:
            SpecError: the arguments do not fit each other or the inputs.
        """


# ---- strides --------------------------------------------------------------------------------------------------------


def _one(value: Any, name: str) -> Fraction:
    """Return a stride or factor that must be equal in both directions."""
    if isinstance(value, tuple):
        if len(set(value)) != 1:
            raise SpecError(f"{name} is {list(value)}; both directions need the same")
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


def _enlarged_by_s(bound: Arguments) -> Fraction:
    return 1 / _one(bound["s"], "s")


def _enlarged_by_stride(bound: Arguments) -> Fraction:
    return 1 / _one(bound["stride"], "stride")


def _pooled(bound: Arguments) -> Fraction:
    stride = bound["stride"]
    return _one(bound["kernel_size"] if stride is None else stride, "stride")


def _upsampled(bound: Arguments) -> Fraction:
    if bound["size"] is not None or bound["scale_factor"] is None:
        raise SpecError("a size is given; only a scale_factor keeps the stride known, as in [None, 2, nearest]")
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
    """Output channels after `width_multiple`, rounded up to a multiple of `channel_multiple`.

    A width that equals the head's output count is not scaled: it is meant to be that.
    """
    if channels == spec.anchors_per_level * (spec.num_classes + 5):
        return channels
    return math.ceil(channels * spec.width_multiple / spec.channel_multiple) * spec.channel_multiple


def _only_input(inputs: Sequence[FeatureLevel]) -> FeatureLevel:
    if len(inputs) != 1:
        raise SpecError(f"from names {len(inputs)} slots; it reads one")
    return inputs[0]


def _stack(copies: list[nn.Module]) -> nn.Module:
    return copies[0] if len(copies) == 1 else nn.Sequential(*copies)


@dataclass(frozen=True)
class ScaledRule:
    """Layers with input and (width-scaled) output channels first.

    Attributes:
        layer: class; its constructor begins (c1, c2) or, with `inner_repeats`, (c1, c2, n).
        stride: factor on the stride, from the bound arguments.
        inner_repeats: the row's number is an argument of the layer, instead of that many copies.
    """

    layer: type[nn.Module]
    stride: Callable[[Arguments], Fraction] = _keeps
    inner_repeats: bool = False
    takes_list: bool = False

    def check(self, row: Row) -> None:
        self._bound(row)

    def _bound(self, row: Row) -> tuple[str, Arguments]:
        """Name of the parameter for output channels, and the row's arguments with that parameter width-scaled."""
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
    """Layers that know nothing of channels: pooling, padding, upsampling."""

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
    """`nn.BatchNorm2d`: takes its channels from the input, whatever the row says."""

    takes_list: bool = False

    def check(self, row: Row) -> None:
        if len(row.args) > 1:
            raise SpecError(f"{len(row.args)} arguments are given; it takes none: its channels are the input's")

    def build(self, row: Row, inputs: Sequence[FeatureLevel]) -> Built:
        level = _only_input(inputs)
        copies: list[nn.Module] = [common.batch_norm(level.channels) for _ in range(row.repeats)]
        return Built(_stack(copies), (level.channels,), level)


@dataclass(frozen=True)
class TransformerRule:
    """`TransformerBlock` with [c2, heads, layers], or as YOLOv5 takes it: [c1, c2, heads, layers], widths unscaled."""

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
class SquaresRule:
    """`Contract` and `Expand`: squares of gain x gain cells into channels and back."""

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
            raise SpecError(f"{level.channels} channels come in; a multiple of {gain**2} is needed for gain {gain}")
        channels = level.channels * gain**2 if self.contracts else level.channels // gain**2
        after = _after(level, Fraction(gain) if self.contracts else Fraction(1, gain), channels)
        return Built(construct(self.layer, bound), row.args, after)


@dataclass(frozen=True)
class ConcatRule:
    """`Concat`: several maps of one stride side by side."""

    takes_list: bool = True

    def check(self, row: Row) -> None:
        if (dimension := bind(common.Concat, row.args)["dimension"]) != 1:
            raise SpecError(f"argument 1 (dimension) is {dimension}; allowed: 1, the channels")

    def build(self, row: Row, inputs: Sequence[FeatureLevel]) -> Built:
        if len({level.stride for level in inputs}) > 1:
            listed = ", ".join(str(level.stride) for level in inputs)
            raise SpecError(f"the inputs have strides {listed}; maps of one stride can be joined")
        level = FeatureLevel(sum(level.channels for level in inputs), inputs[0].stride)
        return Built(common.Concat(1), row.args, level)


@dataclass(frozen=True)
class DetectRule:
    """`Detect` with [nc, anchors]."""

    takes_list: bool = True

    def check(self, row: Row) -> None:
        if len(row.args) != 2:
            raise SpecError(f"{len(row.args)} arguments are given; it takes [nc, anchors]")
        if row.args[0] != row.spec.num_classes:
            classes = row.spec.num_classes
            raise SpecError(f"argument 1 (nc) is {row.args[0]!r}; the model has {classes} classes; write nc")
        if row.args[1] != row.spec.anchors:
            raise SpecError("argument 2 (anchors) is not the file's anchors; give those under that key; write anchors")

    def build(self, row: Row, inputs: Sequence[FeatureLevel]) -> Built:
        anchors = row.spec.anchors
        if isinstance(anchors, int):
            # Placeholders, the same as YOLOv5's: the trainer fits anchors to the dataset before the first epoch.
            anchors = (tuple(range(2 * anchors)),) * len(inputs)
        if len(anchors) != len(inputs):
            raise SpecError(f"it reads {len(inputs)} levels; anchors have {len(anchors)} rows, one per level is needed")
        channels = tuple(level.channels for level in inputs)
        strides = tuple(level.stride for level in inputs)
        head = Detect(row.spec.num_classes, anchors, channels, strides)
        return Built(head, (row.spec.num_classes, anchors, channels), None)


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
    table.register("DWConvTranspose2d", ScaledRule(common.DWConvTranspose2d, _enlarged_by_s))
    table.register("nn.ConvTranspose2d", ScaledRule(nn.ConvTranspose2d, _enlarged_by_stride))
    table.register("TransformerBlock", TransformerRule())
    table.register("nn.BatchNorm2d", BatchNormRule())
    table.register("nn.Upsample", SameChannelsRule(nn.Upsample, _upsampled))
    table.register("nn.MaxPool2d", SameChannelsRule(nn.MaxPool2d, _pooled))
    table.register("nn.AvgPool2d", SameChannelsRule(nn.AvgPool2d, _pooled))
    table.register("nn.ZeroPad2d", SameChannelsRule(nn.ZeroPad2d))
    table.register("nn.Identity", SameChannelsRule(nn.Identity))
    table.register("Contract", SquaresRule(common.Contract, contracts=True))
    table.register("Expand", SquaresRule(common.Expand, contracts=False))
    table.register("Concat", ConcatRule())
    table.register("Detect", DetectRule())
    return table


LAYERS = _table()
