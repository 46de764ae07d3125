"""Parse model YAMLs into `ModelSpec`, with the line number of every row.

The format is that of YOLOv5: `nc`, `depth_multiple`, `width_multiple`, `anchors`, and the rows of `backbone` and
`head`, each `[from, number, module, arguments]`. This module checks the syntax; `models.build.builder` resolves module
names and `from`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard, TypeVar, cast

from utils.errors import SpecError, did_you_mean, one_line, shown
from utils.files import find_file
from utils.yaml_lines import load_yaml, plain

Anchors = int | tuple[tuple[float, ...], ...]
N = TypeVar("N", int, float)
Problems = list[str]

SECTIONS = ("backbone", "head")
REQUIRED = ("nc", *SECTIONS)
# `inplace` selects between two equivalent decoders in YOLOv5; it has no effect here.
KEYS = (
    *("nc", "ch", "depth_multiple", "width_multiple", "channel_multiple", "activation", "inplace", "anchors"),
    *SECTIONS,
)


class HeadForm(NamedTuple):
    """Row of a head: module and arguments, and the hyperparameter file in `data/hyps/` to train it with."""

    module: str
    args: tuple[str, ...]
    recipe: str


# By the value of --head.
HEADS: Mapping[str, HeadForm] = {
    "anchor": HeadForm("Detect", ("nc", "anchors"), "hyp.scratch-low.yaml"),
    "free": HeadForm("AnchorFreeDetect", ("nc",), "hyp.auto.yaml"),
}
# Largest values. Official models have up to 365 classes, multiples of 1.33 and 1.25, 15 repeats and 1280 channels.
LIMITS = {"nc": 10_000, "ch": 1024, "depth_multiple": 10, "width_multiple": 10, "channel_multiple": 1024}
MAX_REPEATS = 100
MAX_ANCHORS = 100  # per level
MAX_SIDE = 100_000  # pixels
FOLDERS = ("models", "models/hub")
ROW_FORM = "a row is [from, number, module, arguments]"
WORDS: dict[str, Any] = {"None": None, "True": True, "False": False}


@dataclass(frozen=True)
class LayerSpec:
    """One row of a model YAML.

    Attributes:
        row: index over backbone and head, equal to the index of its module in `DetectionModel.model`.
        sources: `from` as slot indices (negative: relative to the row) and level names (`"P4"`).
        repeats: `number` before `depth_multiple`; 0 for an invalid row.
        module: name of the module.
        args: positional arguments or, for backbones, keyword arguments; lists are converted to tuples.
        line: line number in the file, 0 without a file.
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
    """Contents of a model YAML.

    Attributes:
        path: file name for error messages.
        num_classes: number of classes.
        depth_multiple, width_multiple: factors for `number` and for output channels.
        anchors: widths and heights (w, h, w, h, ...) in pixels, one row per level, or their number per level;
            None for heads without anchors.
        channel_multiple: scaled output channels are rounded up to a multiple of this.
        activation: string such as `"nn.LeakyReLU(0.1)"`, or None for SiLU.
        layers: the rows.
        channels: channels of the input image if the file defines `ch`.
        key_lines: line number of each top-level key.
    """

    path: str
    num_classes: int
    depth_multiple: float
    width_multiple: float
    anchors: Anchors | None
    channel_multiple: int = 8
    activation: str | None = None
    layers: tuple[LayerSpec, ...] = ()
    channels: int | None = None
    key_lines: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)

    @property
    def anchors_per_level(self) -> int:
        """Return the number of anchors per level of the head; 0 without anchors."""
        if self.anchors is None:
            return 0
        return self.anchors if isinstance(self.anchors, int) else len(self.anchors[0]) // 2

    def where(self, line: int = 0) -> str:
        """Return `file:line`, or only the file for line 0."""
        return f"{self.path}:{line}" if line else self.path

    def key_where(self, key: str) -> str:
        """Return `file:line` of a top-level key."""
        return self.where(self.key_lines.get(key, 0))

    def replaced(self, channels: int, num_classes: int | None, anchors: object) -> ModelSpec:
        """Return the specification with input channels, number of classes or anchors replaced.

        Args:
            channels: channels of the input image; `ch` of the file takes precedence.
            num_classes: number of classes; None keeps the value of the file.
            anchors: sizes in pixels per level, or a number of anchors per level; None keeps those of the file.

        Raises:
            SpecError: a value is out of range.
        """
        problems: Problems = []
        if num_classes is not None and (not _is_int(num_classes) or not 1 <= num_classes <= LIMITS["nc"]):
            problems.append(
                f"{self.path}: nc is set to {shown(num_classes)}; allowed: integers from 1 to {LIMITS['nc']}"
            )
        # Hyperparameter files may give the number of anchors as 3.0.
        anchors = round(anchors) if isinstance(anchors, float) else anchors
        new_anchors = self.anchors if anchors is None else _anchors(anchors, self.path, problems)
        _raise(problems)
        return replace(
            self,
            channels=self.channels or channels,
            num_classes=num_classes or self.num_classes,
            anchors=new_anchors,
        )

    @property
    def head_form(self) -> HeadForm:
        """Return the form of the head in the last row; that of the anchor head if it is not a head."""
        module = self.layers[-1].module if self.layers else ""
        return next((form for form in HEADS.values() if form.module == module), HEADS["anchor"])

    def with_head(self, kind: str) -> ModelSpec:
        """Return the specification with a head of `HEADS` as its last row; other rows stay.

        An anchor head that replaces another one starts with 3 anchors per level, which auto-anchor fits to the dataset.

        Raises:
            SpecError: the last row is not a head.
        """
        module, args, _ = HEADS[kind]
        last = self.layers[-1] if self.layers else None
        names = [form.module for form in HEADS.values()]
        if last is None or last.module not in names:
            found = "there are no rows" if last is None else f"the last row is {last.module}"
            raise SpecError(f"{self.path}: --head {kind}: {found}, not a head ({', '.join(names)})")
        if last.module == module:
            return self
        anchors = (self.anchors or 3) if "anchors" in args else None
        return replace(self, anchors=anchors, layers=(*self.layers[:-1], replace(last, module=module, args=args)))

    def to_dict(self) -> dict[str, Any]:
        """Return dicts, lists and scalars from which `load_model_spec` restores this specification, without lines."""
        out: dict[str, Any] = {"nc": self.num_classes}
        if self.channels is not None:
            out["ch"] = self.channels
        out |= {
            "depth_multiple": self.depth_multiple,
            "width_multiple": self.width_multiple,
            "channel_multiple": self.channel_multiple,
        }
        if self.anchors is not None:
            out["anchors"] = plain(self.anchors)
        if self.activation is not None:
            out["activation"] = self.activation
        for section in SECTIONS:
            out[section] = [_row_to_list(layer) for layer in self.layers if layer.section == section]
        return out


def load_model_spec(source: str | Path | Mapping[str, Any]) -> ModelSpec:
    """Parse a model YAML or an equivalent mapping.

    Args:
        source: path, file name in `models/` or `models/hub/`, or mapping.

    Raises:
        SpecError: the file is not valid; one line per error, each with file and line.
    """
    spec, problems = read_model_spec(source)
    _raise(problems)
    return spec


def read_model_spec(source: str | Path | Mapping[str, Any]) -> tuple[ModelSpec, Problems]:
    """Parse like `load_model_spec`, but return errors instead of raising them.

    Invalid rows get 0 repeats, so that `models.build.builder` can check the remaining rows.

    Raises:
        SpecError: the file does not exist or is not a YAML mapping.
    """
    if isinstance(source, Mapping):
        return _read_mapping(source, "model")
    path = find_file(source, *FOLDERS, error=SpecError)
    return _read_mapping(load_yaml(path, SpecError), str(path))


def _raise(problems: Problems) -> None:
    if problems:
        raise SpecError("\n".join(map(one_line, problems)))


def _read_mapping(data: Mapping[str, Any], path: str) -> tuple[ModelSpec, Problems]:
    key_lines: dict[str, int] = dict(getattr(data, "lines", {}))
    problems: Problems = []

    def where(key: str) -> str:
        return f"{path}:{key_lines[key]}" if key_lines.get(key) else path

    for key in data:
        if key not in KEYS:
            allowed = ", ".join(KEYS)
            problems.append(
                f"{where(key)}: unknown key {shown(plain(key))}; allowed: {allowed}{did_you_mean(key, KEYS)}"
            )
    for key in REQUIRED:
        if key not in data:
            problems.append(f"{path}: key '{key}' is missing")

    def number(key: str, default: N, integer: bool) -> N:
        value, limit = data.get(key, default), LIMITS[key]
        if (_is_int(value) if integer else _is_number(value)) and 0 < value <= limit:
            return value
        what = "integers from 1" if integer else "numbers above 0"
        problems.append(f"{where(key)}: {key} is {shown(value)}; allowed: {what} to {limit}")
        return default

    activation = data.get("activation")
    if activation is not None and not isinstance(activation, str):
        message = f"{where('activation')}: activation is {shown(plain(activation))}"
        problems.append(f"{message}; a string such as nn.LeakyReLU(0.1) is needed")
        activation = None
    spec = ModelSpec(
        path=path,
        num_classes=number("nc", 1, True),
        depth_multiple=number("depth_multiple", 1.0, False),
        width_multiple=number("width_multiple", 1.0, False),
        anchors=_anchors(data["anchors"], where("anchors"), problems) if "anchors" in data else None,
        channel_multiple=number("channel_multiple", 8, True),
        activation=activation,
        layers=_layers(data, path, where, problems),
        channels=number("ch", 3, True) if "ch" in data else None,
        key_lines=key_lines,
    )
    return spec, problems


def _anchors(value: object, where: str, problems: Problems) -> Anchors:
    """Return the number of anchors per level or their sizes; 3 if they are not valid."""
    if _is_int(value) and 0 < value <= MAX_ANCHORS:
        return int(value)
    rows = value if isinstance(value, Sequence) and not isinstance(value, str) else None
    form = "one list of width, height, width, height ... in pixels per level, or an integer from 1 to " + str(
        MAX_ANCHORS
    )
    if not rows or not all(isinstance(row, Sequence) and not isinstance(row, str) and row for row in rows):
        problems.append(f"{where}: anchors are {shown(plain(value))}; allowed: {form}")
        return 3
    flat = [_flat(row) for row in rows]
    if any(not _is_number(side) or not 0 <= side <= MAX_SIDE for row in flat for side in row):
        problems.append(
            f"{where}: anchors contain a value that is not a size in pixels (at most {MAX_SIDE}); allowed: {form}"
        )
        return 3
    if len(flat[0]) > 2 * MAX_ANCHORS:
        problems.append(f"{where}: {len(flat[0]) // 2} anchors per level; allowed: {MAX_ANCHORS}")
        return 3
    if len(flat[0]) % 2 or any(len(row) != len(flat[0]) for row in flat):
        counts = ", ".join(str(len(row)) for row in flat)
        problems.append(f"{where}: rows of anchors have {counts} values; an equal and even number is needed")
        return 3
    return tuple(tuple(row) for row in flat)


def _flat(row: Sequence[Any]) -> list[Any]:
    """Flatten a row of anchors, which may consist of pairs ([[10, 13], [16, 30]])."""
    return [side for item in row for side in (item if isinstance(item, Sequence) else (item,))]


def _layers(
    data: Mapping[str, Any], path: str, where: Callable[[str], str], problems: Problems
) -> tuple[LayerSpec, ...]:
    layers: list[LayerSpec] = []
    for section in SECTIONS:
        rows = data.get(section, [])
        if not isinstance(rows, Sequence) or isinstance(rows, str) or (section in data and not rows):
            problems.append(
                f"{where(section)}: {section} is {shown(plain(rows))}; a list of rows is needed; {ROW_FORM}"
            )
            continue
        lines = getattr(rows, "lines", [0] * len(rows))
        for row, line in zip(rows, lines, strict=True):
            where_row = f"{path}:{line}" if line else path
            layers.append(_layer(row, len(layers), line, section, where_row, problems))
    return tuple(layers)


def _layer(row: object, index: int, line: int, section: str, where_row: str, problems: Problems) -> LayerSpec:
    empty = LayerSpec(index, (-1,), 0, "", (), line, section)
    if not isinstance(row, Sequence) or isinstance(row, str) or len(row) != 4:
        problems.append(f"{where_row}: row {index} is {shown(plain(row))}; {ROW_FORM}")
        return empty
    sources, repeats, module, args = row
    name = f"row {index} ({module})"
    num_problems = len(problems)
    if not isinstance(module, str) or not module:
        problems.append(f"{where_row}: row {index}: the module is {shown(plain(module))}; a name is needed; {ROW_FORM}")
    if not _is_int(repeats) or not 1 <= repeats <= MAX_REPEATS:
        problems.append(
            f"{where_row}: {name}: number is {shown(plain(repeats))}; allowed: integers from 1 to {MAX_REPEATS}"
        )
    listed = list(sources) if isinstance(sources, Sequence) and not isinstance(sources, str) else [sources]
    if not listed or not all(_is_int(item) or isinstance(item, str) for item in listed):
        message = f"{where_row}: {name}: from is {shown(plain(sources))}"
        problems.append(f"{message}; allowed: slot indices and level names such as P4")
    if isinstance(args, Mapping):
        if not all(isinstance(key, str) for key in args):
            problems.append(
                f"{where_row}: {name}: arguments are {shown(plain(args))}; the names of arguments must be strings"
            )
    elif not isinstance(args, Sequence) or isinstance(args, str):
        problems.append(
            f"{where_row}: {name}: arguments are {shown(plain(args))}; a list is needed, such as [{shown(plain(args))}]"
        )
    if len(problems) > num_problems:
        return empty
    frozen = cast("tuple[Any, ...] | Mapping[str, Any]", _frozen(args))
    return LayerSpec(index, tuple(listed), repeats, module, frozen, line, section)


def _frozen(value: object) -> object:
    """Convert lists to tuples and the strings None, True and False, as in YOLOv5 files, to their values."""
    if isinstance(value, Mapping):
        return {key: _frozen(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    return WORDS.get(value, value) if isinstance(value, str) else value


def _row_to_list(layer: LayerSpec) -> list[Any]:
    sources = layer.sources[0] if len(layer.sources) == 1 else list(layer.sources)
    return [sources, layer.repeats, layer.module, plain(layer.args)]


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
