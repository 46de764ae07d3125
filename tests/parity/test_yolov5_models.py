"""Networks against values of the official code: keys, parameters, operations, outputs of every kind.

Bounds are the README's (largest difference of sampled values and statistics over the record's standard deviation).
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.heads import Detect
from models.yolo import DetectionModel
from tests.parity import rules

pytestmark = pytest.mark.parity
NAMES = ("yolov5n", "yolov5s", "yolov5m", "yolov5n6")
ZOO = {record["name"]: record for record in rules.yolov5("zoo")["models"]}
EVAL_BOUND, TRAIN_BOUND, GFLOPS_BOUND = 1e-4, 2e-3, 0.02


@cache
def fixture(name: str) -> Any:
    return rules.yolov5(f"model_{name}")


def cases() -> list[Any]:
    ids = [(name, i, case["id"]) for name in NAMES for i, case in enumerate(fixture(name)["cases"])]
    return [pytest.param(name, i, id=f"{name}-{case}") for name, i, case in ids]


def build(name: str) -> DetectionModel:
    """The model with every weight by the rule, in evaluation mode."""
    model = DetectionModel(f"{name}.yaml")
    state = model.state_dict()
    model.load_state_dict(
        {key: torch.from_numpy(rules.weight_value(key, tuple(v.shape), v.numpy())) for key, v in state.items()}
    )
    return model.eval()


def images(case: Any) -> Tensor:
    return torch.from_numpy(rules.image_batch(case["seed"], case["input_shape"]))


def check(record: Any, value: Tensor, bound: float = EVAL_BOUND) -> None:
    assert rules.compare(record, value.detach().numpy()) < bound


@pytest.mark.parametrize("name", ZOO)
def test_every_official_yaml_has_the_official_keys_parameters_strides_and_operations(name: str) -> None:
    record = ZOO[name]
    with torch.device("meta"):
        model = DetectionModel(f"{name}.yaml")
        three_classes = DetectionModel(f"{name}.yaml", nc=3)
    state = model.state_dict()
    manifest = "\n".join(f"{key} {tuple(value.shape)}" for key, value in state.items())
    assert len(state) == record["entries"]
    assert hashlib.sha256(manifest.encode()).hexdigest() == record["manifest_sha256"]
    assert model.stride.tolist() == record["strides"]
    assert model.head.nl == record["levels"]
    assert len(model.model) == record["layers"]
    assert sum(p.numel() for p in three_classes.parameters()) == record["params_nc3"]
    info = model.info()
    assert (info.parameters, info.layers) == (record["params"], record["leaf_modules"])
    assert info.gflops == pytest.approx(record["gflops_640"], rel=GFLOPS_BOUND)


@pytest.mark.parametrize("name", NAMES)
def test_manifest_strides_anchors_and_kept_slots(name: str) -> None:
    record = fixture(name)
    model = DetectionModel(f"{name}.yaml")
    found = [[key, list(v.shape), str(v.dtype).removeprefix("torch.")] for key, v in model.state_dict().items()]
    assert found == record["state_dict"]
    assert model.save == record["save_list"]
    assert model.stride.tolist() == record["strides"]
    torch.testing.assert_close(model.head.anchors, torch.tensor(record["anchors_buffer"]), rtol=0, atol=0)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(record["bn_eps"], record["bn_momentum"])}


@pytest.mark.parametrize(("name", "index"), cases())
def test_eval_outputs(name: str, index: int) -> None:
    case = fixture(name)["cases"][index]
    model = build(name)
    maps: dict[int, Tensor] = {}
    for row, module in enumerate(model.model):
        module.register_forward_hook(lambda _m, _args, out, row=row: maps.update({row: out}))
    with torch.no_grad():
        decoded, raw = model(images(case))
    check(case["eval_decoded"], decoded)
    for record, level in zip(case["eval_raw"], raw, strict=True):
        check(record, level)
    for record in case.get("eval_layers", []):
        check_layer(record, maps[record["layer"]])


def check_layer(record: Any, value: Tensor) -> None:
    """A record with 16 sampled values instead of 128."""
    array = value.numpy().reshape(-1).astype(np.float64)
    sampled = array[rules.sample_index(array.size, len(record["values"]))]
    expected = [record["mean"], record["std"], record["min"], record["max"], *record["values"]]
    found = [array.mean(), array.std(), array.min(), array.max(), *sampled]
    assert list(value.shape) == record["shape"]
    assert np.abs(np.subtract(found, expected)).max() < EVAL_BOUND * record["std"], record["layer"]


@pytest.mark.parametrize("name", [name for name in NAMES if "eval_augmented" in fixture(name)["cases"][0]])
def test_test_time_augmentation(name: str) -> None:
    case = fixture(name)["cases"][0]
    with torch.no_grad():
        decoded, raw = build(name)(images(case), augment=True)
    check(case["eval_augmented"], decoded)
    for record, level in zip(case["eval_raw"], raw, strict=True):
        check(record, level)


@pytest.mark.parametrize("name", NAMES)
def test_fused_outputs_parameters_and_operations(name: str) -> None:
    record = fixture(name)
    model = build(name)
    with torch.no_grad():
        before = [model(images(case))[0] for case in record["cases"]]
        after = [model.fuse()(images(case))[0] for case in record["cases"]]
    for case, plain, fused in zip(record["cases"], before, after, strict=True):
        check(case["fused_decoded"], fused)
        assert (fused - plain).abs().max() < 4 * case["fused_max_abs_diff"]
    info = model.info()
    assert (info.parameters, info.layers) == (record["fused_params"], record["fused_leaf_modules"])
    assert info.gflops == pytest.approx(record["fused_gflops_640"], rel=GFLOPS_BOUND)
    assert len(model.state_dict()) == record["fused_keys"]


@pytest.mark.parametrize(("name", "index"), cases())
def test_train_outputs_and_running_statistics(name: str, index: int) -> None:
    case = fixture(name)["cases"][index]
    model = build(name).train()
    for record, level in zip(case["train_raw"], model(images(case)), strict=True):
        check(record, level, TRAIN_BOUND)
    state = model.state_dict()
    for key, record in case["running_stats_after_one_train_forward"].items():
        check(record, state[key], TRAIN_BOUND)


@pytest.mark.parametrize("classes", [3, 80])
def test_the_head_starts_with_biases_for_rare_objects(classes: int) -> None:
    records = rules.yolov5("recipe")["head_bias_start"]
    strides = [int(record["stride"]) for record in records]
    head = Detect(classes, [[10, 13]] * len(strides), [4] * len(strides), strides)
    before = [torch.zeros(head.no) for _ in head.m]
    for conv, bias in zip(head.m, before, strict=True):
        conv.bias.data = bias.clone()
    head.reset_biases()
    for conv, record in zip(head.m, records, strict=True):
        expected = torch.zeros(head.no)
        expected[4] = record["added_to_objectness"]
        expected[5:] = record[f"added_to_classes_nc{classes}"]
        torch.testing.assert_close(conv.bias.data, expected, rtol=1e-6, atol=0)
