"""Plain modules, as tutorials write them, as backbones of a model row."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import models.backbones as registry
from engine.cli.plugins import load_plugins
from models.backbones import backbone_from_row
from models.loading import spec_without_weights
from models.yolo import DetectionModel
from utils.errors import SpecError

TUTORIAL = """
import torch
from torch import nn

class TutorialNet(nn.Module):
    def __init__(self, width=8, weights=''):
        super().__init__()
        steps = [(3, width), (width, width), (width, 2 * width), (2 * width, 4 * width), (4 * width, 8 * width)]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU(), nn.Dropout(0.1)) for a, b in steps
        )
        self.ATTRIBUTE = [b for a, b in steps[1:]]
    def forward(self, x):
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[1:]

def tutorial_net(weights=''):
    return TutorialNet(4)

def no_module():
    return 3

class Logits(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))
"""
MODEL = {
    "nc": 3,
    "depth_multiple": 0.33,
    "width_multiple": 0.25,
    "anchors": 2,
    "backbone": [[-1, 1, "TutorialNet", []], [-1, 1, "SPPF", [64, 5]]],
    "head": [[-1, 1, "nn.Upsample", [None, 2, "nearest"]], [[-1, 3], 1, "Concat", [1]],
             [[2, -1, 5], 1, "Detect", ["nc", "anchors"]]],
}  # fmt: skip


@pytest.fixture(autouse=True)
def clean_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_PLAIN", {})


def load(folder: Path, attribute: str = "channel", text: str = TUTORIAL) -> None:
    path = folder / f"tutorial_{attribute}.py"
    path.write_text(text.replace("ATTRIBUTE", attribute))
    load_plugins([str(path)])


@pytest.mark.parametrize("attribute", ["channel", "channels", "width_list", "unrelated"])
def test_adapter_measures_levels(attribute: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(tmp_path, attribute)
    with caplog.at_level("INFO"):
        model = DetectionModel(MODEL)
    assert "8 @ 4, 16 @ 8, 32 @ 16, 64 @ 32" in caplog.text
    assert model.stride.tolist() == [8, 16, 32]
    raw = model.train()(torch.rand(2, 3, 64, 96))
    assert [tuple(level.shape[2:4]) for level in raw] == [(8, 12), (4, 6), (2, 3)]
    sum(level.sum() for level in raw).backward()
    assert all(p.grad is not None for p in model.model[0].parameters())


def test_adapter_changes_no_statistics_and_no_random_state(tmp_path: Path) -> None:
    load(tmp_path)
    torch.manual_seed(0)
    backbone_from_row("TutorialNet", [])
    after = torch.rand(4)
    torch.manual_seed(0)
    plain = registry._PLAIN["TutorialNet"].arguments["factory"]()
    assert torch.equal(after, torch.rand(4))
    built = backbone_from_row("TutorialNet", [])
    for key, value in built.state_dict().items():
        if "running" in key or "num_batches" in key:
            assert torch.equal(value, plain.state_dict()[key.removeprefix("network.")]), key


@pytest.mark.parametrize(
    ("name", "args", "width"),
    [("TutorialNet", [], 8), ("TutorialNet", [False], 8), ("TutorialNet", [""], 8), ("TutorialNet", [16], 16),
     ("TutorialNet", {"width": 4}, 4), ("tutorial_net", [], 4), ("tutorial_net", [""], 4)],
)  # fmt: skip
def test_rows_of_plain_classes_and_functions(name: str, args: Any, width: int, tmp_path: Path) -> None:
    load(tmp_path)
    assert backbone_from_row(name, args).levels[0].channels == width


def test_adapter_refuses_what_is_no_backbone(tmp_path: Path) -> None:
    load(tmp_path)
    with pytest.raises(SpecError, match="no_module returns int; a torch.nn.Module is needed"):
        backbone_from_row("no_module", [])
    with pytest.raises(SpecError, match=r"Logits: a 256 x 256 image gives \[\(1, 3\)\]; feature maps"):
        backbone_from_row("Logits", [])
    load(tmp_path, "channels", TUTORIAL.replace("steps[1:]]", "steps[:4]]"))
    with pytest.raises(SpecError, match=r"channels is \[8, 8, 16, 32\], but its maps have \[8, 16, 32, 64\]"):
        backbone_from_row("TutorialNet", [])


def test_plain_class_with_the_name_of_a_built_in_backbone_is_refused(tmp_path: Path) -> None:
    load(tmp_path, "width_list", TUTORIAL.replace("TutorialNet", "RIFormer"))
    with pytest.raises(SpecError, match="'RIFormer' is a built-in backbone, and a class of a plug-in file"):
        backbone_from_row("RIFormer", [])


def test_adapted_backbone_copies_and_reloads(tmp_path: Path) -> None:
    load(tmp_path)
    model = DetectionModel(MODEL).eval()
    again = DetectionModel(copy.deepcopy(model.yaml)).eval()
    again.load_state_dict(model.state_dict())
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x)[0], again(x)[0])


VARIANT = """

class Variant(TutorialNet):
    def __init__(self, half=False, width=8, pretrained=False):
        super().__init__(width // 2 if half else width)
        assert not pretrained
"""


def test_checkpoint_keeps_positional_arguments_of_plain_class(tmp_path: Path) -> None:
    load(tmp_path, text=TUTORIAL + VARIANT)
    row = [-1, 1, "Variant", [True, 32, False]]
    model = DetectionModel({**MODEL, "backbone": [row, MODEL["backbone"][1]]})
    again = DetectionModel(spec_without_weights(model.yaml))
    assert [level.channels for level in again.model[0].levels] == [16, 32, 64, 128]
    request = {"backbone": [[-1, 1, "Variant", [True, 32, True]]]}
    assert spec_without_weights(request) == {"backbone": [row]}


def test_backbone_weights_of_plain_class(tmp_path: Path) -> None:
    load(tmp_path)
    spec = {**MODEL, "backbone": [[-1, 1, "TutorialNet", [16]], MODEL["backbone"][1]]}
    with pytest.raises(SpecError, match="weights: 'missing.pth' is not a file"):
        DetectionModel(spec, backbone_weights="missing.pth")
    torch.save(backbone_from_row("TutorialNet", [16]).state_dict(), tmp_path / "w.pth")
    model = DetectionModel(spec, backbone_weights=str(tmp_path / "w.pth"))
    assert model.model[0].levels[0].channels == 16
