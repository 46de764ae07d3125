"""Checkpoints with changed bytes, records or values: loaded as they were written, or refused."""

from __future__ import annotations

import copy
import io
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoint.io import write_checkpoint
from models.loading import load_detector
from tests.helpers.checkpoints import content, detector
from tests.helpers.fuzz import Case, WrongResult, faults, seeds
from tests.helpers.mutations import ODD_VALUES, mutate_tree

pytestmark = pytest.mark.fuzz


def shared(levels: int) -> list[Any]:
    """Lists that contain the previous one twice."""
    values: list[Any] = ["a"]
    for _ in range(levels):
        values = [values, values]
    return values


def change_tensor(state: dict[str, Any], rng: random.Random) -> str:
    """Replace a tensor by one of an unusual kind."""
    key = rng.choice(sorted(state))
    kinds = {
        "nan": lambda: torch.full_like(state[key].float(), float("nan")),
        "empty": lambda: torch.zeros(10**8, 0),
        "expanded": lambda: torch.zeros(1).expand(10**6, 10**4),
        "shape": lambda: torch.zeros(3, 1, 2),
        "sparse": lambda: torch.zeros(3).to_sparse(),
        "complex": lambda: torch.zeros(3, dtype=torch.complex64),
        "strided": lambda: torch.zeros(8).as_strided((4,), (2,)),
        "number": lambda: 3,
    }
    kind = rng.choice(sorted(kinds))
    state[key] = kinds[kind]()
    return kind


def damaged(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Flip, cut, insert or overwrite bytes."""
    at, kind = rng.randrange(len(data)), rng.choice(["flip", "cut", "insert", "zeros"])
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :], kind
    if kind == "cut":
        return data[:at], kind
    size = rng.choice([1, 16, 400])
    return data[:at] + (rng.randbytes(size) + data[at:] if kind == "insert" else bytes(size) + data[at + size :]), kind


def replaced_record(data: bytes, rng: random.Random) -> bytes:
    """Write the archive again with one record shortened, left out or twice as long; its checksums are right."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w") as out:
        names = source.namelist()
        chosen, change = rng.choice(names), rng.choice(["short", "none", "double"])
        for name in names:
            body = source.read(name)
            if name == chosen:
                body = body[: len(body) // 2] if change == "short" else body * 2
            if name != chosen or change != "none":
                out.writestr(name, body)
    return target.getvalue()


def make(rng: random.Random, folder: Path) -> Case:
    path, model = folder / "x.pt", detector()
    write_checkpoint(path, content(model))
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    kind = rng.choice(["bytes", "record", "tree", "tensor", "shared"])
    data = path.read_bytes()
    if kind == "bytes":
        data, change = damaged(data, rng)
    elif kind == "record":
        data, change = replaced_record(data, rng), "record"
    else:
        tree = copy.deepcopy(torch.load(path, weights_only=True))
        if kind == "tensor":
            change = change_tensor(tree["state"], rng)
        elif kind == "shared":
            change = rng.choice(["spec", "names", "metadata", "train", "epoch"])
            tree[change] = shared(rng.choice([15, 28, 40]))
        else:
            change = mutate_tree(tree, rng, ODD_VALUES)
        buffer = io.BytesIO()
        torch.save(tree, buffer)
        data = buffer.getvalue()
    path.write_bytes(data)

    def run() -> None:
        state = load_detector(path).state_dict()
        if kind in ("bytes", "record") and any(not torch.equal(state[key], value) for key, value in expected.items()):
            raise WrongResult("damaged weights were loaded")
        if any(not torch.isfinite(value).all() for value in state.values()):
            raise WrongResult("weights that are not finite were loaded")

    return Case(run, f"{kind} {change}", str(path))


def test_checkpoints(tmp_path: Path) -> None:
    assert faults(make, seeds(), tmp_path) == []
