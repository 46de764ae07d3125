"""Tests that run the scripts of examples/ as a user would."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from models.yolo import DetectionModel
from tests.helpers import detectors

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


@pytest.fixture(scope="module", params=["anchor", "free"])
def onnx_file(request, trained, tmp_path_factory) -> Path:
    """An exported detector of each head; the anchor-free one is random."""
    folder = tmp_path_factory.mktemp("onnx")
    weights = shutil.copy(trained[0], folder / "best.pt")
    if request.param == "free":
        detectors.save(detectors.build_anchor_free(), Path(weights))
    run("export.py", "--weights", weights, "--include", "onnx", "--imgsz", 64)
    return Path(weights).with_suffix(".onnx")


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


def test_onnx_with_opencv_finds_the_boxes_of_the_detector(onnx_file, tmp_path):
    drawn = tmp_path / "out.png"
    out = run("examples/onnx_with_opencv.py", onnx_file, IMAGE, drawn, "--imgsz", 64, "--conf", 0.001)
    boxes = re.findall(r"class \d+, confidence", out)
    assert boxes
    assert (cv2.imread(str(drawn)) != cv2.imread(str(IMAGE))).any()


def test_onnx_runtime_prints_named_boxes(onnx_file, tmp_path):
    pytest.importorskip("onnxruntime")
    script = (ROOT / "examples/onnx_runtime.py").read_text().replace("0.25", "0.001")
    (tmp_path / "low.py").write_text(script)
    out = run(tmp_path / "low.py", onnx_file, IMAGE)
    assert re.search(r"^\w+ 0\.\d\d -?\d+ -?\d+ \d+ \d+$", out, re.MULTILINE), out


def test_opencv_cpp_compiles(tmp_path):
    flags = (
        shutil.which("g++") and shutil.which("pkg-config") and _output("pkg-config", "--cflags", "--libs", "opencv4")
    )
    if not flags:
        pytest.skip("needs g++ and the development files of OpenCV")
    command = [
        "g++",
        "-std=c++17",
        "-Wall",
        "-Werror",
        str(ROOT / "examples/onnx_opencv.cpp"),
        "-o",
        str(tmp_path / "detect"),
    ]
    done = subprocess.run([*command, *flags.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    usage = subprocess.run([str(tmp_path / "detect")], capture_output=True, text=True)
    assert (usage.returncode, usage.stderr.startswith("usage")) == (2, True)


_NODE_TEST = """
import { detect } from %s;
class Tensor { constructor(type, data, dims) { Object.assign(this, { type, data, dims }); } }
const rows = new Float32Array([
  32, 16, 20, 10, 0.9, 0.9, 0.1,
  33, 16, 20, 10, 0.8, 0.9, 0.1,
  10, 10, 8, 8, 0.5, 0.1, 0.9,
  33, 16, 20, 10, 0.8, 0.1, 0.9,
  50, 50, 4, 4, 0.2, 0.9, 0.1,
]);
let input;
const session = { run: async ({ images }) => { input = images; return { output0: { dims: [1, 5, 7], data: rows } }; } };
const data = new Uint8ClampedArray(128 * 64 * 4).map((_, i) => [255, 51, 0, 255][i %% 4]);
const found = await detect({ Tensor }, session, { data, width: 128, height: 64 }, 64);
const at = (c, y) => input.data[c * 4096 + y * 64 + 5];
console.log(JSON.stringify({ found, dims: input.dims, top: [at(0, 5), at(1, 5), at(2, 5)], padding: at(0, 40) }));
"""


def test_onnx_web_scales_and_suppresses(tmp_path):
    if not shutil.which("node"):
        pytest.skip("needs Node.js")
    (tmp_path / "test.mjs").write_text(_NODE_TEST % json.dumps((ROOT / "examples/onnx_web.mjs").as_uri()))
    done = subprocess.run(["node", str(tmp_path / "test.mjs")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["dims"] == [1, 3, 64, 64]
    np.testing.assert_allclose(result["top"], [1, 0.2, 0], atol=1e-6)
    assert result["padding"] == pytest.approx(114 / 255)
    assert [(d["cls"], round(d["score"], 2)) for d in result["found"]] == [(0, 0.81), (1, 0.72), (1, 0.45)]
    assert result["found"][0]["box"] == pytest.approx([44, 22, 84, 42])  # twice the network's pixels


def _output(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True).stdout


def test_torch_hub_prints_detections(trained):
    out = run("examples/torch_hub.py", trained[0], IMAGE)
    assert "image 1/1" in out


def test_custom_backbone_yaml_differs_from_the_plain_model_in_the_backbone_only():
    with pytest.raises(ValueError, match="TinyConvNet"):  # without the plug-in the name is unknown
        DetectionModel(str(ROOT / "examples/custom_backbone.yaml"))
