"""One whole training step of yolov5n: loss, gradients, clipped update, averaged weights."""

from __future__ import annotations

import pytest
import torch

from engine.cli.config import Hyperparameters
from engine.train.ema import ModelEma
from engine.train.optimizer import build_optimizer, parameter_groups
from models.losses.anchor_based import DetectionLoss, LossConfig
from models.yolo import DetectionModel
from tests.parity import rules

pytestmark = pytest.mark.parity


def test_one_step():
    case = rules.yolov5("train_step_yolov5n")
    hyp = dict(case["hyp"])
    rate, momentum, decay = (hyp.pop(name) for name in ("lr0", "momentum", "weight_decay"))
    model = DetectionModel("models/yolov5n.yaml", nc=case["nc"])
    state = {
        key: torch.from_numpy(rules.weight_value(key, tuple(value.shape), value.numpy()))
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    model.train()
    ema = ModelEma(model)
    head = model.head
    criterion = DetectionLoss(head.anchors * head.stride.view(-1, 1, 1), head.stride, LossConfig(**hyp))
    optimizer = build_optimizer("SGD", parameter_groups(model, decay), rate, momentum)

    images = torch.from_numpy(rules.image_batch(case["seed"], case["input_shape"]))
    total, parts = criterion(model(images), torch.tensor(case["targets"], dtype=torch.float32))
    total.backward()
    assert total.item() == pytest.approx(case["total"], rel=1e-4)
    assert parts.tolist() == pytest.approx(case["items"], rel=1e-4)
    parameters = dict(model.named_parameters())
    for key, record in case["grads_before_clip"].items():
        assert rules.compare(record, parameters[key].grad.numpy()) < 1e-3, key

    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), case["clip_norm"])
    assert case["clip_norm"] == Hyperparameters.clip_norm and norm.item() == pytest.approx(
        case["grad_norm_before_clip"], rel=1e-4
    )
    optimizer.step()
    ema.update(model)
    for key, record in case["params_after_step"].items():
        assert rules.compare(record, parameters[key].detach().numpy()) < 1e-5, key
    averaged = ema.module.state_dict()
    for key, record in case["ema_after_step"].items():
        assert rules.compare(record, averaged[key].numpy()) < 1e-5, key
    counts = {int(v) for k, v in averaged.items() if k.endswith("num_batches_tracked")}
    assert counts == {case["ema_num_batches_tracked"]}
    counts = {int(v) for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}
    assert counts == {case["model_num_batches_tracked"]}
