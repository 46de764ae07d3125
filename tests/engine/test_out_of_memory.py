"""Out-of-memory errors are one line with batch, size and advice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import export as export_script
import train as train_script
import val as val_script
from engine.cli.config import TrainConfig, ValConfig
from engine.cli.parser import run_main
from engine.export.config import ExportConfig
from tests.helpers.detectors import build, save
from tests.helpers.training import config


def raise_out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has ...")


def raise_on_cpu(*_: Any, **__: Any) -> Any:
    raise RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried ..."
    )


COMMANDS: dict[str, tuple[type, Callable[[Any], Any], int, str]] = {
    "train": (TrainConfig, train_script.work, 4, "a smaller --batch-size (-1 measures what fits), a smaller --imgsz"),
    "val": (ValConfig, val_script.work, 2, "a smaller --batch-size, a smaller --imgsz, or --half"),
    "export": (ExportConfig, export_script.work, 3, "a smaller --batch-size, a smaller --imgsz, or --device cpu"),
}


@pytest.mark.parametrize("error", [raise_out_of_memory, raise_on_cpu], ids=["CUDA", "CPU"])
@pytest.mark.parametrize("command", COMMANDS)
def test_out_of_memory_is_one_line(command, error, project: Path, monkeypatch, capsys) -> None:
    weights = str(save(build("yolov5"), project / "x.pt"))
    kind, work, batch, advice = COMMANDS[command]
    if command == "train":
        options = config(project)
    elif command == "val":
        data = str(project / "data.yaml")
        options = ValConfig(weights=[weights], data=data, imgsz=64, batch_size=2, device="cpu", single_cls=True)
    else:
        options = ExportConfig(weights=[weights], imgsz=[64, 64], batch_size=3, device="cpu", include=["torchscript"])
    place = "engine.train.step.TrainStep.loss" if command == "train" else "models.yolo.DetectionModel.forward"
    monkeypatch.setattr(place, error)
    side = 96 if command == "val" else 64  # padded by half a stride
    assert run_main(kind, f"{command}.py", "", lambda _: work(options), []) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{command}.py: error: out of memory with {batch} images of {side} x {side} pixels; try {advice}" in line


def test_other_errors_are_not_hidden(project: Path, monkeypatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("another error")

    monkeypatch.setattr("engine.train.step.TrainStep.loss", fail)
    with pytest.raises(RuntimeError, match="another error"):
        train_script.work(config(project))
