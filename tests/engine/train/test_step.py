"""Handling of non-finite gradients in a training step, and choice of the batch size by memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from engine.cli.config import TrainConfig
from engine.cli.parser import run_main
from engine.devices.distributed import World
from engine.train.autobatch import CPU_BATCH, choose_batch, largest_batch
from engine.train.ema import ModelEma
from engine.train.freeze import Frozen
from engine.train.setup import ModelParts, memory_format
from engine.train.step import MAX_SKIPPED, TrainStep, restore_statistics
from engine.train.trainer import Trainer, train
from models.backbones.timm_backbone import TimmBackbone
from models.checkpoint.io import read_checkpoint
from models.yolo import DetectionModel
from tests.helpers.detectors import build
from tests.helpers.training import config, detection_loss, poison, rows
from utils.errors import TrainingError
from utils.files import ROOT


def test_step_skips_non_finite_gradients(project: Path, monkeypatch, caplog) -> None:
    poison(monkeypatch, {(1, 1)})
    with caplog.at_level("WARNING"):
        result = train(config(project, epochs=3))
    assert "step skipped (1 so far" in caplog.text and "batch statistics restored" in caplog.text
    assert torch.isfinite(torch.tensor(rows(result.folder))).all()
    for key, value in read_checkpoint(result.last).state.items():
        assert torch.isfinite(value.float()).all(), key


def test_step_raises_after_max_skipped(project: Path, monkeypatch) -> None:
    poison(monkeypatch, {(epoch, i) for epoch in range(1, 9) for i in range(3)})
    with pytest.raises(TrainingError, match=rf"^{MAX_SKIPPED} consecutive steps.*last good checkpoint is .*last\.pt"):
        train(config(project, epochs=9))
    last = read_checkpoint(project / "runs/exp/weights/last.pt")
    assert all(torch.isfinite(v.float()).all() for v in last.state.values())


def test_step_error_without_checkpoint(project: Path, monkeypatch) -> None:
    poison(monkeypatch, {(epoch, i) for epoch in range(9) for i in range(3)})
    with pytest.raises(TrainingError, match="there is no checkpoint yet"):
        train(config(project, epochs=9, nosave=True))


@pytest.mark.parametrize("kind", ["weights", "averaged weights"])
def test_checkpoint_with_non_finite_weights_is_not_written(kind, project: Path, monkeypatch, capsys) -> None:
    """One message, exit status 1, and the checkpoints of the previous epoch are kept."""
    original = Trainer._validate

    def validate(self: Trainer, epoch: int) -> Any:
        result = original(self, epoch)
        if epoch == 1:
            model = self.model if kind == "weights" else self.ema.module
            model.get_parameter("model.1.conv.weight").data[0] = float("inf")
        return result

    monkeypatch.setattr(Trainer, "_validate", validate)
    options = config(project, epochs=3)
    assert run_main(TrainConfig, "train.py", "", lambda _: train(options) and None, []) == 1
    last = project / "runs/exp/weights/last.pt"
    message = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(message) == 1 and f"tensors of the {kind} are not finite (first: model.1.conv.weight)" in message[0]
    assert f"the last good checkpoint is {last}" in message[0]
    for path in (last, last.with_name("best.pt")):
        checkpoint = read_checkpoint(path)
        assert checkpoint.epoch == 0
        assert all(torch.isfinite(v.float()).all() for v in checkpoint.state.values())


def test_statistics_of_batches_after_the_last_step_are_restored(project: Path, monkeypatch) -> None:
    """Batches after the last step of an epoch must not leave non-finite batch statistics either."""
    hyp = yaml.safe_load((ROOT / "data/hyps/hyp.scratch-low.yaml").read_text())
    (project / "hyp.yaml").write_text(yaml.safe_dump({**hyp, "warmup_epochs": 0, "nominal_batch": 8}))
    poison(monkeypatch, {(0, 2)})  # 3 batches, with a step after every second one
    result = train(config(project, hyp=str(project / "hyp.yaml")))
    assert all(torch.isfinite(v.float()).all() for v in read_checkpoint(result.last).state.values())


def test_restore_statistics_replaces_only_non_finite() -> None:
    model, average = build("yolov5", seed=1), build("yolov5", seed=2)
    bad, kept = "model.1.bn.running_mean", "model.2.bn.running_mean"
    before = model.get_buffer(kept).clone()
    model.get_buffer(bad)[0] = float("inf")
    assert restore_statistics(model, average) == 1
    torch.testing.assert_close(model.get_buffer(bad), average.get_buffer(bad), rtol=0, atol=0)
    torch.testing.assert_close(model.get_buffer(kept), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("batches", "used", "capacity", "chosen"),
    [
        ((1, 2, 4, 8), (1.5, 2.5, 4.5, 8.5), 20.5, 20),  # half a byte fixed, one per image
        ((1, 2, 4, 8), (1.5, 2.5, 4.5, 8.5), 20.4, 19),
        ((1, 2), (3.0, 5.0), 2.0, 1),  # never 0
        ((1,), (3.0,), 100.0, 1),  # two images did not fit
        ((1, 2, 4), (5.0, 5.0, 5.0), 9.0, 4),  # no slope to extrapolate
    ],
)
def test_largest_batch(batches, used, capacity, chosen) -> None:
    assert largest_batch(batches, used, capacity) == chosen


def test_batch_on_a_cpu() -> None:
    assert choose_batch(build("yolov5"), 64, torch.device("cpu"), None, 10) == CPU_BATCH


def prepared_step(model: DetectionModel | None = None, **options: Any) -> TrainStep:
    """A training step of a small detector on the CPU."""
    model = (model or build("yolov5")).train()
    parts = ModelParts(model, ModelEma(model), Frozen(), detection_loss(model), 32)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    return TrainStep(parts, optimizer, TrainConfig(imgsz=64, **options), 10.0, torch.device("cpu"), World())


IMAGES = torch.full((2, 3, 64, 64), 99, dtype=torch.uint8)
TARGETS = torch.tensor([[0, 1, 0.5, 0.5, 0.3, 0.4], [1, 0, 0.4, 0.6, 0.2, 0.2]])


def test_step_starts_the_next_one_without_gradients() -> None:
    step = prepared_step()
    step.backward(IMAGES, TARGETS, (0, 0))
    assert any(p.grad is not None for p in step.model.parameters())
    step.step()
    assert all(p.grad is None for p in step.model.parameters())


def test_step_updates_cumulative_batch_statistics() -> None:
    """BatchNorm(momentum=None) averages over all batches and needs its counter for that."""
    model = build("yolov5")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    before = [norm.running_mean.clone() for norm in norms]
    prepared_step(model).backward(IMAGES, TARGETS, (0, 0))
    assert not any(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
    assert {int(norm.num_batches_tracked) for norm in norms} == {2}  # `build` runs one batch


def test_multi_scale_draws_a_size_for_every_batch_and_epoch() -> None:
    step = prepared_step(multi_scale=True)
    sizes = {place: step.backward(IMAGES, TARGETS, place)[1] for place in [(e, i) for e in (0, 1) for i in range(6)]}
    for epoch in (0, 1):
        assert len({sizes[epoch, i] for i in range(6)}) > 1
    assert [sizes[0, i] for i in range(6)] != [sizes[1, i] for i in range(6)]
    assert all(32 <= size <= 96 and size % 32 == 0 for size in sizes.values())


def test_network_that_crashes_in_channels_last_trains_contiguous_on_a_cpu(caplog) -> None:
    model = build("timm")
    (backbone,) = (m for m in model.modules() if isinstance(m, TimmBackbone))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert memory_format(model, cpu) == torch.channels_last
    assert memory_format(model, cpu, "off") == torch.contiguous_format
    backbone.channels_last = False
    assert memory_format(model, cpu) == torch.contiguous_format
    assert "convnext_atto: training in channels_last crashes on a CPU" in caplog.text
    assert memory_format(model, gpu) == memory_format(model, cpu, "on") == torch.channels_last


@pytest.mark.slow
def test_fastvit_trains_on_a_cpu(project: Path) -> None:
    """In channels_last glibc ends the process after a few steps."""
    spec = yaml.safe_load((ROOT / "models/yolov5-timm.yaml").read_text())
    spec["backbone"][0] = [-1, 1, "timm/fastvit_t8", []]
    (project / "fastvit.yaml").write_text(yaml.safe_dump(spec))
    command = [sys.executable, str(ROOT / "train.py"), "--cfg", "fastvit.yaml", "--data", "data.yaml", "--imgsz", "128"]
    done = subprocess.run([*command, "--epochs", "4", "--noplots"], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert "contiguous tensors are used" in done.stderr
