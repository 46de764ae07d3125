"""--freeze: rows, backbone stages, expressions; frozen parameters and statistics do not change."""

from __future__ import annotations

import pytest
import torch

from engine.train.freeze import backbone_rows, eval_frozen, freeze, names_to_freeze, unfreeze
from models.yolo import DetectionModel
from tests.helpers.detectors import BACKBONES, build
from utils.errors import ConfigError

FAMILIES = ["riformer", "repmlp", "revvit", "nextvit", "timm"]


def rows_of(names: set[str]) -> set[int]:
    return {int(name.split(".")[1]) for name in names}


@pytest.mark.parametrize(
    ("selection", "rows"),
    [
        (["0"], set()),
        (["2"], {0, 1}),
        (["1", "3"], {1, 3}),
        (["backbone"], {0, 1, 2, 3, 4, 5, 6}),
        (["backbone:0"], set()),
        (["backbone:2"], {0, 1}),
        ([r"^model\.(4|6)\."], {4, 6}),
        (["backbone:1", r"model\.9\.cv3"], {0, 9}),
    ],
    ids=str,
)
def test_rows_of_a_plain_model(selection: list[str], rows: set[int]) -> None:
    assert rows_of(names_to_freeze(build("yolov5"), selection)) == rows


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (["99"], r"no row 11; the model has rows 0 to 10"),
        ([str(2**63)], r"no row 11; the model has rows 0 to 10"),
        (["1", "backbone"], "give row numbers, or words"),
        (["backbone:8"], "the backbone has 7 rows; allowed: 0 to 7"),
        (["backbone:x"], "the number of stages is missing"),
        (["model.5.convv"], "matches no parameter name.*did you mean 'model.5.conv'"),
        (["(model"], "nor a regular expression"),
    ],
    ids=str,
)
def test_refusals(selection: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        names_to_freeze(build("yolov5"), selection)


def test_rows_beyond_a_backbone_of_one_row_are_explained(caplog: pytest.LogCaptureFixture) -> None:
    """`--freeze 10` is the whole backbone of YOLOv5's own models, but includes neck rows of others."""
    model = build("riformer")
    hint = "the whole backbone (RIFormer) is row 0, the others are neck and head: to freeze its stem and first K stages"
    with pytest.raises(ConfigError, match="no row 9; the model has rows 0 to 8; .*backbone:K, K = 0 to 4") as error:
        names_to_freeze(model, ["10"])
    assert hint in str(error.value)
    assert rows_of(names_to_freeze(model, ["1"])) == {0} and not caplog.records
    assert rows_of(names_to_freeze(model, ["5"])) == {0, 1, 4}  # rows 2 and 3 have no parameters
    assert [record.getMessage().partition("; ")[0] for record in caplog.records] == ["--freeze 5: freezes rows 0 to 4"]
    assert hint in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_of_a_backbone(family: str) -> None:
    model = build(family)
    assert backbone_rows(model) == [0]
    backbone = model.model[0]
    sizes = [len(names_to_freeze(model, [f"backbone:{k}"])) for k in range(backbone.num_stages + 1)]
    assert sizes[0] > 0 and sizes == sorted(set(sizes)), "each stage adds parameters"
    everything = names_to_freeze(model, ["backbone"])
    assert everything == {f"model.0.{name}" for name, _ in backbone.named_parameters()}
    with pytest.raises(ConfigError, match=f"allowed: 0 to {backbone.num_stages}"):
        names_to_freeze(model, [f"backbone:{backbone.num_stages + 1}"])


@pytest.mark.parametrize("family", ["yolov5", *FAMILIES])
def test_frozen_parts_do_not_change(family: str) -> None:
    model = build(family)
    names = names_to_freeze(model, ["backbone:1"])
    frozen = freeze(model, names)
    model.train()
    eval_frozen(model, frozen)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sum(raw.square().mean() for raw in model(torch.rand(2, 3, 64, 64))).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None}.isdisjoint(names)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    still = {name.rsplit(".", 1)[0] for name in names}
    assert moved and not {key for key in moved if key.rsplit(".", 1)[0] in still}


@pytest.mark.parametrize("family", ["yolov5", "repmlp", "nextvit", "timm-repvgg"])
def test_a_frozen_backbone_keeps_its_statistics(family: str) -> None:
    model = build(family)
    frozen = freeze(model, names_to_freeze(model, ["backbone"]))
    prefixes = tuple(f"model.{row}." for row in backbone_rows(model))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    eval_frozen(model, frozen)
    model(torch.rand(2, 3, 64, 64))
    after = model.state_dict()
    running = [key for key in before if key.endswith("running_mean")]
    assert any(key.startswith(prefixes) for key in running) and any(not key.startswith(prefixes) for key in running)
    for key in running:
        assert torch.equal(after[key], before[key]) == key.startswith(prefixes), key


def test_unfreeze_keeps_what_a_backbone_froze_itself() -> None:
    name, arguments = BACKBONES["riformer"]
    spec = build("riformer").yaml
    model = DetectionModel({**spec, "backbone": [[-1, 1, name, {**arguments, "frozen_stages": 0}]]})
    stem = {key for key, p in model.named_parameters() if not p.requires_grad}
    assert stem == {"model.0.patch_embed.proj.weight", "model.0.patch_embed.proj.bias"}
    frozen = freeze(model, names_to_freeze(model, ["backbone"]))
    assert stem < frozen.names
    unfreeze(model, frozen)
    assert {key for key, p in model.named_parameters() if not p.requires_grad} == stem
