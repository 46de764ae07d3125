"""Bind the arguments of YAML rows to constructor signatures with type checks; activations by name.

SpecErrors raised here have no location; `models.build.builder` prepends file, line and row.
"""

from __future__ import annotations

import copy
import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from utils.errors import SpecError, did_you_mean, shown

Arguments = dict[str, Any]
LARGEST = 16_384
"""Bound on numbers in rows, and on the resulting channels."""

LARGEST_KERNEL = 127
MAX_PARAMETERS = 10**9  # of one module
ACTIVATIONS: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        *(nn.SiLU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Mish, nn.GELU),
        *(nn.ELU, nn.CELU, nn.SELU, nn.Softplus, nn.Sigmoid, nn.Tanh, nn.Identity),
    )
}


def activation_from_text(text: str) -> nn.Module:
    """Build the activation described by a string such as `nn.LeakyReLU(0.1)`, without `eval`.

    Raises:
        SpecError: the string cannot be parsed, the name is unknown, or an argument is not accepted.
    """
    match = re.fullmatch(r"\s*(?:torch\.)?(?:nn\.)?(\w+)\s*(?:\((.*)\))?\s*", text)
    if not match or match[1] not in ACTIVATIONS:
        near = did_you_mean(match[1] if match else text, ACTIVATIONS)
        names = ", ".join(ACTIVATIONS)
        raise SpecError(f"unknown activation '{text}'; allowed: {names}, as in nn.LeakyReLU(0.1){near}")
    args: list[float | bool] = []
    named: dict[str, float | bool] = {}
    for part in filter(None, (piece.strip() for piece in (match[2] or "").split(","))):
        name, equals, value = part.rpartition("=")
        if equals:
            named[name.strip()] = _number(value, text)
        else:
            args.append(_number(value, text))
    try:
        activation = ACTIVATIONS[match[1]](*args, **named)
    except (TypeError, ValueError) as error:
        raise SpecError(f"activation '{text}' cannot be built: {error}") from error
    # The output of the norm has no other reader. In training autograd would copy it for these, see `fuse_conv_bn`.
    if hasattr(activation, "inplace") and not isinstance(activation, (nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Mish)):
        setattr(activation, "inplace", True)  # noqa: B010
    return activation


def _number(text: str, activation: str) -> float | bool:
    if text.strip() in ("True", "False"):
        return text.strip() == "True"
    try:
        return float(text)
    except ValueError as error:
        raise SpecError(f"activation '{activation}' has the argument '{text.strip()}'; numbers are allowed") from error


# ---- constructor signatures -----------------------------------------------------------------------------------------


def parameters(layer: type[nn.Module]) -> tuple[tuple[inspect.Parameter, Any], ...]:
    """Return the constructor parameters except `self`, with resolved annotations."""
    constructor = layer.__init__
    hints = typing.get_type_hints(constructor)
    parameters = list(inspect.signature(constructor).parameters.values())[1:]
    return tuple((p, hints.get(p.name, Any)) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def bind(layer: type[nn.Module], args: Sequence[Any], given: Sequence[int] = ()) -> Arguments:
    """Bind positional arguments to the constructor parameters, including defaults, and check their types.

    Args:
        layer: class to construct.
        args: arguments of the row.
        given: positions of constructor parameters that are set by the builder and absent from the row.

    Raises:
        SpecError: the number or the type of the arguments does not match.
    """
    own = [parameter for i, parameter in enumerate(parameters(layer)) if i not in given]
    if len(args) > len(own):
        raise SpecError(f"{len(args)} arguments are given; it takes {_signature(own)}")
    bound: Arguments = {}
    for i, (parameter, hint) in enumerate(own):
        if i >= len(args):
            if parameter.default is inspect.Parameter.empty:
                raise SpecError(f"argument {i + 1} ({parameter.name}) is missing; it takes {_signature(own)}")
            bound[parameter.name] = parameter.default
        else:
            bound[parameter.name] = _converted(args[i], hint, f"argument {i + 1} ({parameter.name})")
    return bound


def _signature(own: Sequence[tuple[inspect.Parameter, Any]]) -> str:
    empty = inspect.Parameter.empty
    return "[" + ", ".join(p.name if p.default is empty else f"{p.name}={p.default}" for p, _ in own) + "]"


def _converted(value: object, hint: object, what: str) -> object:
    if isinstance(value, str) and nn.Module in _choices(hint):
        return activation_from_text(value)
    check_type(value, hint, what)
    numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, (int, float))]
    limit = LARGEST_KERNEL if what.endswith(("(k)", "(kernel_size)", "(s)", "(stride)", "(scale_factor)")) else LARGEST
    if any(not abs(number) <= limit for number in numbers):  # rejects NaN, too
        raise SpecError(f"{what} is {shown(value)}; allowed: numbers up to {limit}")
    return value


def check_type(value: object, hint: object, what: str) -> None:
    """Raise SpecError, naming `what`, unless `value` has the annotated type `hint`."""
    if not _fits(value, hint):
        found = shown(list(value) if isinstance(value, tuple) else value)
        raise SpecError(f"{what} is {found}; allowed: {' or '.join(dict.fromkeys(map(_type_name, _choices(hint))))}")


def _choices(hint: object) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _fits(value: object, hint: object) -> bool:
    for choice in _choices(hint):
        members = typing.get_args(choice)
        if choice is Any or choice is object:
            return True
        if choice is bool:
            fits = isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))
        elif choice is int:
            fits = isinstance(value, int) and not isinstance(value, bool)
        elif choice is float:
            fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        elif typing.get_origin(choice) is tuple:
            many = len(members) == 2 and members[1] is Ellipsis
            items = value if isinstance(value, tuple) else ()
            fits = len(items) > 0 and (many or len(items) == len(members))
            fits = fits and all(_fits(item, members[0 if many else i]) for i, item in enumerate(items))
        elif typing.get_origin(choice) is Sequence:
            fits = isinstance(value, (list, tuple)) and all(_fits(item, members[0]) for item in value)
        elif typing.get_origin(choice) is Mapping:
            fits = isinstance(value, Mapping)
        elif typing.get_origin(choice) is typing.Literal:
            fits = value in members
        else:
            fits = isinstance(choice, type) and isinstance(value, choice)
        if fits:
            return True
    return False


def _type_name(choice: object) -> str:
    members = typing.get_args(choice)
    if typing.get_origin(choice) is tuple:
        size = "" if Ellipsis in members else f"{len(members)} "
        return f"a list of {size}numbers"
    if typing.get_origin(choice) is Sequence:
        return "a list of numbers" if set(members) & {int, float} else "a list"
    if typing.get_origin(choice) is Mapping:
        return "a mapping"
    if typing.get_origin(choice) is typing.Literal:
        return ", ".join(map(str, members))
    names: dict[object, str] = {
        int: "an integer",
        float: "a number",
        bool: "True or False",
        str: "a string",
        nn.Module: "an activation",
    }
    return "None" if choice is type(None) else names.get(choice, getattr(choice, "__name__", str(choice)))


def construct(layer: type[nn.Module], bound: Arguments) -> nn.Module:
    """Construct the layer with the arguments in `bound`.

    Raises:
        SpecError: the constructor raises an error.
    """
    # Copy modules (activations), so that repeats do not share them.
    values = {k: copy.deepcopy(v) if isinstance(v, nn.Module) else v for k, v in bound.items()}
    try:
        with torch.device("meta"):  # no memory is used
            size = sum(p.numel() for p in layer(**values).parameters())
        if size > MAX_PARAMETERS:
            raise SpecError(f"has {size / 1e9:.1f} billion parameters; allowed: {MAX_PARAMETERS / 1e9:g} billion")
        return layer(**values)
    except SpecError:
        raise
    except (TypeError, ValueError, RuntimeError, ArithmeticError, AssertionError) as error:  # the last: attention
        reason = str(error).splitlines()[0]
        raise SpecError(f"cannot be built with {_plain(tuple(values.values()))}: {reason}") from error


def _plain(values: Sequence[Any]) -> list[Any]:
    return [list(v) if isinstance(v, tuple) else v for v in values]
