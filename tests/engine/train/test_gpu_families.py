"""Training, validation, detection and hub of every family on a CUDA device, end to end."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from engine.cli.config import DetectConfig, ValConfig
from engine.evaluate.evaluator import validate
from engine.hub.model import HubModel, load
from engine.predict.predictor import detect
from engine.train.trainer import train
from models.checkpoint.io import read_checkpoint
from tests.helpers.detectors import BACKBONES, build, save
from tests.helpers.training import config, rows
from utils.files import ROOT

pytestmark = pytest.mark.gpu
FAMILIES = ["yolov5", "riformer", "repmlp", "revvit", "nextvit", "timm"]


@pytest.fixture
def frame(tmp_path: Path) -> Path:
    """An image with some structure."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "frame.png"), cv2.resize(pixels, (96, 64)))
    return tmp_path / "frame.png"


@pytest.mark.parametrize("amp", ["fp16", "bf16", "off"])
@pytest.mark.parametrize("family", ["yolov5n", "free", *FAMILIES[1:]])
def test_training(family, amp, project: Path) -> None:
    """An epoch with validation: finite losses, changed weights, a checkpoint that a CPU reads."""
    options = {"head": "free"} if family == "free" else {}
    if family == "yolov5n":
        options["cfg"] = str(ROOT / "models/yolov5n.yaml")
    elif family in BACKBONES:
        (project / "family.yaml").write_text(yaml.safe_dump(build(family).yaml))
        options["cfg"] = str(project / "family.yaml")
    result = train(config(project, device="0", amp=amp, epochs=1, **options))
    (row,) = rows(result.folder)
    assert torch.isfinite(torch.tensor(row)).all() and min(row[1:3]) > 0
    assert (
        result.best is not None
        and read_checkpoint(result.best).state.keys() == read_checkpoint(result.last).state.keys()
    )


@pytest.mark.parametrize(
    "options", [{}, {"half": True}, {"amp": "fp16"}, {"augment": True}, {"ensemble": True}], ids=str
)
def test_validation_gives_the_metrics_of_a_cpu(options, project: Path) -> None:
    members = 2 if options.pop("ensemble", False) else 1
    weights = [str(save(build("yolov5", seed), project / f"{seed}.pt")) for seed in range(members)]
    common = {"weights": weights, "data": str(project / "data.yaml"), "imgsz": 64, "batch_size": 3, "single_cls": True}
    on_gpu, on_cpu = (
        validate(ValConfig.from_keywords(**common, **given, device=device, project=str(project / "val"), workers=0))
        for device, given in (("0", options), ("cpu", {k: v for k, v in options.items() if k == "augment"}))
    )
    assert on_gpu.map50 == pytest.approx(on_cpu.map50, abs=0.02)
    assert on_gpu.mr == pytest.approx(on_cpu.mr, abs=0.05)


@pytest.mark.parametrize("options", [{}, {"half": True}, {"augment": True}, {"ensemble": True}], ids=str)
def test_detection_finds_the_boxes_of_a_cpu(options, frame: Path) -> None:
    members = 2 if options.pop("ensemble", False) else 1
    weights = [str(save(build("yolov5", seed), frame.parent / f"{seed}.pt")) for seed in range(members)]
    found = []
    for device in ("0", "cpu"):
        given = options if device == "0" else {k: v for k, v in options.items() if k != "half"}
        detect(
            DetectConfig.from_keywords(
                weights=weights, source=str(frame), imgsz=[64], conf_thres=0.02, device=device, save_txt=True,
                project=str(frame.parent), name=f"on{device}", **given,
            )
        )  # fmt: skip
        labels = next((frame.parent / f"on{device}").rglob("frame.txt")).read_text().splitlines()
        found.append(sorted([float(cell) for cell in line.split()] for line in labels))
    assert abs(len(found[0]) - len(found[1])) <= (2 if options else 0) and len(found[1]) > 2
    if not options:
        np.testing.assert_allclose(found[0], found[1], atol=2e-3)


def test_hub_model(frame: Path) -> None:
    weights = save(build("yolov5"), frame.parent / "x.pt")
    found = []
    for device in ("0", "cpu"):
        model = load(str(weights), device=device)
        assert isinstance(model, HubModel) and model.device.type == ("cuda" if device == "0" else "cpu")
        model.conf = 0.02
        found.append(torch.as_tensor(model(str(frame), size=64).xyxy[0]).cpu())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=0.05)
    assert len(found[0])
