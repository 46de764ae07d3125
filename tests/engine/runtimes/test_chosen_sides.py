"""Input size where `--imgsz` is not given: that of training, 640 for official checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.cli.config import DetectConfig, ValConfig
from engine.evaluate.evaluator import prepare
from engine.export.config import ExportConfig
from engine.export.exporter import input_shape
from engine.hub.model import load
from engine.predict.predictor import detect
from engine.runtimes.exported import ExportedRuntime
from engine.runtimes.metadata import Metadata
from engine.runtimes.pytorch import chosen_sides
from engine.runtimes.registry import sides_for
from models.checkpoint.io import write_checkpoint
from models.loading import load_detector
from models.yolo import DetectionModel
from tests.helpers.checkpoints import content, detector
from utils.errors import ConfigError

DATA = "path: .\nval: nowhere.txt\nnames: {0: cat, 1: dog}\n"


def model_trained_at(trained: int | None, official: bool = False) -> DetectionModel:
    model = detector()
    model.trained_imgsz = trained
    model.default_imgsz = trained if trained and not official else 640
    return model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of this project that was trained at 192 pixels."""
    return write_checkpoint(tmp_path / "own.pt", content(detector(), metadata={"imgsz": 192}))


@pytest.mark.parametrize(
    ("sides", "given", "trained", "official", "chosen", "warned"),
    [
        ([640], False, None, False, [640], False),  # unknown size
        ([640], False, 192, False, [192], False),
        ([640, 640], False, 192, False, [192, 192], False),
        ([640], True, 192, False, [640], True),
        ([256], True, 192, False, [256], False),  # within a factor of 1.5
        ([96], True, 192, False, [96], True),
        ([640], False, 1280, True, [640], True),  # official checkpoints keep 640
        ([640], False, 800, True, [640], True),
        ([640], False, 640, True, [640], False),
        ([1280], True, 1280, True, [1280], False),
    ],
)
def test_chosen_sides_by_training_size(sides, given, trained, official, chosen, warned, caplog):
    assert chosen_sides(sides, given, [model_trained_at(trained, official)]) == chosen
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert bool(warnings) == warned
    if warned:
        assert f"--imgsz {trained}" in warnings[0] and ("opt.imgsz" in warnings[0]) == official


def test_chosen_sides_of_an_ensemble_is_the_largest():
    assert chosen_sides([640], False, [model_trained_at(192), model_trained_at(256)]) == [256]


@pytest.mark.parametrize("stored", [None, "x", True, 3, 10**9, 192.0])
def test_load_detector_ignores_an_odd_training_size(tmp_path, stored):
    path = write_checkpoint(tmp_path / "own.pt", content(detector(), metadata={"imgsz": stored}))
    model = load_detector(path)
    assert (model.trained_imgsz, model.default_imgsz) == (None, 640)


def test_commands_default_to_the_training_size(checkpoint, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    (tmp_path / "d.yaml").write_text(DATA)
    (tmp_path / "nowhere.txt").touch()
    for options, side in (({}, 192), ({"imgsz": 640}, 640), ({"imgsz": 256}, 256)):
        given = ValConfig.from_keywords(
            weights=[str(checkpoint)], data=str(tmp_path / "d.yaml"), device="cpu", **options
        )
        assert prepare(given)[0].imgsz == side
        shape = input_shape(ExportConfig.from_keywords(**options), load_detector(checkpoint))
        assert (shape.height, shape.width) == (side, side)
    assert "--imgsz not given: 192 is used" in caplog.text
    results = load(str(checkpoint), device="cpu")
    seen = []
    monkeypatch.setattr("engine.hub.model.input_size", lambda sides, runtime: seen.append(sides) or (192, 192))
    image = torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()
    results(image)
    results(image, size=640)
    assert seen == [[192], [640]]


def test_detect_defaults_to_the_training_size(checkpoint, tmp_path, monkeypatch):
    def stop(sides: list[int], runtime: object) -> None:
        raise ConfigError(f"sides {sides}")

    monkeypatch.setattr("engine.predict.predictor.input_size", stop)
    with pytest.raises(ConfigError, match=r"sides \[192\]"):
        detect(DetectConfig.from_keywords(weights=[str(checkpoint)], device="cpu", project=str(tmp_path)))


class File(ExportedRuntime):
    """An exported file for one class, with free sizes or a fixed one."""

    def __init__(self, exported: tuple[int, int] | None, fixed: bool) -> None:
        sides = (192, 192) if fixed else (None, None)
        self._describe("x.onnx", Metadata({0: "x"}, imgsz=exported), torch.device("cpu"), (None, 3, *sides))

    def _infer(self, images: torch.Tensor) -> torch.Tensor:
        return images


@pytest.mark.parametrize(
    ("imgsz", "fixed", "sides", "given", "chosen"),
    [
        ((192, 192), False, [640], False, [192]),
        ((192, 192), False, [640, 640], False, [192, 192]),
        ((192, 256), False, [640], False, [192, 256]),
        ((192, 192), False, [640], True, [640]),
        ((192, 192), True, [640], False, [640]),  # `input_size` takes the fixed size, and logs it
        (None, False, [640], False, [640]),  # YOLOv5's files
    ],
)
def test_sides_for_an_exported_file(imgsz, fixed, sides, given, chosen):
    assert sides_for(File(imgsz, fixed), sides, given) == chosen
