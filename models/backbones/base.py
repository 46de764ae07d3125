"""The contract of a backbone: several feature maps, each declared with its channels and stride.

Whatever fulfils this can stand in a row of a model YAML; the neck and the head are wired from `levels` alone, without a
forward pass at construction (which would shift BatchNorm statistics and fail for fixed-size networks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils.errors import SpecError, did_you_mean

# A backbone file imports this module and `layers` alone; what it needs to refuse a wrong argument comes along.
__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Backbone", "FeatureLevel", "SpecError", "did_you_mean"]

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
    be overridden where more than that is returned.

    Args:
        normalize: subtract `mean` and divide by `std` first, so that published weights see what they were trained on.
        mean, std: per channel (R, G, B), for pixels in [0, 1].
    """

    levels: tuple[FeatureLevel, ...]
    size_divisor: int = 32
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
