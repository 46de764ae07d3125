"""Tests that the commands import expensive packages only when they need them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.helpers import detectors
from tests.helpers.detection_data import write_data
from tests.helpers.training import write_project
from utils.files import ROOT

HEAVY = ("torchvision", "torch._dynamo", "timm", "onnx", "matplotlib")


def imported(script: str, folder: Path, options: Mapping[str, object]) -> str:
    """Run a command in a new process and return the modules of HEAVY that it imported, joined by spaces."""
    code = f"import sys, {script}\n{script}.run(**{dict(options)!r})\n"
    code += f"print('imported', *(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append({str(ROOT)!r})\n{code}"],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].removeprefix("imported").strip()


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("val", {"data": "set.yaml", "batch_size": 2, "workers": 1, "noplots": True}),
        ("val", {"data": "set.yaml", "batch_size": 2, "workers": 0}),
        ("detect", {"source": "images/val"}),
    ],
)
def test_val_and_detect_import_no_heavy_package(tmp_path, script, options):  # charts: in another process
    write_data(tmp_path)
    weights = detectors.save(detectors.build("yolov5"), tmp_path / "tiny.pt")
    options = {"weights": [str(weights)], "imgsz": [64] if script == "detect" else 64, "device": "cpu", **options}
    assert imported(script, tmp_path, options) == ""
    assert any((tmp_path / f"runs/{script}/exp").iterdir()) != ("noplots" in options)


def test_train_without_plots_imports_no_package_of_plots_or_exports(tmp_path):
    write_project(tmp_path)
    options = {"cfg": "tiny.yaml", "data": "data.yaml", "imgsz": 64, "epochs": 1, "batch_size": 4, "workers": 0}
    found = imported("train", tmp_path, {**options, "device": "cpu", "noplots": True}).split()
    assert not {"timm", "onnx", "matplotlib"} & set(found)
