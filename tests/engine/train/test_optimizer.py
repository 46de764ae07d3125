"""Parameter groups, averaging and freezing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.cli.config import Hyperparameters, TrainConfig
from engine.train.ema import ModelEma
from engine.train.optimizer import (
    build_optimizer,
    describe_groups,
    lr_scales,
    parameter_groups,
)
from engine.train.options import choose_hyperparameters, with_recipe
from engine.train.schedule import StepSettings, apply_settings
from models.backbones.base import Backbone, FeatureLevel
from models.yolo import DetectionModel
from tests.helpers.detectors import build
from utils.errors import ConfigError
from utils.files import ROOT


class _Odd(Backbone):
    """A backbone with parameter names that no rule by name covers."""

    levels = (FeatureLevel(4, 4),)

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 9, 4))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.gamma = nn.Parameter(torch.ones(4))
        self.affine = nn.Conv2d(4, 4, 1, groups=4)
        self.proj = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.tied = self.proj


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(_Odd(), nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.MultiheadAttention(8, 2))


def test_every_parameter_in_one_group():
    model = _Model()
    groups = parameter_groups(model, 0.1)
    found = [id(p) for g in groups for p in g["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())


def test_no_decay_for_tokens_scales_and_embeddings():
    model = _Model()
    names = {id(p): n for n, p in model.named_parameters()}
    biases, weights, norms = [{names[id(p)] for p in g["params"]} for g in parameter_groups(model, 0.1)]
    # outside a backbone YOLOv5's rule by name applies, so in_proj_bias is decayed
    assert weights == {"model.0.proj.weight", "model.1.weight", "model.3.in_proj_weight", "model.3.in_proj_bias"} | {
        "model.3.out_proj.weight"
    }
    assert {"model.0.pos_embed", "model.0.cls_token", "model.0.gamma", "model.0.affine.weight"} < norms
    assert {"model.0.norm.weight", "model.2.weight"} < norms
    assert {"model.0.proj.bias", "model.1.bias", "model.2.bias"} < biases


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_optimizers_take_the_groups(name):
    optimizer = build_optimizer(name, parameter_groups(_Model(), 0.1), 0.01, 0.9)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.1, 0.0]


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_optimizers_take_every_allowed_momentum(name):
    model = nn.Linear(2, 1)
    optimizer = build_optimizer(name, parameter_groups(model, 0.1), 0.01, 0.0)
    apply_settings(optimizer, StepSettings((0.1, 0.1, 0.1), 0.0, 1))
    before = model.weight.detach().clone()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_ema_averages_floats_and_keeps_integers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ema = ModelEma(model, decay=0.9, tau=1.0)
    before = {k: v.clone() for k, v in ema.module.state_dict().items()}
    with torch.no_grad():
        for v in model.state_dict().values():
            v.add_(1)
    ema.update(model)
    d = ema.decay_at(1)
    for k, v in ema.module.state_dict().items():
        expected = before[k] if not v.is_floating_point() else before[k] * d + (before[k] + 1) * (1 - d)
        torch.testing.assert_close(v, expected, rtol=1e-6, atol=1e-7)
    assert not ema.module.training and not any(p.requires_grad for p in ema.module.parameters())


def test_ema_averages_shared_layers_once():
    """CoaT has its position encodings under three names."""
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"first": shared, "second": nn.Sequential(shared, nn.BatchNorm1d(3))})
    ema = ModelEma(model)
    for _ in range(3):
        ema.update(model)
    for k, v in ema.module.state_dict().items():
        torch.testing.assert_close(v, model.state_dict()[k], rtol=1e-6, atol=1e-7)


def scales_of(model: DetectionModel, backbone_lr: float, layer_decay: float) -> dict[str, float]:
    scale_of = lr_scales(model, backbone_lr, layer_decay)
    return {name: scale_of(name) for name, _ in model.named_parameters()}


def test_backbone_rate_and_layer_decay():
    model = build("riformer")  # depths 0 (stem), 1 to 4 (one block a stage), 5 (norms)
    scales = scales_of(model, 0.5, 0.1)
    wanted = {
        "model.0.patch_embed.proj.weight": 0.5e-6,
        "model.0.network.0.0.norm1.weight": 0.5e-5,
        "model.0.network.6.0.norm1.weight": 0.5e-2,
        "model.0.norm0.weight": 0.5e-1,
        "model.1.cv1.conv.weight": 1.0,
        "model.8.m.0.bias": 1.0,
    }
    assert {name: scales[name] for name in wanted} == pytest.approx(wanted)
    assert set(scales_of(model, 1.0, 1.0).values()) == {1.0}


def test_backbone_rate_of_a_plain_model_counts_rows():
    scales = scales_of(build("yolov5"), 0.1, 0.5)
    assert scales["model.6.cv1.conv.weight"] == pytest.approx(0.05)
    assert scales["model.0.conv.weight"] == pytest.approx(0.1 * 0.5**7)
    assert scales["model.9.cv1.conv.weight"] == 1.0


def test_groups_by_kind_and_scale():
    model = build("riformer")
    scale_of = lr_scales(model, 0.1, 1.0)
    groups = parameter_groups(model, 0.02, scale_of)
    assert [(g["name"], g["lr_scale"]) for g in groups] == [
        (kind, scale) for scale in (1.0, 0.1) for kind in ("biases", "weights", "norms")
    ]
    found = [id(p) for g in groups for p in g["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    inside = {id(p) for p in model.model[0].parameters()}
    assert all((id(p) in inside) == (g["lr_scale"] == 0.1) for g in groups for p in g["params"])
    optimizer = build_optimizer("SGD", groups, 0.01, 0.9)
    apply_settings(optimizer, StepSettings((0.3, 0.2, 0.1), 0.8, 1))
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.3, 0.2, 0.1, 0.03, 0.02, 0.01])
    table = describe_groups(groups).splitlines()
    assert len(table) == 7 and table[-1].split()[-1] == "0.1"


@pytest.mark.parametrize("path", sorted((ROOT / "data/hyps").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_in_the_project_is_complete(path):
    hyp = Hyperparameters.from_yaml(path)
    assert 0 < hyp.lrf <= 1 and hyp.clip_norm > 0


def test_a_recipe_made_for_another_optimizer_is_refused():
    path = str(ROOT / "data/hyps/hyp.finetune-transformer.yaml")
    with pytest.raises(ConfigError, match="made for AdamW, not SGD; add --optimizer AdamW"):
        choose_hyperparameters(TrainConfig(hyp=path, optimizer="SGD"), None)
    assert with_recipe(TrainConfig(hyp=path)).optimizer == "AdamW"
    assert choose_hyperparameters(TrainConfig(hyp=path, optimizer="AdamW"), None).clip_norm == 1.0
