"""Several processes on one study, one of them killed: exactly the requested trials, none lost or repeated."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.training import TINY

pytest.importorskip("optuna", reason="optuna is not installed")
ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import sys, time
from pathlib import Path
import engine.tune.search, engine.tune.study, train
engine.tune.study.HEARTBEAT, engine.tune.study.GRACE, engine.tune.search.POLL = 1, 4, 0.5
real = engine.tune.search.train
def hang(config, on_epoch):
    Path("hangs.txt").write_text(config.name)
    time.sleep(600)
if "--hang" in sys.argv:
    sys.argv.remove("--hang")
    engine.tune.search.train = hang
sys.exit(train.run_main(train.TrainConfig, "train.py", "", train.work))
"""
OPTIONS = (
    "--cfg tiny.yaml --data data.yaml --imgsz 64 --epochs 2 --batch-size 4 --workers 0 --device cpu --noplots "
    "--project runs --evolve 6"
)


def start(place: Path, *more: str) -> subprocess.Popen:
    """Start a process on the study."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *OPTIONS.split(), *more], cwd=place, env=env)


def wait_for(path: Path) -> None:
    end = time.time() + 120
    while not path.is_file():
        assert time.time() < end, f"{path} did not appear"
        time.sleep(0.1)


@pytest.mark.slow
def test_processes_share_a_study(tmp_path):
    (tmp_path / "data.yaml").write_text(
        "path: set\ntrain: images/train\nval: images/val\nnames: {0: circle, 1: square, 2: cross}\n"
        "generate: {kind: shapes, train: 8, val: 4, test: 1, imgsz: 64, seed: 3}\n"
    )
    (tmp_path / "tiny.yaml").write_text(TINY)
    killed = start(tmp_path, "--hang")
    wait_for(tmp_path / "hangs.txt")
    others = [start(tmp_path, "--resume_evolve", "runs/exp") for _ in range(2)]
    wait_for(tmp_path / "runs/exp/evolve.csv")
    killed.kill()
    killed.wait()
    assert [process.wait(timeout=200) for process in others] == [0, 0]
    with open(tmp_path / "runs/exp/evolve.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    states = [row["state"] for row in rows]
    assert states[0] == "interrupted" and states.count("interrupted") == 1
    assert len(rows) == 7 and set(states[1:]) <= {"complete", "pruned"}
    keys = list(rows[0])[8:]
    points = [tuple(row[key] for key in keys) for row in rows]
    assert points.count(points[0]) == 2 and len(set(points)) == 6, "only the interrupted one is repeated"
    assert len(list((tmp_path / "runs").iterdir())) == 1
