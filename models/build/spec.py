"""Model YAML -> ModelSpec: what the file says, checked for form, with the line of every row. No torch.

The format is YOLOv5's: `nc`, `depth_multiple`, `width_multiple`, `anchors`, and the rows of `backbone` and `head`, each
`[from, number, module, arguments]`. What a row means (which modules there are, how `from` counts) is the business of
`models.build.builder`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from utils.errors import SpecError, did_you_mean
from utils.files import find_file
from utils.yaml_lines import load_yaml, plain

Anchors = int | tuple[tuple[float, ...], ...]
Problems = list[str]

SECTIONS = ("backbone", "head")
REQUIRED = ("nc", "anchors", *SECTIONS)
# `inplace` chooses between two ways of decoding in YOLOv5, with equal results; here there is one.
KEYS = (
    *("nc", "ch", "depth_multiple", "width_multiple", "channel_multiple", "activation", "inplace", "anchors"),
    *SECTIONS,
)
FOLDERS = ("models", "models/hub")
ROW_FORM = "a row is [from, number, module, arguments]"
WORDS: dict[str, Any] = {"None": None, "True": True, "False": False}


@dataclass(frozen=True)
class LayerSpec:
    """One row of a model YAML.

    Attributes:
        row: index of the row, backbone and head counted through; also that of its module in `DetectionModel.model`.
        sources: `from`: slot numbers (negative ones count back) and level names (`"P4"`).
        repeats: `number` as it stands, before `depth_multiple`; 0 where the row could not be read.
        module: name of the module.
        args: arguments, positional or (backbones) by name; lists are tuples.
        line: line in the file, 0 if there is no file.
        section: `"backbone"` or `"head"`.
    """

    row: int
    sources: tuple[int | str, ...]
    repeats: int
    module: str
    args: tuple[Any, ...] | Mapping[str, Any]
    line: int = 0
    section: str = "backbone"


@dataclass(frozen=True)
class ModelSpec:
    """A model YAML, read and checked for form.

    Attributes:
        path: the file as errors name it.
        num_classes: number of classes.
        depth_multiple, width_multiple: factors on `number` and on output channels.
        anchors: width, height, width, height ... in pixels, one row per level of the head; or their number per level.
        channel_multiple: scaled output channels are rounded up to a multiple of it.
        activation: text such as `"nn.LeakyReLU(0.1)"`, or None for SiLU.
        layers: the rows.
        channels: channels of the input image if the file says so.
        key_lines: line of each top-level key.
    """

    path: str
    num_classes: int
    depth_multiple: float
    width_multiple: float
    anchors: Anchors
    channel_multiple: int = 8
    activation: str | None = None
    layers: tuple[LayerSpec, ...] = ()
    channels: int | None = None
    key_lines: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)

    @property
    def anchors_per_level(self) -> int:
        """Number of anchors at each level of the head."""
        return self.anchors if isinstance(self.anchors, int) else len(self.anchors[0]) // 2

    def where(self, line: int = 0) -> str:
        """`file:line`, or the file alone for line 0."""
        return f"{self.path}:{line}" if line else self.path

    def key_where(self, key: str) -> str:
        """`file:line` of a top-level key."""
        return self.where(self.key_lines.get(key, 0))

    def replaced(self, channels: int, num_classes: int | None, anchors: Any) -> ModelSpec:
        """Return the spec with another number of input channels, classes or anchors.

        Args:
            channels: of the input image; the file's own `ch` wins.
            num_classes: None = the file's.
            anchors: pixels per level, or a number of anchors per level; None = the file's.

        Raises:
            SpecError: a number out of range.
        """
        problems: Problems = []
        if num_classes is not None and (not _is_int(num_classes) or num_classes < 1):
            problems.append(f"{self.path}: nc is set to {num_classes!r}; an integer of at least 1 is needed")
        # A number of anchors may come from a hyperparameter file as 3.0.
        wanted = round(anchors) if isinstance(anchors, float) else anchors
        new_anchors = self.anchors if wanted is None else _anchors(wanted, self.path, problems)
        _raise(problems)
        return replace(
            self,
            channels=self.channels or channels,
            num_classes=num_classes or self.num_classes,
            anchors=new_anchors,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars that `load_model_spec` turns into this spec again (without line numbers)."""
        out: dict[str, Any] = {"nc": self.num_classes}
        if self.channels is not None:
            out["ch"] = self.channels
        out |= {
            "depth_multiple": self.depth_multiple,
            "width_multiple": self.width_multiple,
            "channel_multiple": self.channel_multiple,
            "anchors": plain(self.anchors),
        }
        if self.activation is not None:
            out["activation"] = self.activation
        for section in SECTIONS:
            out[section] = [_row_to_list(layer) for layer in self.layers if layer.section == section]
        return out


def load_model_spec(source: str | Path | Mapping[str, Any]) -> ModelSpec:
    """Read a model YAML, or a mapping of the same form.

    Args:
        source: a path, a file name in `models/` or `models/hub/`, or a mapping.

    Raises:
        SpecError: everything that is wrong with the form, one line per mistake, each with file and line.
    """
    spec, problems = read_model_spec(source)
    _raise(problems)
    return spec


def read_model_spec(source: str | Path | Mapping[str, Any]) -> tuple[ModelSpec, Problems]:
    """As `load_model_spec`, but mistakes inside the mapping are returned beside what could be read.

    A row that cannot be read has 0 repeats; so `models.build.builder` can report the mistakes of the others with them.

    Raises:
        SpecError: no such file, or not a mapping in YAML.
    """
    if isinstance(source, Mapping):
        return _read_mapping(source, "model")
    path = find_file(source, *FOLDERS, error=SpecError)
    return _read_mapping(load_yaml(path, SpecError), str(path))


def _raise(problems: Problems) -> None:
    if problems:
        raise SpecError("\n".join(problems))


def _read_mapping(data: Mapping[str, Any], path: str) -> tuple[ModelSpec, Problems]:
    key_lines: dict[str, int] = dict(getattr(data, "lines", {}))
    problems: Problems = []

    def where(key: str) -> str:
        return f"{path}:{key_lines[key]}" if key_lines.get(key) else path

    for key in data:
        if key not in KEYS:
            allowed = ", ".join(KEYS)
            problems.append(f"{where(key)}: unknown key '{key}'; allowed: {allowed}{did_you_mean(key, KEYS)}")
    for key in REQUIRED:
        if key not in data:
            problems.append(f"{path}: key '{key}' is missing")

    def number(key: str, default: Any, whole: bool) -> Any:
        value = data.get(key, default)
        if (_is_int(value) if whole else _is_number(value)) and value > 0:
            return value
        what = "an integer of at least 1" if whole else "a number above 0"
        problems.append(f"{where(key)}: {key} is {value!r}; {what} is needed")
        return default

    activation = data.get("activation")
    if activation is not None and not isinstance(activation, str):
        found = f"{where('activation')}: activation is {plain(activation)!r}"
        problems.append(f"{found}; a text such as nn.LeakyReLU(0.1) is needed")
        activation = None
    spec = ModelSpec(
        path=path,
        num_classes=number("nc", 1, True),
        depth_multiple=number("depth_multiple", 1.0, False),
        width_multiple=number("width_multiple", 1.0, False),
        anchors=_anchors(data["anchors"], where("anchors"), problems) if "anchors" in data else 3,
        channel_multiple=number("channel_multiple", 8, True),
        activation=activation,
        layers=_layers(data, path, where, problems),
        channels=number("ch", 3, True) if "ch" in data else None,
        key_lines=key_lines,
    )
    return spec, problems


def _anchors(value: Any, where: str, problems: Problems) -> Anchors:
    """Anchors as a number or as tuples; 3 where they cannot be used."""
    if _is_int(value) and value > 0:
        return int(value)
    rows = value if isinstance(value, Sequence) and not isinstance(value, str) else None
    form = "one list of width, height, width, height ... in pixels per level, or an integer of at least 1"
    if not rows or not all(isinstance(row, Sequence) and not isinstance(row, str) and row for row in rows):
        problems.append(f"{where}: anchors are {value!r}; allowed: {form}")
        return 3
    flat = [_flat(row) for row in rows]
    if any(not _is_number(side) or side < 0 for row in flat for side in row):
        problems.append(f"{where}: anchors hold something that is not a size in pixels; allowed: {form}")
        return 3
    if len(flat[0]) % 2 or any(len(row) != len(flat[0]) for row in flat):
        counts = ", ".join(str(len(row)) for row in flat)
        problems.append(f"{where}: anchors have rows of {counts} numbers; an equal and even count is needed")
        return 3
    return tuple(tuple(row) for row in flat)


def _flat(row: Sequence[Any]) -> list[Any]:
    """Widths and heights one after the other; pairs ([[10, 13], [16, 30]]) are allowed too."""
    return [side for item in row for side in (item if isinstance(item, Sequence) else (item,))]


def _layers(
    data: Mapping[str, Any], path: str, where: Callable[[str], str], problems: Problems
) -> tuple[LayerSpec, ...]:
    layers: list[LayerSpec] = []
    for section in SECTIONS:
        rows = data.get(section, [])
        if not isinstance(rows, Sequence) or isinstance(rows, str) or (section in data and not rows):
            problems.append(f"{where(section)}: {section} is {plain(rows)!r}; a list of rows is needed; {ROW_FORM}")
            continue
        lines = getattr(rows, "lines", [0] * len(rows))
        for row, line in zip(rows, lines, strict=True):
            place = f"{path}:{line}" if line else path
            layers.append(_layer(row, len(layers), line, section, place, problems))
    return tuple(layers)


def _layer(row: Any, index: int, line: int, section: str, place: str, problems: Problems) -> LayerSpec:
    empty = LayerSpec(index, (-1,), 0, "", (), line, section)
    if not isinstance(row, Sequence) or isinstance(row, str) or len(row) != 4:
        problems.append(f"{place}: row {index} is {plain(row)!r}; {ROW_FORM}")
        return empty
    sources, repeats, module, args = row
    name = f"row {index} ({module})"
    found = len(problems)
    if not isinstance(module, str) or not module:
        problems.append(f"{place}: row {index}: the module is {plain(module)!r}; a name is needed; {ROW_FORM}")
    if not _is_int(repeats) or repeats < 1:
        problems.append(f"{place}: {name}: number is {plain(repeats)!r}; an integer of at least 1 is needed")
    listed = list(sources) if isinstance(sources, Sequence) and not isinstance(sources, str) else [sources]
    if not listed or not all(_is_int(item) or isinstance(item, str) for item in listed):
        found_sources = f"{place}: {name}: from is {plain(sources)!r}"
        problems.append(f"{found_sources}; allowed: slot numbers and level names such as P4")
    if isinstance(args, Mapping):
        if not all(isinstance(key, str) for key in args):
            problems.append(f"{place}: {name}: arguments are {plain(args)!r}; the names of arguments are texts")
    elif not isinstance(args, Sequence) or isinstance(args, str):
        problems.append(f"{place}: {name}: arguments are {plain(args)!r}; a list is needed, such as [{plain(args)}]")
    if len(problems) > found:
        return empty
    frozen = {key: _frozen(value) for key, value in args.items()} if isinstance(args, Mapping) else _frozen(args)
    return LayerSpec(index, tuple(listed), repeats, module, frozen, line, section)


def _frozen(value: Any) -> Any:
    """Convert lists to tuples and the words None, True and False of YOLOv5's files to their values."""
    if isinstance(value, Mapping):
        return {key: _frozen(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    return WORDS.get(value, value) if isinstance(value, str) else value


def _row_to_list(layer: LayerSpec) -> list[Any]:
    sources = layer.sources[0] if len(layer.sources) == 1 else list(layer.sources)
    return [sources, layer.repeats, layer.module, plain(layer.args)]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
