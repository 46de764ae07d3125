"""A training with the anchor-free head: columns, recipe, resume, transfer between heads, ensembles of both."""

from __future__ import annotations

import logging
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.cli.config import DetectConfig, Hyperparameters
from engine.predict.predictor import detect
from engine.runtimes.pytorch import PyTorchRuntime
from engine.train.optimizer import AUTO_ITERATIONS, auto_optimizer, auto_settings
from engine.train.options import choose_hyperparameters, resolve_auto, with_recipe
from engine.train.trainer import train
from models.loading import load_detector
from tests.helpers.training import assert_equal_runs, config, interrupt_at, signal_at, write_project
from utils.errors import ConfigError
from utils.files import ROOT

AUTO = Hyperparameters.from_yaml(ROOT / "data/hyps/hyp.auto.yaml")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return write_project(tmp_path_factory.mktemp("free"))


@pytest.fixture(scope="module")
def run(project) -> Path:
    """A run of two epochs with the free head."""
    return train(config(project, head="free", name="free")).folder


def test_results_name_the_losses_of_the_head(run):
    header = [word.strip() for word in (run / "results.csv").read_text().splitlines()[0].split(",")]
    assert header[1:4] == ["train/box_loss", "train/cls_loss", "train/dfl_loss"]
    assert header[8:11] == ["val/box_loss", "val/cls_loss", "val/dfl_loss"]


def test_run_files_hold_the_resolved_recipe(run):
    options, hyp = (run / "opt.yaml").read_text(), (run / "hyp.yaml").read_text()
    assert "head: free" in options
    assert "optimizer: AdamW" in options
    assert "hyp.auto.yaml" in options
    assert f"lr0: {auto_settings('AdamW', 3).lr0}" in hyp
    assert load_detector(run / "weights/best.pt").head.kind == "free"


def test_a_resumed_run_is_bit_equal(project, run, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 1)
        train(config(project, head="free", name="resumed"))
    train(config(project, resume=str(project / "runs/resumed/weights/last.pt")))
    assert_equal_runs(run, project / "runs/resumed")


@pytest.mark.parametrize("options", [{"freeze": ["3"]}, {"amp": "bf16"}, {"rect": True}, {"quad": True}])
def test_options_of_a_training_work(project, options):
    result = train(config(project, head="free", epochs=1, **options))
    assert result.best is not None


def test_freeze_keeps_the_weights(project, run):
    result = train(config(project, head="free", weights=str(run / "weights/best.pt"), cfg="", freeze=["3"], epochs=1))
    before, after = load_detector(run / "weights/best.pt").state_dict(), load_detector(result.last).state_dict()
    changed = {name.split(".")[1] for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"3", "4", "5"}


def test_label_smoothing_without_effect_is_reported(project, caplog):
    train(config(project, head="free", epochs=1, label_smoothing=0.1))
    assert "--label-smoothing has no effect: AnchorFreeDetect has no label smoothing" in caplog.messages


def test_resumed_run_keeps_the_confidence_of_its_last_validation(project, run, monkeypatch):
    last = project / "runs/kept/weights/last.pt"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 1)
        train(config(project, head="free", name="kept"))
    content = torch.load(last, weights_only=True)
    content["metadata"]["best_conf"] = 0.375
    torch.save(content, last)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        signal_at(patch, signal.SIGTERM, (1, 0))
        train(config(project, resume=str(last)))
    assert torch.load(last, weights_only=True)["metadata"]["best_conf"] == 0.375


def test_transfer_takes_all_but_the_head_and_reports_it(project, run, caplog):
    caplog.set_level(logging.INFO)
    result = train(config(project, weights=str(run / "weights/best.pt"), cfg="", head="anchor", epochs=1, name="back"))
    assert load_detector(result.last).head.kind == "anchor"
    assert any("Transferred 30/37 items; 7 new: model.5.anchors" in text for text in caplog.messages)


def test_ensemble_of_both_heads_has_the_rows_of_both(project, run):
    other = train(config(project, epochs=1, name="anchor")).last
    runtime = PyTorchRuntime([run / "weights/best.pt", other], torch.device("cpu"))
    images = torch.rand(1, 3, 64, 64)
    alone = [PyTorchRuntime([weights], torch.device("cpu"))(images) for weights in (run / "weights/best.pt", other)]
    assert alone[1].shape[1] == 3 * alone[0].shape[1]
    torch.testing.assert_close(runtime(images), torch.cat(alone, 1), rtol=0, atol=0)


def test_conf_thres_auto_uses_the_threshold_of_the_validation(project, run, caplog):
    weights = run / "weights/best.pt"
    content = torch.load(weights, weights_only=True)
    caplog.set_level(logging.INFO)
    content["metadata"]["best_conf"] = 0.125
    torch.save(content, project / "auto.pt")
    options = {"source": str(project / "set/images/val"), "imgsz": 64, "project": str(project / "d"), "nosave": True}
    detect(DetectConfig.from_keywords(weights=str(project / "auto.pt"), conf_thres="auto", **options))
    assert "Confidence threshold 0.125 (--conf-thres auto)" in caplog.messages
    del content["metadata"]["best_conf"]
    torch.save(content, project / "none.pt")
    with pytest.raises(ConfigError, match=r"--conf-thres auto: .*none\.pt: no threshold is stored; give a number"):
        detect(DetectConfig.from_keywords(weights=str(project / "none.pt"), conf_thres="auto", **options))


AUTO_CASES = [
    (AUTO_ITERATIONS - 1, 3, "AdamW", 0.001429),
    (1, 80, "AdamW", 0.000119),
    (AUTO_ITERATIONS, 3, "SGD", 0.01),
]


@pytest.mark.parametrize(("iterations", "classes", "name", "lr"), AUTO_CASES)
def test_auto_chooses_by_iterations_and_classes(iterations, classes, name, lr):
    assert auto_optimizer(iterations) == name
    settings = auto_settings(name, classes)
    assert settings.lr0 == lr
    assert settings.warmup_bias_lr == (0 if name == "AdamW" else 0.1)


def test_auto_is_resolved_once(project):
    options, hyp = resolve_auto(config(project, optimizer="auto", epochs=60), AUTO, 3, 205)
    assert (options.optimizer, options.close_mosaic, hyp.optimizer, hyp.lr0) == ("AdamW", 10, "AdamW", 0.001429)
    assert resolve_auto(options, hyp, 3, 205) == (options, hyp)


@pytest.mark.parametrize(
    ("optimizer", "own", "iterations", "chosen", "lr0"),
    [
        ("auto", "auto", 100, "AdamW", 0.001429),
        ("auto", "auto", 10**6, "SGD", 0.02),  # the file's
        ("auto", "AdamW", 10**6, "SGD", 0.01),  # the file's is for AdamW
        ("AdamW", "auto", 10**6, "AdamW", 0.001429),
        ("Adam", "auto", 10**6, "Adam", 0.001429),
        ("SGD", "auto", 100, "SGD", 0.02),
        ("SGD", None, 100, None, 0.02),
        ("AdamW", None, 100, None, 0.02),
    ],
)
def test_learning_rates_of_auto_are_for_the_optimizer(project, optimizer, own, iterations, chosen, lr0):
    options = config(project, optimizer=optimizer, epochs=iterations, batch_size=1)
    resolved, hyp = resolve_auto(options, replace(AUTO, optimizer=own, lr0=0.02), 3, 1)
    assert (resolved.optimizer, hyp.optimizer, hyp.lr0) == (chosen or optimizer, chosen, lr0)


def test_hyperparameters_of_a_run_are_read_without_further_options(project, run):
    """Those of --evolve, too: hyp_evolve.yaml names its optimizer."""
    options = with_recipe(config(project, head="free", hyp=str(run / "hyp.yaml")))
    assert options.optimizer == "AdamW"
    hyp = choose_hyperparameters(options, None)
    assert resolve_auto(options, hyp, 3, 10) == (replace(options, close_mosaic=0), hyp)


@pytest.mark.parametrize(("given", "epochs", "expected"), [(-1, 30, 5), (-1, 600, 10), (3, 6, 3), (0, 60, 0)])
def test_close_mosaic_is_a_sixth_of_a_short_run(project, given, epochs, expected):
    options = config(project, close_mosaic=given, epochs=epochs)
    assert resolve_auto(options, AUTO, 3, 205)[0].close_mosaic == expected


@pytest.mark.parametrize(
    ("options", "hyp", "optimizer"),
    [
        ({}, "hyp.scratch-low.yaml", "SGD"),
        ({"head": "free"}, "hyp.auto.yaml", "auto"),
        ({"cfg": "yolov5n-free.yaml"}, "hyp.auto.yaml", "auto"),
        ({"cfg": "yolov5n-free.yaml", "head": "anchor"}, "hyp.scratch-low.yaml", "SGD"),
        ({"head": "free", "hyp": "hyp.scratch-high.yaml"}, "hyp.scratch-high.yaml", "SGD"),
        ({"head": "free", "optimizer": "AdamW"}, "hyp.auto.yaml", "AdamW"),
        ({"hyp": "hyp.auto.yaml"}, "hyp.auto.yaml", "auto"),
    ],
)
def test_recipe_follows_the_head_unless_given(project, options, hyp, optimizer):
    resolved = with_recipe(config(project, **options))
    assert (Path(resolved.hyp).name, resolved.optimizer) == (hyp, optimizer)


def test_without_a_model_there_is_no_recipe(project):
    with pytest.raises(ConfigError, match="--cfg and --weights are empty"):
        with_recipe(config(project, cfg=""))
