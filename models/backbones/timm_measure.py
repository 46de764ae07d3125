"""Measure the feature maps of a timm network on shapes alone.

The network is built without memory (device `meta`) and run on shapes, so no BatchNorm statistics move and no weights
are needed. This gives the stride and the layout of each map, the arguments that free a network from its native input
size, and the sizes that it takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import nn

from utils.errors import SpecError, did_you_mean

SHRINK = 7 / 8
FREEING_ARGUMENTS: tuple[dict[str, bool], ...] = (
    {},
    {"strict_img_size": False, "always_partition": True},
    {"dynamic_img_size": True},
    {"strict_img_size": False},
)

# Exceptions of networks that cannot be built or run this way; the next way is then tried.
PROBE_ERRORS = (
    RuntimeError,
    AssertionError,
    TypeError,
    ValueError,
    IndexError,
    KeyError,
    AttributeError,
    NotImplementedError,
)


@dataclass(frozen=True)
class Measured:
    """Feature maps of a timm network, and the inputs it takes.

    Attributes:
        arguments: constructor arguments that free the input size, as sorted pairs.
        indices: index of each map among all that timm can return (it counts every block of a plain transformer).
        channels, strides: per map, in timm's order; strides in pixels of the image that the detector sees.
        channels_last: whether maps come as (B, H, W, C).
        size_divisor: sides the network takes are multiples of it.
        tile: side of the only input it takes, 0 where it takes any multiple of `size_divisor`.
        shrink: factor on the image's sides before the network.
    """

    arguments: tuple[tuple[str, Any], ...]
    indices: tuple[int, ...]
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    channels_last: bool
    size_divisor: int
    tile: int
    shrink: float


# ---- names ----------------------------------------------------------------------------------------------------------


def timm_package() -> ModuleType:
    """Import timm, or raise SpecError with the pip command."""
    try:
        import timm
    except ImportError as error:
        raise SpecError("timm/...: needs the package timm: pip install timm") from error
    return timm


def is_timm_name(name: str) -> bool:
    """Return whether timm has exactly this name, with or without a tag of pretrained weights (`resnet50.a1_in1k`)."""
    try:
        import timm
    except ImportError:
        return False
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        return False
    return not tag or name in timm.list_models(f"{architecture}.*", pretrained=True)


def _check_name(name: str) -> None:
    if is_timm_name(name):
        return
    timm = timm_package()
    architecture, _, tag = name.partition(".")
    if timm.is_model(architecture):
        tags = [full.partition(".")[2] for full in timm.list_models(f"{architecture}.*", pretrained=True)]
        raise SpecError(
            f"timm/{name}: {architecture} has no weights tagged '{tag}'; allowed: {', '.join(tags) or 'no tag'}"
            f"{did_you_mean(tag, tags)}"
        )
    near = did_you_mean(architecture, timm.list_models())
    raise SpecError(f"timm/{name}: timm {timm.__version__} has no model of this name{near}")


# ---- measuring ------------------------------------------------------------------------------------------------------


def create_features(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Create timm's network as a feature extractor."""
    return timm_package().create_model(name, features_only=True, **arguments)


class _Probe:
    """A network in evaluation mode that returns the shapes of its maps.

    It has no memory (device `meta`), except for the few networks that read values while they are built or run: those
    are built in full. The random state does not change.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any], device: str) -> None:
        self.device = device
        with torch.random.fork_rng(devices=[]), torch.device(device):
            self.network = create_features(name, arguments).eval()
        info: Any = self.network.feature_info
        self.indices: tuple[int, ...] = tuple(info.out_indices)
        self.channels: tuple[int, ...] = tuple(info.channels())
        self.reduction: tuple[int, ...] = tuple(info.reduction())

    def shapes(self, height: int, width: int) -> list[tuple[int, ...]]:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return [tuple(x.shape) for x in self.network(torch.zeros(1, 3, height, width, device=self.device))]

    def is_channels_last(self, shapes: Sequence[tuple[int, ...]]) -> bool:
        first = all(shape[1] == c for shape, c in zip(shapes, self.channels))
        last = all(shape[3] == c for shape, c in zip(shapes, self.channels))
        if not first and not last:
            raise ValueError(f"maps of shapes {shapes} do not have the declared channels {self.channels}")
        return last and (not first or "NHWC" in str(getattr(self.network, "output_fmt", "")))

    def unused(self, height: int, width: int) -> frozenset[str]:
        """Return the names of the parameters that no map depends on."""
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            maps = self.network(torch.zeros(1, 3, height, width, device=self.device))
            torch.stack([x.sum() for x in maps]).sum().backward()
        return frozenset(name for name, p in self.network.named_parameters() if p.grad is None)


def _stride(side: tuple[int, int], map_side: tuple[int, int], declared: float) -> int:
    """Return the input pixels per cell as a power of two.

    Networks with unpadded convolutions lose their border, so that a small map is shorter than its stride implies; there
    timm's declaration is used, if it is within half an octave of the measured stride.
    """
    rows, columns = (math.log2(s / m) for s, m in zip(side, map_side))
    exponent = round(math.log2(declared))
    if abs(math.log2(declared) - exponent) > 0.01 or max(abs(rows - exponent), abs(columns - exponent)) > 0.5:
        exponent = round((rows + columns) / 2)
    if max(abs(rows - exponent), abs(columns - exponent)) > 0.5:
        raise ValueError(f"strides of {2**rows:.1f} and {2**columns:.1f} pixels are no power of two")
    return 2**exponent


@dataclass(frozen=True)
class _Way:
    """One way to build and feed a network: arguments, sides to try (as the network sees them), sides it then takes."""

    arguments: dict[str, Any]
    sizes: tuple[tuple[int, int], ...]
    divisor: int = 32
    tile: int = 0


def _try(name: str, way: _Way, device: str = "meta") -> Measured:
    """Measure on all sizes; one of PROBE_ERRORS if the network cannot take one of them."""
    probe = _Probe(name, way.arguments, device)
    shrink = SHRINK if all(r % 7 == 0 for r in probe.reduction) else 1.0
    if way.divisor != 32 and way.divisor / shrink % 32:
        raise ValueError(f"takes images of {way.divisor} pixels only, no multiple of 32")
    found: set[tuple[int, ...]] = set()
    for size in way.sizes:
        fed = size if way.divisor != 32 else (int(size[0] * shrink), int(size[1] * shrink))
        seen = (int(fed[0] / shrink), int(fed[1] / shrink))
        shapes = probe.shapes(*fed)
        last = probe.is_channels_last(shapes)
        sides = [(s[1], s[2]) if last else (s[2], s[3]) for s in shapes]
        found.add(tuple(_stride(seen, side, r / shrink) for side, r in zip(sides, probe.reduction)))
    if len(found) != 1:
        raise ValueError(f"strides depend on the input size: {sorted(found)}")
    return Measured(
        arguments=tuple(sorted(way.arguments.items())),
        indices=probe.indices,
        channels=probe.channels,
        strides=found.pop(),
        channels_last=last,
        size_divisor=int(way.divisor / shrink) if way.divisor != 32 else 32,
        tile=int(way.tile / shrink),
        shrink=shrink,
    )


def _ways(name: str, user: dict[str, Any]) -> list[_Way]:
    """Return the ways to try, the least restrictive first."""
    config = timm_package().models.get_pretrained_cfg(name)
    native = max(config.input_size[-2:]) if config is not None else 224
    given = user.get("img_size", native)
    side = max(given) if isinstance(given, (list, tuple)) else int(given)
    free = ((256, 320), (384, 256))
    ways = [_Way({**arguments, **user}, free) for arguments in FREEING_ARGUMENTS]
    ways += [_Way(user, ((side, 2 * side), (2 * side, side)), side), _Way(user, ((side, side),), side, side)]
    if side % 32:
        side += -side % 32
        ways.append(_Way({**user, "img_size": side}, ((side, side),), side, side))
    return ways


def _is_fixed(name: str) -> bool:
    """Return whether timm declares that the network takes its native size only."""
    config = timm_package().models.get_pretrained_cfg(name)
    return config is not None and config.fixed_input_size


@lru_cache(maxsize=64)
def _measure(name: str, user_items: tuple[tuple[str, Any], ...]) -> Measured:
    problems: list[str] = []
    user = dict(user_items)
    for way in _ways(name, user):
        for device in ("meta", "cpu"):
            try:
                measured = _try(name, way, device)
                if way.arguments == user and not way.tile and _is_fixed(name):
                    # It should not have taken these sizes. A look-up beyond a table's end fails on real values only.
                    _try(name, way, "cpu")
                return measured
            except PROBE_ERRORS as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                if any(f"unexpected keyword argument '{key}'" in reason for key in user):
                    raise SpecError(f"timm/{name}: {reason}") from error
                problems.append(reason)
                if "meta" not in reason:
                    break
    reasons = "; ".join(dict.fromkeys([problems[0], problems[-1]]))
    raise SpecError(f"timm/{name}: gives no feature maps that a detector can use ({reasons})")


def measure(name: str, model_args: Mapping[str, Any] | None = None) -> Measured:
    """Measure the feature maps of a timm network on the meta device.

    Args:
        name: timm's name.
        model_args: further arguments of timm's constructor.

    Raises:
        SpecError: unknown name, or no feature maps with strides that are powers of two.
    """
    _check_name(name)
    items = {k: tuple(v) if isinstance(v, list) else v for k, v in (model_args or {}).items()}
    return _measure(name, tuple(sorted(items.items())))


@lru_cache(maxsize=64)
def _unused(name: str, items: tuple[tuple[str, Any], ...], side: int) -> frozenset[str]:
    for device in ("meta", "cpu"):
        try:
            return _Probe(name, dict(items), device).unused(side, side)
        except PROBE_ERRORS as error:
            if "meta" not in str(error):
                break
    return frozenset()


def unused_parameters(name: str, arguments: Mapping[str, Any], measured: Measured) -> frozenset[str]:
    """Return the parameters that none of the maps depends on: the tail that some of timm's extractors keep.

    Args:
        name: timm's name.
        arguments: of the extractor as it is built, `out_indices` among them.
        measured: result of `measure` for it.
    """
    items = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    side = int(max(measured.size_divisor, 256 if measured.size_divisor == 32 else 0) * measured.shrink)
    return _unused(name, tuple(sorted(items.items())), side)
