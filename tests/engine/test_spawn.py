"""Training and comparison where new processes import the script again (macOS, Windows) instead of forking."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.training import TINY, write_project
from utils.files import ROOT

SCRIPT = """
import multiprocessing, os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import compare, train

Path(f"{{__name__}}_{{os.getpid()}}").touch()
options = dict(data="data.yaml", imgsz=64, epochs=1, workers=2, device="cpu")
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    {call}
"""
TRAIN = "train.run(cfg='tiny.yaml', batch_size=4, noplots=True, project='runs', **options)"
COMPARE = (
    "compare.run(cfg=['tiny.yaml', 'small.yaml'], rounds=3, seconds=0.0, threads=1, project='compared', **options)"
)


def run(call: str, folder: Path) -> int:
    """Run a script that calls a command under `spawn`; return the number of processes that it started."""
    (folder / "script.py").write_text(SCRIPT.format(root=str(ROOT), call=call))
    done = subprocess.run([sys.executable, "script.py"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return len(list(folder.glob("__mp_main___*")))


def test_training_with_workers(tmp_path: Path) -> None:
    started = run(TRAIN, write_project(tmp_path))
    assert (tmp_path / "runs/exp/weights/best.pt").is_file()
    assert started >= 2, "loader processes of the training"


@pytest.mark.slow
def test_comparison(tmp_path: Path) -> None:
    write_project(tmp_path)
    (tmp_path / "small.yaml").write_text(TINY.replace("width_multiple: 0.125", "width_multiple: 0.25"))
    started = run(COMPARE, tmp_path)
    assert started >= 2, "a process for each candidate"
    text = (tmp_path / "compared/exp/results.csv").read_text()
    assert text.count(",measured,") == 2, text
