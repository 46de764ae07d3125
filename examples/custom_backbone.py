"""A custom backbone, used without editing the project.

    python train.py --cfg examples/custom_backbone.yaml --plugin examples/custom_backbone.py

`val.py`, `detect.py` and `export.py` take the same `--plugin`. See docs/add-your-backbone.md.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.backbones import Backbone, FeatureLevel, register_backbone


def downsample(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a 3x3 convolution of stride 2 with batch norm and activation."""
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.SiLU())


@register_backbone
class TinyConvNet(Backbone):
    """Five strided convolutions; the last three give P3, P4 and P5.

    Args:
        width: channels after the first convolution; each following one doubles them.
        normalize: subtract the ImageNet mean and divide by the standard deviation first.
    """

    def __init__(self, width: int = 8, normalize: bool = True) -> None:
        super().__init__(normalize)
        self.stem = nn.Sequential(downsample(3, width), downsample(width, 2 * width))
        self.stages = nn.ModuleList(downsample(2**i * width, 2 ** (i + 1) * width) for i in (1, 2, 3))
        self.levels = tuple(FeatureLevel(width * stride // 2, stride) for stride in (8, 16, 32))

    def forward_features(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps of strides 8, 16 and 32 of a normalized image (B, 3, H, W)."""
        x = self.stem(image)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return tuple(maps)
