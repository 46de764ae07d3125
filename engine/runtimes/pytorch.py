"""Checkpoints in PyTorch: one model, or several as an ensemble."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from engine.runtimes.base import Runtime
from models.fuse import reparameterize
from models.loading import load_detector, require_rgb
from models.yolo import AUGMENTATIONS, DetectionModel
from utils.device import keep_freed_memory, out_of_memory, to_device
from utils.errors import CheckpointError
from utils.structures import to_unit

LOGGER = logging.getLogger(__name__)
SIZE_FACTOR = 1.5
"""Ratio between training and inference size above which a warning is logged."""
SMALLEST_GRID = 32  # input sides are multiples of at least this, as in YOLOv5


class PyTorchRuntime:
    """One or several checkpoints, ready to detect.

    Batch norms are folded and backbones re-parameterized. The rows of an ensemble are concatenated; NMS selects among
    all of them.

    Args:
        weights: checkpoint files.
        device: where to run.
        half: compute in float16; ignored on a CPU, with a warning.
        autocast: dtype of autocast; the weights stay float32.
        augment: test-time augmentation.

    Raises:
        CheckpointError: a file that cannot be used, or an ensemble of models with different classes.
    """

    imgsz: tuple[int, int] | None = None
    fixed_batch: int | None = None

    def __init__(
        self,
        weights: Sequence[str | Path],
        device: torch.device,
        *,
        half: bool = False,
        autocast: torch.dtype | None = None,
        augment: bool = False,
    ) -> None:
        if not weights:
            raise CheckpointError("no weights given; at least one checkpoint is needed")
        models = [load_detector(path) for path in weights]
        names = {tuple(model.names.items()): str(path) for model, path in zip(models, weights)}
        if len(names) > 1:
            raise CheckpointError(_different_classes(names))
        half = half_possible(half, device)
        for model in models:
            reparameterize(model.fuse())
            model.requires_grad_(False)
            model.to(device, torch.float16 if half else torch.float32).to(memory_format=torch.channels_last)
        self._set_up(models, device, torch.float16 if half else torch.float32, autocast=autocast, augment=augment)
        for model, path in zip(models, weights):
            parameters = sum(p.numel() for p in model.parameters())
            LOGGER.info("%s: %d parameters, %d classes, grid of %d pixels", path, parameters, model.nc, grid_of(model))
        if autocast is not None:
            LOGGER.info("Precision: %s under autocast, boxes in float32 (--amp)", str(autocast)[6:])

    @classmethod
    def from_model(
        cls,
        model: DetectionModel,
        device: torch.device,
        *,
        autocast: torch.dtype | None = None,
        augment: bool = False,
    ) -> PyTorchRuntime:
        """Run a model (for example during training) without changing it.

        Args:
            model: in evaluation mode, on `device`.
            autocast, augment: see the class.
        """
        if model.training:
            raise ValueError("the model is in training mode; a runtime needs it in evaluation mode")
        runtime = cls.__new__(cls)
        runtime._set_up([model], device, torch.float32, autocast=autocast, augment=augment)
        return runtime

    def _set_up(
        self,
        models: Sequence[DetectionModel],
        device: torch.device,
        dtype: torch.dtype,
        *,
        autocast: torch.dtype | None,
        augment: bool,
    ) -> None:
        if device.type == "cpu":
            keep_freed_memory()
        self.models = list(models)
        for model in self.models:
            require_rgb(model)
        self.device, self.dtype = device, dtype
        self.autocast, self.augment = autocast, augment
        self.names: Mapping[int, str] = dict(models[0].names)
        known = [model.best_conf for model in models if model.best_conf is not None]
        self.best_conf = sum(known) / len(known) if len(known) == len(models) else None
        self.stride = max(grid_of(model) for model in models)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """See `Runtime`."""
        return self.with_raw(images)[0]

    @torch.no_grad()
    def with_raw(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return decoded rows (B, N, 5 + nc) and the raw levels of the first model without augmentation."""
        pixels = to_unit(to_device(images, self.device), self.dtype).contiguous(memory_format=torch.channels_last)
        autocast = torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)
        try:
            with autocast, out_of_memory(pixels.shape, "a smaller --batch-size, a smaller --imgsz, or --half"):
                outputs = [model(pixels, augment=self.augment) for model in self.models]
        except RuntimeError:
            height, width = pixels.shape[2:]
            for model in self.models:
                model.check_size(height, width, self.augment)  # raises where the size is the reason
            raise
        decoded = torch.cat([rows for rows, _ in outputs], 1) if len(outputs) > 1 else outputs[0][0]
        return decoded.float(), list(outputs[0][1])

    def warmup(self, shape: tuple[int, int, int, int]) -> None:
        """See `Runtime`; a CPU has nothing to warm up."""
        if self.device.type != "cpu":
            self(torch.zeros(shape, dtype=torch.uint8, device=self.device))


def check_size(runtime: Runtime, height: int, width: int) -> None:
    """Raise SpecError where images of height x width pixels are too small for a kernel of a checkpoint's model.

    The test pass takes most of a second, so it is skipped if the coarsest map is at least as large as each kernel.
    Failures for other reasons appear when the model is called.
    """
    if isinstance(runtime, PyTorchRuntime):
        for model in runtime.models:
            smallest = min(height, width) * (min(scale for scale, _ in AUGMENTATIONS) if runtime.augment else 1)
            if smallest < largest_kernel(model) * grid_of(model):
                model.check_size(height, width, runtime.augment)


def largest_kernel(model: nn.Module) -> int:
    """Return an upper bound of the cells per side that a map needs for the kernels of a model, beyond their padding."""
    sizes = [1]
    for module in model.modules():
        if isinstance(kernel := getattr(module, "kernel_size", None), int | tuple):
            padding, dilation = getattr(module, "padding", 0), getattr(module, "dilation", 1)
            pairs = [x if isinstance(x, tuple) else (x, x) for x in (kernel, padding, dilation)]
            sizes += [d * (k - 1) + 1 - 2 * (p if isinstance(p, int) else 0) for k, p, d in zip(*pairs)]
    return max(sizes)


def grid_of(model: DetectionModel) -> int:
    """Return the number of pixels of which height and width of the input must be multiples."""
    return max(int(model.stride.max()), model.model.size_multiple, SMALLEST_GRID)


def half_possible(half: bool, device: torch.device) -> bool:
    """Return whether to compute in float16; warn where a CPU cannot."""
    if half and device.type == "cpu":
        LOGGER.warning("--half is ignored on a CPU: float32 is used")
    return half and device.type != "cpu"


def _different_classes(names: Mapping[tuple[tuple[int, str], ...], str]) -> str:
    """Return a message about the first class in which two models of an ensemble differ."""
    (first, path), (second, other), *_ = names.items()
    if len(first) != len(second):
        return f"{other}: has {len(second)} classes, {path} has {len(first)}; an ensemble needs the same classes"
    a, b = next((a, b) for a, b in zip(first, second) if a != b)
    return f"{other}: class {b[0]} is '{b[1]}', in {path} class {a[0]} is '{a[1]}'; an ensemble needs the same classes"


def chosen_sides(sides: Sequence[int], given: bool, models: Sequence[DetectionModel]) -> list[int]:
    """Return `--imgsz`, or the size at which checkpoints of this project were trained where it is not given.

    Official checkpoints keep 640, as in YOLOv5. A size that differs from that of training is warned about.

    Args:
        sides: values of `--imgsz`, one or two.
        given: whether the user chose them.
        models: models of the checkpoints; none for exported files.
    """
    trained = [model.trained_imgsz for model in models if model.trained_imgsz is not None]
    if not trained:
        return list(sides)
    if not given:
        sides = [max(model.default_imgsz for model in models)] * len(sides)
        LOGGER.info("--imgsz not given: %d is used", sides[0])
    for side in trained:
        ratio = max(max(sides) / side, side / max(sides))
        official = any(model.trained_imgsz == side != model.default_imgsz for model in models)
        if ratio > SIZE_FACTOR or (official and not given and ratio > 1):
            name = "opt.imgsz" if official else "imgsz"
            LOGGER.warning(
                "--imgsz %d: the checkpoint was trained at %d pixels (its %s); accuracy may be lower: --imgsz %d",
                max(sides), side, name, side,
            )  # fmt: skip
    return list(sides)
