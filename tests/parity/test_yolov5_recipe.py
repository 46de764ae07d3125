"""Optimizer recipe against the reference tables: learning rates, accumulation, averaging, decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.cli.config import Hyperparameters
from engine.train.ema import ModelEma
from engine.train.optimizer import parameter_groups, scaled_decay
from engine.train.schedule import Schedule, accumulation, lr_factor
from tests.parity import rules
from utils.files import ROOT

pytestmark = pytest.mark.parity
RECIPE = rules.yolov5("recipe")


@pytest.mark.parametrize("case", RECIPE["lr_factor"], ids=lambda c: f"{c['epochs']}-{c['lrf']}")
def test_lr_factor(case):
    for cosine, column in ((False, "linear"), (True, "cosine")):
        got = [lr_factor(e, case["epochs"], case["lrf"], cosine) for e in case["epoch"]]
        assert got == pytest.approx(case[column], rel=1e-12)


@pytest.mark.parametrize("case", RECIPE["warmup"], ids=lambda c: f"{c['batches_per_epoch']}x{c['epochs']}")
def test_schedule(case):
    base = Hyperparameters.from_yaml(ROOT / "data/hyps/hyp.scratch-low.yaml").to_dict()
    hyp = Hyperparameters.from_mapping({**base, **case["hyp"]})
    schedule = Schedule(hyp, case["epochs"], case["batches_per_epoch"], case["batch"], case["cosine"])
    assert schedule.warmup_iterations == case["warmup_iterations"]
    last_step = -1
    for iteration, epoch, bias, weights, norms, momentum, accumulate, step in case["rows"]:
        s = schedule.at(iteration, epoch)
        assert s.lr == pytest.approx((bias, weights, norms), rel=1e-9), iteration
        assert s.momentum == pytest.approx(momentum, rel=1e-9)
        assert s.accumulate == accumulate
        assert (iteration - last_step >= s.accumulate) == step, iteration
        last_step = iteration if step else last_step
    for epoch, *rates in case["lr_at_epoch_end"]:
        last = (epoch + 1) * case["batches_per_epoch"] - 1
        assert schedule.at(last, epoch).lr == pytest.approx(rates, rel=1e-9)


def test_ema_decay():
    ema = ModelEma(nn.Linear(1, 1))
    for case in RECIPE["ema_decay"]:
        assert ema.decay_at(case["updates"]) == pytest.approx(case["decay"], rel=1e-12)


def test_accumulation_and_decay():
    for case in RECIPE["accumulate_and_weight_decay"]:
        assert accumulation(case["batch"]) == case["accumulate"]
        assert scaled_decay(0.0005, case["batch"]) == pytest.approx(case["weight_decay_of_0.0005"], rel=1e-12)


@pytest.mark.parametrize("name", list(RECIPE["parameter_groups"]))
def test_parameter_groups(name):
    from models.yolo import DetectionModel

    folder = "models/hub" if name.endswith("6") else "models"
    with torch.device("meta"):
        model = DetectionModel(ROOT / folder / f"{name}.yaml")
    groups = parameter_groups(model, 0.0005)
    for group, expected in zip(groups, RECIPE["parameter_groups"][name], strict=True):
        assert len(group["params"]) == expected["tensors"]
        assert sum(p.numel() for p in group["params"]) == expected["elements"]
        assert group["weight_decay"] == expected["weight_decay"]
