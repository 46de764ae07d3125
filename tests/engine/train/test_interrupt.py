"""Stopping and resuming: signals in the middle of an epoch, kills at any time, a full disk."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.cli.config import TrainConfig
from engine.evaluate import evaluator
from engine.train.trainer import train
from models.checkpoint.io import read_checkpoint
from tests.helpers.training import assert_equal_runs, config, rows, signal_at
from utils.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[3]


# 10 images in batches of 2 are 5 batches per epoch; in this warm-up the optimizer steps after batches 0, 1, 3, 6, 10.
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("number", "at", "epoch"), [(signal.SIGTERM, (1, 0), 0), (signal.SIGINT, (0, 1), -1)], ids=["term", "int"]
)
def test_a_signal_in_the_middle_of_an_epoch(project, monkeypatch, number, at, epoch, workers) -> None:
    options = {"batch_size": 2, "epochs": 3, "workers": workers, "multi_scale": True}
    whole = train(config(project, name="whole", **options))
    with monkeypatch.context() as patch:
        signal_at(patch, number, at)
        with pytest.raises(SystemExit if number == signal.SIGTERM else KeyboardInterrupt) as caught:
            train(config(project, name="cut", **options))
    if number == signal.SIGTERM:
        assert caught.value.code == 128 + signal.SIGTERM  # type: ignore[attr-defined]
    last = project / "runs/cut/weights/last.pt"
    saved = read_checkpoint(last)
    assert saved.epoch == epoch and saved.train is not None and saved.train["batches"] == 2
    train(TrainConfig.from_keywords(resume=str(last), workers=workers))
    assert_equal_runs(whole.folder, project / "runs/cut")


def test_a_signal_during_validation_saves_the_finished_training_part(project, monkeypatch) -> None:
    whole = train(config(project, name="whole", epochs=2))
    original = evaluator._suppress
    calls = []

    def suppress(*arguments):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(evaluator, "_suppress", suppress)
    with pytest.raises(SystemExit):
        train(config(project, name="cut", epochs=2))
    last = project / "runs/cut/weights/last.pt"
    saved = read_checkpoint(last).train
    assert saved is not None and saved["batches"] == 3
    train(TrainConfig.from_keywords(resume=str(last)))
    assert_equal_runs(whole.folder, project / "runs/cut")


def test_handlers_are_restored(project) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    train(config(project, epochs=1))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_changed_dataset_is_not_resumed(project, monkeypatch) -> None:
    signal_at(monkeypatch, signal.SIGTERM, (1, 0))
    with pytest.raises(SystemExit):
        train(config(project))
    label = next((project / "set/labels/train").glob("*.txt"))
    label.write_text(label.read_text() + "0 0.5 0.5 0.1 0.1\n")
    with pytest.raises(CheckpointError, match="images or labels have changed"):
        train(TrainConfig.from_keywords(resume=str(project / "runs/exp/weights/last.pt")))


def test_a_run_killed_before_its_end_was_noted_is_finished_by_resume(project, monkeypatch) -> None:
    whole = train(config(project, name="whole"))

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("engine.train.trainer.strip", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config(project, name="cut"))
    resumed = train(TrainConfig.from_keywords(resume=str(project / "runs/cut/weights/last.pt")))
    assert resumed.epochs == whole.epochs == 2
    assert_equal_runs(whole.folder, resumed.folder)


def test_a_full_disk_keeps_the_checkpoint_before(project) -> None:
    first = train(config(project, epochs=1, exist_ok=True))
    before = first.last.read_bytes()

    def small_files() -> None:  # a write beyond the limit fails, as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, resource.RLIM_INFINITY))

    done = subprocess.run(
        command(project, "--exist-ok", "--workers=0"), preexec_fn=small_files, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    wanted = r"train.py: error: .*best\.pt: cannot be written .*the earlier file is unchanged$"
    assert re.search(wanted, done.stderr.strip())
    assert "Traceback" not in done.stderr
    assert first.last.read_bytes() == before
    assert sorted(p.name for p in first.last.parent.iterdir()) == ["best.pt", "last.pt"]


def command(project: Path, *more: str, epochs: int = 4) -> list[str]:
    options = config(project, epochs=epochs, batch_size=2, patience=0).to_dict()
    given = ("cfg", "data", "imgsz", "epochs", "batch_size", "project", "patience")
    flags = [f"--{name.replace('_', '-')}={options[name]}" for name in given]
    return [sys.executable, str(ROOT / "train.py"), *flags, "--device=cpu", "--noplots", *more]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_twenty_kills_leave_no_trace(project, workers) -> None:
    """SIGKILL at 20 random times, every second one while a checkpoint is being written."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    epochs = 150
    subprocess.run(command(project, f"--workers={workers}", "--name=whole", epochs=epochs), check=True, **quiet)
    weights = project / "runs/cut/weights"
    last = weights / "last.pt"
    resume = [sys.executable, str(ROOT / "train.py"), "--resume", str(last), f"--workers={workers}"]
    first = command(project, f"--workers={workers}", "--name=cut", "--exist-ok", epochs=epochs)
    draw = random.Random(workers)
    for kill in range(20):
        process = subprocess.Popen(resume if last.is_file() else first, **quiet)
        before = last.stat().st_mtime_ns if last.is_file() else 0
        while process.poll() is None and not (last.is_file() and last.stat().st_mtime_ns > before):
            time.sleep(0.001)  # until it trains
        until = time.time() + draw.uniform(0.0, 0.4)
        while process.poll() is None and time.time() < until:
            time.sleep(0.001)
        while kill % 2 and process.poll() is None and not list(weights.glob(".*.pt")):
            pass  # until a checkpoint is being written
        assert process.poll() is None, "it exited before it was killed"
        process.kill()
        process.wait()
    subprocess.run(resume, check=True, **quiet)
    assert_equal_runs(project / "runs/whole", project / "runs/cut")
    assert len(rows(project / "runs/cut")) == epochs
