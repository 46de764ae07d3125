"""Inputs that are too small for a row of the model give one-line errors that name the row, in every command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from engine.cli.config import DetectConfig, TrainConfig, ValConfig
from engine.compare.worker.jobs import CandidateJobs
from engine.compare.worker.setting import Setting
from engine.evaluate.evaluator import validate
from engine.export.config import ExportConfig
from engine.export.exporter import export
from engine.hub.model import load
from engine.predict.predictor import detect
from engine.runtimes.pytorch import PyTorchRuntime, check_size, largest_kernel
from engine.runtimes.registry import open_runtime
from engine.train.trainer import train
from models.build.rows import Rows
from models.checkpoint.io import write_checkpoint
from models.yolo import DetectionModel
from tests.helpers.detection_data import NAMES, write_data
from utils.errors import CheckpointError, SpecError

CPU = torch.device("cpu")
MODEL = """
nc: 3
backbone:
  - [-1, 1, Conv, [8, 3, 16]]
  - [-1, 1, Conv, [8, 8, 1, 0]]  # needs 128 pixels
head:
  - [[-1], 1, AnchorFreeDetect, [nc]]
"""

BACKBONE = [[-1, 1, "Conv", [8, 6, 2, 2]], [-1, 1, "Conv", [8, 3, 16]], [-1, 1, "SPPF", [8, 5]]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with set.yaml (squares, and images with aspect ratios up to 2.2), flat.yaml, m.yaml and m.pt."""
    folder = tmp_path_factory.mktemp("small")
    text = write_data(folder).read_text()
    (folder / "flat.yaml").write_text(text.replace("val: images/val", "val: flat.txt"))
    (folder / "flat.txt").write_text("./images/val/p3.png\n")
    (folder / "m.yaml").write_text(MODEL)
    model = DetectionModel(folder / "m.yaml").eval()
    content = {"spec": model.yaml, "names": NAMES, "stride": model.stride.tolist(), "state": model.state_dict()}
    write_checkpoint(folder / "m.pt", content)
    return folder


def named(height: int, width: int, advice: str = "a larger --imgsz", file: str = r"m\.pt") -> str:
    """Return the pattern of the message."""
    return rf"{file}: row 1 \(Conv\): cannot run .* from images of {height} x {width} pixels: .*; try {advice}"


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"imgsz": 64}, (96, 96)),  # half a stride is added
        ({"imgsz": 128, "batch_size": 1}, (96, 160)),
        ({"imgsz": 64, "task": "speed"}, (64, 64)),
        ({"imgsz": 64, "tile": 64}, (64, 64)),
        ({"imgsz": 128, "task": "speed", "augment": True}, (112, 112)),
    ],
)
def test_validation(files, tmp_path, monkeypatch, options, shape):
    monkeypatch.setattr(PyTorchRuntime, "with_raw", lambda *_: pytest.fail("images were processed"))
    config = {"weights": [str(files / "m.pt")], "data": str(files / "set.yaml"), "workers": 0, "device": "cpu"}
    with pytest.raises(SpecError, match=named(*shape)):
        validate(ValConfig.from_keywords(**config, **options, project=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("imgsz", "shape"), [(64, (64, 64)), (128, (64, 128))])
def test_detection(files, tmp_path, imgsz, shape):
    """Squares fail before the first image, rectangles with the first such image."""
    source = str(files / "images/val/p3.png")
    options = {"weights": [str(files / "m.pt")], "source": source, "imgsz": [imgsz], "device": "cpu"}
    with pytest.raises(SpecError, match=named(*shape)):
        detect(DetectConfig.from_keywords(**options, project=str(tmp_path / "runs")))
    assert (tmp_path / "runs").exists() == (imgsz == 128)


@pytest.mark.parametrize(
    ("imgsz", "dynamic", "pattern"),
    [
        (64, False, named(64, 64)),
        (64, True, named(64, 64)),
        (256, True, named(64, 64, "without --dynamic") + "|" + named(96, 160, "without --dynamic")),
    ],
)
def test_export(files, imgsz, dynamic, pattern):
    config = ExportConfig(weights=[str(files / "m.pt")], imgsz=[imgsz], include=["torchscript"], dynamic=dynamic)
    with pytest.raises(SpecError, match=pattern):
        export(config)
    assert not (files / "m.torchscript").exists()


def test_hub(files):
    with pytest.raises(SpecError, match=named(64, 128)):
        load(files / "m.pt", device="cpu")(str(files / "images/val/p3.png"), size=128)


def test_candidate_of_a_comparison(files, tmp_path):
    setting = Setting(files / "m.yaml", NAMES, threads=1)
    with pytest.raises(SpecError, match=named(64, 64, file=r"m\.yaml:5")):
        CandidateJobs(setting).structure(64, str(tmp_path / "m.pt"))


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"imgsz": 128, "rect": True, "batch_size": 1}, (64, 128)),
        ({"imgsz": 128, "batch_size": 6, "data": "flat.yaml"}, (96, 160)),  # validation batch
        ({"imgsz": 192, "multi_scale": True}, (96, 96)),
    ],
)
def test_training(files, tmp_path, options, shape):
    options = {"cfg": str(files / "m.yaml"), "workers": 0, "device": "cpu", **options}
    options["data"] = str(files / options.get("data", "set.yaml"))
    with pytest.raises(SpecError, match=named(*shape, file=r"m\.yaml:5")):
        train(TrainConfig.from_keywords(**options, project=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


def test_sizes_that_hold_each_kernel_need_no_pass(files, monkeypatch):
    """The test pass imports much of PyTorch, so val.py and detect.py skip it if possible."""
    checked: list[tuple[int, int]] = []
    monkeypatch.setattr(DetectionModel, "check_size", lambda _self, height, width, *_: checked.append((height, width)))
    runtime = open_runtime([str(files / "m.pt")], CPU)
    for shape in ((224, 640), (256, 256), (640, 224)):  # 8 cells of 32 pixels
        check_size(runtime, *shape)
    runtime.augment = True
    check_size(runtime, 256, 256)
    assert checked == [(224, 640), (640, 224), (256, 256)]
    model = DetectionModel({"nc": 1, "backbone": BACKBONE, "head": [[[-1], 1, "AnchorFreeDetect", ["nc"]]]}).eval()
    check_size(PyTorchRuntime.from_model(model, CPU), 64, 64)
    assert len(checked) == 3


@pytest.mark.parametrize(
    ("module", "cells"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), 1),
        (nn.Conv2d(3, 8, (5, 1), padding=(1, 0)), 3),
        (nn.Conv2d(3, 8, 3, dilation=4), 9),
        (nn.Conv2d(3, 8, 7, padding="same"), 7),  # upper bound
        (nn.MaxPool2d(5, 1, 2), 1),
        (nn.MaxPool2d(5, 1, 1, dilation=2), 7),
        (nn.AvgPool2d((2, 4)), 4),
        (nn.Linear(3, 8), 1),
    ],
)
def test_largest_kernel(module, cells):
    assert largest_kernel(nn.Sequential(nn.SiLU(), module)) == cells


@pytest.mark.gpu
def test_half_precision(files):
    runtime = open_runtime([str(files / "m.pt")], torch.device("cuda", 0), half=True)
    with pytest.raises(SpecError, match=named(64, 64)):
        runtime(torch.zeros(1, 3, 64, 64))
    assert runtime(torch.zeros(1, 3, 128, 128)).isfinite().all()


def test_other_errors_stay(files, monkeypatch):
    """A RuntimeError for reasons other than the size is not a user error."""
    runtime = open_runtime([str(files / "m.pt")], CPU)

    def fail(*_: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(Rows, "forward", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        runtime(torch.zeros(1, 3, 128, 128))


def test_torchscript_file_of_free_size(tmp_path, files):
    """A file has no rows to name; its last line gives the reason."""
    model = torch.jit.trace(torch.nn.Conv2d(3, 8, 128, 32), torch.zeros(1, 3, 128, 128))
    config = '{"stride": 32, "names": {"0": "disc"}, "dynamic": true, "shape": [1, 3, 128, 128]}'
    torch.jit.save(model, tmp_path / "m.torchscript", _extra_files={"config.txt": config})
    runtime = open_runtime([str(tmp_path / "m.torchscript")], CPU)
    with pytest.raises(CheckpointError, match="m.torchscript: TorchScript cannot run it: RuntimeError: .*Kernel size"):
        runtime(torch.zeros(1, 3, 64, 64))
