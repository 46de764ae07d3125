"""The detector that a model YAML describes, under the names that YOLOv5's users know."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.build.builder import build_layers, with_backbone_weights
from models.build.rows import Rows
from models.build.spec import load_model_spec, read_model_spec
from models.fuse import fuse_conv_bn
from models.heads import Detect
from models.summary import ModelInfo, layer_table, recorded_maps, summarize

LOGGER = logging.getLogger(__name__)
# Test-time augmentation: (scale, flipped left-right).
AUGMENTATIONS = ((1.0, False), (0.83, True), (0.67, False))
AUGMENT_PAD = 0.447  # the letterbox's gray, 114 / 255, as YOLOv5 rounds it

Predictions = list[Tensor] | tuple[Tensor, list[Tensor]]


class DetectionModel(nn.Module):
    """A detector built from a model YAML.

    Args:
        cfg: path of a model YAML, its name in `models/` or `models/hub/`, or a mapping of the same form.
        ch: channels of the input image; the YAML's `ch` wins.
        nc: number of classes, instead of the YAML's.
        anchors: widths and heights in pixels per level, or a number of anchors per level, instead of the YAML's.
        backbone_weights: weights for the YAML's backbone row: a path, a URL or a published name.

    Attributes:
        model: the rows; state-dict keys are `model.<row>...`.
        spec: what it was built from, with the overrides.
        yaml: the same as plain values; `DetectionModel(model.yaml)` builds an equal network.
        save: slots that are read by number or level name, in rising order.
        names: class names by index.
        nc: number of classes.

    Raises:
        SpecError: everything that is wrong with the YAML, one line per mistake, each with file and line.
    """

    model: Rows

    def __init__(
        self,
        cfg: str | Path | Mapping[str, Any] = "yolov5s.yaml",
        ch: int = 3,
        nc: int | None = None,
        anchors: Any = None,
        backbone_weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        spec, problems = read_model_spec(cfg)
        if nc is not None and nc != spec.num_classes:
            LOGGER.info("%s: nc %d is replaced by %s", spec.path, spec.num_classes, nc)
        spec = spec.replaced(ch, nc, anchors)
        self.spec = spec if backbone_weights is None else with_backbone_weights(spec, str(backbone_weights))
        self.model, self.save = build_layers(self.spec, problems)
        self.yaml = self.spec.to_dict()
        self.nc = self.spec.num_classes
        self.names = {i: str(i) for i in range(self.nc)}

    @property
    def head(self) -> Detect:
        """The last row."""
        head = self.model[-1]
        assert isinstance(head, Detect)
        return head

    @property
    def stride(self) -> Tensor:
        """Input pixels per cell, per level of the head; float32 on the CPU."""
        return self.head.stride

    def forward(self, x: Tensor, augment: bool = False) -> Predictions:
        """Predict.

        Args:
            x: (B, ch, H, W) in [0, 1], RGB. H and W are multiples of the largest stride, unless a backbone reads the
                image: that pads it for itself.
            augment: test-time augmentation (evaluation mode only): the rows of three scales one after the other.

        Returns:
            Training mode: per level the raw predictions (B, A, ny, nx, 5 + nc).
            Evaluation mode: (decoded, raw); decoded is (B, N, 5 + nc), box center, width and height in pixels of x,
            objectness and class scores. With `augment`, raw is that of the unscaled image.

        Raises:
            ConfigError: a size that is no multiple of the stride.
        """
        return self._forward_augment(x) if augment and not self.training else self._forward_once(x)

    def _forward_once(self, x: Tensor) -> Predictions:
        return self.model(x)

    def _forward_augment(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        multiple = max(int(self.stride.max()), self.model.size_multiple)
        outputs: list[Tensor] = []
        first_raw: list[Tensor] = []
        for i, (scale, flipped) in enumerate(AUGMENTATIONS):
            decoded, raw = self._forward_once(scaled_image(x.flip(3) if flipped else x, scale, multiple))
            assert isinstance(raw, list)  # as in evaluation mode
            first_raw = first_raw or raw
            decoded = unscaled_boxes(decoded, scale, x.shape[3] if flipped else None)
            # The coarsest level of the largest image and the finest of the smallest one see sizes that the others
            # see as well or better: their rows are left out.
            rows = [level[0, ..., 0].numel() for level in raw]
            if i == 0:
                decoded = decoded[:, : decoded.shape[1] - rows[-1]]
            elif i == len(AUGMENTATIONS) - 1:
                decoded = decoded[:, rows[0] :]
            outputs.append(decoded)
        return torch.cat(outputs, 1), first_raw

    def fuse(self) -> DetectionModel:
        """Fold batch norms into their convolutions, in place; outputs in evaluation mode stay as they are."""
        fuse_conv_bn(self)
        return self

    def info(self, imgsz: int | Sequence[int] = 640) -> ModelInfo:
        """Return the number of layers, parameters, gradients and GFLOPs; as a string, the summary line.

        Args:
            imgsz: side of a square image in pixels, or (height, width); rounded up to the stride.
        """
        sides = (imgsz, imgsz) if isinstance(imgsz, int) else tuple(imgsz)
        multiple = self.model.size_multiple
        height, width = (math.ceil(side / multiple) * multiple for side in sides)
        return summarize(self, self.spec.channels or 3, height, width, self.model)

    def layer_table(self) -> str:
        """One line per row: slot, from, n, params, module, arguments, output channels @ stride."""
        return layer_table(self.model)

    def feature_maps(self, x: Tensor) -> dict[str, Tensor]:
        """Return the feature map (B, C, H, W) of every slot but the head's, by row, module and level (`17_C3_P3`).

        Args:
            x: as for `forward`.
        """
        with torch.no_grad():
            return recorded_maps(self.model, x)


def parse_model(d: str | Path | Mapping[str, Any], ch: int | Sequence[int] = 3) -> tuple[Rows, list[int]]:
    """Build the rows of a model YAML.

    Args:
        d: path or mapping.
        ch: channels of the input image (YOLOv5 passes a list whose last entry they are).

    Returns:
        The rows, an nn.Sequential that knows where each row reads, and the slots that are read by number or level name.

    Raises:
        SpecError: as `DetectionModel`.
    """
    channels = ch if isinstance(ch, int) else ch[-1]
    return build_layers(load_model_spec(d).replaced(channels, None, None))


def scaled_image(image: Tensor, scale: float, multiple: int) -> Tensor:
    """Resize (B, C, H, W) by `scale`, then pad with gray at right and bottom up to multiples of `multiple`."""
    if scale == 1.0:
        return image
    height, width = image.shape[-2:]
    size = int(height * scale), int(width * scale)
    bottom, right = (
        math.ceil(side * scale / multiple) * multiple - done for side, done in zip((height, width), size, strict=True)
    )
    image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
    return F.pad(image, (0, right, 0, bottom), value=AUGMENT_PAD)


def unscaled_boxes(decoded: Tensor, scale: float, flipped_width: int | None) -> Tensor:
    """Return decoded rows (B, N, 5 + nc) of a scaled image in the coordinates of the unscaled one.

    Args:
        scale: factor between them.
        flipped_width: width of the unscaled image in pixels if the scaled one was flipped left-right.
    """
    x, y, size, scores = decoded.split((1, 1, 2, decoded.shape[2] - 4), dim=2)
    x = x / scale if flipped_width is None else flipped_width - x / scale
    return torch.cat((x, y / scale, size / scale, scores), 2)
