"""Our checkpoints: round trip, atomic writes, and one-line errors for everything that cannot be read."""

from __future__ import annotations

import os
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models.checkpoint import io as module
from models.checkpoint.inert import LoadedFile
from models.checkpoint.io import read_checkpoint, write_checkpoint
from models.loading import load_detector
from tests.helpers.checkpoints import content, detector
from tests.parity import rules
from utils.errors import CheckpointError


def test_write_checkpoint_round_trip(tmp_path):
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


def test_write_checkpoint_is_readable_by_torch_weights_only(tmp_path):
    write_checkpoint(tmp_path / "a.pt", content(detector(), train={"x": OrderedDict(a=1)}))
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert loaded["format"] == "detector-1"


def test_write_checkpoint_stores_float32_without_the_storage_of_views(tmp_path):
    model = detector().half()
    state = dict(model.state_dict(), extra=torch.zeros(1000, 1000)[:1, :1])
    path = write_checkpoint(tmp_path / "a.pt", {**content(model), "state": state})
    assert path.stat().st_size < 200_000
    assert {v.dtype for v in read_checkpoint(path).state.values()} == {torch.float32, torch.int64}


def test_entries_may_share_storage(tmp_path):
    """Raw and averaged weights of a fresh run are stored once."""
    model = detector()
    state = dict(model.state_dict(), large=torch.zeros(100_000))
    path = write_checkpoint(tmp_path / "a.pt", {**content(model, train={"model": state}), "state": state})
    assert path.stat().st_size < 500_000
    found = read_checkpoint(path)
    assert found.train is not None
    found.train["model"]["large"].fill_(1)
    torch.testing.assert_close(found.state["large"], state["large"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("value", "key"),
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
def test_write_checkpoint_rejects_other_values_by_key(tmp_path, value, key):
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(tmp_path / "a.pt", content(detector(), metadata=value))
    assert f"'{key}'" in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("key", ["spec", "names", "stride", "state"])
def test_write_checkpoint_requires_every_key(tmp_path, key):
    mapping = content(detector())
    del mapping[key]
    with pytest.raises(CheckpointError, match=f"'{key}' was not given"):
        write_checkpoint(tmp_path / "a.pt", mapping)


def test_write_checkpoint_failure_keeps_the_old_file(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "a.pt", content(detector(0), epoch=1))

    def full_disk(value, target, **_):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.torch, "save", full_disk)
    with pytest.raises(CheckpointError, match=r"a\.pt: cannot be written .*the earlier file is unchanged"):
        write_checkpoint(path, content(detector(1), epoch=2))
    assert read_checkpoint(path).epoch == 1
    assert os.listdir(tmp_path) == ["a.pt"]


def test_write_checkpoint_detects_a_lost_entry(tmp_path, monkeypatch):
    """The file is compared with what was given before it gets its name."""
    real = torch.save

    def lossy(value, target, **_):
        real({**value, "state": dict(list(value["state"].items())[:-1])}, target)

    monkeypatch.setattr(module.torch, "save", lossy)
    with pytest.raises(CheckpointError, match="not stored"):
        write_checkpoint(tmp_path / "a.pt", content(detector()))
    assert os.listdir(tmp_path) == []


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
    ("git-lfs", raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"), "a git-lfs pointer"),
    ("onnx", raw(b"\x08\x08\x12\x07pytorch\x1a\x052.0.0" + bytes(40)), "an ONNX file"),
    ("torchscript", torchscript, "a TorchScript file"),
    ("zip", raw(b"PK\x05\x06" + bytes(18)), "a zip archive with no data.pkl"),
    ("pickle", raw(b"\x80\x02}q\x00."), "cannot be read, damaged"),
    ("state dict", plain(STATE), "a bare state dict (2 tensors: conv.weight, conv.bias)"),
    ("wrapped state dict", plain({"epoch": 1, "model": STATE}), "'weights: <path>'"),
    ("numbers", plain({"a": 1, "b": 2}), "not a checkpoint of a detector (found: keys a, b)"),
    ("list", plain([1, 2]), "found: list"),
    ("another version", own(format="detector-9"), "written by another version: format 'detector-9'"),
    ("no spec", own(spec=None), "'spec' is NoneType; dict is needed"),
    ("names", own(names={0: "a", 2: "b"}), "'names' must name the classes 0..n-1"),
    ("stride", own(stride=[0.0]), "'stride' must be a list of positive numbers"),
    ("state", own(state={"a": 1}), "'state' contains values that are not tensors"),
    ("epoch", own(epoch="last"), "'epoch' is str; int is needed"),
]


@pytest.mark.parametrize(("write", "message"), [u[1:] for u in UNREADABLE], ids=[u[0] for u in UNREADABLE])
def test_read_checkpoint_says_what_a_file_is(tmp_path, write, message):
    path = tmp_path / "weights.pt"
    write(path)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read_checkpoint_of_a_missing_file_suggests_similar_names(tmp_path):
    (tmp_path / "best.pt").touch()
    (tmp_path / "image.png").touch()
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "bset.pt")
    assert str(caught.value) == f"{tmp_path}/bset.pt: no such file; similar names in that folder: best.pt"
    with pytest.raises(CheckpointError, match=r"no such file$"):
        read_checkpoint(tmp_path / "no" / "such.pt")


def test_read_checkpoint_does_not_open_a_fifo(tmp_path):
    os.mkfifo(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt: cannot be read: is a FIFO"):
        read_checkpoint(tmp_path / "x.pt")


def test_read_checkpoint_of_a_folder_lists_its_checkpoints(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "best.pt").touch()
    with pytest.raises(CheckpointError, match=r"a folder; a checkpoint file is needed; it contains weights/best\.pt"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("record", ["data/0", "data.pkl", ".format_version"])
def test_read_checkpoint_refuses_a_flipped_bit(tmp_path, record):
    path = write_checkpoint(tmp_path / "a.pt", content(detector()))
    with zipfile.ZipFile(path) as archive:
        (info,) = (i for i in archive.infolist() if i.filename.endswith("/" + record))
        before = archive.read(info)
    data = bytearray(path.read_bytes())
    at = data.index(before, info.header_offset) + len(before) // 2
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"damaged: the content of '.*{record}' does not match its checksum"):
        read_checkpoint(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_read_checkpoint_refuses_weights_that_are_not_finite(tmp_path, value):
    values = content(detector())
    key = next(iter(values["state"]))
    values["state"][key].view(-1)[0] = value
    with pytest.raises(CheckpointError, match=f"weight '{key}' is not finite"):
        read_checkpoint(write_checkpoint(tmp_path / "a.pt", values))


@pytest.mark.parametrize("key", ["spec", "metadata", "train"])
def test_read_checkpoint_bounds_the_values_of_shared_lists(tmp_path, key):
    """Forty lists that each contain the previous one twice are 2^40 values in a small file."""
    shared = ["a"]
    for _ in range(40):
        shared = [shared, shared]
    path = tmp_path / "x.pt"
    torch.save({**content(detector()), key: {"x": shared}, "format": "detector-1"}, path)
    loaded = LoadedFile(path)
    assert loaded.values < 1_000_000
    with pytest.raises(CheckpointError, match="nested too deeply, or too many of them"):
        loaded.plain(loaded.value, keep_tensors=True)


def test_read_checkpoint_finds_a_short_record_among_others_of_that_size(tmp_path):
    write_checkpoint(tmp_path / "x.pt", content(detector()))
    with zipfile.ZipFile(tmp_path / "x.pt") as source, zipfile.ZipFile(tmp_path / "y.pt", "w") as out:
        sizes = [info.file_size for info in source.infolist() if "/data/" in info.filename]
        short = next(i.filename for i in source.infolist() if "/data/" in i.filename and sizes.count(i.file_size) > 2)
        for name in source.namelist():
            body = source.read(name)
            out.writestr(name, body[: len(body) // 2] if name == short else body)
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(tmp_path / "y.pt")
