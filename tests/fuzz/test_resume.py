"""`--resume` of damaged run folders: the training continues, or one line says why not."""

from __future__ import annotations

import copy
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.cli.config import TrainConfig
from engine.train.trainer import train
from tests.helpers.fuzz import Case, WrongResult, faults, seeds
from tests.helpers.mutations import ODD_VALUES, mutate_tree
from tests.helpers.training import config, interrupt_at, rows, write_project
from utils.errors import TrainingError, UserError

pytestmark = pytest.mark.fuzz
EPOCHS = 2
TENSORS = [
    torch.zeros(3), torch.zeros(0), torch.full((2,), float("nan")), torch.zeros(1).expand(10**6),
    torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.complex64), torch.zeros(5056), torch.eye(2).half(),
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a training that was interrupted before its last epoch."""
    folder = write_project(tmp_path_factory.mktemp("project"))
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, EPOCHS - 1)
        with pytest.raises(KeyboardInterrupt):
            train(config(folder, epochs=EPOCHS, data=str(folder / "data.yaml")))
    return folder / "runs/exp"


def damage_state(tree: dict[str, Any], rng: random.Random) -> str:
    """Change the content of last.pt in place; return what was changed."""
    state = tree["train"]
    values = [*ODD_VALUES, *TENSORS]
    kind = rng.choice(["entry", "entry", "option", "hyp", "drop", "drop", "tree", "tensor", "optimizer", "epoch"])
    if kind in ("entry", "option", "hyp"):
        place = {"entry": state, "option": state["options"], "hyp": state["hyp"]}[kind]
        key = rng.choice(list(place))
        place[key] = rng.choice(values)
        return f"{kind} {key}"
    if kind == "drop":
        place = rng.choice([state, state, tree, state["optimizer"], state["rng"], state["hyp"], state["options"]])
        key = rng.choice(list(place))
        del place[key]
        return f"drop {key}"
    if kind == "tree":
        return mutate_tree(state, rng, values)
    if kind == "tensor":
        place = rng.choice([state["model"], tree["state"]])
        key = rng.choice(list(place))
        place[key] = rng.choice([*TENSORS, place[key] * float("nan") if place[key].is_floating_point() else 3])
        return f"tensor {key}"
    if kind == "optimizer":
        buffers = state["optimizer"]["state"]
        key = rng.choice(list(buffers))
        buffers[key] = rng.choice([{}, None, {"momentum_buffer": rng.choice(TENSORS)}, {"step": 1}])
        return f"optimizer {key}"
    tree["epoch"] = rng.choice([-10, -2, 10**6, 10**30, EPOCHS, True, 1.5])
    return f"epoch {tree['epoch']}"


def damage_file(folder: Path, rng: random.Random) -> str:
    """Change a file beside the checkpoint; return what was changed."""
    name = rng.choice(["results.csv", "results.csv", "opt.yaml", "hyp.yaml", "report.html", "loggers.json"])
    path, kind = (
        folder / name,
        rng.choice(["empty", "cut", "binary", "future", "long", "repeat", "gone", "folder", "link"]),
    )
    data = path.read_bytes() if path.is_file() else b""
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("/nowhere/x")
    elif kind != "gone":
        future = data + ",".join(f"{v:20.5g}" for v in [99] + [0] * 13).encode()
        path.write_bytes({"cut": data[: len(data) // 2], "binary": rng.randbytes(300), "future": future,
                          "long": data + b"1," * 90_000, "empty": b"", "repeat": data * 3}[kind])  # fmt: skip
    return f"{kind} {name}"


def make(run: Path, rng: random.Random, folder: Path) -> Case:
    here = folder / "runs/exp"
    shutil.copytree(run, here)
    last = here / "weights/last.pt"
    kind = ""
    if rng.random() < 0.8:
        tree = torch.load(last, weights_only=True)
        changed = copy.deepcopy(tree)
        kind = damage_state(changed, rng)
        try:
            torch.save(changed, last)
        except Exception:  # noqa: BLE001 (values that no file can hold)
            torch.save(tree, last)
            kind = "not storable"
        options = changed["train"].get("options") if isinstance(changed.get("train"), dict) else None
        if isinstance(options, dict) and any(_is_long(options.get(key)) for key in ("epochs", "imgsz", "batch_size")):
            return Case(lambda: None, "too long", "")
    else:
        kind = damage_file(here, rng)

    def resume() -> None:
        logging.disable(logging.CRITICAL)
        torch.set_num_threads(1)
        try:
            train(TrainConfig.from_keywords(resume=str(last), device="cpu", workers=0))
        except TrainingError as error:  # a diverged training is not a fault
            raise UserError(str(error)) from error
        epochs = [row[0] for row in rows(here)]
        if epochs != sorted(set(epochs)) or not np.isfinite(epochs).all():
            raise WrongResult(f"results.csv has epochs {epochs}")

    return Case(resume, kind, kind)


def _is_long(value: object) -> bool:
    return isinstance(value, (int, float)) and not value <= 128


def test_damaged_runs_are_resumed_or_refused_in_one_line(run: Path, tmp_path: Path) -> None:
    assert not faults(lambda rng, folder: make(run, rng, folder), seeds(), tmp_path)
