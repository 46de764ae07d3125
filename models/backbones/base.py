"""The contract of a backbone: several feature maps, each declared with its channels and stride.

Whatever fulfils this can stand in a row of a model YAML; the neck and the head are wired from `levels` alone, without a
forward pass at construction (which would shift BatchNorm statistics and fail for fixed-size networks).
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor, nn

from utils.errors import SpecError, did_you_mean

# A backbone file imports this module and `layers` alone; what it needs to refuse a wrong argument comes along.
__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Backbone", "FeatureLevel", "SpecError", "did_you_mean", "wholly_inside"]

B = TypeVar("B", bound="Backbone")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class FeatureLevel:
    """Declaration of one feature map.

    Attributes:
        channels: number of channels.
        stride: input pixels per cell, a power of two.
    """

    channels: int
    stride: int


class Backbone(nn.Module):
    """Base class of all backbones.

    A subclass sets `levels` (high resolution first) and `size_divisor`, and defines `forward_features`; `forward` may
    be overridden where more than that is returned. One that sets `stage_sizes` (how many depths of `param_depth` each
    stage has after the stem) and calls `hold(frozen_stages, norm_eval)` when it is built can be frozen by stage.

    Attributes:
        frozen_stages: -1 for none; 0 froze the stem, n also the first n stages, which stay in evaluation mode.
        norm_eval: every BatchNorm stays in evaluation mode (its weights still learn).

    Args:
        normalize: subtract `mean` and divide by `std` first, so that published weights see what they were trained on.
        mean, std: per channel (R, G, B), for pixels in [0, 1].
    """

    levels: tuple[FeatureLevel, ...]
    size_divisor: int = 32
    stage_sizes: tuple[int, ...] = ()
    frozen_stages: int = -1
    norm_eval: bool = False
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        normalize: bool = True,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        # Not persistent: the published key sets stay as they are.
        self.register_buffer("pixel_mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def normalized(self, image: Tensor) -> Tensor:
        """Normalise an image (B, 3, H, W) in [0, 1]; returned as it is when `normalize` is off."""
        if not self.normalize:
            return image
        return (image - self.pixel_mean.to(image.dtype)) / self.pixel_std.to(image.dtype)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of an image.

        Args:
            image: (B, 3, H, W), RGB in [0, 1]; H and W multiples of `size_divisor`.

        Returns:
            One (B, levels[i].channels, H / levels[i].stride, W / levels[i].stride) per level, high resolution first.
        """
        return tuple(self.forward_features(self.normalized(image)))

    def forward_features(self, image: Tensor) -> Sequence[Tensor]:
        """What the published network computes for an already normalised image, before anything added for detection."""
        raise TypeError(f"{type(self).__name__} must define forward_features(image) or forward(image)")

    def reparameterize(self) -> None:
        """Swap training-form modules for their deployed form, in place; calling it again changes nothing."""

    def param_depth(self, name: str) -> int:
        """Depth of a parameter, 0 = stem, for layer-wise learning rates.

        Args:
            name: as in `named_parameters()`.
        """
        return 0

    @property
    def num_stages(self) -> int:
        """Stages after the stem, as `frozen_stages` counts them; without `stage_sizes` each depth is one."""
        return len(self.stage_sizes) or max((self.param_depth(name) for name, _ in self.named_parameters()), default=0)

    def stage_of(self, name: str) -> int:
        """Stage of a parameter: 0 = stem, 1 = first stage ...; `num_stages` + 1 for what was added after the last."""
        depth = self.param_depth(name)
        ends = accumulate(self.stage_sizes or [1] * self.num_stages)
        return next((stage for stage, end in enumerate((0, *ends)) if depth <= end), self.num_stages + 1)

    def hold(self, frozen_stages: int = -1, norm_eval: bool = False) -> None:
        """Switch gradients off up to a stage, and keep it, or all BatchNorms, in evaluation mode from now on.

        Raises:
            SpecError: there is no such stage.
        """
        if not -1 <= frozen_stages <= self.num_stages:
            kind = type(self).__name__
            raise SpecError(f"{kind}: frozen_stages is {frozen_stages}; allowed: -1 to {self.num_stages}")
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        for name in self._frozen_names():
            self.get_parameter(name).requires_grad_(False)
        self.train(self.training)

    def train(self: B, mode: bool = True) -> B:
        """As `nn.Module.train`; what `hold` was told to keep still stays in evaluation mode."""
        super().train(mode)
        if self.frozen_stages >= 0:
            for part in wholly_inside(self, self._frozen_names()):
                part.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def _frozen_names(self) -> set[str]:
        if self.frozen_stages < 0:
            return set()
        return {name for name, _ in self.named_parameters() if self.stage_of(name) <= self.frozen_stages}


def wholly_inside(module: nn.Module, names: Container[str], prefix: str = "") -> list[nn.Module]:
    """The largest submodules that have parameters, and none whose name (after `prefix`) is not among `names`."""
    found = []
    for name, child in module.named_children():
        own = [f"{prefix}{name}.{key}" for key, _ in child.named_parameters()]
        if own and all(key in names for key in own):
            found.append(child)
        elif own:
            found += wholly_inside(child, names, f"{prefix}{name}.")
    return found
