"""Timed subjects: inference on images of the dataset, stage by stage, and a training step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

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
from engine.train.setup import ModelParts, build_loss, memory_format
from engine.train.step import TrainStep
from models.yolo import DetectionModel
from utils.device import Profile, synchronize
from utils.structures import to_unit

STAGES = ("preprocess", "forward", "nms")
TOTAL, STEP = "total", "step"
CONF, IOU, MAX_DET = float(DetectConfig().conf_thres), DetectConfig().iou_thres, DetectConfig().max_det
NMS = NmsSettings(CONF, IOU, max_det=MAX_DET)
SMALL_STEP = 1e-3  # of lr0: repeated steps on one batch must not diverge

SampleFiles = tuple[tuple[Path, NDArray[np.float32]], ...]
"""Image files, with labels (n, 5) each: class, xywhn."""
Sample = Sequence[tuple[NDArray[np.uint8], NDArray[np.float32]]]
"""Images (H, W, 3) uint8 BGR, with labels (n, 5) each: class, xywhn."""
Times = dict[str, float]
"""Milliseconds per image by name."""


def load_sample(files: SampleFiles) -> Sample:
    """Read the images of a sample."""
    return [(read(path), labels) for path, labels in files]


class Subject(Protocol):
    """Interface of a timed subject."""

    def call(self, number: int) -> Times:
        """Run call `number` and return its times; equal numbers use equal images."""


class Inference:
    """Inference in three stages, each timed with the device synchronized.

    Args:
        runtime: the detector.
        sample: images; each call uses the next ones.
        batch: images per call.
        side: input side in pixels.
    """

    def __init__(self, runtime: Runtime, sample: Sample, batch: int, side: int) -> None:
        self.runtime, self.batch, self.side = runtime, batch, side
        self._frames = [Frame(image, Path(f"image{i}.jpg"), "", "image") for i, (image, _) in enumerate(sample)]

    def call(self, number: int) -> Times:
        """Run one batch; return the times of the stages, and their sum."""
        frames = tuple(self._frames[(number * self.batch + i) % len(self._frames)] for i in range(self.batch))
        device = self.runtime.device
        timers = [Profile(device) for _ in STAGES]
        with timers[0]:
            images = preprocess([frame.image for frame in frames], (self.side, self.side)).to(device)
        infer(self.runtime, Prepared(frames, images), NMS, timers[1], timers[2])
        times = {stage: timer.total * 1000 / self.batch for stage, timer in zip(STAGES, timers)}
        return {**times, TOTAL: sum(times.values())}


class TrainingStep:
    """The trainer's step, always on the same batch, without the loader.

    Args:
        model: on its device.
        sample: images and labels.
        config: options of train.py.
        hyp: hyperparameters.
        batch: images per step.
    """

    def __init__(
        self, model: DetectionModel, sample: Sample, config: TrainConfig, hyp: Hyperparameters, batch: int
    ) -> None:
        self.device, self.batch = next(model.parameters()).device, batch
        layout = memory_format(model, self.device)
        self.model = model.to(memory_format=layout).train()
        self.images, self.targets = training_batch(sample, batch, config.imgsz)
        groups = parameter_groups(model, scaled_decay(hyp.weight_decay, config.batch_size, int(hyp.nominal_batch)))
        optimizer = build_optimizer(str(config.optimizer), groups, hyp.lr0 * SMALL_STEP, hyp.momentum)
        loss = build_loss(model, hyp, config)
        parts = ModelParts(self.model, ModelEma(model), Frozen(), loss, int(model.stride.max()), layout)
        config = replace(config, compile=False, multi_scale=False)  # one size, eager: equal for all candidates
        self.step = TrainStep(parts, optimizer, config, hyp.clip_norm, self.device, World())

    def loss(self) -> Tensor:
        """Return the loss of the batch, a scalar."""
        images = to_unit(self.images.to(self.device)).contiguous(memory_format=self.step.memory_format)
        return self.step.loss(images, self.targets)[0]

    def call(self, number: int) -> Times:  # noqa: ARG002
        """Run one step and return its time."""
        start = time.perf_counter()
        self.step.backward(self.images.to(self.device), self.targets, (0, 0))
        self.step.step()
        synchronize(self.device)
        return {STEP: 1000 * (time.perf_counter() - start) / self.batch}


def training_batch(sample: Sample, batch: int, side: int) -> tuple[Tensor, Tensor]:
    """Return images and labels fitted into squares; images repeat when there are fewer than the batch needs.

    Returns:
        (B, 3, side, side) uint8 RGB; (M, 6) float32 image number, class, normalized cxcywh.
    """
    chosen = [sample[i % len(sample)] for i in range(batch)]
    rows = [np.zeros((0, 6), np.float32)]
    for number, (image, labels) in enumerate(chosen):
        height, width = image.shape[:2]
        _, (ratio, _), (left, top) = letterbox(image, (side, side), auto=False)
        scale = np.array([width, height, width, height], np.float32) * ratio / side
        boxes = labels[:, 1:] * scale + np.array([left, top, 0, 0], np.float32) / side
        rows.append(np.concatenate((np.full((len(labels), 1), number, np.float32), labels[:, :1], boxes), 1))
    images = preprocess([image for image, _ in chosen], (side, side)).contiguous()
    return images, torch.from_numpy(np.concatenate(rows).astype(np.float32))


def visit(subject: Subject, calls: int) -> Times:
    """Time one turn of a candidate and return medians over the calls.

    Args:
        subject: timed subject.
        calls: number of counted calls, after one that is not counted (other candidates evicted the caches).
    """
    subject.call(0)
    found = [subject.call(number) for number in range(1, calls + 1)]
    return {name: statistics.median(times[name] for times in found) for name in found[0]}


def warm_up(subject: Subject) -> float:
    """Run two calls; return the seconds of the second one."""
    subject.call(0)
    start = time.perf_counter()
    subject.call(1)
    return time.perf_counter() - start


def kept_for_backward(forward: Callable[[], Tensor], model: torch.nn.Module) -> int:
    """Return the bytes of all storages that autograd keeps for backward, except the parameters of a model.

    Args:
        forward: returns the loss, a scalar, or an output of any shape.
        model: its parameters are not counted.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()  # referenced, so that no storage is freed and its address used again
    total = sum(storages.values())
    del loss
    return total
