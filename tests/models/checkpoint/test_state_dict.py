"""Published weights files, and loading of state dicts into modules."""

from __future__ import annotations

import argparse
import collections
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.checkpoint.state_dict import LoadReport, load_state, read_state_dict
from utils.errors import CheckpointError


class Net(nn.Module):
    """Seven entries and a position embedding."""

    def __init__(self, grid: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.pos_embed = nn.Parameter(torch.zeros(1, 2, grid, grid))


def random_state(grid: int = 4) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {k: torch.rand_like(v) if v.is_floating_point() else v + 3 for k, v in Net(grid).state_dict().items()}


def assert_loaded(net: nn.Module, state: dict[str, torch.Tensor], keys: list[str]) -> None:
    for key in keys:
        torch.testing.assert_close(net.state_dict()[key], state[key], rtol=0, atol=0)


def test_load_state_copies_in_place():
    net, state = Net(), random_state()
    weight = net.conv.weight
    report = load_state(net, state)
    assert net.conv.weight is weight
    assert report == LoadReport(matched=tuple(net.state_dict()))
    assert report.summary() == "Transferred 8/8 items"
    assert_loaded(net, state, list(state))


@pytest.mark.parametrize("wrapper", ["module.", "backbone.", "model.", "module.backbone.", "model.module."])
def test_load_state_removes_wrappers(wrapper):
    net, state = Net(), random_state()
    report = load_state(net, {wrapper + key: value for key, value in state.items()})
    assert report.transferred == 8
    assert_loaded(net, state, list(state))


def test_load_state_keeps_prefixes_of_the_module():
    """`model.` begins the keys of a detector; only keys that do not fit unchanged are unwrapped."""
    net = nn.ModuleDict({"model": nn.Linear(2, 2), "weight": nn.ParameterDict({"x": torch.zeros(1)})})
    state = {"model.weight": torch.ones(2, 2), "model.bias": torch.ones(2), "weight.x": torch.ones(1)}
    assert load_state(net, state).transferred == 3


def test_load_state_key_map_ignore_and_allow_new():
    net, state = Net(), random_state()
    file = {f"backbone.net.{key}": value for key, value in state.items() if not key.startswith("bn.")}
    file |= {"head.fc.weight": torch.zeros(3), "head.fc.bias": torch.zeros(3), "backbone.net.extra": torch.zeros(1)}
    report = load_state(
        net,
        file,
        key_map=lambda key: None if key == "net.extra" else key.removeprefix("net."),
        ignore=("head.*",),
        allow_new=("bn.*",),
    )
    assert report.matched == ("pos_embed", "conv.weight", "conv.bias")
    assert all(key.startswith("bn.") for key in report.missing) and len(report.missing) == 5
    assert dict(report.unexpected)["head.fc.bias"] == "not needed"
    assert report.summary().startswith("Transferred 3/8 items; 5 new: bn.weight, bn.bias")


def test_load_state_resizes():
    def resize(key: str, value: torch.Tensor, target: torch.Tensor) -> torch.Tensor | None:
        return F.interpolate(value, target.shape[2:], mode="nearest") if key == "pos_embed" else None

    net, state = Net(8), random_state(4)
    report = load_state(net, state, resize=resize)
    assert report.resized == ("pos_embed",) and len(report.matched) == 7
    torch.testing.assert_close(net.pos_embed[0, 0, ::2, ::2].detach(), state["pos_embed"][0, 0], rtol=0, atol=0)
    assert "1 resized: pos_embed" in report.summary()


def without(*keys: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in random_state().items() if key not in keys}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "holds 0 of the 7 entries of Net; missing: pos_embed, conv.weight, conv.bias, bn.weight, ..."),
        (without("conv.weight"), "holds 7 of the 8 entries of Net; missing: conv.weight; not used: none"),
        (
            {**without("conv.weight"), "conv.weigth": torch.zeros(4, 3, 1, 1)},
            "missing: conv.weight; not used: conv.weigth; did you mean 'conv.weigth'?",
        ),
        ({**random_state(), "bn.bias": torch.zeros(5)}, "'bn.bias' has shape [5], Net needs [4]"),
        (random_state(5), "'pos_embed' has shape [1, 2, 5, 5], Net needs [1, 2, 4, 4]"),
        ({**random_state(), "module.conv.bias": torch.zeros(4)}, "'conv.bias' and 'module.conv.bias' are both for"),
    ],
)
def test_load_state_error_changes_nothing(state, message):
    net = Net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_state(net, state, where="a.pth")
    assert str(caught.value).startswith("a.pth: ") and message in str(caught.value)
    assert_loaded(net, before, list(before))


def test_load_state_allows_missing_batch_counters():
    assert load_state(Net(), without("bn.num_batches_tracked")).missing == ("bn.num_batches_tracked",)


def test_load_state_requires_ninety_percent():
    net = nn.Sequential(*(nn.Linear(1, 1) for _ in range(10)))
    state = dict(net.state_dict())
    del state["0.weight"], state["0.bias"]
    assert len(load_state(net, state).missing) == 2
    del state["1.weight"]
    with pytest.raises(CheckpointError, match="holds 17 of the 20"):
        load_state(net, state)


def test_load_state_partial_takes_what_fits():
    net = Net()
    state = {"conv.weight": torch.ones(4, 3, 1, 1), "bn.bias": torch.zeros(5), "other": torch.zeros(1)}
    report = load_state(net, state, partial=True)
    assert report.matched == ("conv.weight",)
    assert report.mismatched == (("bn.bias", (5,), (4,)),)
    assert report.total == 8
    assert "1 of another shape: bn.bias [5] -> [4]; 1 of the file not used: other (no such entry)" in report.summary()
    torch.testing.assert_close(net.conv.weight.detach(), torch.ones(4, 3, 1, 1))


def test_load_state_casts_to_the_dtype_of_the_module():
    net, state = Net().double(), random_state()
    load_state(net, {key: value.half() if value.is_floating_point() else value for key, value in state.items()})
    torch.testing.assert_close(net.conv.weight.detach(), state["conv.weight"].half().double(), rtol=0, atol=0)


STATE = {"conv.weight": torch.zeros(2), "conv.bias": torch.zeros(1)}
WRAPPERS = ["state_dict", "model", "model_state", "state_dict_ema", None]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_read_state_dict_unwraps(tmp_path, wrapper):
    torch.save({wrapper: STATE, "meta": {"a": 1}, "epoch": 3} if wrapper else STATE, tmp_path / "a.pth")
    assert list(read_state_dict(tmp_path / "a.pth")) == list(STATE)


@pytest.mark.parametrize("legacy", [False, True])
def test_read_state_dict_ignores_objects(tmp_path, legacy):
    """Training scripts store an argparse.Namespace, a counter, paths ... in their files: ignored, not executed."""
    options = [argparse.Namespace(lr=0.1), collections.Counter("aab"), collections.deque([1]), {1, 2}, Path("x"), print]
    weights = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2, dtype=torch.float16)}
    torch.save({"args": options, "model": weights}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    found = read_state_dict(tmp_path / "a.pth")
    assert list(found) == list(weights)
    for key in weights:
        torch.testing.assert_close(found[key], weights[key], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(60)), "damaged"),
        (lambda path: path.write_bytes(b""), "empty file"),
        (lambda path: torch.save({"a": 1}, path), "no weights in it (found: keys a)"),
        (lambda path: torch.save({}, path), "no weights in it"),
        (lambda path: torch.save(nn.Conv2d(1, 1, 1), path), "no weights in it (found: torch.nn.modules.conv.Conv2d)"),
        (lambda path: torch.save({"model": nn.Conv2d(1, 1, 1)}, path), "torch.save(model.state_dict(), path)"),
    ],
)
def test_read_state_dict_without_weights(tmp_path, write, message):
    write(tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as caught:
        read_state_dict(tmp_path / "a.pth")
    assert message in str(caught.value)


class Malicious:
    """Object whose unpickling would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return subprocess.check_call, (["touch", str(self.path)],)


@pytest.mark.parametrize("legacy", [False, True])
def test_read_state_dict_executes_nothing(tmp_path, legacy):
    file = {"model": STATE, "args": Malicious(tmp_path / "executed")}
    torch.save(file, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    assert list(read_state_dict(tmp_path / "a.pth")) == list(STATE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth"]
