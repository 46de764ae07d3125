"""Detectors from checkpoints: exact loading, and specs that ask for no published weights."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from models.backbones import published
from models.checkpoint.io import read_checkpoint, write_checkpoint
from models.loading import load_detector, spec_without_weights, transfer_weights
from models.yolo import DetectionModel
from tests.helpers.checkpoints import XCA_SPEC, content, detector, separate_queries_and_keys
from tests.helpers.pickles import official_module, save, stand_in
from utils.errors import CheckpointError


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([-1, 1, "RIFormer", ["s12"]], ["s12"]),
        ([-1, 1, "RIFormer", ["s12", True]], ["s12"]),
        ([-1, 1, "RIFormer", [True]], []),
        ([-1, 1, "RIFormer", ["s12", "x.pth"]], ["s12"]),
        ([-1, 1, "RIFormer", [{"arch": "s12"}, "x.pth"]], [{"arch": "s12"}]),
        ([-1, 1, "RIFormer", [False]], []),
        ([-1, 1, "RIFormer", []], []),
        ([-1, 1, "riformer_s12", ["pretrained"]], []),
        (
            [-1, 1, "timm/resnet18", ["pretrained", {"extra_levels": True, "weights": "x.pth"}]],
            [{"extra_levels": True}],
        ),
        ([-1, 1, "RIFormer", {"arch": "s12", "weights": "x.pth"}], {"arch": "s12"}),
        ([-1, 1, "timm/resnet18", {"pretrained": True, "extra_levels": True}], {"extra_levels": True}),
        ([-1, 3, "C3", [128, True]], [128, True]),
        ([-1, 1, "Conv", [True]], [True]),
    ],
)
def test_spec_without_weights_strips_backbone_rows_only(row, expected):
    spec = {"nc": 1, "backbone": [row], "head": [[-1, 1, "Detect", ["nc", "anchors"]]]}
    before = deepcopy(spec)
    assert spec_without_weights(spec) == {**spec, "backbone": [[*row[:3], expected]]}
    assert spec == before


WITH_BACKBONE = {
    "nc": 2,
    "depth_multiple": 1.0,
    "width_multiple": 1.0,
    "anchors": [[10, 13, 16, 30]],
    "backbone": [[-1, 1, "RIFormer", ["s12", {"weights": "missing.pth"}]]],
    "head": [["P4", 1, "Conv", [24]], [-1, 1, "Detect", ["nc", "anchors"]]],
}


@pytest.fixture
def no_published_weights(monkeypatch):
    def fail(*_args, **_options):
        raise AssertionError("published weights are loaded")

    monkeypatch.setattr(published, "load_published", fail)
    monkeypatch.setattr(published, "find_weights", fail)


def test_checkpoint_whose_spec_asks_for_weights_loads_without_them(tmp_path, no_published_weights):
    """As in older versions or official files; the stored spec is unchanged."""
    model = DetectionModel(spec_without_weights(WITH_BACKBONE))
    with pytest.raises(AssertionError, match="published weights are loaded"):
        DetectionModel(deepcopy(WITH_BACKBONE))
    path = write_checkpoint(tmp_path / "a.pt", {**content(model), "spec": WITH_BACKBONE})
    checkpoint = read_checkpoint(path)
    assert checkpoint.spec == WITH_BACKBONE
    rebuilt = load_detector(path)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(rebuilt.state_dict()[key], value, rtol=0, atol=0)
    target = DetectionModel(spec_without_weights(WITH_BACKBONE))
    assert transfer_weights(target, checkpoint, exclude=()).transferred == len(model.state_dict())


def test_load_detector_reports_every_mismatch(tmp_path):
    model = detector()
    state = dict(model.state_dict())
    del state["model.0.conv.weight"]
    state["model.1.bn.bias"] = torch.zeros(9)
    state["model.7.conv.weight"] = torch.zeros(1)
    path = write_checkpoint(tmp_path / "a.pt", {**content(model), "state": state})
    with pytest.raises(CheckpointError) as caught:
        load_detector(path)
    message = str(caught.value)
    assert "3 weights do not fit" in message and "missing 'model.0.conv.weight'" in message
    assert "'model.1.bn.bias' has shape [9], needs [8]" in message and "unknown 'model.7.conv.weight'" in message


@pytest.mark.parametrize("deploy", [False, True])
def test_checkpoints_with_separate_queries_and_keys_load_exactly(tmp_path, deploy):
    """As written before the layers q and k of cross-covariance attention were merged."""
    spec = deepcopy(XCA_SPEC)
    spec["backbone"][0][3]["deploy"] = deploy
    model = detector(spec=spec)
    state = model.state_dict()
    old = separate_queries_and_keys(state)
    assert len(old) == len(state) + 2 * 3 and not any(".qk." in key for key in old)
    path = write_checkpoint(tmp_path / "a.pt", {**content(model), "state": old})
    rebuilt = load_detector(path).state_dict()
    assert rebuilt.keys() == state.keys() and all(torch.equal(rebuilt[key], state[key]) for key in state)
    target = detector(seed=1, spec=spec)
    report = transfer_weights(target, read_checkpoint(path), exclude=())
    assert report.transferred == report.total == len(state) and not report.unexpected
    assert all(torch.equal(target.state_dict()[key], state[key]) for key in state)


def test_load_detector_reports_queries_without_keys(tmp_path):
    model = detector(spec=XCA_SPEC)
    old = separate_queries_and_keys(model.state_dict())
    del old["model.0.features.1.e_mhsa.k.weight"]
    path = write_checkpoint(tmp_path / "a.pt", {**content(model), "state": old})
    with pytest.raises(CheckpointError) as caught:
        load_detector(path)
    message = str(caught.value)
    assert "2 weights do not fit" in message and "missing 'model.0.features.1.e_mhsa.qk.weight'" in message
    assert "unknown 'model.0.features.1.e_mhsa.q.weight'" in message


def test_load_detector_reports_every_error_of_the_spec(tmp_path):
    model = detector()
    spec = deepcopy(model.yaml)
    spec["backbone"][2][2] = "C33"
    spec["head"][0][2] = "Konv"
    path = write_checkpoint(tmp_path / "a.pt", {**content(model), "spec": spec})
    with pytest.raises(CheckpointError) as caught:
        load_detector(path)
    assert "C33" in str(caught.value) and "Konv" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_load_detector_reads_official_files(tmp_path, fused, legacy):
    """Our own network, pickled the official way; also one whose BatchNorms were folded."""
    model = detector()
    image = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        expected = model(image)[0]
    tree = model.fuse() if fused else model
    rows = stand_in(
        "torch.nn.modules.container.Sequential",
        _modules={key: official_module(row) for key, row in tree.model._modules.items()},
    )
    about = {"yaml": {**model.yaml, "ch": 3}, "names": ["cat", "dog"], "stride": torch.tensor([4.0, 8.0])}
    pickled = stand_in("models.yolo.Model", _modules={"model": rows}, **about)
    rebuilt = load_detector(save({"model": pickled}, tmp_path / "a.pt", legacy))
    assert list(rebuilt.state_dict()) == list(tree.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(image)[0], expected, rtol=1e-4, atol=1e-4)
