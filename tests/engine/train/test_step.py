"""Handling of non-finite gradients in a training step, and choice of the batch size by memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.train.autobatch import CPU_BATCH, choose_batch, largest_batch
from engine.train.step import MAX_SKIPPED, restore_statistics
from engine.train.trainer import train
from models.checkpoint.io import read_checkpoint
from tests.helpers.detectors import build
from tests.helpers.training import config, poison, rows
from utils.errors import TrainingError


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
        ((1, 2, 4), (5.0, 5.0, 5.0), 9.0, 4),  # nothing to extrapolate from
    ],
)
def test_largest_batch(batches, used, capacity, chosen) -> None:
    assert largest_batch(batches, used, capacity) == chosen


def test_batch_on_a_cpu() -> None:
    assert choose_batch(build("yolov5"), 64, torch.device("cpu"), None, 10) == CPU_BATCH
