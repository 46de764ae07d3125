"""Our checkpoints: what is written comes back; what cannot be read is refused in one line."""

from __future__ import annotations

import argparse
import collections
import os
from collections import OrderedDict
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models.checkpoint import io as module
from models.checkpoint.io import (
    load_detector,
    read_checkpoint,
    read_state_dict,
    spec_without_weights,
    write_checkpoint,
)
from models.yolo import DetectionModel
from tests.models.pickles import official_module, save, stand_in
from tests.parity import rules
from utils.errors import CheckpointError

SPEC = {
    "nc": 2,
    "depth_multiple": 1.0,
    "width_multiple": 1.0,
    "anchors": [[10, 13, 16, 30], [30, 61, 62, 45]],
    "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [8, 3, 2]], [-1, 1, "C3", [16]]],
    "head": [[-1, 1, "Conv", [16, 3, 2]], [[2, 3], 1, "Detect", ["nc", "anchors"]]],
}


def detector(seed: int = 0) -> DetectionModel:
    """A small detector with nothing at its initial value."""
    torch.manual_seed(seed)
    model = DetectionModel(deepcopy(SPEC)).eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point() and not key.endswith("anchors"):
                value.copy_(torch.rand_like(value) + 0.2 if key.endswith("var") else torch.randn_like(value) * 0.3)
    return model


def content(model: DetectionModel, **more) -> dict:
    return {
        "spec": model.yaml,
        "names": {0: "cat", 1: "dog"},
        "stride": model.stride.tolist(),
        "state": model.state_dict(),
        **more,
    }


def test_round_trip(tmp_path):
    model = detector()
    train = {
        "model": model.state_dict(),
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.randn(3)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}],
        },
        "rng": {"torch": torch.get_rng_state(), "numpy": np.random.default_rng(3).bit_generator.state},
        "best": None,
        "nan": float("nan"),
    }
    metadata = {
        "fitness": np.float32(0.5),
        "count": np.int64(3),
        "flag": np.bool_(True),
        "data": Path("data") / "x.yaml",
    }
    path = write_checkpoint(tmp_path / "a.pt", content(model, epoch=4, metadata=metadata, train=train))
    found = read_checkpoint(path)
    assert (found.source, found.epoch, found.nc, found.names) == ("own", 4, 2, {0: "cat", 1: "dog"})
    assert found.stride == (4.0, 8.0)
    assert dict(found.metadata) == {"fitness": 0.5, "count": 3, "flag": True, "data": "data/x.yaml"}
    assert [type(v) for v in found.metadata.values()] == [float, int, bool, str]
    assert list(found.state) == list(model.state_dict())
    assert found.train is not None
    assert found.train["rng"]["numpy"] == train["rng"]["numpy"]  # 128-bit numbers
    assert found.train["optimizer"]["param_groups"] == train["optimizer"]["param_groups"]
    torch.testing.assert_close(found.train["rng"]["torch"], train["rng"]["torch"], rtol=0, atol=0)
    rebuilt = load_detector(path)
    assert rebuilt.names == {0: "cat", 1: "dog"} and not rebuilt.training
    image = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(image)[0], model(image)[0], rtol=0, atol=0)


def test_is_plain_for_torch(tmp_path):
    write_checkpoint(tmp_path / "a.pt", content(detector(), train={"x": OrderedDict(a=1)}))
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert loaded["format"] == "detector-1"


def test_weights_are_float32_and_views_are_cut_out(tmp_path):
    model = detector().half()
    state = dict(model.state_dict(), extra=torch.zeros(1000, 1000)[:1, :1])
    path = write_checkpoint(tmp_path / "a.pt", {**content(model), "state": state})
    assert path.stat().st_size < 200_000
    assert {v.dtype for v in read_checkpoint(path).state.values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize(
    "value, key",
    [
        ({"a": {"b": [1, object()]}}, "metadata.a.b[1]"),
        ({"a": {1, 2}}, "metadata.a"),
        ({"a": np.zeros(3)}, "metadata.a"),
        ({"a": torch.float32}, "metadata.a"),
        ({"a": print}, "metadata.a"),
        ({"a": nn.Conv2d(1, 1, 1)}, "metadata.a"),
        ({(1, 2): 3}, "metadata"),
    ],
)
def test_other_values_are_refused_by_key(tmp_path, value, key):
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(tmp_path / "a.pt", content(detector(), metadata=value))
    assert f"'{key}'" in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("key", ["spec", "names", "stride", "state"])
def test_what_a_checkpoint_needs(tmp_path, key):
    mapping = content(detector())
    del mapping[key]
    with pytest.raises(CheckpointError, match=f"'{key}' was not given"):
        write_checkpoint(tmp_path / "a.pt", mapping)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "a.pt", content(detector(0), epoch=1))

    def full_disk(value, target, **_):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.torch, "save", full_disk)
    with pytest.raises(CheckpointError, match=r"a\.pt: cannot be written .*the earlier file is as it was"):
        write_checkpoint(path, content(detector(1), epoch=2))
    assert read_checkpoint(path).epoch == 1
    assert os.listdir(tmp_path) == ["a.pt"]


def test_what_was_written_is_read_back(tmp_path, monkeypatch):
    """A writer that drops an entry is found out before the file gets its name."""
    real = torch.save

    def forgetful(value, target, **_):
        real({**value, "state": dict(list(value["state"].items())[:-1])}, target)

    monkeypatch.setattr(module.torch, "save", forgetful)
    with pytest.raises(CheckpointError, match="not stored"):
        write_checkpoint(tmp_path / "a.pt", content(detector()))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "row, expected",
    [
        ([-1, 1, "RIFormer", ["s12"]], ["s12"]),
        ([-1, 1, "RIFormer", ["s12", True]], ["s12"]),
        ([-1, 1, "RIFormer", [True]], []),
        ([-1, 1, "RIFormer", [False]], [False]),
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
def test_specs_ask_for_no_weights(row, expected):
    spec = {"nc": 1, "backbone": [row], "head": [[-1, 1, "Detect", ["nc", "anchors"]]]}
    before = deepcopy(spec)
    assert spec_without_weights(spec) == {**spec, "backbone": [[*row[:3], expected]]}
    assert spec == before


def test_a_written_spec_asks_for_no_weights(tmp_path):
    mapping = content(detector())
    mapping["spec"] = {**mapping["spec"], "backbone": [[-1, 1, "RIFormer", {"weights": "somewhere.pth"}]]}
    path = write_checkpoint(tmp_path / "a.pt", mapping)
    assert torch.load(path, weights_only=True)["spec"]["backbone"] == [[-1, 1, "RIFormer", {}]]


def truncated(path: Path) -> None:
    write_checkpoint(path, content(detector()))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bit_flipped(path: Path) -> None:
    """Damage in the pickle of an official file."""
    data = bytearray(rules.official_checkpoint()[0].read_bytes())
    start = data.index(b"models.yolo") + 200
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)


def torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 2, 2)), str(path))


def plain(value) -> object:
    return lambda path: torch.save(value, path)


def raw(data: bytes) -> object:
    return lambda path: path.write_bytes(data)


def own(**changes) -> object:
    return lambda path: torch.save({**content(detector()), "format": "detector-1", **changes}, path)


STATE = {"conv.weight": torch.zeros(2), "conv.bias": torch.zeros(1)}
UNREADABLE = [
    ("empty", raw(b""), "an empty file (0 bytes)"),
    ("truncated", truncated, "damaged: a zip archive without its end"),
    ("bit flips", bit_flipped, ""),
    ("text", raw(b"nc: 80\nanchors: []\n"), "not a checkpoint: a text file"),
    ("binary", raw(bytes(range(256)) * 4), "not a checkpoint: neither a zip archive nor a pickle"),
    ("web page", raw(b"<!DOCTYPE html><html>404</html>"), "a web page"),
    ("git-lfs", raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"), "a pointer of git-lfs"),
    ("onnx", raw(b"\x08\x08\x12\x07pytorch\x1a\x052.0.0" + bytes(40)), "an ONNX file"),
    ("torchscript", torchscript, "a TorchScript file"),
    ("zip", raw(b"PK\x05\x06" + bytes(18)), "a zip archive without data.pkl"),
    ("pickle", raw(b"\x80\x02}q\x00."), "cannot be read as a checkpoint"),
    ("state dict", plain(STATE), "a bare state dict (2 tensors: conv.weight, conv.bias)"),
    ("wrapped state dict", plain({"epoch": 1, "model": STATE}), "'weights: <path>'"),
    ("numbers", plain({"a": 1, "b": 2}), "not a checkpoint of a detector (found: keys a, b)"),
    ("list", plain([1, 2]), "found: list"),
    ("another version", own(format="detector-9"), "written by another version: format 'detector-9'"),
    ("no spec", own(spec=None), "'spec' is NoneType; dict is needed"),
    ("names", own(names={0: "a", 2: "b"}), "'names' must name the classes 0..n-1"),
    ("stride", own(stride=[0.0]), "'stride' must be a list of positive numbers"),
    ("state", own(state={"a": 1}), "'state' holds values that are no tensors"),
    ("epoch", own(epoch="last"), "'epoch' is str; int is needed"),
]


@pytest.mark.parametrize("write, message", [u[1:] for u in UNREADABLE], ids=[u[0] for u in UNREADABLE])
def test_says_what_a_file_is(tmp_path, write, message):
    path = tmp_path / "weights.pt"
    write(path)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "best.pt").touch()
    (tmp_path / "picture.png").touch()
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "bset.pt")
    assert str(caught.value) == f"{tmp_path}/bset.pt: no such file; near in that folder: best.pt"
    with pytest.raises(CheckpointError, match="no such file$"):
        read_checkpoint(tmp_path / "no" / "such.pt")


def test_a_folder_names_what_is_in_it(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "best.pt").touch()
    with pytest.raises(CheckpointError, match="a folder; a checkpoint file is needed; there are best.pt in it"):
        read_checkpoint(tmp_path)


def test_every_mismatch_is_in_one_message(tmp_path):
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


def test_a_spec_that_cannot_be_built(tmp_path):
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
def test_official_files_of_other_models_load(tmp_path, fused, legacy):
    """Our own network, pickled the official way; also one whose batch norms were folded before."""
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


WRAPPERS = ["state_dict", "model", "model_state", "state_dict_ema", None]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_published_files_are_unwrapped(tmp_path, wrapper):
    torch.save({wrapper: STATE, "meta": {"a": 1}, "epoch": 3} if wrapper else STATE, tmp_path / "a.pth")
    assert list(read_state_dict(tmp_path / "a.pth")) == list(STATE)


@pytest.mark.parametrize("legacy", [False, True])
def test_published_files_with_options_beside_the_weights(tmp_path, legacy):
    """Training scripts keep an argparse.Namespace, a counter, paths ... in their files: unread, not executed."""
    options = [argparse.Namespace(lr=0.1), collections.Counter("aab"), collections.deque([1]), {1, 2}, Path("x"), print]
    weights = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2, dtype=torch.float16)}
    torch.save({"args": options, "model": weights}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    found = read_state_dict(tmp_path / "a.pth")
    assert list(found) == list(weights)
    for key in weights:
        torch.testing.assert_close(found[key], weights[key], rtol=0, atol=0)


@pytest.mark.parametrize(
    "write, message",
    [
        (truncated, "damaged"),
        (raw(b""), "empty file"),
        (plain({"a": 1}), "no weights in it (found: keys a)"),
        (plain({}), "no weights in it"),
        (lambda path: torch.save(nn.Conv2d(1, 1, 1), path), "no weights in it (found: Holder)"),
        (lambda path: torch.save({"model": nn.Conv2d(1, 1, 1)}, path), "torch.save(model.state_dict(), path)"),
    ],
)
def test_other_files_hold_no_weights(tmp_path, write, message):
    write(tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as caught:
        read_state_dict(tmp_path / "a.pth")
    assert message in str(caught.value)
