"""Timed subjects: inference on images of the dataset, stage by stage, and a training step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.images import read
from data.letterbox import letterbox
from data.sources.frames import Frame
from engine.cli.config import DetectConfig, Hyperparameters, TrainConfig
from engine.devices.distributed import World
from engine.predict.inference import NmsSettings, Prepared, infer, preprocess
from engine.runtimes.base import Runtime
from engine.train.ema import ModelEma
from engine.train.freeze import Frozen
from engine.train.optimizer import build_optimizer, parameter_groups, scaled_decay
from engine.train.setup import ModelParts, build_loss
from engine.train.step import TrainStep
from models.yolo import DetectionModel
from utils.device import Profile, synchronize
from utils.structures import to_unit

STAGES = ("preprocess", "forward", "nms")
TOTAL, STEP = "total", "step"
CONF, IOU, MAX_DET = float(DetectConfig().conf_thres), DetectConfig().iou_thres, DetectConfig().max_det
NMS = NmsSettings(CONF, IOU, max_det=MAX_DET)
SMALL_STEP = 1e-3  # of lr0: repeated steps on one batch must not diverge

LabeledImage = NDArray[np.uint8]
SampleFiles = tuple[tuple[Path, NDArray[np.float32]], ...]
"""Image files, with labels (n, 5) each: class, xywhn."""
Times = dict[str, float]


@dataclass(frozen=True)
class SampleImages:
    """Decoded images on which all candidates are measured.

    Attributes:
        images: (H, W, 3) uint8 BGR each.
        labels: per image (n, 5) float32 class, xywhn.
    """

    images: tuple[LabeledImage, ...]
    labels: tuple[NDArray[np.float32], ...]

    @classmethod
    def load(cls, files: SampleFiles) -> SampleImages:
        """Read the images."""
        return cls(tuple(read(path) for path, _ in files), tuple(labels for _, labels in files))


class Inference:
    """Inference in three stages, each timed with the device synchronized.

    Args:
        runtime: the detector.
        sample: images; each call uses the next ones.
        batch: images per call.
        side: of the input in pixels.
    """

    def __init__(self, runtime: Runtime, sample: SampleImages, batch: int, side: int) -> None:
        self.runtime, self.batch, self.side = runtime, batch, side
        self._frames = [Frame(image, Path(f"image{i}.jpg"), "", "image") for i, image in enumerate(sample.images)]
        self._next = 0

    def restart(self) -> None:
        """Start with the first image again, so that all candidates use the same ones."""
        self._next = 0

    def call(self) -> Times:
        """Run one batch; return milliseconds per image by stage, and their sum."""
        frames = tuple(self._frames[(self._next + i) % len(self._frames)] for i in range(self.batch))
        self._next += self.batch
        device = self.runtime.device
        timers = tuple(Profile(device) for _ in STAGES)
        with timers[0]:
            images = preprocess([frame.image for frame in frames], (self.side, self.side)).to(device)
        infer(self.runtime, Prepared(frames, images), NMS, timers[1], timers[2])
        times = {stage: timer.total * 1000 / self.batch for stage, timer in zip(STAGES, timers)}
        return {**times, TOTAL: sum(times.values())}

    def rest(self) -> None:
        """Do nothing: inference holds no memory to free."""


@dataclass(frozen=True)
class Recipe:
    """Options and hyperparameters of train.py for a training step."""

    config: TrainConfig
    hyp: Hyperparameters


class TrainingStep:
    """The trainer's step on one batch, without the loader.

    Args:
        model: on `device`.
        sample: images and labels.
        recipe: of the training.
        batch: images per step.
        device: where.
    """

    def __init__(
        self, model: DetectionModel, sample: SampleImages, recipe: Recipe, batch: int, device: torch.device
    ) -> None:
        config, hyp = recipe.config, recipe.hyp
        self.model = model.to(memory_format=torch.channels_last).train()
        self.device, self.batch = device, batch
        self.images, self.targets = training_batch(sample, batch, config.imgsz)
        groups = parameter_groups(model, scaled_decay(hyp.weight_decay, config.batch_size, int(hyp.nominal_batch)))
        optimizer = build_optimizer(config.optimizer or "SGD", groups, hyp.lr0 * SMALL_STEP, hyp.momentum)
        parts = ModelParts(
            self.model, ModelEma(model), Frozen(), build_loss(model, hyp, config), int(model.stride.max())
        )
        config = replace(config, compile=False, multi_scale=False)  # one size, eager: equal for all candidates
        self.step = TrainStep(parts, optimizer, config, hyp.clip_norm, device, World())

    def restart(self) -> None:
        """Do nothing: the batch is always the same."""

    def loss(self) -> Tensor:
        """Return the loss of the batch, a scalar."""
        images = to_unit(self.images.to(self.device)).contiguous(memory_format=torch.channels_last)
        return self.step.loss(images, self.targets)[0]

    def call(self) -> Times:
        """Run one step; return milliseconds per image."""
        start = time.perf_counter()
        self.step.backward(self.images.to(self.device), self.targets, (0, 0))
        self.step.step()
        synchronize(self.device)
        return {STEP: 1000 * (time.perf_counter() - start) / self.batch}

    def rest(self) -> None:
        """Free cached GPU memory for the other candidates."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


Subject = Inference | TrainingStep


def training_batch(sample: SampleImages, batch: int, side: int) -> tuple[Tensor, Tensor]:
    """Images and labels fitted into squares.

    Returns:
        (B, 3, side, side) uint8 RGB; (M, 6) float32 image number, class, center x, center y, width, height (parts of
        the side).
    """
    chosen = [i % len(sample.images) for i in range(batch)]
    rows = [np.zeros((0, 6), np.float32)]
    for number, i in enumerate(chosen):
        height, width = sample.images[i].shape[:2]
        _, (ratio, _), (left, top) = letterbox(sample.images[i], (side, side), auto=False)
        labels = sample.labels[i]
        scale = np.array([width, height, width, height], np.float32) * ratio / side
        boxes = labels[:, 1:] * scale + np.array([left, top, 0, 0], np.float32) / side
        rows.append(np.concatenate((np.full((len(labels), 1), number, np.float32), labels[:, :1], boxes), 1))
    images = preprocess([sample.images[i] for i in chosen], (side, side)).contiguous()
    return images, torch.from_numpy(np.concatenate(rows).astype(np.float32))


def visit(subject: Subject, calls: int) -> Times:
    """Time one turn of a candidate: a call that is not counted (other candidates emptied the caches), then `calls`.

    Args:
        subject: what is timed.
        calls: that are counted.

    Returns:
        Medians over the calls, in milliseconds per image.
    """
    subject.restart()
    subject.call()
    found = [subject.call() for _ in range(calls)]
    subject.rest()
    return {name: statistics.median(times[name] for times in found) for name in found[0]}


def warm_up(subject: Subject) -> float:
    """Run two calls; return the seconds of the second one."""
    subject.call()
    start = time.perf_counter()
    subject.call()
    return time.perf_counter() - start


def kept_for_backward(forward: Callable[[], Tensor | tuple[Tensor, ...]], parameters: Mapping[int, Any]) -> int:
    """Return the bytes of all storages that autograd keeps for backward, except parameters; of any shape.

    Args:
        forward: returns the loss, or any output.
        parameters: addresses of storages that are not counted.
    """
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()  # held, so that no storage is freed and its address used again
    total = sum(storages.values())
    del loss
    return total


def addresses(model: torch.nn.Module) -> dict[int, str]:
    """Return the storage address of every parameter, with its name."""
    return {parameter.untyped_storage().data_ptr(): name for name, parameter in model.named_parameters()}
