"""train.run, val.run, detect.run and export.run: keywords, result objects, UserError."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import detect
import export
import train
import val
from engine.cli.config import DetectConfig, TrainConfig, ValConfig
from engine.cli.keywords import settled
from engine.export.config import ExportConfig
from models.loading import load_detector
from tests.helpers.training import TINY
from utils.errors import ConfigError, UserError


@pytest.mark.parametrize(
    ("config", "name", "value", "expected"),
    [
        (DetectConfig, "weights", "best.pt", ["best.pt"]),
        (DetectConfig, "weights", Path("a") / "best.pt", [str(Path("a/best.pt"))]),
        (DetectConfig, "weights", (Path("a.pt"), "b.pt"), ["a.pt", "b.pt"]),
        (DetectConfig, "imgsz", 320, [320]),
        (DetectConfig, "imgsz", (320, 640), [320, 640]),
        (DetectConfig, "source", Path("x.jpg"), "x.jpg"),
        (DetectConfig, "source", 0, "0"),
        (DetectConfig, "classes", 2, [2]),
        (DetectConfig, "classes", None, None),
        (DetectConfig, "conf_thres", 1, 1.0),
        (DetectConfig, "device", torch.device("cuda", 1), "cuda:1"),
        (DetectConfig, "device", 0, "0"),
        (TrainConfig, "freeze", [10], ["10"]),
        (TrainConfig, "freeze", "backbone", ["backbone"]),
        (TrainConfig, "imgsz", 320.0, 320),
        (TrainConfig, "cache", True, "ram"),
        (TrainConfig, "cache", False, None),
        (TrainConfig, "cache", "disk", "disk"),
        (TrainConfig, "resume", True, True),
        (TrainConfig, "resume", Path("last.pt"), "last.pt"),
        (TrainConfig, "epochs", None, 100),
        (ExportConfig, "include", "onnx", ["onnx"]),
        (ValConfig, "weights", None, []),
        (ValConfig, "half", True, True),
    ],
)
def test_settled_converts_values(config, name, value, expected):
    found = settled(fields(config), {name: value})[name]
    assert found == expected and type(found) is type(expected)
    assert settled(fields(config), {name: found})[name] == expected


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", "3", r"epochs='3': an integer is needed"),
        ("epochs", 2.5, r"epochs=2.5: an integer is needed"),
        ("imgsz", (640, 640), r"imgsz=\(640, 640\): an integer is needed"),
        ("noplots", "yes", r"noplots='yes': True or False is needed"),
        ("label_smoothing", "0.1", r"a number is needed"),
        ("data", {"nc": 1}, r"a string or a path is needed"),
        ("weights", True, r"a string or a path is needed"),
    ],
)
def test_settled_refuses_other_types(name, value, message):
    with pytest.raises(ConfigError, match=message):
        settled(fields(TrainConfig), {name: value})


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A dataset of a few images, a small model, and an image."""
    folder = tmp_path_factory.mktemp("python")
    (folder / "data.yaml").write_text(
        "path: set\ntrain: images/train\nval: images/val\nnames: {0: circle, 1: square, 2: cross}\n"
        "generate: {kind: shapes, train: 6, val: 2, test: 1, imgsz: 96, seed: 3}\n"
    )
    (folder / "tiny.yaml").write_text(TINY)
    assert cv2.imwrite(str(folder / "a.png"), np.full((64, 96, 3), 90, np.uint8))
    return folder


def test_train_val_detect_export(place):
    """The example of docs/python.md with `Path` objects."""
    result = train.run(
        cfg=place / "tiny.yaml", data=place / "data.yaml", imgsz=64, epochs=1, batch_size=2, workers=0, noplots=True,
        device="cpu", project=place / "runs",
    )  # fmt: skip
    assert result.epochs == 1 and result.best.is_file() and 0 <= result.metrics.map50 <= 1
    checked = val.run(weights=result.best, data=place / "data.yaml", imgsz=64, workers=0, project=place / "val")
    assert checked.map == pytest.approx(result.metrics.map, abs=1e-6) and checked.images == 2
    report = detect.run(weights=result.best, source=place / "a.png", imgsz=64, device="cpu", project=place / "detect")
    assert report.frames == 1 and (report.folder / "a.png").is_file() and not report.failures
    done = export.run(weights=result.best, include="torchscript", imgsz=64, data=place / "data.yaml")
    assert [Path(a.path).suffix for a in done.exported_files] == [".torchscript"] and not done.failures
    assert load_detector(result.best).names == {0: "circle", 1: "square", 2: "cross"}


@pytest.mark.parametrize(
    ("call", "options", "message"),
    [
        (train.run, {"epoch": 3}, "unknown option 'epoch'; did you mean 'epochs'"),
        (train.run, {"cfg": "nowhere.yaml"}, "nowhere.yaml"),
        (train.run, {"epochs": 0}, "out of range"),
        (val.run, {"weights": "nowhere.pt"}, "nowhere.pt"),
        (val.run, {"task": "tests"}, "'tests' is not one of"),
        (detect.run, {"weights": "nowhere.pt"}, "nowhere.pt"),
        (detect.run, {"imgsz": "big"}, "an integer is needed"),
        (export.run, {"weights": "nowhere.pt"}, "nowhere.pt"),
        (export.run, {"include": "onyx"}, "did you mean 'onnx'"),
    ],
)
def test_run_raises_user_errors(call, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        call(**options)
    assert list(tmp_path.iterdir()) == []
