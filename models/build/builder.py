"""Build the modules and routes of a `ModelSpec` and resolve the `from` column.

A *slot* is one output tensor. A plain row owns one slot, a backbone row five: P1 ... P5 with strides 2 ... 32; levels
the backbone does not return are empty. Without a backbone row the slot index equals the row index, as in YOLOv5. Each
slot has known channels and stride, so the strides of the head are known without a forward pass.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from models.arguments import activation_from_text
from models.backbones import arguments_with_weights, backbone_from_row, is_backbone_name, is_plugin_name, row_names
from models.backbones.base import FeatureLevel
from models.build.layer_rules import LAYERS, Built, Row, Rule
from models.build.rows import IMAGE, Route, Rows
from models.build.spec import HEADS, LayerSpec, ModelSpec
from models.common import Conv
from utils.errors import SpecError, UserError, did_you_mean, one_line, shown
from utils.yaml_lines import plain

LOGGER = logging.getLogger(__name__)
MAX_PARAMETERS = 2_000_000_000
LEVEL_STRIDES = {"P1": 2, "P2": 4, "P3": 8, "P4": 16, "P5": 32}


def build_layers(spec: ModelSpec, problems: Sequence[str] = ()) -> tuple[Rows, list[int]]:
    """Build the modules of a model specification.

    Args:
        spec: model specification; `channels` defaults to 3.
        problems: errors found earlier, raised together with those found here.

    Returns:
        The rows, and the slots that are read by index or level name in ascending order (`save` in YOLOv5).

    Raises:
        SpecError: the file is not a valid model; one line per error, each with file, line and row.
    """
    builder = _Builder(spec, problems)
    for layer in spec.layers:
        builder.add(layer)
    return builder.finish()


def with_backbone_weights(spec: ModelSpec, weights: str) -> ModelSpec:
    """Return the specification with the weights of its backbone row replaced.

    Raises:
        SpecError: the number of backbone rows is not 1.
    """
    names = [layer.module for layer in spec.layers]
    rows = [i for i, name in enumerate(names) if name not in LAYERS and is_backbone_name(name)]
    if len(rows) != 1:
        raise SpecError(f"{spec.path}: {len(rows)} rows are backbones; weights for the backbone need exactly one")
    layer = spec.layers[rows[0]]
    args = arguments_with_weights(layer.module, layer.args, weights)
    layers = [replace(layer, args=args) if i == rows[0] else other for i, other in enumerate(spec.layers)]
    return replace(spec, layers=tuple(layers))


@dataclass(frozen=True)
class _Slot:
    """A slot: a feature level, empty (level None), or unknown after an error in its row."""

    level: FeatureLevel | None = None
    known: bool = True


OTHER_HEADS = {
    "Segment": "; segmentation is not supported: use Detect with [nc, anchors], which gives boxes",
    "Classify": "; classification is not supported: end the YAML with a neck and Detect",
}
_UNKNOWN = _Slot(known=False)


class _Builder:
    """Single pass over the rows that collects the errors of all of them."""

    def __init__(self, spec: ModelSpec, problems: Sequence[str]) -> None:
        self.spec = spec
        self.problems = list(problems)
        self.image = FeatureLevel(spec.channels or 3, 1)
        self.slots: list[_Slot] = []
        self.modules: list[nn.Module] = []
        self.routes: list[Route] = []
        self.save: set[int] = set()
        self.backbone: tuple[str, int] | None = None  # name and first slot of the last backbone row
        self.parameters = 0
        self.warned: set[str] = set()
        self.numbers_known = True  # False after an invalid row, which may own one slot or five
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
        """Add a row; on an error record it and mark the slots of the row as unknown."""
        where = f"{self.spec.where(layer.line)}: row {layer.row} ({layer.module})"
        is_plain = layer.module in LAYERS
        if is_plain and is_plugin_name(layer.module) and layer.module not in self.warned:
            self.warned.add(layer.module)
            LOGGER.warning(
                "%s: is the built-in layer; the plug-in's class of that name is not used in rows unless renamed", where
            )
        if not layer.repeats or not (is_plain or is_backbone_name(layer.module)):
            if layer.repeats:
                names = (*LAYERS.names(), *row_names(layer.module))
                near = OTHER_HEADS.get(layer.module) or did_you_mean(layer.module, names)
                own = "" if near else "; a class of your own needs --plugin FILE.py"
                self.problems.append(f"{where}: unknown module {shown(layer.module)}{near}{own}")
            self.numbers_known = False
            self.slots.append(_UNKNOWN)
            return
        try:
            if is_plain:
                self._add_plain(layer, LAYERS.get(layer.module))
            else:
                self._add_backbone(layer)
        except UserError as error:
            self.problems.append(f"{where}: {error}")
            if not is_plain:  # rows that name its levels are not wrong
                self.backbone = layer.module, len(self.slots)
            self.slots += [_UNKNOWN] * (1 if is_plain else len(LEVEL_STRIDES))

    def finish(self) -> tuple[Rows, list[int]]:
        """Return the finished rows and the saved slots."""
        last = self.spec.layers[-1] if self.spec.layers else None
        names = [form.module for form in HEADS.values()]
        heads = [layer for layer in self.spec.layers if layer.module in names]
        known = last is not None and (last.module in LAYERS or is_backbone_name(last.module))
        if last is not None and known and last.repeats and (last.module not in names or len(heads) != 1):
            where = self.spec.where(last.line)
            self.problems.append(
                f"{where}: row {last.row} ({last.module}): {' or '.join(names)} must be the last row and appear once"
            )
        if self.problems:
            raise SpecError("\n".join(map(one_line, self.problems)))
        largest = max((level.stride for route in self.routes for level in route.levels), default=1)
        readers = [route.gives_levels for route in self.routes if IMAGE in route.sources]
        # Backbones pad their own input; if they are the only readers of the image, any size is valid.
        size_multiple = 1 if all(readers) else largest
        for route, module in zip(self.routes, self.modules, strict=True):
            _describe(module, route)
        return Rows(self.modules, self._with_releases(largest), size_multiple), sorted(self.save)

    def _with_releases(self, largest: int) -> list[Route]:
        last_reader = {slot: i for i, route in enumerate(self.routes) for slot in route.sources}
        routes = []
        for i, route in enumerate(self.routes):
            outputs = tuple(slot if slot in last_reader else None for slot in route.outputs)
            releases = tuple(slot for slot in dict.fromkeys(route.sources) if last_reader[slot] == i)
            needed = max(largest // route.in_stride, 1)
            pad_to = math.lcm(route.pad_to, needed) if route.gives_levels else 1
            routes.append(replace(route, outputs=outputs, releases=releases, pad_to=pad_to))
        return routes

    # ---- rows -------------------------------------------------------------------------------------------------------

    def _add_plain(self, layer: LayerSpec, rule: Rule) -> None:
        if not isinstance(layer.args, tuple):
            raise SpecError(f"arguments are {dict(layer.args)!r}; this module takes a list")
        variables = {"nc": self.spec.num_classes, "anchors": self.spec.anchors}
        args = tuple(variables.get(arg, arg) if isinstance(arg, str) else arg for arg in layer.args)
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
        self._count(built.module)
        self.routes.append(Route(layer, repeats, built.arguments, slot, sources, takes_list, False, (slot,), levels))
        self.slots.append(_Slot(built.level))

    def _count(self, module: nn.Module) -> None:
        """Add a module; refuse models that do not fit into any memory before they fill it."""
        self.parameters += sum(p.numel() for p in module.parameters())
        if self.parameters > MAX_PARAMETERS:
            raise SpecError(
                f"{self.parameters / 1e9:.1f} billion parameters so far; allowed: {MAX_PARAMETERS / 1e9:g} billion"
            )
        self.modules.append(module)

    def _add_backbone(self, layer: LayerSpec) -> None:
        if layer.repeats != 1:
            raise SpecError(f"number is {layer.repeats}; a backbone row needs number 1")
        sources = self._sources(layer)
        inputs = None if sources is None else self._levels(sources)
        if sources is None or inputs is None:
            self.slots += [_UNKNOWN] * len(LEVEL_STRIDES)
            return
        if len(inputs) != 1:
            raise SpecError(f"from is {_listed(layer.sources)}; a backbone reads one slot: the image, or a stem row")
        source = inputs[0]
        try:
            is_image = source == FeatureLevel(3, 1)
            module = backbone_from_row(layer.module, layer.args, None if is_image else source)
            levels = tuple(FeatureLevel(level.channels, level.stride * source.stride) for level in module.levels)
        except (TypeError, AttributeError) as error:  # raised by the constructor of a plugin class
            raise SpecError(f"cannot be built with {plain(layer.args)}: {error}") from error
        first = len(self.slots)
        by_stride = {level.stride: level for level in levels}
        self.slots += [_Slot(by_stride.get(stride)) for stride in LEVEL_STRIDES.values()]
        self.backbone = layer.module, first
        number = {stride: first + i for i, stride in enumerate(LEVEL_STRIDES.values())}
        outputs = tuple(number.get(level.stride) for level in levels)
        given = layer.args if isinstance(layer.args, tuple) else (layer.args,)
        self._count(module)
        self.routes.append(
            Route(
                *(layer, 1, given, first, sources, False, True, outputs, levels),
                pad_to=module.size_divisor,
                in_stride=source.stride,
            )
        )

    # ---- from -------------------------------------------------------------------------------------------------------

    def _sources(self, layer: LayerSpec) -> tuple[int, ...] | None:
        """Return the source slots of a row, or None if an earlier error makes the slot indices unknown."""
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
            available = f"0 to {count - 1}, or -1 to -{count}" if count else "-1, the image"
            raise SpecError(f"from refers to slot {source}; available: {available}")
        self._check_not_empty(slot, f"slot {source}")
        self.save.add(slot)
        return slot

    def _named(self, name: str) -> int:
        if name == "image":
            return IMAGE
        if name not in LEVEL_STRIDES:
            names = (*LEVEL_STRIDES, "image")
            near = did_you_mean(name, names)
            raise SpecError(f"from is '{name}'; allowed: slot indices, {', '.join(names)}{near}")
        if self.backbone is None:
            raise SpecError(f"from refers to level {name}, but no earlier row is a backbone; use a slot index")
        slot = self.backbone[1] + list(LEVEL_STRIDES).index(name)
        self._check_not_empty(slot, name)
        self.save.add(slot)
        return slot

    def _check_not_empty(self, slot: int, named: str) -> None:
        """Raise SpecError with the available levels if `slot` is a level its backbone does not return."""
        if self.slots[slot].level is not None or not self.slots[slot].known:
            return
        owner = next(route for route in reversed(self.routes) if route.slot <= slot)
        level = list(LEVEL_STRIDES)[slot - owner.slot] if owner.levels else "the head"
        available = [
            f"{name} (slot {owner.slot + i})"
            for i, (name, stride) in enumerate(LEVEL_STRIDES.items())
            if any(given.stride == stride for given in owner.levels)
        ]
        what = f"{level} of row {owner.layer.row} ({owner.layer.module})"
        raise SpecError(f"from refers to {named}, {what}, which is empty; available: {', '.join(available) or 'none'}")

    def _levels(self, sources: Sequence[int]) -> list[FeatureLevel] | None:
        levels = [self.image if source == IMAGE else self.slots[source].level for source in sources]
        return None if any(level is None for level in levels) else [level for level in levels if level is not None]


def _describe(module: nn.Module, route: Route) -> None:
    """Set the attributes by which YOLOv5 tools know a row: index, from, type name, number of parameters."""
    sources = route.layer.sources
    facts = {
        "i": route.layer.row,
        "f": sources[0] if len(sources) == 1 else list(sources),
        "type": route.layer.module,
        "np": sum(p.numel() for p in module.parameters()),
    }
    for name, value in facts.items():
        setattr(module, name, value)


def _listed(sources: Sequence[int | str]) -> str:
    return str(sources[0]) if len(sources) == 1 else str(list(sources))
