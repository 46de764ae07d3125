"""Unexpected exceptions in every script: one line with the log file's path, exit status 70, traceback in a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import compare as compare_script
import detect as detect_script
import export as export_script
import train as train_script
import val as val_script
from data import convert
from data.check import check
from engine.cli.config import DetectConfig, TrainConfig, ValConfig
from engine.cli.parser import run_main
from engine.compare.config import CompareConfig
from engine.export.config import ExportConfig
from models.backbones import __main__ as backbones_command
from utils import log


def _main(config: Any, work: Any) -> Callable[[list[str]], int]:
    required = ["--cfg", "x"] if config is CompareConfig else []
    return lambda argv: run_main(config, "script", "", work, [*required, *argv])


# Script -> its main, a function of it to replace, and the folder of error.log.
SCRIPTS: dict[str, tuple[Callable[[list[str]], int], str, str]] = {
    "train.py": (_main(TrainConfig, train_script.work), "engine.train.trainer.train", "runs/train"),
    "val.py": (_main(ValConfig, val_script.work), "engine.evaluate.evaluator.validate", "runs/val"),
    "detect.py": (_main(DetectConfig, detect_script.work), "engine.predict.predictor.detect", "runs/detect"),
    "export.py": (_main(ExportConfig, export_script.work), "engine.export.exporter.export", "runs"),
    "compare.py": (_main(CompareConfig, compare_script.work), "engine.compare.runner.compare", "runs/compare"),
    "data.check": (lambda a: check.main(["x.yaml", *a]), "data.check.check._check", "runs"),
    "data.convert": (lambda a: convert.main(["x", "y", "--to", "coco", *a]), "data.convert._convert", "runs"),
    "models.backbones": (backbones_command.main, "models.backbones.__main__.describe", "runs"),
}


def fail(*_: object, **__: object) -> None:
    raise FileNotFoundError("a path of our own\nwith http://user:secret@host")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    log.set_error_folder(Path("runs"))
    return tmp_path


@pytest.mark.parametrize("script", SCRIPTS)
def test_internal_error_is_one_line_with_the_log(
    script: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main, target, project = SCRIPTS[script]
    monkeypatch.setattr(target, fail)
    assert main([]) == 70
    line = capsys.readouterr().err
    path = Path(project) / "error.log"
    assert line.count("\n") == 1 and f"traceback in {path}" in line and "FileNotFoundError" in line
    text = (folder / path).read_text()
    assert "Traceback (most recent call last)" in text and "in fail" in text
    assert "secret" not in line + text


@pytest.mark.parametrize("script", SCRIPTS)
def test_debug_prints_the_traceback(
    script: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main, target, _ = SCRIPTS[script]
    monkeypatch.setattr(target, fail)
    assert main(["--debug"]) == 70
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    assert not list(folder.rglob("error.log"))


def test_training_writes_the_traceback_into_its_run_folder(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("engine.train.trainer.Trainer.fit", fail)
    argv = ["--cfg", "tiny.yaml", "--data", "data.yaml", "--imgsz", "64", "--workers", "0", "--device", "cpu"]
    assert run_main(TrainConfig, "train.py", "", train_script.work, argv) == 70
    assert (project / "runs/train/exp/error.log").is_file()
    assert "runs/train/exp/error.log" in capsys.readouterr().err.splitlines()[-1]


def test_unwritable_folder_falls_back_to_the_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "runs").write_text("a file")
    assert log.run_command("prog", fail) == 70
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and "cannot be written" in lines[-1]
