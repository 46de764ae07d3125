"""The tutorial form of a model YAML and its variations build, train one step, export and reload."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import models.backbones as registry
from engine.cli.plugins import load_plugins
from models.fuse import reparameterize
from models.yolo import DetectionModel
from tests.helpers.training import detection_loss

RIFORMER = {"layers": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32]}
REVVIT = {"embed_dims": 32, "num_layers": 2, "num_heads": 4, "feedforward_channels": 64}
REPMLP = {"channels": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "sharesets_nums": [1, 2, 4, 8], "nominal": 64}
NEXTVIT = {"depths": [1, 1, 1, 1], "conv_channels": [32, 32, 64, 64], "out_channels": [32, 64, 96, 128]}
PLUGIN = """
from torch import nn

class VariationNet(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.channel = [width] * 4
        steps = [nn.Conv2d(3, width, 3, 2, 1), *[nn.Conv2d(width, width, 3, 2, 1) for _ in range(4)]]
        self.steps = nn.ModuleList(nn.Sequential(step, nn.BatchNorm2d(width), nn.ReLU()) for step in steps)
    def forward(self, x):
        maps = []
        for step in self.steps:
            x = step(x)
            maps.append(x)
        return maps[1:]
"""
HEAD = [
    [-1, 1, "Conv", [32, 1, 1]],
    [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
    [[-1, "P4"], 1, "Concat", [1]],
    [-1, 1, "C3", [32, False]],
    [[-1, "P5"], 1, "Detect", ["nc", "anchors"]],
]
VARIATIONS: dict[str, list[list[Any]]] = {
    "architecture mapping": [[-1, 1, "RIFormer", [{"arch": RIFORMER}]]],
    "published argument names": [[-1, 1, "RIFormer", {"arch": RIFORMER, "out_indices": [2, 4, 6], "drop_rate": 0.1}]],
    "name in lower case": [[-1, 1, "riformer", {"arch": RIFORMER, "weights": ""}]],
    "published class name": [[-1, 1, "RevVisionTransformer", {"arch": REVVIT, "img_size": 64, "widths": 8}]],
    "class token": [[-1, 1, "RevViT", {"arch": REVVIT, "img_size": 64, "widths": 8, "with_cls_token": True}]],
    "published arch field": [[-1, 1, "RepMLPNet", {"arch": REPMLP, "reparam_conv_kernels": [1, 3]}]],
    "alias": [[-1, 1, "NextViT", {"arch": NEXTVIT, "path_dropout": 0.1, "with_extra_norm": True}]],
    "plain timm name": [[-1, 1, "test_convnext", []]],
    "timm prefix": [[-1, 1, "timm/test_resnet", {"strides": [16, 32]}]],
    "tutorial class": [[-1, 1, "VariationNet", [16]]],
    "stem row": [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "RIFormer", {"arch": RIFORMER, "in_stride": 2}]],
}


@pytest.fixture(autouse=True)
def plugin(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(registry, "_PLAIN", {})
    path = tmp_path_factory.mktemp("plugin") / "variation_net.py"
    path.write_text(PLUGIN)
    load_plugins([str(path)])
    return path


def build(name: str) -> DetectionModel:
    torch.manual_seed(0)
    anchors = [[10, 13, 16, 30], [30, 61, 62, 45]]
    spec = {"nc": 3, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": anchors}
    return DetectionModel({**spec, "backbone": [*VARIATIONS[name], [-1, 1, "SPPF", [32, 5]]], "head": HEAD})


@pytest.mark.parametrize("name", VARIATIONS)
def test_variation_trains_one_step(name: str) -> None:
    model = build(name).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    before = {key: value.clone() for key, value in model.named_parameters()}
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.4, 0.3], [1, 2, 0.3, 0.6, 0.2, 0.2]])
    detection_loss(model)(model(torch.rand(2, 3, 64, 64)), targets).total.backward()
    optimizer.step()
    changed = [key for key, value in model.named_parameters() if not torch.equal(value, before[key])]
    first = len(VARIATIONS[name]) - 1  # row of the backbone
    assert any(key.startswith(f"model.{first}.") for key in changed)
    assert f"model.{first + 1}.cv1.conv.weight" in changed


@pytest.mark.parametrize("size", [(64, 64), (96, 64)], ids=str)
def test_traced_variations_run_in_a_fresh_process(size: tuple[int, int], tmp_path: Path) -> None:
    """Tracing is the supported way to TorchScript; each file is loaded where none of our modules is imported."""
    x = torch.rand(1, 3, *size)
    for i, name in enumerate(VARIATIONS):
        model = reparameterize(build(name).eval()).fuse()
        with torch.no_grad():
            torch.jit.trace(model, x, check_trace=False).save(tmp_path / f"{i}.torchscript")
            torch.save((x, model(x)[0]), tmp_path / f"{i}.pt")
    code = (
        "import sys, torch\n"
        "for i in range(int(sys.argv[1])):\n"
        "    x, expected = torch.load(f'{i}.pt')\n"
        "    found = torch.jit.load(f'{i}.torchscript')(x)[0]\n"
        "    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)\n"
        "assert not any(name.split('.')[0] == 'models' for name in sys.modules)\n"
        "print('equal', i + 1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(len(VARIATIONS))], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == f"equal {len(VARIATIONS)}", done.stderr
