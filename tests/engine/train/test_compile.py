"""`--compile`: the same training, few graphs, ordinary checkpoints, one-line errors.

Most tests capture graphs with a backend that runs them as they are: what PyTorch generates from a graph is not ours to
test, and takes a minute. Those with generated code are slow.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.cli.config import TrainConfig
from engine.train.trainer import Trainer, TrainResult, train
from models.checkpoint.io import read_checkpoint
from tests.engine.train.test_trainer import config, place, rows
from utils.errors import ConfigError

__all__ = ["place"]  # the fixture; 10 pictures in batches of 4: the last batch of an epoch is smaller
COMPILE = torch.compile


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Parameters of each graph that is captured instead of compiled."""
    seen: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(COMPILE, backend=backend))
    return seen


def assert_same(found: TrainResult, wanted: TrainResult, tolerance: float = 0.0) -> None:
    """Equal rows and weights, under the same keys."""
    torch.testing.assert_close(
        torch.tensor(rows(found.folder)), torch.tensor(rows(wanted.folder)), rtol=1e-3, atol=1e-4
    )
    for name in ("best.pt", "last.pt"):
        a, b = (read_checkpoint(result.folder / "weights" / name).state for result in (found, wanted))
        assert list(a) == list(b)
        for key in b:
            torch.testing.assert_close(a[key], b[key], rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({}, 1),  # the smaller last batch runs uncompiled
        ({"freeze": ["2"], "freeze_epochs": 1}, 2),  # other parameters learn from epoch 1 on
        ({"quad": True}, 1),
    ],
    ids=str,
)
def test_the_same_training_with_few_graphs(options, number, place: Path, graphs) -> None:
    plain = train(config(place, name="plain", **options))
    assert not graphs
    assert_same(train(config(place, name="compiled", compile=True, **options)), plain, 1e-6)
    assert len(graphs) == number


@pytest.mark.parametrize("option", [pytest.param("multi_scale", marks=pytest.mark.slow), "rect"])
def test_sizes_that_vary_share_a_graph(option, place: Path, graphs) -> None:
    options = {option: True, "epochs": 3, "imgsz": 96}
    plain = train(config(place, name="plain", **options))
    assert_same(train(config(place, name="compiled", compile=True, **options)), plain, 1e-5)
    assert len(graphs) <= 2


def test_resume(place: Path, graphs, monkeypatch) -> None:
    whole = train(config(place, name="whole", epochs=3, compile=True))
    original = Trainer._train_epoch

    def interrupted(self: Trainer, epoch: int) -> Any:
        if epoch == 2:
            raise KeyboardInterrupt
        return original(self, epoch)

    monkeypatch.setattr(Trainer, "_train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config(place, name="cut", epochs=3, compile=True))
    monkeypatch.setattr(Trainer, "_train_epoch", original)
    last = place / "runs/cut/weights/last.pt"
    state = torch.load(last, weights_only=True)["train"]["model"]
    assert not any("_orig_mod" in key for key in state)
    assert_same(train(TrainConfig.from_keywords(resume=str(last))), whole)
    assert read_checkpoint(last).state.keys() == state.keys()


def test_what_cannot_be_compiled_is_told_in_a_line(place: Path, monkeypatch) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise NotImplementedError("no rule for\nthis operator")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(COMPILE, backend=backend))
    with pytest.raises(ConfigError, match="^--compile: torch.compile cannot compile this network here: ") as error:
        train(config(place, compile=True))
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"multi_scale": True}], ids=["one size", "many sizes"])
def test_generated_code(options, place: Path) -> None:
    """For real: code generated for the CPU computes the same up to the order of sums."""
    torch._dynamo.reset()
    plain = train(config(place, name="plain", epochs=1, amp="off", **options))
    assert_same(train(config(place, name="compiled", epochs=1, amp="off", compile=True, **options)), plain, 1e-3)
