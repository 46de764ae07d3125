"""Output of commands in a terminal of 80 columns: no word is split, and tables fit the line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.helpers.terminal import printed_lines, run_in_terminal, visible_lines
from tests.helpers.training import write_project
from utils.files import ROOT

pytest.importorskip("pty", reason="pseudo terminals need Unix")
TRAIN = "--cfg tiny.yaml --data data.yaml --imgsz 64 --epochs 1 --batch-size 4 --workers 0 --device cpu --project runs"


def shown(script: str, options: str, folder: Path) -> str:
    """Run a script and return the terminal output; only a single word (a path) may exceed the width."""
    status, text = run_in_terminal([sys.executable, str(ROOT / script), *options.split()], folder)
    assert status == 0, text
    for line in printed_lines(text):
        assert len(line) <= 80 or len(line.split()) == 1, f"{len(line)}: {line}"
    return "\n".join(visible_lines(text))


def test_train_val_and_detect_fit_80_columns(tmp_path: Path) -> None:
    write_project(tmp_path)
    text = shown("train.py", TRAIN, tmp_path)
    assert "verifying" not in text, "its bar is removed at the end"
    assert re.search(r"^slot +from +n +params +output +module$", text, re.M)
    assert re.search(r"^ +5 +\[2, 3, 4\] .* predictions +Detect \[3, \[\[10, 13.*\.\.\.$", text, re.M), (
        "arguments are cut"
    )
    assert re.search(r"^ +Epoch +GPU_mem +box_loss +obj_loss +cls_loss +Instances +Size$", text, re.M)
    assert re.search(r"^ +0/0 .* 100%\|.*\| 00:00$", text, re.M), "the bar with the remaining time"
    assert re.search(r"^ +all( +\d+){2}( +\d\.\d{3}){4}$", text, re.M), "P, R, mAP50 and mAP50-95 on a line"
    assert re.search(r"^1 epoch in \d+ s$", text, re.M)
    assert "The detector has learned nothing yet" in text and "\n  " in text[text.index("learned nothing") :]
    weights = "--weights runs/exp/weights/best.pt --device cpu"
    text = shown("val.py", f"{weights} --data data.yaml --workers 0 --save-json --project val", tmp_path)
    assert re.search(r"^ +all( +\d+){2}( +\d\.\d{3}){4}$", text, re.M)
    text = shown("detect.py", f"{weights} --source set/images/val --project found", tmp_path)
    assert "image 1/" in text


def test_errors_fit_80_columns(tmp_path: Path) -> None:
    for options in ("--imgsz 64 --epoch-number 3 --nothing-of-this-kind", f"--cfg {'missing-' * 8}.yaml"):
        status, text = run_in_terminal([sys.executable, str(ROOT / "train.py"), *options.split()], tmp_path)
        assert status == 2
        first, *rest = visible_lines(text.rstrip())
        assert first.startswith("train.py: error:") and rest and all(line.startswith("  ") for line in rest), text
        assert all(len(line) <= 80 or len(line.split()) == 1 for line in (first, *rest)), text
