"""Tests that run the scripts of examples/ as a user would."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from models.yolo import DetectionModel

ROOT = Path(__file__).resolve().parents[1]
IMAGE = ROOT / "data/images/shapes_1.jpg"


def run(*words: object) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, str]:
    """Weights and output of the Python training example."""
    project = tmp_path_factory.mktemp("examples")
    out = run("-m", "examples.train_from_python", "--epochs", 1, "--imgsz", 64, "--project", project)
    weights = re.search(r"weights: (\S+)", out)
    assert weights, out
    return Path(weights[1]), out


def test_train_from_python_trains_and_detects(trained):
    weights, out = trained
    assert weights.is_file()
    assert re.search(r"\d+ detections in 4 images", out)


def test_custom_backbone_trains_one_epoch(tmp_path):
    options = ["--cfg", "examples/custom_backbone.yaml", "--plugin", "examples/custom_backbone.py", "--workers", 0]
    out = run(
        "train.py", *options, "--epochs", 1, "--imgsz", 64, "--batch-size", 32, "--project", tmp_path, "--noplots"
    )
    assert "TinyConvNet" in out
    assert (tmp_path / "exp/weights/last.pt").is_file()


def test_onnx_with_opencv_finds_the_boxes_of_the_detector(trained, tmp_path):
    weights, _ = trained
    run("export.py", "--weights", weights, "--include", "onnx", "--imgsz", 64)
    model, drawn = weights.with_suffix(".onnx"), tmp_path / "out.png"
    out = run("examples/onnx_with_opencv.py", model, IMAGE, drawn, "--imgsz", 64, "--conf", 0.001)
    boxes = re.findall(r"class \d+, confidence", out)
    assert boxes
    assert (cv2.imread(str(drawn)) != cv2.imread(str(IMAGE))).any()


def test_torch_hub_prints_detections(trained):
    out = run("examples/torch_hub.py", trained[0], IMAGE)
    assert "image 1/1" in out


def test_custom_backbone_yaml_differs_from_the_plain_model_in_the_backbone_only():
    with pytest.raises(ValueError, match="TinyConvNet"):  # without the plug-in the name is unknown
        DetectionModel(str(ROOT / "examples/custom_backbone.yaml"))
