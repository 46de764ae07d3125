"""Plain modules as backbones: any `nn.Module` whose forward returns a list of feature maps.

This is the form in which tutorials write backbones for YOLOv5: a class, or a function that builds a module, whose
channels are in an attribute `channel`, `channels` or `width_list`, if anywhere.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.backbones.base import Backbone, FeatureLevel
from utils.errors import SpecError

LOGGER = logging.getLogger(__name__)
SIDES = (256, 640, 224)  # image sides tried in turn: some networks work at one size only
CHANNEL_ATTRIBUTES = ("channel", "channels", "width_list")


class AdaptedBackbone(Backbone):
    """Backbone around a plain module; the input is the image in [0, 1], which the module normalizes if it needs to.

    Channels and strides are measured once, on a copy in eval mode: no statistics and no random state are changed. Of
    several maps of one stride the last one is returned, and maps are sorted by stride.

    Args:
        factory: class or function that returns the module.
        args, keywords: its arguments.

    Raises:
        SpecError: if the factory returns no module, the module returns no feature maps, or its maps differ from the
            channels in its attribute.
    """

    def __init__(self, factory: Callable[..., nn.Module], args: Sequence[Any] = (), **keywords: Any) -> None:
        super().__init__(normalize=False)
        self.name = factory.__name__
        network = factory(*args, **keywords)
        if not isinstance(network, nn.Module):
            raise SpecError(f"{self.name} returns {type(network).__name__}; a torch.nn.Module is needed")
        self.network = network
        shapes, side = _measure(network, self.name)
        by_stride = {side // height: (index, channels) for index, (channels, height) in enumerate(shapes)}
        self.positions = tuple(by_stride[stride][0] for stride in sorted(by_stride))
        self.levels = tuple(FeatureLevel(by_stride[stride][1], stride) for stride in sorted(by_stride))
        self.size_divisor = max(32, self.levels[-1].stride)
        found = ", ".join(f"{level.channels} @ {level.stride}" for level in self.levels)
        LOGGER.info("%s: feature maps measured on a %d x %d image: %s", self.name, side, side, found)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps of an image (B, 3, H, W) in [0, 1], one (B, C, H / stride, W / stride) per level."""
        maps = _maps(self.network(image))
        return tuple(maps[position] for position in self.positions)


def _maps(output: Tensor | Mapping[str, Tensor] | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return list(output.values()) if isinstance(output, Mapping) else list(output)


def _measure(network: nn.Module, name: str) -> tuple[list[tuple[int, int]], int]:
    """Return (channels, height) of each map, and the side of the image they were measured on."""
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    failure = ""
    for side in SIDES:
        twin = copy.deepcopy(network).eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                maps = _maps(twin(torch.zeros(1, 3, side, side, device=device)))
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            failure = failure or str(error).splitlines()[0]
            continue
        _check(network, maps, side, name)
        return [(y.shape[1], y.shape[2]) for y in maps], side
    raise SpecError(f"{name}: cannot run on images of {', '.join(map(str, SIDES))} pixels: {failure}")


def _check(network: nn.Module, maps: Sequence[Tensor], side: int, name: str) -> None:
    shapes = [tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__ for y in maps]
    for y in maps:
        is_map = isinstance(y, Tensor) and y.ndim == 4 and y.shape[2] == y.shape[3] and y.shape[2] >= 1
        stride = side // y.shape[2] if is_map else 0
        if not is_map or stride * y.shape[2] != side or stride & (stride - 1):
            raise SpecError(
                f"{name}: a {side} x {side} image gives {shapes}; feature maps (B, C, H, W) of strides that are powers "
                "of two are needed, and no logits"
            )
    channels = [y.shape[1] for y in maps]
    for attribute in CHANNEL_ATTRIBUTES:
        declared = getattr(network, attribute, None)
        if isinstance(declared, (list, tuple)) and list(declared) != channels:
            raise SpecError(f"{name}: {attribute} is {list(declared)}, but its maps have {channels} channels")
