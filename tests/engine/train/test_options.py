"""Options of a training: chosen files, options without effect, batches too small for BatchNorm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from engine.cli.config import TrainConfig
from engine.devices.distributed import World
from engine.train.autobatch import needs_two_images
from engine.train.options import resolve_run, warn_without_effect, with_files
from engine.train.setup import TrainingParts, build_parts
from engine.train.trainer import train
from models.yolo import DetectionModel
from tests.helpers.training import TINY, config
from utils.errors import CheckpointError, ConfigError, DataError
from utils.files import ROOT

# A squeeze-and-excitation block with BatchNorm after global pooling, as in many timm networks.
POOLED = """
import torch
from torch import nn
from models.backbones import Backbone, FeatureLevel, register_backbone


@register_backbone
class Pooled(Backbone):
    def __init__(self):
        super().__init__()
        self.levels = (FeatureLevel(8, 8),)
        self.conv = nn.Conv2d(3, 8, 8, 8)
        self.norm = nn.BatchNorm2d(8)

    def forward_features(self, x):
        x = self.conv(x)
        return (x * self.norm(x.mean((2, 3), keepdim=True)),)

    def param_depth(self, name):
        return 0
"""


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cfg": "mien/yolov5n.yaml"}, ConfigError, r"mien/yolov5n\.yaml: no such file"),
        ({"hyp": "nowhere/hyp.scratch-low.yaml"}, ConfigError, r"nowhere/hyp\.scratch-low\.yaml: no such file"),
        ({"data": "/nowhere/shapes.yaml"}, DataError, r"/nowhere/shapes\.yaml: no such file"),
        ({"weights": "nowhere/best.pt", "cfg": ""}, CheckpointError, r"nowhere/best\.pt: no such file"),
        ({"weights": "yolov5s6.pt"}, CheckpointError, r"no such file .*; it is a release file of YOLOv5.*docs/weights"),
        ({"weights": "yolov5m-seg.pt"}, CheckpointError, r"no such file.*segmentation is not supp.* yolov5m\.pt"),
    ],
    ids=["cfg", "hyp", "data", "weights", "release", "segmentation"],
)
def test_missing_file_is_refused(project, monkeypatch, options, error, message):
    monkeypatch.chdir(project)
    with pytest.raises(error, match=message):
        train(config(project, **options))
    assert not (project / "runs").exists()


def test_chosen_files_are_recorded_as_absolute_paths(project, monkeypatch):
    monkeypatch.chdir(project)
    folder = train(config(project, cfg="tiny.yaml", data="data.yaml", hyp="hyp.scratch-low.yaml", epochs=1)).folder
    written = yaml.safe_load((folder / "opt.yaml").read_text())
    assert written["cfg"] == str(project / "tiny.yaml") and written["data"] == str(project / "data.yaml")
    assert written["hyp"] == str(ROOT / "data/hyps/hyp.scratch-low.yaml")
    assert written["given"] == {"cfg": "tiny.yaml", "data": "data.yaml", "hyp": "hyp.scratch-low.yaml"}


def test_bare_names_are_logged_once(caplog):
    caplog.set_level("INFO")
    found = with_files(TrainConfig(cfg="yolov5n.yaml"))
    assert found.cfg == str(ROOT / "models/yolov5n.yaml") and with_files(found) == found
    assert caplog.text.count("yolov5n.yaml: using") == 1


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"rect": True, "image_weights": True}, "--image-weights has no effect: --rect"),
        ({"rect": True, "close_mosaic": 3}, "--close-mosaic has no effect: --rect"),
        ({"freeze_epochs": 3}, "--freeze-epochs has no effect: nothing is frozen"),
        ({"freeze": ["2"], "freeze_epochs": 5, "epochs": 5}, "--freeze-epochs has no effect: nothing is unfrozen"),
        ({"sync_bn": True}, "--sync-bn has no effect: one process"),
        ({"save_period": 2, "nosave": True}, "--save-period has no effect: --nosave"),
        ({"weights": "a.pt", "backbone_weights": "b.pt"}, "--backbone-weights has no effect: --weights"),
        ({"partial_weights": True}, "--partial-weights has no effect"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_option_without_effect_is_named(options, flag, caplog):
    warn_without_effect(TrainConfig.from_keywords(**options), world_size=1)
    assert [record.getMessage()[: len(flag)] for record in caplog.records] == [flag]


def test_usual_options_give_no_warning(caplog):
    warn_without_effect(TrainConfig(), 1)
    warn_without_effect(TrainConfig(freeze=["backbone"], freeze_epochs=3, sync_bn=True, rect=True), 2)
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"cfg": "models/yolov5n.yaml"}, "yolov5n"),
        ({"weights": "yolov5s.pt"}, "yolov5s"),  # once the parent folder itself
        ({"cfg": "yolov5n.yaml", "weights": "yolov5s.pt"}, "yolov5n"),
    ],
    ids=["cfg", "weights", "both"],
)
def test_run_is_named_after_its_model(options, name):
    assert TrainConfig.from_keywords(name="cfg", **options).run_name == name


def test_options_without_effect_do_not_end_a_training(project):
    result = train(config(project, epochs=1, rect=True, image_weights=True, sync_bn=True, freeze_epochs=1))
    assert result.epochs == 1


def parts_of(folder: Path, **options: object) -> TrainingParts:
    return build_parts(resolve_run(config(folder, **options))[0], None, torch.device("cpu"), World())


@pytest.fixture
def pooled(project: Path) -> dict[str, object]:
    """Options of a model whose BatchNorm follows a global pooling."""
    (project / "pooled.py").write_text(POOLED)
    rows = TINY[: TINY.index("backbone:")].replace("  - [30,61, 62,45, 59,119]\n  - [116,90, 156,198, 373,326]\n", "")
    rows += "backbone:\n  - [-1, 1, Pooled, []]\nhead:\n  - [[P3], 1, Detect, [nc, anchors]]\n"
    (project / "pooled.yaml").write_text(rows)
    return {"cfg": str(project / "pooled.yaml"), "plugin": [str(project / "pooled.py")], "noautoanchor": True}


@pytest.mark.parametrize(("batch_size", "batches", "left_out"), [(3, 3, True), (9, 1, True), (4, 3, False)])
def test_last_batch_of_one_image_is_left_out(project, pooled, caplog, batch_size, batches, left_out):
    result = train(config(project, **pooled, batch_size=batch_size, epochs=1))  # 10 images
    assert result.epochs == 1
    assert ("it is left out" in caplog.text) == left_out
    loader = parts_of(project, **pooled, batch_size=batch_size).data.loader
    assert len(loader) == len(list(loader)) == batches


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 4, "quad": True}], ids=["batch", "quad"])
def test_batches_of_one_image_are_refused_before_training(project, pooled, options):
    with pytest.raises(ConfigError, match="one value per channel from one image of .*larger --batch-size"):
        train(config(project, **pooled, **options))
    assert not (project / "runs").exists()


def test_frozen_norms_take_single_images(project, pooled):
    assert len(parts_of(project, **pooled, batch_size=3, freeze=["backbone"]).data.loader) == 4


def test_multi_scale_is_checked_at_its_smallest_size(project, caplog):
    options = {"imgsz": 64, "batch_size": 3, "multi_scale": True}  # 32 pixels are 1 x 1 cells of stride 32
    assert len(parts_of(project, **options).data.loader) == 3
    assert "it is left out" in caplog.text
    assert len(parts_of(project, imgsz=64, batch_size=3).data.loader) == 4


def test_dry_run_changes_nothing():
    model = DetectionModel("models/yolov5n.yaml", nc=2).train()
    before, seed = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert needs_two_images(model, (32, 32)) and not needs_two_images(model, (64, 64))
    assert torch.equal(seed, torch.get_rng_state())
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@pytest.mark.parametrize("family", ["riformer", "revvit", "repmlp", "nextvit", "timm"])
def test_dry_run_agrees_with_a_training_step_for_every_family(family):
    model = DetectionModel(str(next(ROOT.glob(f"models/yolov5-{family}.yaml"))), nc=2).train()
    side = 2 * max(32, model.model[0].size_divisor)
    assert not needs_two_images(model, (side, side))
    model(torch.rand(1, 3, side, side))
