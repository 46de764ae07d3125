"""`--compile`: the same training, few graphs, ordinary checkpoints, one-line errors.

Most tests capture graphs with a backend that runs them unchanged: code generation is PyTorch's part, and takes a
minute. Tests with generated code are slow.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.cli.config import TrainConfig
from engine.train.trainer import TrainResult, train
from models.checkpoint.io import read_checkpoint
from tests.helpers.training import config, interrupt_at, rows
from utils.errors import ConfigError

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
    """Assert equal rows and weights, under the same keys."""
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
        ({"head": "free"}, 1),
    ],
    ids=str,
)
def test_the_same_training_with_few_graphs(options, number, project: Path, graphs) -> None:
    plain = train(config(project, name="plain", **options))
    assert not graphs
    assert_same(train(config(project, name="compiled", compile=True, **options)), plain, 1e-6)
    assert len(graphs) == number


@pytest.mark.parametrize("option", [pytest.param("multi_scale", marks=pytest.mark.slow), "rect"])
def test_sizes_that_vary_share_a_graph(option, project: Path, graphs) -> None:
    options = {option: True, "epochs": 3, "imgsz": 96}
    plain = train(config(project, name="plain", **options))
    assert_same(train(config(project, name="compiled", compile=True, **options)), plain, 1e-5)
    assert len(graphs) <= 2


def test_resume(project: Path, graphs, monkeypatch) -> None:
    whole = train(config(project, name="whole", epochs=3, compile=True))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(config(project, name="cut", epochs=3, compile=True))
    last = project / "runs/cut/weights/last.pt"
    state = torch.load(last, weights_only=True)["train"]["model"]
    assert not any("_orig_mod" in key for key in state)
    assert_same(train(TrainConfig.from_keywords(resume=str(last))), whole)
    assert read_checkpoint(last).state.keys() == state.keys()


def test_compile_error_is_one_line(project: Path, monkeypatch) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise NotImplementedError("no rule for\nthis operator")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(COMPILE, backend=backend))
    with pytest.raises(ConfigError, match="^--compile: torch.compile cannot compile this network here: ") as error:
        train(config(project, compile=True))
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"multi_scale": True}, {"head": "free"}], ids=["one size", "many sizes", "anchor-free head"]
)
def test_generated_code(options, project: Path) -> None:
    """Generated CPU code computes the same up to the order of sums."""
    torch._dynamo.reset()
    plain = train(config(project, name="plain", epochs=1, amp="off", **options))
    assert_same(train(config(project, name="compiled", epochs=1, amp="off", compile=True, **options)), plain, 1e-3)
