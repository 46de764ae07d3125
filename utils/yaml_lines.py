"""YAML with line numbers of mappings and lists, so that errors can name file:line.

Plain scalars follow the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema): `no`, `12:30` and
`1_000` are strings. The source text of numbers and booleans is kept, for names and paths (`text_of`).
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import yaml

from utils.errors import ConfigError, UserError, shown
from utils.files import atomic_path, read_text

MAX_NODES = 200_000
"""Maximum number of values in a file; aliases count each time they are used."""

MAX_DEPTH = 50
"""Maximum nesting of mappings and lists."""

MAX_BYTES = 2**23
"""Maximum size of a file in bytes; the parser takes about a second per 2**20 bytes."""

MAX_DIGITS = 1000
"""Maximum characters of an integer; Python cannot print more than 4,300 decimal digits."""

YamlValue: TypeAlias = Any
"""A value of a YAML file: None, bool, int, float, str, LineList or LineDict; callers check the type."""

_TAG = "tag:yaml.org,2002:"
_ConstructorError = yaml.constructor.ConstructorError


class LineDict(dict[Any, Any]):
    """A dict with `.line` (1-based line where it begins), `.lines[key]` and `.texts[key]` (number as written)."""

    line: int = 0
    lines: dict[Any, int]
    texts: dict[Any, str]
    key_texts: dict[Any, str]


class LineList(list[Any]):
    """A list with `.line`, `.lines[index]` (line of that item) and `.texts[index]` (number as written)."""

    line: int = 0
    lines: list[int]
    texts: dict[Any, str]


class _Loader(yaml.SafeLoader):
    """Loader of the core schema's types that builds LineDict and LineList, with bounds on size and depth."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 -- PyYAML's name; filled below
    yaml_constructors = {}  # noqa: RUF012

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._nodes = self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node; refuse files with too many values or levels, and aliases that refer to a parent."""
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                raise yaml.composer.ComposerError(None, None, "an alias refers to a value that contains it", mark)
            self._count(self._sizes[id(node)], mark)
            return node
        before = self._nodes
        self._count(1, mark)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_DEPTH} levels of nesting", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._sizes[id(node)] = self._nodes - before
        return node

    def _count(self, nodes: int, mark: yaml.Mark) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_NODES} values (aliases count)", mark)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> LineDict:
    out = LineDict()
    if not isinstance(node, yaml.MappingNode):
        raise _ConstructorError(None, None, "a mapping is needed", node.start_mark)
    loader.flatten_mapping(node)
    out.line, out.lines, out.texts, out.key_texts = node.start_mark.line + 1, {}, {}, {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, (LineDict, LineList)):
            raise _ConstructorError(None, None, "a key must be a plain value", key_node.start_mark)
        if key in out.lines:
            problem = f"key {shown(key)} is given twice (first in line {out.lines[key]})"
            raise _ConstructorError(None, None, problem, key_node.start_mark)
        out.lines[key] = key_node.start_mark.line + 1
        out[key] = loader.construct_object(value_node, deep=True)
        _keep_text(out.texts, key, value_node)
        _keep_text(out.key_texts, key, key_node)
    return out


def _sequence(loader: _Loader, node: yaml.SequenceNode) -> LineList:
    if not isinstance(node, yaml.SequenceNode):
        raise _ConstructorError(None, None, "a list is needed", node.start_mark)
    out = LineList(loader.construct_object(child, deep=True) for child in node.value)
    out.line, out.lines = node.start_mark.line + 1, [child.start_mark.line + 1 for child in node.value]
    out.texts = {}
    for i, child in enumerate(node.value):
        _keep_text(out.texts, i, child)
    return out


def _keep_text(texts: dict[Any, str], key: object, node: yaml.Node) -> None:
    if node.tag in (f"{_TAG}int", f"{_TAG}float", f"{_TAG}bool"):
        texts[key] = node.value


_WORDS = {"true": True, "false": False}
_FLOATS = {".inf": float("inf"), "+.inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan")}


def _scalar(loader: _Loader, node: yaml.ScalarNode) -> object:
    text = loader.construct_scalar(node)
    kind = node.tag.removeprefix(_TAG)
    try:
        if kind == "null":
            return None
        if kind == "bool":
            return _WORDS[text.lower()]
        if kind == "int":
            if len(text) > MAX_DIGITS:
                raise ValueError
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        if kind == "float":
            return _FLOATS[text.lower()] if text.lower() in _FLOATS else float(text)
        text.encode()  # an escape may give a lone surrogate, which cannot be encoded
    except (KeyError, ValueError):
        raise _ConstructorError(None, None, f"{shown(text)} is not of type {kind}", node.start_mark) from None
    return text


def _unknown(_: _Loader, node: yaml.Node) -> NoReturn:
    raise _ConstructorError(None, None, f"tag {shown(node.tag)} is not allowed", node.start_mark)


for _kind, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    ("float", r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.[0-9]+[eE][-+]?[0-9]+)"
     r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", list("-+0123456789.")),
    ("merge", r"^(?:<<)$", ["<"]),
):  # fmt: skip
    _Loader.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(_pattern), _first)
for _kind in ("null", "bool", "int", "float", "str"):
    _Loader.add_constructor(f"{_TAG}{_kind}", _scalar)
_Loader.add_constructor(f"{_TAG}map", _mapping)
_Loader.add_constructor(f"{_TAG}seq", _sequence)
_Loader.add_constructor(None, _unknown)


def load_yaml(path: str | Path, error: type[UserError] = ConfigError) -> LineDict:
    """Read a YAML file whose top level is a mapping.

    Args:
        path: the file, UTF-8.
        error: the UserError subclass to raise.

    Raises:
        error: missing, empty or unreadable file, a syntax error, a key given twice or too many values, with file:line.
    """
    text = read_text(path, error, MAX_BYTES)
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as cause:
        mark = getattr(cause, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(cause, "problem", None) or str(cause).splitlines()[0]
        raise error(f"{where}: not valid YAML: {problem}") from cause
    if not isinstance(data, LineDict):
        what = "is empty" if data is None else f"holds a {type(data).__name__.replace('Line', '').lower()}"
        raise error(f"{path}: {what}; a mapping of 'key: value' lines is needed")
    return data


def text_of(container: LineDict | LineList, key: YamlValue) -> YamlValue:
    """Return a value that is used as a name: numbers and booleans as they were written (`02146`, `2.10`, `true`)."""
    return container.texts.get(key, container[key])


def key_text(container: LineDict, key: Hashable) -> str:
    """Return a key of a mapping as it was written."""
    return container.key_texts.get(key, str(key))


def plain(value: YamlValue) -> YamlValue:
    """Return the data as plain dicts and lists without line numbers."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


class _Dumper(yaml.SafeDumper):
    """Dumper that writes strings so that both versions of YAML read them as strings."""

    def ignore_aliases(self, _: object) -> bool:
        """Write repeated values in full."""
        return True


def _string(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    core = any(
        pattern.match(text)
        for tag, pattern in _Loader.yaml_implicit_resolvers.get(text[:1], [])
        if tag != f"{_TAG}merge"
    )
    return dumper.represent_scalar(f"{_TAG}str", text, style="'" if core else None)


_Dumper.add_representer(str, _string)


def dump_yaml(path: str | Path, data: object) -> None:
    """Write plain data as YAML, keys in their order, atomically."""
    with atomic_path(path) as part:
        text = yaml.dump(plain(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
        part.write_text(text, encoding="utf-8")
