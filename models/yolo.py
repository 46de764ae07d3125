"""DetectionModel: a detector built from a model YAML, with the interface of YOLOv5."""

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
from models.build.dry_run import dry_run
from models.build.rows import Rows
from models.build.spec import load_model_spec, read_model_spec
from models.fuse import fuse_conv_bn
from models.heads import Head
from models.summary import ModelInfo, layer_table, recorded_maps, save_maps, summarize, time_table
from utils.errors import SpecError

LOGGER = logging.getLogger(__name__)
# Test-time augmentation: (scale, horizontal flip).
AUGMENTATIONS = ((1.0, False), (0.83, True), (0.67, False))
AUGMENT_PAD = 0.447  # gray of the letterbox, 114 / 255, rounded as in YOLOv5

Predictions = list[Tensor] | tuple[Tensor, list[Tensor]]


class DetectionModel(nn.Module):
    """A detector built from a model YAML.

    Args:
        cfg: path of a model YAML, its name in `models/` or `models/hub/`, or a mapping of the same form.
        ch: channels of the input image; `ch` of the YAML takes precedence.
        nc: number of classes; None = that of the YAML.
        anchors: widths and heights in pixels per level, or number of anchors per level; None = those of the YAML.
        head: replaces the last row, `anchor` or `free` (see `models.build.spec.HEADS`); None keeps it.
        backbone_weights: weights of the backbone row: path, URL or published name.

    Attributes:
        model: rows; state-dict keys are `model.<row>...`.
        spec: model specification including the overrides.
        yaml: the specification as plain values; `DetectionModel(model.yaml)` builds the same network.
        save: slots read by index or level name, in ascending order.
        names: class names by index.
        nc: number of classes.
        trained_imgsz: side at which its checkpoint was trained, in pixels, None if unknown.
        default_imgsz: side to use by default: that of training, 640 for official checkpoints.
        best_conf: confidence threshold with the best F1 in the validation of its checkpoint, None if unknown.
        inplace: `inplace` of the YAML, which has no effect.
        hyp: hyperparameters, for tools that store them here; unused.

    Raises:
        SpecError: the YAML is not valid; one line per error, each with file and line.
    """

    model: Rows

    def __init__(
        self,
        cfg: str | Path | Mapping[str, Any] = "yolov5s.yaml",
        ch: int = 3,
        nc: int | None = None,
        anchors: object = None,
        backbone_weights: str | Path | None = None,
        head: str | None = None,
    ) -> None:
        super().__init__()
        spec, problems = read_model_spec(cfg)
        if head is not None and not problems:
            spec = spec.with_head(head)
        if nc is not None and nc != spec.num_classes:
            LOGGER.info("%s: nc %d is replaced by %s", spec.path, spec.num_classes, nc)
        spec = spec.replaced(ch, nc, anchors)
        self.spec = spec if backbone_weights is None else with_backbone_weights(spec, str(backbone_weights))
        self.model, self.save = build_layers(self.spec, problems)
        if not isinstance(cfg, Mapping):  # those of checkpoints have run before
            dry_run(self.model, self.spec)
        self.yaml = self.spec.to_dict()
        self.nc = self.spec.num_classes
        self.names = {i: str(i) for i in range(self.nc)}
        self.best_conf: float | None = None
        self.trained_imgsz: int | None = None
        self.default_imgsz = 640
        self.inplace = True
        self.hyp: dict[str, Any] = {}

    def check_size(self, height: int, width: int, augment: bool = False, advice: str = "a larger --imgsz") -> None:
        """Check that images of a size are large enough for every row.

        Args:
            height, width: of the images in pixels, rounded up to the model's multiple.
            augment: check the scales of test-time augmentation, too.
            advice: what to try, for the message.

        Raises:
            SpecError: names the row.
        """
        multiple = max(int(self.stride.max()), self.model.size_multiple)
        for scale in (1.0, *(scale for scale, _ in AUGMENTATIONS[1:] if augment)):
            sides = (math.ceil(side * scale / multiple) * multiple for side in (height, width))
            try:
                dry_run(self.model, self.spec, *sides)
            except SpecError as error:
                dry_run(self.model, self.spec)  # a row that runs at no size is reported as such
                raise SpecError(f"{error}; try {advice}") from error

    @property
    def head(self) -> Head:
        """Return the detection head, which is the last row."""
        head = self.model[-1]
        assert isinstance(head, Head)
        return head

    @property
    def stride(self) -> Tensor:
        """Return the stride of each level, shape (levels,), in input pixels per cell; float32 on the CPU."""
        return self.head.stride

    def forward(
        self, x: Tensor, augment: bool = False, profile: bool = False, visualize: str | Path | bool = False
    ) -> Predictions:
        """Run the detector.

        Args:
            x: (B, ch, H, W) in [0, 1], RGB. H and W must be multiples of the largest stride, except for models with a
                backbone, which pads its input.
            augment: test-time augmentation (eval mode only): concatenate the predictions of three scales.
            profile: log the time of each row in milliseconds.
            visualize: folder in which the feature maps of each row are written as PNG files.

        Returns:
            Training mode: raw predictions of each level.
            Eval mode: (decoded, raw); decoded is (B, N, 5 + nc): xywh in pixels of x, objectness, class probabilities.
            With `augment`, raw is that of the first scale.

        Raises:
            ConfigError: height or width is not a multiple of the stride.
        """
        if augment and not self.training:
            return self._forward_augment(x)
        return self._forward_once(x, profile, visualize)

    def _forward_once(self, x: Tensor, profile: bool = False, visualize: str | Path | bool = False) -> Predictions:
        if profile:
            LOGGER.info("%s", time_table(self.model, x))
        if visualize:
            save_maps(self.feature_maps(x), x, Path(str(visualize)))
        return self.model(x)

    def _forward_augment(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        multiple = max(int(self.stride.max()), self.model.size_multiple)
        outputs: list[Tensor] = []
        first_raw: list[Tensor] = []
        for i, (scale, flipped) in enumerate(AUGMENTATIONS):
            decoded, raw = self._forward_once(scaled_image(x.flip(3) if flipped else x, scale, multiple))
            assert isinstance(raw, list)  # eval mode
            first_raw = first_raw or raw
            decoded = unscaled_boxes(decoded, scale, x.shape[3] if flipped else None)
            # As in YOLOv5, the coarsest level at the largest scale and the finest level at the smallest are dropped.
            rows = [level[0, ..., 0].numel() for level in raw]
            if i == 0:
                decoded = decoded[:, : decoded.shape[1] - rows[-1]]
            elif i == len(AUGMENTATIONS) - 1:
                decoded = decoded[:, rows[0] :]
            outputs.append(decoded)
        return torch.cat(outputs, 1), first_raw

    def fuse(self) -> DetectionModel:
        """Fuse convolutions with BatchNorm in place; outputs in eval mode are unchanged up to rounding."""
        fuse_conv_bn(self)
        return self

    def info(self, imgsz: int | Sequence[int] = 640) -> ModelInfo:
        """Return the number of layers, parameters, gradients and GFLOPs.

        Args:
            imgsz: image side, or (height, width), in pixels; rounded up to a multiple of the stride.
        """
        sides = (imgsz, imgsz) if isinstance(imgsz, int) else tuple(imgsz)
        multiple = self.model.size_multiple
        height, width = (math.ceil(side / multiple) * multiple for side in sides)
        return summarize(self, self.spec.channels or 3, height, width, self.model)

    def layer_table(self, width: int | None = None) -> str:
        """Return a table with one line per row, see `models.summary.layer_table`."""
        return layer_table(self.model, width)

    def feature_maps(self, x: Tensor) -> dict[str, Tensor]:
        """Return the feature map (B, C, H, W) of every slot except the head, by row, module and level (`17_C3_P3`).

        Args:
            x: as for `forward`.
        """
        with torch.no_grad():
            return recorded_maps(self.model, x)


def parse_model(d: str | Path | Mapping[str, Any], ch: int | Sequence[int] = 3) -> tuple[Rows, list[int]]:
    """Build the modules of a model YAML.

    Args:
        d: path or mapping.
        ch: channels of the input image, or a list whose last entry is that number, as in YOLOv5.

    Returns:
        The rows (an nn.Sequential with routes), and the slots read by index or level name.

    Raises:
        SpecError: the YAML is not valid, see `DetectionModel`.
    """
    channels = ch if isinstance(ch, int) else ch[-1]
    return build_layers(load_model_spec(d).replaced(channels, None, None))


def scaled_image(image: Tensor, scale: float, multiple: int) -> Tensor:
    """Resize (B, C, H, W) by `scale` and pad with gray at the right and bottom to multiples of `multiple`."""
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
    """Map decoded predictions (B, N, 5 + nc) of a scaled image to the coordinates of the original image.

    Args:
        decoded: predictions at `scale`.
        scale: size of the scaled image relative to the original.
        flipped_width: width of the original image in pixels if the scaled one was flipped horizontally, else None.
    """
    x, y, size, scores = decoded.split((1, 1, 2, decoded.shape[2] - 4), dim=2)
    x = x / scale if flipped_width is None else flipped_width - x / scale
    return torch.cat((x, y / scale, size / scale, scores), 2)
