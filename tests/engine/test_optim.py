"""Parameter groups, averaging and freezing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.ema import ModelEma
from engine.freeze import freeze_rows, keep_still, rows_to_freeze
from engine.optim import build_optimizer, parameter_groups
from models.backbones.base import Backbone, FeatureLevel
from utils.errors import ConfigError


class _Odd(Backbone):
    """A backbone whose parameters have names that no rule by name foresees."""

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
    # outside a backbone YOLOv5's rule by name holds, so in_proj_bias is decayed
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


def test_ema_averages_floats_and_keeps_integers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ema = ModelEma(model, decay=0.9, tau=1.0)
    before = {k: v.clone() for k, v in ema.module.state_dict().items()}
    with torch.no_grad():
        for v in model.state_dict().values():
            v.add_(1)
    ema.update(model)
    d = ema.rate(1)
    for k, v in ema.module.state_dict().items():
        expected = before[k] if not v.is_floating_point() else before[k] * d + (before[k] + 1) * (1 - d)
        torch.testing.assert_close(v, expected, rtol=1e-6, atol=1e-7)
    assert not ema.module.training and not any(p.requires_grad for p in ema.module.parameters())


@pytest.mark.parametrize(
    ("selection", "rows"), [(["0"], []), (["2"], [0, 1]), (["1", "3"], [1, 3]), (["backbone"], [0])]
)
def test_rows_to_freeze(selection, rows):
    assert rows_to_freeze(_Model(), selection) == rows


@pytest.mark.parametrize(
    ("selection", "message"),
    [(["9"], "row 4 is not there"), (["neck"], "allowed are row numbers"), (["1", "x"], "allowed")],
)
def test_freeze_errors(selection, message):
    with pytest.raises(ConfigError, match=message):
        rows_to_freeze(_Model(), selection)


def test_frozen_rows_do_not_move():
    model = _Model()
    names = freeze_rows(model, [2])
    assert names == ["model.2.weight", "model.2.bias"]
    model.train()
    keep_still(model, [2])
    before = model.model[2].running_mean.clone()
    model.model[2](torch.randn(4, 8, 3, 3) + 5)
    torch.testing.assert_close(model.model[2].running_mean, before, rtol=0, atol=0)
