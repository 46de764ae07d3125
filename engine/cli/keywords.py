"""Conversion of keywords to the types that a command line gives. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field
from numbers import Integral, Real
from typing import Any

from utils.errors import ConfigError

WORDS: Mapping[Any, str] = {int: "an integer", float: "a number", str: "a string or a path", bool: "True or False"}


def settled(options: Iterable[Field[Any]], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Convert keywords to the types of the fields of an option dataclass.

    A single value becomes a list of one, and a tuple a list. A path, integer or device becomes a string where one is
    expected (`device=0`, `freeze=[10]`). NumPy's numbers are numbers. `True` means the option without a value
    (`cache=True`), None its default.

    Args:
        options: fields of the dataclass, made by `engine.cli.config.option`.
        keywords: values by field name; unknown names are not allowed.

    Raises:
        ConfigError: values of another type, all in one message.
    """
    known = {f.name: f for f in options}
    out, problems = {}, []
    for name, value in keywords.items():
        try:
            out[name] = _settled(known[name], value)
        except TypeError as error:
            problems.append(f"{name}={value!r}: {error}")
    if problems:
        raise ConfigError("; ".join(problems))
    return out


def _settled(f: Field[Any], value: object) -> object:
    default = f.default if f.default is not MISSING else f.default_factory()  # type: ignore[operator]
    form, kind = f.metadata.get("form"), f.metadata["kind"]
    if value is None or (form == "optional" and value is False):
        return default
    if form == "optional" and value is True:
        return f.metadata["const"]
    if form == "many":
        return [_one(kind, item) for item in (value if isinstance(value, (list, tuple)) else [value])]
    return _one(kind, value)


def _one(kind: Callable[[Any], Any], value: object) -> object:
    """Return a single value converted to its type, or raise TypeError."""
    number = value if isinstance(value, Real) and not isinstance(value, bool) else None  # NumPy's numbers, too
    if kind is bool and isinstance(value, bool):
        return value
    if kind is float and number is not None:
        return float(number)
    if kind is int and isinstance(number, Integral):
        return int(number)
    if kind is int and number is not None and float(number).is_integer():
        return int(float(number))
    if kind is str and (isinstance(value, (str, os.PathLike, Integral)) and not isinstance(value, bool)):
        return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
    if kind is str and type(value).__name__ == "device":  # a torch.device; torch is not imported
        return str(value)
    if not isinstance(kind, type) and (number is not None or isinstance(value, str)):
        with suppress(ValueError):
            return kind(value)
    raise TypeError(f"{WORDS.get(kind, kind.__name__)} is needed")
