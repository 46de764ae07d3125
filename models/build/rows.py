"""The module sequence of a model, and the routes by which feature maps pass through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones.base import FeatureLevel
from models.build.spec import LayerSpec
from utils.errors import ConfigError

IMAGE = -1  # slot number of the image
PAD_VALUE = 114 / 255  # gray of the letterbox border


@dataclass(frozen=True)
class Route:
    """Inputs and outputs of one row.

    Attributes:
        layer: row of the YAML.
        repeats: number of repeats after `depth_multiple`.
        arguments: arguments the module was built with.
        slot: index of the first slot of the row.
        sources: slots that are read; IMAGE is the input image.
        takes_list: the module takes the list of feature maps instead of a single one.
        gives_levels: the module returns several feature maps (a backbone).
        outputs: slot of each returned feature map; None where no row reads it.
        levels: channels and stride of each returned feature map (empty for the head).
        releases: slots that no later row reads.
        pad_to: the input is padded at the right and bottom to a multiple of this (1 = no padding).
        in_stride: stride of the input of a backbone (1 = the image).
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
    in_stride: int = 1


class Rows(nn.Sequential):
    """Modules of all rows with their routes.

    Args:
        modules: one per row; the row index is the first component of the state-dict keys.
        routes: one per row.
        size_multiple: height and width of the image must be multiples of this.
    """

    def __init__(self, modules: Sequence[nn.Module], routes: Sequence[Route], size_multiple: int) -> None:
        super().__init__(*modules)
        self.routes = tuple(routes)
        self.size_multiple = size_multiple

    def forward(self, image: Tensor) -> Any:  # noqa: ANN401 (the head decides)
        """Run all rows.

        Args:
            image: (B, C, H, W) in [0, 1].

        Returns:
            Output of the last row.

        Raises:
            ConfigError: height or width is not a multiple of `size_multiple`.
        """
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call, unused-ignore]
        if not (torch.compiler.is_compiling() or tracing):  # graphs are captured at a checked size
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
