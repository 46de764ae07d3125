"""Model YAMLs, changed in structure, values and text: built, or refused with a located message."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import yaml

from models.yolo import DetectionModel
from tests.helpers.fuzz import Case, WrongResult, faults, seeds
from tests.helpers.mutations import ODD_VALUES, mutate_tree, mutate_yaml
from utils.files import ROOT

pytestmark = pytest.mark.fuzz
FILES = [
    "models/yolov5n.yaml",
    "models/yolov5n-free.yaml",
    "models/hub/yolov5-bifpn.yaml",
    "models/hub/yolov3-tiny.yaml",
]
VALUES = [*ODD_VALUES, "nn.GELU(2)", "P4", "image", "anchors", "nc", [-1, 6], [[1, 2], [3, 4]], -25, 999, 99_999, 0.001]


def make(rng: random.Random, folder: Path) -> Case:
    text = (ROOT / rng.choice(FILES)).read_text()
    if rng.random() < 0.6:
        tree = yaml.safe_load(text)
        kind = mutate_tree(tree, rng, VALUES)
        try:
            text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
        except (ValueError, yaml.YAMLError):  # an integer of thousands of digits
            text = f"nc: {'9' * 5000}\n{text}"
    else:
        text, kind = mutate_yaml(text, rng)
    path = folder / "m.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")

    def run() -> None:
        torch.manual_seed(0)
        model = DetectionModel(path, nc=2).eval()
        side = model.model.size_multiple
        with torch.no_grad():
            rows = model(torch.zeros(1, model.spec.channels or 3, 2 * side, 2 * side))[0]
        if rows.shape[2] != 7:
            raise WrongResult(f"rows of {rows.shape[2]} numbers")

    return Case(run, kind, text)


def test_model_yaml(tmp_path: Path) -> None:
    assert faults(make, seeds(), tmp_path) == []
