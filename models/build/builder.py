"""ModelSpec -> modules and routes: how `from` is read, and what every row gets and gives.

A *slot* is one output tensor. A plain row owns one, a backbone row five: P1 ... P5, for strides 2 ... 32; levels that
it does not give are empty. With plain rows alone a slot's number is the row's, as in YOLOv5. A slot carries its
channels and stride, so the head's strides are known without running anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.arguments import activation_from_text
from models.backbones import backbone_from_row, is_backbone_name, row_names
from models.backbones.base import FeatureLevel
from models.build.layer_rules import LAYERS, Built, Row, Rule
from models.build.spec import LayerSpec, ModelSpec
from models.common import Conv
from utils.errors import ConfigError, SpecError, UserError, did_you_mean
from utils.yaml_lines import plain

IMAGE = -1  # slot number of the image
LEVEL_STRIDES = {"P1": 2, "P2": 4, "P3": 8, "P4": 16, "P5": 32}
PAD_VALUE = 114 / 255  # the gray of the letterbox


@dataclass(frozen=True)
class Route:
    """Where a row reads and writes.

    Attributes:
        layer: the row of the YAML.
        repeats: its number after `depth_multiple`.
        arguments: what its module was built with.
        slot: number of its first slot.
        sources: slots it reads; IMAGE is the image.
        takes_list: its module is called with the list of maps, not with one map.
        gives_levels: its module returns several maps (a backbone).
        outputs: slot of each map it returns; None where nobody can read it.
        levels: channels and stride of each of them (empty for the head).
        releases: slots that no later row reads.
        pad_to: its input is padded at right and bottom to a multiple of this (1 = as it is).
    """

    layer: LayerSpec
    repeats: int
    arguments: tuple[Any, ...]
    slot: int
    sources: tuple[int, ...]
    takes_list: bool
    gives_levels: bool
    outputs: tuple[int | None, ...]
    levels: tuple[FeatureLevel, ...]
    releases: tuple[int, ...] = ()
    pad_to: int = 1


class Rows(nn.Sequential):
    """The modules of all rows, and the way of the maps through them.

    Args:
        modules: one per row; the row's index is the first part of its state-dict keys.
        routes: one per row.
        size_multiple: height and width of the image must be multiples of it.
    """

    def __init__(self, modules: Sequence[nn.Module], routes: Sequence[Route], size_multiple: int) -> None:
        super().__init__(*modules)
        self.routes = tuple(routes)
        self.size_multiple = size_multiple

    def forward(self, image: Tensor) -> Any:
        """Run all rows.

        Args:
            image: (B, C, H, W) in [0, 1].

        Returns:
            What the last row returns.

        Raises:
            ConfigError: height or width is no multiple of `size_multiple`.
        """
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call, unused-ignore]
        if not (torch.compiler.is_compiling() or tracing):  # a graph is made for a size that was checked
            check_size(image.shape[-2], image.shape[-1], self.size_multiple)
        slots: dict[int, Tensor] = {IMAGE: image}
        out: Any = image
        for module, route in zip(self, self.routes, strict=True):
            maps = [slots[source] for source in route.sources]
            for done in route.releases:
                slots.pop(done)
            out = module(maps) if route.takes_list else module(padded(maps[0], route.pad_to))
            results = zip(route.outputs, out if route.gives_levels else (out,), strict=True)
            slots |= {slot: result for slot, result in results if slot is not None}
        return out


def check_size(height: int, width: int, multiple: int) -> None:
    """Raise ConfigError unless both sides are multiples of `multiple`."""
    if height % multiple or width % multiple:
        nearest = [max(round(side / multiple), 1) * multiple for side in (height, width)]
        raise ConfigError(
            f"image of {height} x {width} pixels: this model's largest stride is {multiple}, and height and width "
            f"must be multiples of it; nearest: {nearest[0]} x {nearest[1]}"
        )


def padded(image: Tensor, multiple: int) -> Tensor:
    """Pad (B, C, H, W) with gray at right and bottom up to multiples of `multiple`."""
    if multiple == 1:
        return image
    bottom, right = -image.shape[-2] % multiple, -image.shape[-1] % multiple
    if isinstance(bottom, int) and isinstance(right, int) and bottom == right == 0:
        return image
    return F.pad(image, (0, right, 0, bottom), value=PAD_VALUE)


def build_layers(spec: ModelSpec, problems: Sequence[str] = ()) -> tuple[Rows, list[int]]:
    """Build the rows of a spec.

    Args:
        spec: with `channels` set (3 otherwise).
        problems: mistakes found before, reported together with those found here.

    Returns:
        The rows, and the slots that are read by number or level name (`save` in YOLOv5), in rising order.

    Raises:
        SpecError: one line per mistake, each with file, line and row.
    """
    builder = _Builder(spec, problems)
    for layer in spec.layers:
        builder.add(layer)
    return builder.finish()


def with_backbone_weights(spec: ModelSpec, weights: str) -> ModelSpec:
    """Return the spec with other weights for its backbone row.

    Raises:
        SpecError: there is not exactly one backbone row.
    """
    names = [layer.module for layer in spec.layers]
    rows = [i for i, name in enumerate(names) if name not in LAYERS and is_backbone_name(name)]
    if len(rows) != 1:
        raise SpecError(f"{spec.path}: {len(rows)} rows are backbones; weights for the backbone need exactly one")
    layer = spec.layers[rows[0]]
    if isinstance(layer.args, tuple):
        # Without what says "weights" in a list: True, False, the word pretrained, a mapping.
        kept = tuple(arg for arg in layer.args if isinstance(arg, str) and arg != "pretrained")
        mapping = {key: value for arg in layer.args if isinstance(arg, Mapping) for key, value in arg.items()}
        args: Any = (*kept, {**_without_weights(mapping), "weights": weights})
    else:
        args = {**_without_weights(layer.args), "weights": weights}
    layers = [replace(layer, args=args) if i == rows[0] else other for i, other in enumerate(spec.layers)]
    return replace(spec, layers=tuple(layers))


def _without_weights(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key not in ("weights", "pretrained")}


@dataclass(frozen=True)
class _Slot:
    """What stands at a slot number: a level, nothing (an empty level), or something unknown after a mistake."""

    level: FeatureLevel | None = None
    known: bool = True


_UNKNOWN = _Slot(known=False)


class _Builder:
    """Goes through the rows once; a mistake in one does not hide those of the others."""

    def __init__(self, spec: ModelSpec, problems: Sequence[str]) -> None:
        self.spec = spec
        self.problems = list(problems)
        self.image = FeatureLevel(spec.channels or 3, 1)
        self.slots: list[_Slot] = []
        self.modules: list[nn.Module] = []
        self.routes: list[Route] = []
        self.save: set[int] = set()
        self.backbone: tuple[str, int] | None = None  # the latest: its name and first slot
        self.numbers_known = True  # until a row that cannot be read: it may own one slot or five
        self.activation = self._activation()

    def _activation(self) -> nn.Module | None:
        if self.spec.activation is None:
            return None
        try:
            return activation_from_text(self.spec.activation)
        except SpecError as error:
            self.problems.append(f"{self.spec.key_where('activation')}: {error}")
            return None

    def add(self, layer: LayerSpec) -> None:
        """Add a row; a mistake in it is noted, and its slots are unknown."""
        place = f"{self.spec.where(layer.line)}: row {layer.row} ({layer.module})"
        is_plain = layer.module in LAYERS
        if not layer.repeats or not (is_plain or is_backbone_name(layer.module)):
            if layer.repeats:
                near = did_you_mean(layer.module, (*LAYERS.names(), *row_names(layer.module)))
                self.problems.append(f"{place}: unknown module '{layer.module}'{near}")
            self.numbers_known = False
            self.slots.append(_UNKNOWN)
            return
        try:
            if is_plain:
                self._add_plain(layer, LAYERS.get(layer.module))
            else:
                self._add_backbone(layer)
        except UserError as error:
            self.problems.append(f"{place}: {error}")
            self.slots += [_UNKNOWN] * (1 if is_plain else len(LEVEL_STRIDES))

    def finish(self) -> tuple[Rows, list[int]]:
        """Return the rows after all were added."""
        last = self.spec.layers[-1] if self.spec.layers else None
        heads = [layer for layer in self.spec.layers if layer.module == "Detect"]
        if last is not None and last.repeats and (last.module != "Detect" or len(heads) != 1):
            where = self.spec.where(last.line)
            self.problems.append(f"{where}: row {last.row} ({last.module}): the last row, and only it, must be Detect")
        if self.problems:
            raise SpecError("\n".join(self.problems))
        largest = max((level.stride for route in self.routes for level in route.levels), default=1)
        readers = [route.gives_levels for route in self.routes if IMAGE in route.sources]
        # Where backbones alone read the image, each pads it for itself, and any size will do.
        size_multiple = 1 if all(readers) else largest
        return Rows(self.modules, self._with_releases(largest), size_multiple), sorted(self.save)

    def _with_releases(self, largest: int) -> list[Route]:
        last_reader = {slot: i for i, route in enumerate(self.routes) for slot in route.sources}
        routes = []
        for i, route in enumerate(self.routes):
            outputs = tuple(slot if slot in last_reader else None for slot in route.outputs)
            releases = tuple(slot for slot in dict.fromkeys(route.sources) if last_reader[slot] == i)
            pad_to = math.lcm(route.pad_to, largest) if route.gives_levels else 1
            routes.append(replace(route, outputs=outputs, releases=releases, pad_to=pad_to))
        return routes

    # ---- rows -------------------------------------------------------------------------------------------------------

    def _add_plain(self, layer: LayerSpec, rule: Rule) -> None:
        if not isinstance(layer.args, tuple):
            raise SpecError(f"arguments are {dict(layer.args)!r}; this module takes a list")
        words = {"nc": self.spec.num_classes, "anchors": self.spec.anchors}
        args = tuple(words.get(arg, arg) if isinstance(arg, str) else arg for arg in layer.args)
        depth = self.spec.depth_multiple
        repeats = max(round(layer.repeats * depth), 1) if layer.repeats > 1 else layer.repeats
        row = Row(self.spec, args, repeats)
        rule.check(row)
        sources = self._sources(layer)
        levels = None if sources is None else self._levels(sources)
        if sources is None or levels is None:
            self.slots.append(_UNKNOWN)
            return
        built = rule.build(row, levels)
        self._append(layer, built, sources, rule.takes_list, repeats)

    def _append(self, layer: LayerSpec, built: Built, sources: tuple[int, ...], takes_list: bool, repeats: int) -> None:
        if self.activation is not None:
            for module in built.module.modules():
                if isinstance(module, Conv):
                    module.use_default_activation(self.activation)
        slot = len(self.slots)
        levels = () if built.level is None else (built.level,)
        self.modules.append(built.module)
        self.routes.append(Route(layer, repeats, built.arguments, slot, sources, takes_list, False, (slot,), levels))
        self.slots.append(_Slot(built.level))

    def _add_backbone(self, layer: LayerSpec) -> None:
        if layer.repeats != 1:
            raise SpecError(f"number is {layer.repeats}; a backbone row stands once: 1")
        sources = self._sources(layer)
        if sources is not None and sources != (IMAGE,):
            raise SpecError(f"from is {_listed(layer.sources)}; a backbone reads the image: -1 in row 0, or image")
        if self.image.channels != 3:
            raise SpecError(f"the image has {self.image.channels} channels; a backbone takes 3")
        try:
            module = backbone_from_row(layer.module, layer.args)
            levels, divisor = tuple(module.levels), module.size_divisor
        except (TypeError, AttributeError) as error:  # the constructor of a class that is not ours (a plugin)
            raise SpecError(f"cannot be built with {plain(layer.args)}: {error}") from error
        first = len(self.slots)
        by_stride = {level.stride: level for level in levels}
        self.slots += [_Slot(by_stride.get(stride)) for stride in LEVEL_STRIDES.values()]
        self.backbone = layer.module, first
        number = {stride: first + i for i, stride in enumerate(LEVEL_STRIDES.values())}
        outputs = tuple(number.get(level.stride) for level in levels)
        given = layer.args if isinstance(layer.args, tuple) else (layer.args,)
        self.modules.append(module)
        self.routes.append(Route(layer, 1, given, first, (IMAGE,), False, True, outputs, levels, pad_to=divisor))

    # ---- from -------------------------------------------------------------------------------------------------------

    def _sources(self, layer: LayerSpec) -> tuple[int, ...] | None:
        """Slot numbers of a row's `from`; None when a mistake in an earlier row makes them unknown."""
        if not self.numbers_known:
            return None
        return tuple(self._source(source) for source in layer.sources)

    def _source(self, source: int | str) -> int:
        if isinstance(source, str):
            return self._named(source)
        count = len(self.slots)
        if source == -1:
            return max((i for i, slot in enumerate(self.slots) if slot.level or not slot.known), default=IMAGE)
        slot = source if source >= 0 else count + source
        if not 0 <= slot < count:
            at_hand = f"0 to {count - 1}, or -1 to -{count}" if count else "-1, the image"
            raise SpecError(f"from names slot {source}; available: {at_hand}")
        self._check_not_empty(slot, f"slot {source}")
        self.save.add(slot)
        return slot

    def _named(self, name: str) -> int:
        if name == "image":
            return IMAGE
        if name not in LEVEL_STRIDES:
            names = (*LEVEL_STRIDES, "image")
            near = did_you_mean(name, names)
            raise SpecError(f"from names '{name}'; allowed: slot numbers, {', '.join(names)}{near}")
        if self.backbone is None:
            raise SpecError(f"from names level {name}, and no row above is a backbone; use a slot number")
        slot = self.backbone[1] + list(LEVEL_STRIDES).index(name)
        self._check_not_empty(slot, name)
        self.save.add(slot)
        return slot

    def _check_not_empty(self, slot: int, named: str) -> None:
        """Raise SpecError, with the levels available, if `slot` is a level that its backbone does not give."""
        if self.slots[slot].level is not None or not self.slots[slot].known:
            return
        owner = next(route for route in reversed(self.routes) if route.slot <= slot)
        level = list(LEVEL_STRIDES)[slot - owner.slot] if owner.levels else "the head"
        at_hand = [
            f"{name} (slot {owner.slot + i})"
            for i, (name, stride) in enumerate(LEVEL_STRIDES.items())
            if any(given.stride == stride for given in owner.levels)
        ]
        what = f"{level} of row {owner.layer.row} ({owner.layer.module})"
        raise SpecError(f"from names {named}, {what}, which is empty; available: {', '.join(at_hand) or 'none'}")

    def _levels(self, sources: Sequence[int]) -> list[FeatureLevel] | None:
        levels = [self.image if source == IMAGE else self.slots[source].level for source in sources]
        return None if any(level is None for level in levels) else [level for level in levels if level is not None]


def _listed(sources: Sequence[int | str]) -> str:
    return str(sources[0]) if len(sources) == 1 else str(list(sources))
