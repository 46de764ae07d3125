"""The hyperparameter `class_weights`: parsing, refusals, logging, and effect in training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from engine.cli.config import Hyperparameters
from engine.train.trainer import train
from models.checkpoint.io import read_checkpoint
from tests.helpers.training import config, interrupt_at, rows
from utils.errors import ConfigError
from utils.files import ROOT

PLAIN = yaml.safe_load((ROOT / "data/hyps/hyp.scratch-low.yaml").read_text(encoding="utf-8"))


def hyp_file(folder: Path, weights: object) -> str:
    path = folder / "hyp.yaml"
    path.write_text(yaml.safe_dump({**PLAIN, "class_weights": weights}), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("given", "read"),
    [(None, None), ("none", None), ("balanced", "balanced"), ([1, 2, 0.5], [1, 2, 0.5]), ({"cross": 3}, {"cross": 3})],
)
def test_forms(given, read, tmp_path: Path) -> None:
    hyp = Hyperparameters.from_yaml(hyp_file(tmp_path, given))
    assert hyp.class_weights == read and type(hyp.class_weights) in (type(None), str, list, dict)
    assert Hyperparameters.from_mapping(hyp.to_dict()) == hyp
    assert ("class_weights" in hyp.to_dict()) is (read is not None)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("balance", "class_weights is 'balance'; allowed: none, balanced, a list of numbers, or numbers by class name"),
        (2.0, "class_weights is 2.0"),
        ([1, -1], "class_weights holds -1; finite numbers of at least 0 are needed"),
        ([1, "x"], "class_weights holds 'x'"),
        ({"cross": float("inf")}, "class_weights holds inf"),
        ({"cross": float("nan")}, "class_weights holds nan"),
        ("x" * 999, "class_weights is 'xxx"),
        ([True], "class_weights holds True"),
    ],
)
def test_mistakes_name_file_and_key(given, words, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        Hyperparameters.from_yaml(hyp_file(tmp_path, given))
    text = str(error.value)
    assert "hyp.yaml:" in text and words in text and "\n" not in text and len(text) < 400


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([1, 2], "2 numbers; the dataset has 3 classes"),
        ({"circles": 2}, "no class 'circles'; .* did you mean 'circle'"),
    ],
)
def test_mistakes_about_the_dataset_leave_no_folder(given, words, project: Path) -> None:
    with pytest.raises(ConfigError, match=rf"hyp\.yaml: class_weights: {words}"):
        train(config(project, hyp=hyp_file(project, given)))
    assert not (project / "runs").exists()


def test_a_training_uses_and_prints_them(project: Path, caplog) -> None:
    plain = train(config(project, epochs=1, name="plain", image_weights=True))
    assert "class_weights" not in caplog.text
    with caplog.at_level("INFO"):
        doubled = train(config(project, epochs=1, name="two", hyp=hyp_file(project, [2, 2, 2]), image_weights=True))
    assert "Class loss weighted (class_weights): circle 2, square 2, cross 2" in caplog.text
    first, second = rows(plain.folder)[0], rows(doubled.folder)[0]
    # The first learning rates are close to 0, so the networks are still almost equal.
    assert second[3] == pytest.approx(2 * first[3], rel=0.01) and second[1:3] == pytest.approx(first[1:3], rel=0.01)
    kept = yaml.safe_load((doubled.folder / "hyp.yaml").read_text())
    assert kept["class_weights"] == [2, 2, 2]


def test_resumed_with_the_same_weights(project: Path, monkeypatch) -> None:
    """Plain values in the checkpoint; rows and weights equal those of an uninterrupted run."""
    options = {"hyp": hyp_file(project, "balanced"), "epochs": 2}
    whole = train(config(project, name="whole", **options))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(config(project, name="cut", **options))
    last = project / "runs/cut/weights/last.pt"
    assert torch.load(last, weights_only=True)["train"]["hyp"]["class_weights"] == "balanced"
    resumed = train(config(project).from_keywords(resume=str(last)))
    assert rows(resumed.folder) == rows(whole.folder)
    state, expected = read_checkpoint(resumed.last).state, read_checkpoint(whole.last).state
    assert all(torch.equal(state[key], expected[key]) for key in expected)
