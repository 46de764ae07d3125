"""Detectors for use from Python with the interface of YOLOv5's `torch.hub` models: images in, results out.

`hubconf.py` publishes these functions to `torch.hub`; without it: `from engine.hub.model import load`.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data.sources.frames import Frame
from engine.cli.config import SIDE
from engine.hub.inputs import as_frames, as_list, pixels_of
from engine.hub.results import Results
from engine.predict.detections import Detections
from engine.predict.inference import NmsSettings, Prepared, infer, prepare
from engine.predict.predictor import check_classes, input_size
from engine.runtimes.base import Runtime
from engine.runtimes.pytorch import PyTorchRuntime
from engine.runtimes.registry import CHECKPOINT_SUFFIXES, open_runtime, sides_for, split_device
from models.checkpoint.io import read_checkpoint
from models.loading import load_detector, transfer_weights
from models.yolo import DetectionModel
from utils.device import Profile, select_device
from utils.errors import ConfigError
from utils.files import find_file
from utils.nms import Classes, class_numbers
from utils.structures import to_unit

LOGGER = logging.getLogger(__name__)
GRAY = 114 / 255  # padding of tensors, as of a letterbox

Device = str | int | torch.device | None
Weights = str | Path | Sequence[str | Path]


class HubModel(nn.Module):
    """A detector that takes images of any kind and returns `Results`.

    Args:
        runtime: runs the detector.

    Attributes:
        conf, iou: thresholds of confidence and IoU, 0..1.
        classes: keep only this class or these classes; None = all.
        agnostic: NMS over all classes together.
        multi_label: a box may have several classes.
        max_det: boxes per image.
        amp: mixed precision on a GPU.
        names, stride, device: attributes of the model; names is a dict by class number.
    """

    __module__ = "models.common"  # as in YOLOv5: other packages (SAHI) recognize hub models by it

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self.runtime = runtime
        self.conf, self.iou, self.max_det = 0.25, 0.45, 1000
        self.classes: Classes = None
        self.agnostic = self.multi_label = self.amp = False
        if isinstance(runtime, PyTorchRuntime):
            self.models = nn.ModuleList(runtime.models)

    @property
    def names(self) -> dict[int, str]:
        """Class names by number."""
        return dict(self.runtime.names)

    @property
    def stride(self) -> int:
        """Number of pixels of which the sides of the input are multiples."""
        return int(self.runtime.stride)

    @property
    def device(self) -> torch.device:
        """Device of the detector."""
        return self.runtime.device

    @property
    def model(self) -> DetectionModel:
        """The network of a checkpoint."""
        if not isinstance(self.runtime, PyTorchRuntime):
            raise ConfigError("model.model: an exported file has no PyTorch network; load the .pt file")
        return self.runtime.models[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (), self.__dict__  # by reference to a function: the class is not found under `__module__`

    def train(self, mode: bool = True) -> HubModel:
        """Accept evaluation mode only: batch norms are folded already."""
        if mode:
            raise ConfigError("this model is for detection; for training load it with autoshape=False, or use train.py")
        return super().train(False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> HubModel:
        """Convert the weights, and set device and dtype of the inputs."""
        if not isinstance(self.runtime, PyTorchRuntime):
            raise ConfigError("an exported file cannot be moved; give device=... when it is loaded")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call, unused-ignore]
        first = next(self.models.parameters())
        self.runtime.device, self.runtime.dtype = first.device, first.dtype
        return self

    @torch.no_grad()
    def forward(self, ims: object, size: int | Sequence[int] | None = None, augment: bool = False) -> Results:
        """Detect.

        Every image is letterboxed to the smallest rectangle of multiples of the stride, as in `detect.py`: detections
        do not depend on the other images.

        Args:
            ims: a path, a URL, a (H, W, 3) uint8 RGB array (OpenCV's BGR: `im[..., ::-1]`), a PIL image, a
                (3, H, W) tensor in 0..1, a list of these; or a (B, 3, H, W) tensor on any device, floating point in
                0..1 or uint8, which is only padded, not resized.
            size: longer side of the network's input in pixels, or (height, width); ignored for batch tensors. None:
                the training size, 640 for official checkpoints.
            augment: test-time augmentation (checkpoints only).

        Raises:
            ConfigError: a value that is not allowed.
            DataError: an image that cannot be read.
        """
        classes = class_numbers(self.classes)
        check_classes(classes, self.runtime.names)
        if augment and not isinstance(self.runtime, PyTorchRuntime):
            raise ConfigError("augment=True: needs a .pt file; an exported file is made for the plain image")
        timers = Profile(), Profile(self.device), Profile(self.device)
        if isinstance(ims, torch.Tensor) and ims.ndim == 4:
            groups = [self._batch(ims, timers[0])]
        else:
            groups = self._groups(as_list(ims), size, timers[0])
        found: dict[int, Detections] = {}
        shape = (0, 3, 0, 0)
        nms = NmsSettings(self.conf, self.iou, classes, self.agnostic, self.multi_label, self.max_det)
        if isinstance(self.runtime, PyTorchRuntime):
            self.runtime.augment = augment
            self.runtime.autocast = torch.float16 if self.amp and self.device.type != "cpu" else None
        for prepared in groups:
            shape = (len(prepared.images), 3, *prepared.images.shape[2:])
            for detections in infer(self.runtime, prepared, nms, timers[1], timers[2]):
                found[detections.frame.number] = detections
        share = 1000 / len(found)
        times = (timers[0].total * share, timers[1].total * share, timers[2].total * share)
        return Results([found[k] for k in sorted(found)], self.names, times, shape, self.device)

    def _groups(self, ims: Sequence[Any], size: int | Sequence[int] | None, timer: Profile) -> list[Prepared]:
        """Group images by the shape of their rectangle, in the order of the first of each group."""
        with timer:
            given = sides_for(self.runtime, _sides(size), size is not None)
            wanted = input_size(given, self.runtime)
            auto = self.runtime.imgsz is None
            together: dict[torch.Size, list[Prepared]] = {}
            for frame in as_frames(ims):
                one = prepare((frame,), wanted, self.stride, auto)
                together.setdefault(one.images.shape, []).append(one)
            return [
                Prepared(tuple(p.frames[0] for p in some), torch.cat([p.images for p in some]))
                for some in together.values()
            ]

    def _batch(self, images: torch.Tensor, timer: Profile) -> Prepared:
        """Pad a tensor with gray at the right and bottom to a multiple of the stride."""
        with timer:
            pixels = pixels_of(images)
            names = (Path(f"image{i}.jpg") for i in range(len(pixels)))
            frames = tuple(
                Frame(p[..., ::-1].copy(), name, name.name, "image", i, len(pixels))
                for i, (p, name) in enumerate(zip(pixels, names), 1)
            )
            if self.runtime.imgsz is None:
                bottom, right = (-side % self.stride for side in images.shape[2:])
                if bottom or right:
                    images = nn.functional.pad(to_unit(images), (0, right, 0, bottom), value=GRAY)
        return Prepared(frames, images, letterboxed=False)


def _sides(size: int | Sequence[int] | None) -> list[int]:
    """Return the sides that `size` gives in pixels, one or two, or raise ConfigError."""
    try:
        sides = [operator.index(side) for side in np.ravel(640 if size is None else size).tolist()]
    except (TypeError, ValueError):
        sides = []
    if len(sides) not in (1, 2) or not all(1 <= side <= SIDE["high"] for side in sides):
        raise ConfigError(f"size={size}: one integer or two (height, width), from 1 to {SIDE['high']}, are needed")
    return sides


def _empty() -> HubModel:
    return HubModel.__new__(HubModel)


def load(path: Weights, autoshape: bool = True, device: Device = None) -> HubModel | DetectionModel:
    """Open a model file.

    Args:
        path: checkpoint (ours or an official one), several for an ensemble, or an exported file (.onnx, ...).
        autoshape: return a `HubModel`; without it the network, in evaluation mode, not folded: for training.
        device: `'cpu'`, `0`, `'cuda:0'`, a `torch.device`; None = the first GPU, else the CPU.

    Raises:
        CheckpointError: a file is missing or cannot be used.
        ConfigError: the device is not available, or `autoshape=False` for anything but one checkpoint.
    """
    weights = [str(p) for p in (path if isinstance(path, (list, tuple)) else [path])]
    name, provider = split_device(_device_text(device))
    place = select_device(name)
    if autoshape:
        return HubModel(open_runtime(weights, place, provider=provider)).eval()
    if len(weights) != 1 or Path(weights[0]).suffix.lower() not in CHECKPOINT_SUFFIXES:
        raise ConfigError(f"autoshape=False: needs one checkpoint (.pt), not {', '.join(weights)}")
    return load_detector(weights[0], place)


def create(
    cfg: str,
    *,
    path: str | Path | None = None,
    channels: int = 3,
    classes: int | None = None,
    autoshape: bool = True,
    verbose: bool = True,
    device: Device = None,
) -> HubModel | DetectionModel:
    """Build a network from a model YAML.

    Args:
        cfg: YAML in `models/` or `models/hub/`, or a path.
        path: checkpoint to load matching layers from; None = random weights, with a warning.
        channels: input channels; values other than 3 need `autoshape=False`.
        classes: number of classes; None = the checkpoint's, or the YAML's.
        autoshape, device: as for `load`.
        verbose: warn about random weights.

    Raises:
        CheckpointError: weights that have too little in common with the YAML.
        UserError: another argument that cannot be used.
    """
    if channels != 3 and autoshape:
        raise ConfigError(f"channels={channels}: images have 3; for other inputs give autoshape=False")
    place = select_device(_device_text(device))
    checkpoint = read_checkpoint(path) if path else None
    number = classes if classes is not None else checkpoint.nc if checkpoint else None
    model = DetectionModel(find_file(cfg, "models", "models/hub"), ch=channels, nc=number)
    if checkpoint is not None:
        LOGGER.info("%s: %s", path, transfer_weights(model, checkpoint, exclude=()).summary())
        if checkpoint.nc == model.nc:
            model.names = dict(checkpoint.names)
    elif verbose:
        LOGGER.warning("%s: random weights: its detections are meaningless; give path=... for trained ones", cfg)
    model.to(place)
    return HubModel(PyTorchRuntime.from_model(model.eval(), place)).eval() if autoshape else model


def _device_text(device: Device) -> str:
    return "" if device is None else str(device)
