"""SIGKILL at random moments of trainings and validations: every file stays intact, and `--resume` finishes the run.

KILLS is the number of kills of each setting (default 2).
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import torch
import yaml

from tests.helpers.processes import free_ports
from tests.helpers.training import rows, write_project
from utils.files import ROOT

pytestmark = pytest.mark.fuzz
KILLS = int(os.environ.get("KILLS", "2"))
EPOCHS = 4
LIMIT = 300  # seconds of a command
SETTINGS = {
    "no workers": ["--workers=0"],
    "workers": ["--workers=2"],
    "multi-scale": ["--workers=0", "--multi-scale"],
    "cache disk": ["--workers=2", "--cache=disk"],
    "periodic checkpoints": ["--workers=0", "--cache=ram", "--save-period=1"],
    "rect": ["--workers=0", "--rect"],
    "no plots": ["--workers=0", "--noplots"],
    "image weights": ["--workers=0", "--image-weights"],
    "AdamW": ["--workers=0", "--cos-lr", "--optimizer=AdamW"],
    "free head": ["--workers=0", "--head=free"],
}
TORCHRUN = ["-m", "torch.distributed.run", "--nnodes=1", "--nproc_per_node=2"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg"}


def launcher(processes: int) -> list[str]:
    """Return the interpreter, or torchrun at a port of its own."""
    port = f"--master_port={free_ports(1)[0]}"
    return [sys.executable, *([*TORCHRUN, port] if processes > 1 else [])]


def finish(command: list[str]) -> None:
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-2000:]


def kill_when(command: list[str], started: Callable[[], bool], delay: float) -> bool:
    """Kill a command and its children `delay` seconds after `started` is true; return whether it was still running."""
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, env=environment(), stdout=quiet, stderr=quiet) as process:
        while process.poll() is None and not started():
            time.sleep(0.005)
        time.sleep(delay)
        running = process.poll() is None
        with contextlib.suppress(psutil.NoSuchProcess):
            agent = psutil.Process(process.pid)
            for one in (agent, *agent.children(recursive=True)):  # torchrun's processes have sessions of their own
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
    return running


def assert_whole(folder: Path) -> None:
    """Assert that every file under its final name can be read; temporary files of the killed process are hidden."""
    for path in folder.rglob("*"):
        if not path.is_file() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".yaml":
            assert isinstance(yaml.safe_load(path.read_text()), dict), path
        elif path.name == "results.csv":
            lines = path.read_text().splitlines()
            assert len({line.count(",") for line in lines}) == 1, path
        elif path.suffix in (".jpg", ".png"):
            assert cv2.imread(str(path)) is not None, path
        elif path.suffix in (".npy", ".npz"):
            np.load(path)


def training(folder: Path, settings: list[str], processes: int = 1) -> list[str]:
    given = [
        f"--cfg={folder / 'tiny.yaml'}", f"--data={folder / 'data.yaml'}", f"--project={folder / 'runs'}", "--imgsz=64",
        f"--epochs={EPOCHS}", "--batch-size=4", "--device=cpu", "--noautoanchor", "--patience=0", "--exist-ok",
    ]  # fmt: skip
    return [*launcher(processes), str(ROOT / "train.py"), *given, *settings]


def check_kills(folder: Path, settings: list[str], processes: int = 1) -> None:
    """Kill a training at KILLS random moments; each time its files have to be intact, and the last one finishes it."""
    start = time.monotonic()
    finish([*training(write_project(folder), settings, processes), "--name=whole"])
    span = time.monotonic() - start
    rng = random.Random(" ".join(settings))
    killed = attempt = 0
    while killed < KILLS:
        attempt += 1
        assert attempt < 4 * KILLS + 4, f"only {killed} kills hit"
        run = folder / f"runs/cut{attempt}"
        last, epoch = run / "weights/last.pt", rng.randrange(EPOCHS)

        def started(run: Path = run, epoch: int = epoch) -> bool:
            return len(rows(run)) >= epoch if (run / "results.csv").is_file() else epoch == 0 and run.is_dir()

        command = [*training(folder, settings, processes), f"--name={run.name}"]
        killed += (hit := kill_when(command, started, rng.uniform(0, 0.1) * span))
        print(f"{' '.join(settings)}: epoch {epoch}: {'killed' if hit else 'ended before'}, last.pt: {last.is_file()}")
        assert_whole(folder)
        state = torch.load(last, weights_only=True).get("train") if last.is_file() else None
        if state is not None:
            finish([*launcher(processes), str(ROOT / "train.py"), f"--resume={last}", "--device=cpu"])
        else:  # killed before the first checkpoint, or after the last one
            finish(command)
        assert [row[0] for row in rows(run)] == list(range(EPOCHS))
        assert_whole(folder)
        assert not list(run.rglob(".*.*")), "leftovers of the killed process"


@pytest.mark.parametrize("setting", SETTINGS)
def test_killed_training_is_whole_and_resumes(setting: str, tmp_path: Path) -> None:
    check_kills(tmp_path, SETTINGS[setting])


def test_killed_training_of_two_processes_is_whole_and_resumes(tmp_path: Path) -> None:
    check_kills(tmp_path, ["--workers=0", "--noplots"], processes=2)


def test_killed_validation_leaves_whole_files_or_none(tmp_path: Path) -> None:
    finish([*training(write_project(tmp_path, val=12), ["--workers=0", "--noplots"]), "--name=whole"])
    command = [
        *launcher(1), str(ROOT / "val.py"), f"--weights={tmp_path / 'runs/whole/weights/best.pt'}",
        f"--data={tmp_path / 'data.yaml'}", "--imgsz=64", "--batch-size=1", "--workers=0", "--device=cpu",
        f"--project={tmp_path / 'val'}", "--save-txt", "--save-json",
    ]  # fmt: skip
    finish([*command, "--name=whole"])
    expected = sorted(path.name for path in (tmp_path / "val/whole").rglob("*"))
    rng = random.Random(0)
    for number in range(KILLS):
        cut, hidden = tmp_path / f"val/cut{number}", f".cut{number}.*"
        hit = kill_when(
            [*command, f"--name={cut.name}"],
            lambda hidden=hidden: bool(list((tmp_path / "val").glob(hidden))),
            rng.uniform(0, 1),
        )
        print(f"validation: {'killed' if hit else 'ended before'}, {cut.exists()=}")
        assert_whole(tmp_path)
        assert not cut.exists() or sorted(path.name for path in cut.rglob("*")) == expected
