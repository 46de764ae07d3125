"""The example of docs/add-your-backbone.md and plug-in files of version 0.1 work; faulty backbones fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.cli.plugins import load_plugins
from models import backbones
from models.backbones import FeatureLevel
from models.yolo import DetectionModel
from utils.yaml_lines import load_yaml, plain

ROOT = Path(__file__).resolve().parents[1]
DOC = ROOT / "docs" / "add-your-backbone.md"


def example() -> str:
    found = re.search(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


def contract(file: Path, name: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_backbone_contract.py"]
    done = subprocess.run(
        [*command, "--backbone", f"{file}:{name}", "-k", name],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_it_is_short() -> None:
    lines = [line for line in example().splitlines() if line.strip()]
    assert len(lines) < 30


def test_it_passes_the_contract(tmp_path: Path) -> None:
    (tmp_path / "tiny_net.py").write_text(example(), encoding="utf-8")
    status, text = contract(tmp_path / "tiny_net.py", "TinyNet")
    assert status == 0, text
    assert re.search(r"\b13 passed", text), text


def test_it_is_a_row_of_a_detector(tmp_path: Path) -> None:
    (tmp_path / "tiny_net.py").write_text(example(), encoding="utf-8")
    load_plugins([str(tmp_path / "tiny_net.py")])
    spec = plain(load_yaml(ROOT / "models" / "yolov5-riformer.yaml"))
    spec["backbone"][0][2:] = ["TinyNet", {"width": 24}]
    model = DetectionModel(spec, nc=3).eval()
    assert model.model[0].levels == (FeatureLevel(96, 8), FeatureLevel(192, 16), FeatureLevel(384, 32))
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 96))[0].shape == (1, 3 * (8 * 12 + 4 * 6 + 2 * 3), 8)


# Plug-in file as written for version 0.1: it imports from `models.backbones.base` and registers under a name.
PLUGIN_0_1 = """
from torch import nn
from models.backbones import create_backbone, list_backbones, register_backbone
from models.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone, FeatureLevel

assert "riformer_s12" in list_backbones()


@register_backbone("old_net")
class OldNet(Backbone):
    NEW_KEYS = ("stem.*",)

    def __init__(self, width=8, frozen_stages=-1, norm_eval=False, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__(True, mean, std)
        widths = [width, 2 * width, 3 * width, 4 * width]
        self.inner = create_backbone("riformer_s12", arch={"layers": [1] * 4, "embed_dims": widths})
        self.stem = nn.Conv2d(3, 3, 1)
        self.levels = tuple(FeatureLevel(level.channels, level.stride) for level in self.inner.levels)
        self.size_divisor = 32
        self.stage_sizes = (1,)
        self.hold(frozen_stages, norm_eval)

    def forward(self, image):
        return tuple(self.inner.forward_features(self.stem(self.normalized(image))))

    def param_depth(self, name):
        return 0 if name.startswith("stem.") else 1
"""


def test_plugin_of_version_0_1_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "_PLUGINS", {})
    (tmp_path / "old_net.py").write_text(PLUGIN_0_1, encoding="utf-8")
    load_plugins([str(tmp_path / "old_net.py")])
    assert backbones.list_backbones()[-1] == "old_net"
    backbone = backbones.create_backbone("old_net", width=16, frozen_stages=0)
    assert backbone.levels == tuple(FeatureLevel(16 * (i + 1), 4 << i) for i in range(4))
    assert not backbone.get_parameter("stem.weight").requires_grad
    maps = backbone(torch.rand(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(1, 16 * (i + 1), 16 >> i, 24 >> i) for i in range(4)]


FAULTS = {
    "declares other channels": (
        ("width * stride // 2", "width * stride"),
        "test_returned_levels_are_the_declared_ones",
    ),
    "has a part that nothing depends on": (
        ("self.stem = ", "self.spare = nn.Linear(2, 2)\n        self.stem = "),
        "test_every_parameter_gets_a_gradient",
    ),
    "is deployed into something else": (
        (
            "    def forward_features",
            "    def reparameterize(self):\n        self.stem[0][1].eps *= 2\n\n    def forward_features",
        ),
        "test_reparameterized_form_computes_the_same",
    ),
    "re-seeds the generator": (
        (
            "x, maps = self.stem(image), []",
            "__import__('torch').manual_seed(1)\n        x, maps = self.stem(image), []",
        ),
        "test_evaluation_leaves_random_numbers_and_state_alone",
    ),
    "probes itself in training mode": (
        ("        self.levels", "        self.stem(__import__('torch').zeros(2, 3, 64, 64))\n        self.levels"),
        "test_construction_runs_nothing_through_batch_norm",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_contract_sees(fault: str, tmp_path: Path) -> None:
    (old, new), failing = FAULTS[fault]
    text = example()
    assert old in text
    (tmp_path / "wrong_net.py").write_text(text.replace(old, new), encoding="utf-8")
    status, output = contract(tmp_path / "wrong_net.py", "TinyNet")
    assert status == 1
    assert re.search(rf"FAILED .*{failing}", output), output
