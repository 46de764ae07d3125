"""Base class of backbones: several feature maps, each declared with its channels and stride.

The neck and head are built from the declared `levels`, without a forward pass at construction (which would update
BatchNorm statistics and fail for fixed-size networks).
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from utils.errors import SpecError, did_you_mean

# A backbone file imports only this module and `layers`, so the error type for wrong arguments is exported here.
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

    A subclass sets `levels` (high resolution first) and `size_divisor`, and defines `forward_features`; it overrides
    `forward` only to return more than that. A subclass that sets `stage_sizes` (number of `param_depth` values of each
    stage after the stem) and calls `hold(frozen_stages, norm_eval)` in its constructor can be frozen by stage.

    Attributes:
        levels: declaration of each returned map, high resolution first.
        size_divisor: the height and width of the input are multiples of it.
        stage_sizes: number of depths of each stage after the stem.
        frozen_stages: -1 for none; 0 freezes the stem, n also the first n stages. They stay in eval mode.
        norm_eval: every BatchNorm stays in eval mode (its weights are still trained).
        channels_last: whether a CPU can train it in that memory format.

    `ALIASES` maps argument names of the published class to names of this one; `REFUSED` maps those that have no meaning
    for dense features to the reason. `create_backbone` and model YAMLs accept the former and raise for the latter.

    Args:
        normalize: subtract `mean` and divide by `std` first, as in the training of the published weights. Inputs that
            are not RGB images (`in_channels` other than 3) are normalized only if `mean` and `std` are given for them.
        mean: mean of each channel (R, G, B), for pixels in [0, 1].
        std: standard deviation of each channel, for pixels in [0, 1].
        in_channels: channels of the input.

    Raises:
        SpecError: if the number of means or standard deviations differs from the number of channels, or a value is not
            one for pixels in [0, 1].
    """

    ALIASES: ClassVar[Mapping[str, str]] = {}
    REFUSED: ClassVar[Mapping[str, str]] = {}

    levels: tuple[FeatureLevel, ...]
    size_divisor: int = 32
    stage_sizes: tuple[int, ...] = ()
    frozen_stages: int = -1
    norm_eval: bool = False
    channels_last: bool = True
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        normalize: bool = True,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        default = tuple(mean) == IMAGENET_MEAN and tuple(std) == IMAGENET_STD
        self.normalize = normalize and (in_channels == 3 or not default)
        if self.normalize and not len(mean) == len(std) == in_channels:
            kind = type(self).__name__
            raise SpecError(
                f"{kind}: {len(mean)} means and {len(std)} stds for {in_channels} channels; one each is needed"
            )
        highest = 1 if in_channels == 3 else math.inf
        valid = all(value <= highest for value in mean) and all(0 < value <= highest for value in std)  # NaN is not
        if self.normalize and not valid:
            kind = type(self).__name__
            raise SpecError(
                f"{kind}: mean is {list(mean)}, std is {list(std)}; allowed: values for pixels in [0, 1] (those for "
                "pixels up to 255, divided by 255), and std above 0"
            )
        # Not persistent, so that the state-dict keys equal the published ones.
        self.register_buffer(
            "pixel_mean", torch.tensor(mean, dtype=torch.get_default_dtype()).view(1, -1, 1, 1), persistent=False
        )
        self.register_buffer(
            "pixel_std", torch.tensor(std, dtype=torch.get_default_dtype()).view(1, -1, 1, 1), persistent=False
        )

    def normalized(self, image: Tensor) -> Tensor:
        """Normalize an image (B, C, H, W) in [0, 1]; return it unchanged if `normalize` is False."""
        if not self.normalize:
            return image
        return (image - self.pixel_mean.to(image.dtype)) / self.pixel_std.to(image.dtype)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps of an image.

        Args:
            image: (B, 3, H, W), RGB in [0, 1]; H and W multiples of `size_divisor`.

        Returns:
            One (B, levels[i].channels, H / levels[i].stride, W / levels[i].stride) per level, high resolution first.
        """
        return tuple(self.forward_features(self.normalized(image)))

    def forward_features(self, image: Tensor) -> Sequence[Tensor]:  # noqa: ARG002 (subclasses use it)
        """Return the feature maps of the published network for a normalized image (B, 3, H, W).

        Returns:
            (B, C, H / stride, W / stride) each; layers added for detection are not applied.

        Raises:
            TypeError: if the subclass defines neither this method nor `forward`.
        """
        raise TypeError(f"{type(self).__name__} must define forward_features(image) or forward(image)")

    def reparameterize(self) -> None:
        """Replace training-time modules by their re-parameterized equivalents, in place; idempotent."""

    def param_depth(self, name: str) -> int:  # noqa: ARG002 (subclasses use it)
        """Return the depth of a parameter, 0 = stem, for layer-wise learning-rate decay.

        Args:
            name: as in `named_parameters()`.
        """
        return 0

    @property
    def num_stages(self) -> int:
        """Number of stages after the stem, as in `frozen_stages`; without `stage_sizes` each depth is a stage."""
        return len(self.stage_sizes) or max((self.param_depth(name) for name, _ in self.named_parameters()), default=0)

    def stage_of(self, name: str) -> int:
        """Return the stage of a parameter: 0 = stem, 1 = first stage, ..., `num_stages` + 1 = layers after the last."""
        depth = self.param_depth(name)
        ends = accumulate(self.stage_sizes or [1] * self.num_stages)
        return next((stage for stage, end in enumerate((0, *ends)) if depth <= end), self.num_stages + 1)

    def hold(self, frozen_stages: int = -1, norm_eval: bool = False) -> None:
        """Freeze the stem and the first stages, and optionally keep all BatchNorms in eval mode.

        Args:
            frozen_stages: -1 for none, 0 for the stem, n for the stem and the first n stages.
            norm_eval: keep every BatchNorm in eval mode.

        Raises:
            SpecError: if there are fewer stages.
        """
        if not -1 <= frozen_stages <= self.num_stages:
            kind = type(self).__name__
            raise SpecError(f"{kind}: frozen_stages is {frozen_stages}; allowed: -1 to {self.num_stages}")
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        for name in self._frozen_names():
            self.get_parameter(name).requires_grad_(False)
        self.train(self.training)

    def train(self: B, mode: bool = True) -> B:
        """Set the mode as `nn.Module.train` does; parts frozen by `hold` stay in eval mode."""
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
    """Return the largest submodules whose parameters (at least one) are all in `names`.

    Args:
        module: module to search.
        names: full parameter names.
        prefix: prepended to the names of `module`'s parameters.
    """
    inside = []
    for name, child in module.named_children():
        keys = [f"{prefix}{name}.{key}" for key, _ in child.named_parameters()]
        if keys and all(key in names for key in keys):
            inside.append(child)
        elif keys:
            inside += wholly_inside(child, names, f"{prefix}{name}.")
    return inside
