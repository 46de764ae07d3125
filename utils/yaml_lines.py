"""YAML whose mappings and lists remember their line numbers, so that an error can say file:line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from utils.errors import ConfigError, UserError
from utils.files import atomic_path


class LineDict(dict[Any, Any]):
    """A dict with `.line` (1-based line where it begins) and `.lines[key]` (line of that key)."""

    line: int = 0
    lines: dict[Any, int]


class LineList(list[Any]):
    """A list with `.line` and `.lines[index]` (line of that item)."""

    line: int = 0
    lines: list[int]


class _Loader(yaml.SafeLoader):
    """Safe loader (plain values only) that builds LineDict and LineList."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> LineDict:
    out = LineDict()
    out.line, out.lines = node.start_mark.line + 1, {}
    loader.flatten_mapping(node)
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, (LineDict, LineList)):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a plain value", key_node.start_mark)
        if key in out.lines:
            raise yaml.constructor.ConstructorError(
                None, None, f"key '{key}' is given twice (first in line {out.lines[key]})", key_node.start_mark
            )
        out.lines[key] = key_node.start_mark.line + 1
        out[key] = loader.construct_object(value_node, deep=True)
    return out


def _sequence(loader: _Loader, node: yaml.SequenceNode) -> LineList:
    out = LineList(loader.construct_object(child, deep=True) for child in node.value)
    out.line, out.lines = node.start_mark.line + 1, [child.start_mark.line + 1 for child in node.value]
    return out


# YAML 1.1 takes 1e-5 for a text (it wants 1.0e-5); nobody who writes it in a configuration means that.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_SEQUENCE_TAG, _sequence)


def load_yaml(path: str | Path, error: type[UserError] = ConfigError) -> LineDict:
    """Read a YAML file whose top level is a mapping.

    Args:
        path: the file, UTF-8.
        error: the UserError subclass to raise.

    Raises:
        error: missing, empty or unreadable file, a syntax error or a key given twice (with file:line).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as cause:
        raise error(f"{path}: is not a text file in UTF-8 (byte {cause.start})") from cause
    except OSError as cause:
        raise error(f"{path}: cannot be read: {cause.strerror or cause}") from cause
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


def plain(value: Any) -> Any:
    """Return the data as plain dicts and lists without line numbers."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def dump_yaml(path: str | Path, data: Any) -> None:
    """Write plain data as YAML, keys in their order, atomically."""
    with atomic_path(path) as part:
        part.write_text(yaml.safe_dump(plain(data), sort_keys=False, allow_unicode=True), encoding="utf-8")
