"""The table of backbones, and the one place where a name becomes a backbone.

`BACKBONES` is the whole list: name -> class, arguments. Class files are imported when a backbone of theirs is built.
"""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, TypeVar, overload

from torch import nn

from models.arguments import check_type
from models.backbones.base import Backbone, FeatureLevel
from models.backbones.layers import find_architecture
from utils.errors import SpecError, did_you_mean

__all__ = [
    "BACKBONES",
    "ROW_CLASSES",
    "Backbone",
    "BackboneEntry",
    "FeatureLevel",
    "arguments_with_weights",
    "arguments_without_weights",
    "backbone_class",
    "backbone_from_row",
    "create_backbone",
    "is_backbone_name",
    "list_backbones",
    "named_arguments",
    "register_backbone",
    "register_plain",
    "row_names",
]

TIMM_PREFIX = "timm/"
WEIGHT_ARGUMENTS = ("weights", "pretrained")
BackboneClass = TypeVar("BackboneClass", bound=type[Backbone])


@dataclass(frozen=True)
class BackboneEntry:
    """One row of the table.

    Attributes:
        target: where the class is, `"module:Class"`, or the class itself for one that a plugin registered.
        arguments: arguments of the named architecture; a user's arguments override them.
    """

    target: str | type[Backbone]
    arguments: Mapping[str, Any] = field(default_factory=dict)


RIFORMER = "models.backbones.riformer:RIFormer"
REVVIT = "models.backbones.revvit:RevViT"
REPMLP = "models.backbones.repmlp:RepMLPNet"
NEXTVIT = "models.backbones.nextvit:NextViT"
TIMM = "models.backbones.timm_backbone:TimmBackbone"

BACKBONES: dict[str, BackboneEntry] = {
    "riformer_s12": BackboneEntry(RIFORMER, {"arch": "s12"}),
    "riformer_s24": BackboneEntry(RIFORMER, {"arch": "s24"}),
    "riformer_s36": BackboneEntry(RIFORMER, {"arch": "s36"}),
    "riformer_m36": BackboneEntry(RIFORMER, {"arch": "m36"}),
    "riformer_m48": BackboneEntry(RIFORMER, {"arch": "m48"}),
    "revvit_small": BackboneEntry(REVVIT, {"arch": "deit-small"}),
    "revvit_base": BackboneEntry(REVVIT, {"arch": "deit-base"}),
    "repmlp_t224": BackboneEntry(REPMLP, {"arch": "t224"}),
    "repmlp_b224": BackboneEntry(REPMLP, {"arch": "b224"}),
    "repmlp_t256": BackboneEntry(REPMLP, {"arch": "t256"}),
    "repmlp_b256": BackboneEntry(REPMLP, {"arch": "b256"}),
    "repmlp_d256": BackboneEntry(REPMLP, {"arch": "d256"}),
    "repmlp_l256": BackboneEntry(REPMLP, {"arch": "l256"}),
    "nextvit_small": BackboneEntry(NEXTVIT, {"arch": "small"}),
    "nextvit_base": BackboneEntry(NEXTVIT, {"arch": "base"}),
    "nextvit_large": BackboneEntry(NEXTVIT, {"arch": "large"}),
}

# Class names as model rows: [-1, 1, RIFormer, [s24]]. Without arguments the class's own default architecture.
ROW_CLASSES: dict[str, BackboneEntry] = {
    "RIFormer": BackboneEntry(RIFORMER),
    "RevViT": BackboneEntry(REVVIT),
    "RevVisionTransformer": BackboneEntry(REVVIT, {"arch": "base"}),  # published name and default architecture
    "RepMLPNet": BackboneEntry(REPMLP),
    "NextViT": BackboneEntry(NEXTVIT),
}

ADAPTER = "models.backbones.adapter:AdaptedBackbone"

_PLUGINS: dict[str, BackboneEntry] = {}
_PLAIN: dict[str, BackboneEntry] = {}  # classes and functions of plug-in files that are not registered


def list_backbones() -> list[str]:
    """Return the registered names: built-in ones in the order of the table, then those of plug-ins.

    timm's names are not listed; any of them works as `timm/<name>`.
    """
    return [*BACKBONES, *_PLUGINS]


@overload
def register_backbone(name: str) -> Callable[[BackboneClass], BackboneClass]: ...
@overload
def register_backbone(name: BackboneClass) -> BackboneClass: ...
def register_backbone(name: Any) -> Any:
    """Register a backbone of your own under a name for model YAMLs (class decorator).

    Use it bare (under the class name) or with a name: `@register_backbone("my_backbone")`.

    Raises:
        SpecError: the name is taken, or the class is not a `Backbone`.
    """
    if isinstance(name, type):
        return _register(name.__name__, name)
    return lambda cls: _register(name, cls)


def _register(name: str, cls: object) -> type[Backbone]:
    if not (isinstance(cls, type) and issubclass(cls, Backbone)):
        raise SpecError(f"backbone '{name}': {cls!r} is not a subclass of models.backbones.Backbone")
    known = _PLUGINS.get(name)
    same = known is not None and isinstance(known.target, type) and known.target.__qualname__ == cls.__qualname__
    if name in BACKBONES or name in ROW_CLASSES or (known is not None and not same):
        raise SpecError(f"backbone '{name}' is registered already; choose another name")
    _PLUGINS[name] = BackboneEntry(cls)  # the same class again: its file was loaded twice
    return cls


def register_plain(module: ModuleType) -> None:
    """Make the plain `nn.Module` classes, and functions, of a plug-in file available to model rows by their names."""
    for name, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
        is_class = isinstance(value, type) and issubclass(value, nn.Module) and not issubclass(value, Backbone)
        if own and name not in _PLUGINS and (is_class or isinstance(value, FunctionType)):
            _PLAIN[name] = BackboneEntry(ADAPTER, {"factory": value})


def row_names(like: str = "") -> list[str]:
    """Return the names allowed in a model row: classes, registered names, and timm's if `like` may be one."""
    names = [*ROW_CLASSES, *list_backbones(), *_PLAIN]
    if like.islower() and not like.startswith("nn."):
        try:
            from models.backbones.timm_measure import timm_package

            names += timm_package().list_models()
        except SpecError:  # timm is not installed
            return names
    return names


def is_plugin_name(name: str) -> bool:
    """Return whether a class, function or registered backbone of a plug-in file has this name."""
    return name in _PLUGINS or name in _PLAIN


def is_backbone_name(name: str) -> bool:
    """Return whether a model row of this name is a backbone.

    That is a registered name, a class name, `timm/...`, or exactly a name that timm has. A misspelled name is not, so
    that its own error is shown.
    """
    if name.startswith(TIMM_PREFIX) or _registered(name) is not None:
        return True
    # timm's names are lower case; so a misspelled layer ('C33') does not cost the import of timm.
    if not name.islower() or name.startswith("nn."):
        return False
    return _is_timm_name(name)


def _is_timm_name(name: str) -> bool:
    try:
        from models.backbones.timm_measure import is_timm_name
    except ImportError:
        return False
    return is_timm_name(name)


def backbone_class(name: str) -> type[Backbone]:
    """Import and return the class of a name.

    Raises:
        SpecError: unknown name; the nearest one is suggested.
    """
    return _class_of(_entry(name))


def named_arguments(name: str) -> Mapping[str, Any]:
    """Return the arguments that a registered name stands for, such as {"arch": "m36"}.

    Raises:
        SpecError: unknown name; the nearest one is suggested.
    """
    return _entry(name).arguments


def _registered(name: str) -> BackboneEntry | None:
    """Return the entry of a registered or class name; built-in names ignore case."""
    if name in _PLUGINS:
        return _PLUGINS[name]
    lower = name.lower()
    built_in = next((entry for key, entry in {**BACKBONES, **ROW_CLASSES}.items() if key.lower() == lower), None)
    if built_in is not None and name in _PLAIN:
        raise SpecError(f"'{name}' is a built-in backbone, and a class of a plug-in file; rename the latter")
    return built_in or _PLAIN.get(name)


def _entry(name: str) -> BackboneEntry:
    known_entry = _registered(name)
    if known_entry is not None:
        return known_entry
    if is_backbone_name(name):
        return BackboneEntry(TIMM, {"name": name.removeprefix(TIMM_PREFIX)})
    known = row_names()
    near = did_you_mean(name, row_names(name))
    raise SpecError(f"unknown backbone '{name}'; allowed: {', '.join(known)}, or timm/<name>{near}")


def _class_of(entry: BackboneEntry) -> type[Backbone]:
    if not isinstance(entry.target, str):
        return entry.target
    module, _, cls = entry.target.partition(":")
    return getattr(importlib.import_module(module), cls)


def create_backbone(
    name: str, weights: str | Path | bool | None = None, *, partial_weights: bool = False, **arguments: Any
) -> Backbone:
    """Build a backbone by name.

    Args:
        name: a registered name (`riformer_s12`), a class name (`RIFormer`), a plugin's, `timm/<name>`, or a timm name.
        weights: None, False or "" for random weights; True for the default published weights; or a published name, a
            path, a URL. What was loaded is logged; less than 90 % is an error. Only rank zero loads.
        partial_weights: accept a file that fits only in part.
        arguments: of the class; they override those of the entry.

    Raises:
        SpecError: if a name or argument is unknown, or a value is not allowed.
        CheckpointError: if the weights are not available or do not fit.
    """
    entry = _entry(name)
    cls = _class_of(entry)
    arguments = _own_names(name, cls, arguments)
    _check_arguments(name, cls, arguments)
    given = {**entry.arguments, **arguments}
    if entry.target == TIMM and weights is True:
        return cls(**{**given, "pretrained": True})
    backbone = cls(**given)
    _check_declaration(name, backbone)
    if weights not in (None, False, ""):
        from models.backbones.published import load_published

        load_published(backbone, weights, _published_key(name, entry, cls, given), partial=partial_weights)
    return backbone


def _check_declaration(name: str, backbone: Backbone) -> None:
    """Raise SpecError if a class (usually a plug-in's) violates the contract."""
    levels = getattr(backbone, "levels", None)
    form = "levels = (FeatureLevel(channels, stride), ...), high resolution first"
    if not isinstance(levels, tuple) or not levels or not all(isinstance(level, FeatureLevel) for level in levels):
        raise SpecError(f"{name}: its levels are {levels!r}; a backbone declares {form}")
    strides = [level.stride for level in levels]
    if any(not isinstance(s, int) or s < 1 or s & (s - 1) for s in strides) or strides != sorted(set(strides)):
        raise SpecError(f"{name}: its strides are {strides}; increasing powers of two are needed: {form}")
    if not isinstance(backbone.size_divisor, int) or backbone.size_divisor % strides[-1]:
        raise SpecError(
            f"{name}: its size_divisor is {backbone.size_divisor!r}; a multiple of its largest stride {strides[-1]} is "
            "needed"
        )
    cls = type(backbone)
    if cls.forward is Backbone.forward and cls.forward_features is Backbone.forward_features:
        raise SpecError(f"{name}: it defines neither forward_features(image) nor forward(image); one is needed")


def _published_key(name: str, entry: BackboneEntry, cls: type[Backbone], given: Mapping[str, Any]) -> str | None:
    """Return the registered name of the built architecture for its published weights; None for a custom one."""
    if entry.target in (TIMM, ADAPTER) or name in _PLUGINS:
        return name
    known = importlib.import_module(cls.__module__).ARCHITECTURES
    arch = given.get("arch", inspect.signature(cls).parameters["arch"].default)
    built = find_architecture(arch, known) if isinstance(arch, str) else None
    for key, row in BACKBONES.items():
        if row.target == entry.target and built is not None and known[row.arguments["arch"]] == built:
            return key
    return None


def _own_names(name: str, cls: type[Backbone], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Translate argument names of the published class.

    Raises:
        SpecError: an argument without meaning here, or one given under two names.
    """
    own: dict[str, Any] = {}
    for key, value in arguments.items():
        if key in cls.REFUSED and not value:
            continue  # the published default
        if key in cls.REFUSED:
            raise SpecError(f"{name}: argument '{key}' is not supported: {cls.REFUSED[key]}")
        target = cls.ALIASES.get(key, key)
        if target in own:
            raise SpecError(f"{name}: '{key}' and another argument both set '{target}'")
        own[target] = value
    return own


def _check_arguments(name: str, cls: type[Backbone], arguments: Mapping[str, Any]) -> None:
    parameters = inspect.signature(cls).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    try:
        hints = typing.get_type_hints(cls.__init__)
    except NameError:  # a plugin's annotation that only its type checker can resolve
        hints = {}
    for key, value in arguments.items():
        check_type(value, hints.get(key, Any), f"{name}: {key}")
        if key not in parameters:
            allowed = ["weights", "partial_weights", *parameters, *cls.ALIASES]
            raise SpecError(
                f"{name}: unknown argument '{key}'; allowed: {', '.join(allowed)}{did_you_mean(key, allowed)}"
            )


def backbone_from_row(
    name: str, args: Sequence[Any] | Mapping[str, Any], source: FeatureLevel | None = None
) -> Backbone:
    """Build the backbone of a model row `[-1, 1, name, args]`.

    Args:
        name: see `create_backbone`.
        args: a mapping of arguments, `weights` among them; or a list of: the name of the architecture (`s12`) and,
            after it, weights (a path, URL or published name); True, False or the string `pretrained` (whether to load
            the published weights); and a mapping of arguments. An empty list or `['']` means the default architecture
            with random weights. A plain class or function of a plug-in file gets the list as positional arguments.
        source: level that the row reads, if that is not an RGB image: its channels become `in_channels`, and features
            are not normalized.

    Raises:
        SpecError, CheckpointError: see `create_backbone`.
    """
    if source is not None and "in_channels" not in inspect.signature(backbone_class(name)).parameters:
        raise SpecError(f"{name} takes RGB images; it has no argument in_channels for {source.channels} channels")
    if name in _PLAIN and not isinstance(args, Mapping):
        args = _plain_arguments(args)
    arguments: dict[str, Any] = {}
    if source is not None:
        arguments = {"in_channels": source.channels} | ({"normalize": False} if source.stride > 1 else {})
    for arg in [args] if isinstance(args, Mapping) else args:
        for key, value in _row_argument(name, arg, "arch" in arguments).items():
            if key in arguments:
                raise SpecError(f"{name}: '{key}' is given twice: {arguments[key]!r} and {value!r}")
            arguments[key] = value
    if "pretrained" in arguments:  # timm's name for it
        arguments.setdefault("weights", bool(arguments.pop("pretrained")))
    weights = arguments.pop("weights", None)
    return create_backbone(name, weights, **arguments)


def _row_argument(name: str, arg: object, has_arch: bool) -> dict[str, Any]:
    if isinstance(arg, Mapping):
        unfit = [key for key in arg if not isinstance(key, str) or key in ("name", "self")]
        if unfit:
            raise SpecError(f"{name}: {unfit[0]!r} is not the name of an argument")
        return dict(arg)
    if arg is None:
        return {}
    if isinstance(arg, bool) or arg == "pretrained":
        return {"weights": bool(arg)}
    if arg == "":
        return {"weights": None}
    is_class = name.lower() in {key.lower() for key in ROW_CLASSES}
    if isinstance(arg, str) and is_class:
        known = getattr(importlib.import_module(backbone_class(name).__module__), "ARCHITECTURES", {})
        return {"weights": arg} if has_arch and find_architecture(arg, known) is None else {"arch": arg}
    if isinstance(arg, str) and name not in _PLUGINS:
        raise SpecError(
            f"{name}: argument '{arg}' is not allowed, the name says the architecture; allowed: pretrained, True, "
            f"False, or a mapping such as {{weights: {arg}}}"
        )
    raise SpecError(
        f"{name}: argument {arg!r} is not allowed; allowed: an architecture's name, pretrained, True, False, or a "
        "mapping such as {arch: s12, weights: path}"
    )


def arguments_without_weights(name: str, args: Sequence[Any] | Mapping[str, Any]) -> list[Any] | dict[str, Any]:
    """Return the arguments of a model row without its request for pretrained weights.

    Args:
        name: of a backbone, see `create_backbone`.
        args: see `backbone_from_row`. Of the positional arguments of a plain class or function, those of parameters
            named `weights` or `pretrained` become False.

    Raises:
        SpecError: an argument that is not allowed.
    """
    if isinstance(args, Mapping):
        return {key: value for key, value in args.items() if key not in WEIGHT_ARGUMENTS}
    if name in _PLAIN:
        parameters = list(inspect.signature(_PLAIN[name].arguments["factory"]).parameters)
        unset = {i for i, parameter in enumerate(parameters) if parameter in WEIGHT_ARGUMENTS}
        return [False if i in unset else arg for i, arg in enumerate(args)]
    kept: list[Any] = []
    has_arch = False
    for arg in args:
        meaning = _row_argument(name, arg, has_arch)
        has_arch |= "arch" in meaning
        if isinstance(arg, Mapping):
            kept.append(arguments_without_weights(name, arg))
        elif "weights" not in meaning:
            kept.append(arg)
    return kept


def arguments_with_weights(
    name: str, args: Sequence[Any] | Mapping[str, Any], weights: str
) -> tuple[Any, ...] | dict[str, Any]:
    """Return the arguments of a model row with `weights` in place of those that it requests.

    Raises:
        SpecError: an argument that is not allowed.
    """
    kept = arguments_without_weights(name, args)
    if name in _PLAIN and not isinstance(kept, dict):
        kept = _plain_arguments(kept)
    return {**kept, "weights": weights} if isinstance(kept, dict) else (*kept, {"weights": weights})


def _plain_arguments(args: Sequence[Any]) -> dict[str, Any]:
    """Return the positional arguments of a plain class or function of a plug-in file by name."""
    return {"args": () if list(args) in ([False], [""], [None]) else tuple(args)}
