"""Tests of the pass over the meta device at construction."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.backbones import _PLUGINS as PLUGINS
from models.backbones import Backbone, FeatureLevel, register_backbone
from models.yolo import DetectionModel
from utils.errors import SpecError

HEAD = """
head:
  - [[-1], 1, AnchorFreeDetect, [nc]]
"""


def write(folder: Path, rows: str, keys: str = "nc: 2\n") -> Path:
    path = folder / "m.yaml"
    path.write_text(f"{keys}backbone:\n{rows}{HEAD}")
    return path


@pytest.mark.parametrize(
    ("rows", "keys", "found"),
    [
        ("  - [-1, 1, Conv, [8, 3, 2]]\n", "nc: 2\nactivation: nn.GELU(2)\n", r"m.yaml:4: row 0 \(Conv\): cannot run"),
        ("  - [-1, 1, Conv, [8, 3, 32]]\n  - [-1, 1, nn.MaxPool2d, [99, 1]]\n", "nc: 2\n", r"m.yaml:4: row 1 \(nn.Max"),
    ],
)
def test_module_that_fails_in_forward_is_named(tmp_path, rows, keys, found):
    with pytest.raises(SpecError, match=found) as error:
        DetectionModel(write(tmp_path, rows, keys))
    assert len(str(error.value).splitlines()) == 1


def test_kernel_larger_than_the_map_of_small_images_is_named(tmp_path):
    model = DetectionModel(write(tmp_path, "  - [-1, 1, Conv, [8, 3, 16]]\n  - [-1, 1, Conv, [8, 8, 1, 0]]\n"))
    model.check_size(128, 128)
    with pytest.raises(
        SpecError, match=r"m.yaml:4: row 1 \(Conv\): cannot run .* images of 64 x 128 pixels: .*larger --imgsz"
    ):
        model.check_size(64, 128)


def test_small_scale_of_test_time_augmentation_is_named(tmp_path):
    model = DetectionModel(write(tmp_path, "  - [-1, 1, Conv, [8, 3, 16]]\n  - [-1, 1, Conv, [8, 8, 1, 0]]\n"))
    with pytest.raises(SpecError, match="images of 112 x 112 pixels"):  # 0.83 * 128, in multiples of 16
        model.check_size(128, 128, augment=True)


def test_size_of_a_model_in_another_precision_is_checked(tmp_path):
    model = DetectionModel(write(tmp_path, "  - [-1, 1, Conv, [8, 3, 16]]\n  - [-1, 1, Conv, [8, 8, 1, 0]]\n"))
    model.double().check_size(128, 128)


def test_row_that_runs_at_no_size_gets_no_advice():
    rows = [[-1, 1, "Conv", [8, 3, 32]], [-1, 1, "nn.MaxPool2d", [99, 1]]]
    model = DetectionModel({"nc": 2, "backbone": rows, "head": [[[-1], 1, "AnchorFreeDetect", ["nc"]]]})
    with pytest.raises(SpecError, match=r"model: row 1 .* 640 x 640 pixels: ") as error:
        model.check_size(64, 64)
    assert "--imgsz" not in str(error.value)


class Scaled(Backbone):
    """A backbone that returns maps of another stride than it declares, or fails on the meta device."""

    fails = False
    smallest = 0

    def __init__(self, channels: int = 8, stride: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 8, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.levels = (FeatureLevel(channels, stride),)

    def forward_features(self, image: Tensor) -> tuple[Tensor, ...]:
        if self.fails and image.is_meta:
            raise NotImplementedError("no meta kernel")
        if min(image.shape[2:]) < self.smallest:
            raise RuntimeError("too small")
        return (self.norm(self.conv(image)),)


@pytest.fixture
def scaled(monkeypatch):
    monkeypatch.setattr("models.backbones._PLUGINS", dict(PLUGINS))
    return register_backbone(Scaled)


@pytest.mark.parametrize("arguments", ["{stride: 16}", "{channels: 9}"])
def test_backbone_that_returns_other_maps_than_declared_is_refused(tmp_path, scaled, arguments):
    with pytest.raises(SpecError, match=r"m.yaml:3: row 0 \(Scaled\): declares the levels .*@.* but returns"):
        DetectionModel(write(tmp_path, f"  - [-1, 1, Scaled, {arguments}]\n"))


def test_statistics_and_random_state_stay(tmp_path, scaled):
    torch.manual_seed(3)
    DetectionModel({"nc": 2, "backbone": [[-1, 1, "Scaled", []]], "head": [[[-1], 1, "AnchorFreeDetect", ["nc"]]]})
    expected = torch.rand(4)
    torch.manual_seed(3)
    model = DetectionModel(write(tmp_path, "  - [-1, 1, Scaled, []]\n"))
    assert torch.equal(torch.rand(4), expected)
    assert model.training
    assert not model.model[0].norm.num_batches_tracked
    assert not model.model[0].norm.running_mean.any()
    assert not any(p.is_meta for p in model.parameters())


class Shared(Scaled):
    """A backbone with a module of two names, a parameter of two modules, and one of two names."""

    def __init__(self) -> None:
        super().__init__()
        self.same = self.conv
        self.mix, self.tied = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.tied.weight = self.mix.weight
        self.first = self.second = nn.Parameter(torch.rand(8, 1, 1))

    def forward_features(self, image: Tensor) -> tuple[Tensor, ...]:
        (x,) = super().forward_features(image)
        return (self.tied(self.mix(x * self.first)) + self.same(image) * self.second,)


def test_shared_modules_and_parameters_stay(tmp_path, scaled):
    register_backbone(Shared)
    torch.manual_seed(3)
    expected = Shared().state_dict()
    torch.manual_seed(3)
    model = DetectionModel(write(tmp_path, "  - [-1, 1, Shared, []]\n"))
    assert model.info(64).gflops > 0
    found = model.model[0].state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert model.eval()(torch.zeros(1, 3, 64, 64))[0].isfinite().all()


def test_backbone_without_meta_kernels_is_skipped_with_a_debug_message(tmp_path, scaled, monkeypatch, caplog):
    monkeypatch.setattr(Scaled, "fails", True)
    with caplog.at_level(logging.DEBUG):
        DetectionModel(write(tmp_path, "  - [-1, 1, Scaled, []]\n  - [-1, 1, Conv, [8, 3, 2]]\n"))
    assert "row 0 (Scaled): not run on the meta device: no meta kernel" in caplog.text


def test_backbone_that_needs_larger_images_is_named(tmp_path, scaled, monkeypatch):
    monkeypatch.setattr(Scaled, "smallest", 128)
    model = DetectionModel(write(tmp_path, "  - [-1, 1, Scaled, []]\n"))
    model.check_size(128, 160)
    with pytest.raises(SpecError, match=r"m.yaml:3: row 0 \(Scaled\): cannot run .* 160 x 96 pixels: .*larger --imgsz"):
        model.check_size(160, 96)


def test_failed_backbone_row_gives_one_error(tmp_path):
    text = (Path(__file__).parents[3] / "models/yolov5-riformer.yaml").read_text()
    path = tmp_path / "broken.yaml"
    path.write_text(text.replace("[s12]", "[s13]"))
    with pytest.raises(SpecError) as error:
        DetectionModel(path)
    assert len(str(error.value).splitlines()) == 1, error.value
