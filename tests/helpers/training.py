"""A small dataset, model and configuration for tests that run a training."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.cli.config import Hyperparameters, TrainConfig
from engine.devices.distributed import World
from engine.train.ema import ModelEma
from engine.train.freeze import Frozen
from engine.train.setup import ModelParts, build_loss
from engine.train.step import TrainStep
from engine.train.trainer import Trainer
from models.checkpoint.io import read_checkpoint
from models.losses.anchor_based import DetectionLoss
from models.yolo import DetectionModel
from utils.files import ROOT

TINY = """
nc: 80
depth_multiple: 0.33
width_multiple: 0.125
anchors:
  - [10,13, 16,30, 33,23]
  - [30,61, 62,45, 59,119]
  - [116,90, 156,198, 373,326]
backbone:
  - [-1, 1, Conv, [32, 6, 2, 2]]
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 1, Conv, [128, 3, 2]]
  - [-1, 1, Conv, [128, 3, 2]]
head:
  - [[2, 3, 4], 1, Detect, [nc, anchors]]
"""
DATA = """
path: set
train: images/train
val: images/val
names: {{0: circle, 1: square, 2: cross}}
generate: {{kind: shapes, train: 10, val: {val}, test: 1, imgsz: 96, seed: 3}}
"""


def write_project(folder: Path, val: int = 4) -> Path:
    """Write data.yaml (10 training images, generated on first use) and tiny.yaml; return the folder."""
    (folder / "data.yaml").write_text(DATA.format(val=val))
    (folder / "tiny.yaml").write_text(TINY)
    return folder


def config(folder: Path, **options: Any) -> TrainConfig:
    """Options of a short training on the files of `write_project`."""
    base = {
        "cfg": str(folder / "tiny.yaml"),
        "data": str(folder / "data.yaml"),
        "imgsz": 64,
        "epochs": 2,
        "batch_size": 4,
        "workers": 0,
        "noplots": True,
        "project": str(folder / "runs"),
        "device": "cpu",
    }
    return TrainConfig.from_keywords(**{**base, **options})


def rows(folder: Path) -> list[list[float]]:
    """Rows of results.csv."""
    with (folder / "results.csv").open() as stream:
        return [[float(cell) for cell in row] for row in list(csv.reader(stream))[1:]]


def assert_equal_runs(a: Path, b: Path) -> None:
    """Assert that two run folders have bit-equal results and weights."""
    assert (a / "results.csv").read_text() == (b / "results.csv").read_text()
    for name in ("last.pt", "best.pt"):
        x, y = (read_checkpoint(folder / "weights" / name) for folder in (a, b))
        assert x.epoch == y.epoch
        assert x.state.keys() == y.state.keys()
        for key in x.state:
            torch.testing.assert_close(x.state[key], y.state[key], rtol=0, atol=0, msg=f"{name}: {key}")


def detection_loss(model: DetectionModel) -> DetectionLoss:
    """Loss with the hyperparameters of hyp.scratch-low.yaml at 64 pixels."""
    hyp = Hyperparameters.from_yaml(ROOT / "data/hyps/hyp.scratch-low.yaml")
    return build_loss(model, hyp, TrainConfig(imgsz=64))


def train_step(model: nn.Module, criterion: Any, world: World) -> TrainStep:
    """A training step on the CPU with plain SGD; its EMA is a placeholder, so only forward and backward may be used."""
    ema = ModelEma(nn.Linear(1, 1))  # a model with synchronized batch norms cannot be copied
    parts = ModelParts(model, ema, Frozen(), criterion, 32)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    return TrainStep(parts, optimizer, TrainConfig(imgsz=64), 10.0, torch.device("cpu"), world)


def interrupt_at(patch: pytest.MonkeyPatch, epoch: int) -> None:
    """Raise KeyboardInterrupt at the beginning of an epoch; use it inside `monkeypatch.context()`."""
    original = Trainer._train_epoch

    def train_epoch(self: Trainer, current: int) -> Any:
        if current == epoch:
            raise KeyboardInterrupt
        return original(self, current)

    patch.setattr(Trainer, "_train_epoch", train_epoch)


def signal_at(patch: pytest.MonkeyPatch, number: int, position: tuple[int, int]) -> None:
    """Send this process a signal during the backward pass of one (epoch, batch)."""
    original = TrainStep.backward

    def backward(
        self: TrainStep, images: torch.Tensor, targets: torch.Tensor, current: tuple[int, int], **options: Any
    ) -> Any:
        if current == position:
            os.kill(os.getpid(), number)
        return original(self, images, targets, current, **options)

    patch.setattr(TrainStep, "backward", backward)


def poison(patch: pytest.MonkeyPatch, positions: set[tuple[int, int]]) -> None:
    """Make the images of these (epoch, batch) NaN."""
    loss, original = TrainStep.loss, TrainStep.backward
    current = (-1, -1)

    def backward(
        self: TrainStep, images: torch.Tensor, targets: torch.Tensor, position: tuple[int, int], **options: Any
    ) -> Any:
        nonlocal current
        current = position
        return original(self, images, targets, position, **options)

    def poisoned(self: TrainStep, images: torch.Tensor, targets: torch.Tensor) -> Any:
        return loss(self, images * float("nan") if current in positions else images, targets)

    patch.setattr(TrainStep, "backward", backward)
    patch.setattr(TrainStep, "loss", poisoned)


def results_row(epoch: int, map50: float = 0.5, map5095: float = 0.25) -> list[float]:
    """Return a row of results.csv."""
    return [epoch, 0.1, 0.2, 0.3, 0.6, 0.7, map50, map5095, 0.4, 0.5, 0.6, 0.01, 0.01, 0.1]
