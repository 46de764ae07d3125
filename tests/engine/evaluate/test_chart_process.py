"""Tests of the process that draws charts."""

from __future__ import annotations

import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from engine.evaluate.accumulator import Tally, summarize
from engine.evaluate.chart_process import ChartProcess
from engine.evaluate.plots import draw_charts
from tests.helpers.processes import ends
from utils.errors import DataError
from utils.files import ROOT
from utils.metrics import ConfusionMatrix
from utils.plots import plot_confusion_matrix, plot_history

NAMES = {0: "disc", 1: "bar"}


def test_charts_are_drawn_and_the_first_error_is_raised(tmp_path):
    with ChartProcess() as charts:
        charts.draw(plot_history, tmp_path / "history.png", tmp_path / "none.csv")
        charts.draw(plot_history, tmp_path / "history.png", tmp_path / "another.csv")
        charts.draw(plot_confusion_matrix, tmp_path / "matrix.png", np.eye(3), NAMES)
        with pytest.raises(DataError, match=r"none\.csv"):
            charts.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["matrix.png"]


def test_a_process_that_ends_early_is_an_error(tmp_path, capfd):
    with ChartProcess() as charts:
        charts.draw(plot_confusion_matrix, tmp_path / "matrix.png", np.zeros(1))  # names are missing
        with pytest.raises(RuntimeError, match="ended with status 1"):
            charts.finish()


def test_an_error_in_the_block_ends_the_process():
    with pytest.raises(KeyError), ChartProcess() as charts:
        raise KeyError
    assert charts._process.poll() is not None


DRAW = """
import numpy, pathlib, time, utils.plots
for number in range(5):
    charts.draw(utils.plots.plot_confusion_matrix, pathlib.Path(f"{number}.png"), numpy.eye(3), {0: "a", 1: "b"})
while not pathlib.Path("0.png").exists():
    time.sleep(0.01)
"""


@pytest.mark.parametrize("work", ["", DRAW], ids=["at its start", "while it draws"])
def test_it_ends_with_a_killed_command(tmp_path, work):
    code = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from engine.evaluate.chart_process import ChartProcess\n"
        f"charts = ChartProcess()\nprint(charts._process.pid)\n{work}\n"
        "sys.stdout.flush()\nos.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    assert ends(int(done.stdout), seconds=20)


def test_importing_it_imports_no_torch_and_no_matplotlib():
    code = "import sys, engine.evaluate.chart_process as c; print({'torch', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
    code = "import sys, utils.plots; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_all_charts_of_a_validation_are_drawn_as_in_this_process(tmp_path):
    tally = Tally(2, confusion=ConfusionMatrix(2))
    box = torch.tensor([[0.0, 0, 9, 9]])
    tally.add("a.png", (9, 9), torch.cat((box, torch.tensor([[0.9, 1]])), 1), torch.cat((torch.ones(1, 1), box), 1))
    result = summarize(tally)
    (tmp_path / "here").mkdir()
    draw_charts(tmp_path / "here", result, NAMES)
    (tmp_path / "there").mkdir()
    with ChartProcess() as charts:
        draw_charts(tmp_path / "there", result, NAMES, charts.draw)
        charts.finish()
    here, there = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("here", "there"))
    assert len(here) == 5
    assert here == there
