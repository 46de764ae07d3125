"""SIGKILL at random moments of compare.py and of train.py --evolve: the same command continues, nothing is lost.

KILLS is the number of kills of each command (default 2).
"""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import psutil
import pytest
import torch
import yaml

from tests.helpers.training import TINY
from utils.files import ROOT

pytestmark = pytest.mark.fuzz
KILLS = int(os.environ.get("KILLS", "2"))
LONGEST_S = 900  # of the run that is not killed
DATA = """
path: set
train: images/train
val: images/val
names: {0: circle, 1: square, 2: cross}
generate: {kind: shapes, train: 12, val: 12, test: 1, imgsz: 64, seed: 3}
"""
COMPARE = (
    "compare.py --cfg tiny.yaml small.yaml --head anchor free --data data.yaml --imgsz 64 --epochs 3 --seeds 0 1 "
    "--batch-size 4 --workers 1 --device cpu --threads 1 --rounds 3 --seconds 0 --project runs"
)
EVOLVE = (
    "train.py --cfg tiny.yaml --data data.yaml --imgsz 64 --epochs 2 --batch-size 4 --workers 0 --device cpu "
    "--project runs --evolve 12"
)
SHORT_HEARTBEAT = """
import runpy, sys
sys.argv = sys.argv[1:]
import engine.tune.study as study
study.HEARTBEAT, study.GRACE = 1, 3
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a dataset, two models, and a copy of the sources (a changed source is a reason to train again)."""
    (tmp_path / "data.yaml").write_text(DATA)
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "small.yaml").write_text(TINY.replace("width_multiple: 0.125", "width_multiple: 0.25"))
    for name in ("models", "data", "engine", "utils"):
        shutil.copytree(ROOT / name, tmp_path / "sources" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("compare.py", "train.py"):
        shutil.copy(ROOT / name, tmp_path / "sources")
    return tmp_path


def start(place: Path, command: str, code: str = "") -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own."""
    script, *options = command.split()
    words = [str(place / "sources" / script), *options]
    env = {**os.environ, "PYTHONPATH": str(place / "sources"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(place / "log.txt", "ab") as log:
        before = ["-c", code] if code else []
        return subprocess.Popen(
            [sys.executable, *before, *words], cwd=place, env=env, stdout=log, stderr=log, start_new_session=True
        )


def kill(process: subprocess.Popen[bytes], whole_group: bool) -> None:
    """Kill a process, or its group; wait until its children have ended, too."""
    children = psutil.Process(process.pid).children(recursive=True)
    if whole_group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
    assert psutil.wait_procs(children, timeout=30)[1] == [], "processes end with their parent"


def damaged(folder: Path) -> list[str]:
    """Return the damaged files of a folder; hidden ones are temporary, and are checked at the end."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        try:
            if path.suffix == ".pt":
                torch.load(path, weights_only=True, map_location="cpu")
            elif path.suffix == ".yaml":
                assert yaml.safe_load(path.read_text()), "empty"
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".csv":
                rows = list(csv.reader(path.open()))
                assert rows and {len(row) for row in rows} == {len(rows[0])}, "truncated"
            elif path.suffix in (".png", ".jpg"):
                assert cv2.imread(str(path)) is not None, "truncated"
        except Exception as error:  # noqa: BLE001 -- a fault is a result here
            found.append(f"{path.relative_to(folder)}: {type(error).__name__}: {error}")
    return found


def hidden(folder: Path) -> list[str]:
    """Return leftover temporary files and folders."""
    return [str(p.relative_to(folder)) for p in folder.rglob(".*") if p.name not in (".lock",)]


def kill_repeatedly(
    run: Callable[[], subprocess.Popen[bytes]], check: Callable[[], None], span: float
) -> subprocess.Popen[bytes]:
    """Kill runs at random moments and check after each kill; return the last run, which is left alone.

    Args:
        run: starts the command.
        check: raises when something was lost.
        span: seconds until the latest kill.
    """
    rng = random.Random(0)
    kills = 0
    while kills < KILLS:
        process = run()
        try:
            process.wait(rng.uniform(0.2, 1.0) * span)
            return process  # finished before all kills; the caller checks its status
        except subprocess.TimeoutExpired:
            kill(process, whole_group=rng.random() < 0.5)
        kills += 1
        check()
    return run()


def test_compare_loses_nothing_when_killed(place):
    stored: dict[str, bytes] = {}
    epochs: dict[str, int] = {}

    def check() -> None:
        assert damaged(place / "runs") == []
        found = {p.name: p.read_bytes() for p in place.glob("runs/cache/results/*.json") if p.name[0] != "."}
        assert {name: found.get(name) for name in stored} == stored, "finished results stay as they are"
        stored.update(found)
        for path in place.glob("runs/cache/trainings/*/results.csv"):
            count = len(path.read_text().splitlines()) - 1
            assert count >= epochs.get(path.parent.name, 0), "finished epochs are not repeated"
            epochs[path.parent.name] = count

    last = kill_repeatedly(lambda: start(place, COMPARE), check, span=40)
    assert last.wait(LONGEST_S) == 0, (place / "log.txt").read_text()[-2000:]
    check()
    assert hidden(place / "runs") == []
    (report,) = place.glob("runs/exp*/results.json")
    candidates = json.loads(report.read_text())["candidates"]
    assert [(c["label"], c["notes"], c["accuracy"]["seeds"]) for c in candidates] == [
        (f"{name} ({head})", [], [0, 1]) for name in ("tiny", "small") for head in ("anchor", "free")
    ]


def test_evolve_loses_nothing_when_killed(place):
    pytest.importorskip("optuna")
    finished: dict[str, list[str]] = {}
    table = place / "runs/exp/evolve.csv"

    def run() -> subprocess.Popen[bytes]:
        more = " --resume_evolve runs/exp" if (place / "runs/exp/study.db").is_file() else " --exist-ok"
        return start(place, EVOLVE + more, SHORT_HEARTBEAT)

    def check() -> None:
        assert damaged(place / "runs") == []
        rows = {row[0]: row for row in csv.reader(table.open())} if table.is_file() else {}
        assert {number: rows.get(number) for number in finished} == finished, "finished trials stay as they are"
        finished.update({number: row for number, row in rows.items() if row[1] in ("complete", "pruned")})

    last = kill_repeatedly(run, check, span=25)
    assert last.wait(LONGEST_S) == 0, (place / "log.txt").read_text()[-2000:]
    check()
    assert hidden(place / "runs") == []
    states = [row["state"] for row in csv.DictReader(table.open())]
    assert sum(state in ("complete", "pruned") for state in states) == 12
    assert set(states) <= {"complete", "pruned", "interrupted"}
