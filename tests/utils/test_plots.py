"""Charts: complete images, also for empty data, that show their data."""

from __future__ import annotations

import subprocess
import sys

import cv2
import numpy as np
import pytest

from tests.parity import rules
from utils import plots as curves
from utils.errors import DataError
from utils.files import ROOT
from utils.metrics import APResult, ap_per_class

NAMES = {0: "RBC", 1: "$WBC$", 2: "_größe 猫"}


def result(seed=0, labels=60) -> APResult:
    return ap_per_class(*rules.ap_inputs(seed, 300, labels, 3))


def precision_recall(path, seed=0, labels=60):
    r = result(seed, labels)
    curves.plot_precision_recall(path, r.curves.at_recall, r.curves.precision_at_recall, r.ap[:, 0], r.classes, NAMES)


def f1(path, seed=0, labels=60):
    r = result(seed, labels)
    curves.plot_confidence_curve(
        path,
        r.curves.confidence,
        r.curves.f1,
        r.curves.f1.mean(0) if len(r.classes) else 0 * r.curves.confidence,
        "F1",
        r.classes,
        NAMES,
    )


def confusion(path, seed=0, labels=60):
    matrix = np.random.default_rng(seed).integers(0, 9, (4, 4)) * bool(labels)
    curves.plot_confusion_matrix(path, matrix.astype(float), NAMES)


def label_image(path, seed=0, labels=60):
    rows = np.random.default_rng(seed).random((labels, 5))
    rows[:, 0] *= 2.99
    curves.plot_labels(path, rows, NAMES)


COLUMNS = (
    *("train/box_loss", "train/obj_loss", "train/cls_loss", "metrics/precision", "metrics/recall", "metrics/mAP_0.5"),
    *("metrics/mAP_0.5:0.95", "val/box_loss", "val/obj_loss", "val/cls_loss"),
)


def history(path, seed=0, labels=60):
    table = path.with_name("results.csv")
    values = np.random.default_rng(seed).random((labels, len(COLUMNS)))
    lines = [",".join(f"{name:>20}" for name in ("epoch", *COLUMNS))]
    lines += [",".join(f"{v:20.5g}" for v in (k, *row)) for k, row in enumerate(values)]
    table.write_text("\n".join(lines) + "\n")
    curves.plot_history(path, table)


def study(path, seed=0, labels=60):
    rows = np.random.default_rng(seed).random((labels // 6, 4)) * (1536, 1, 1, 90)
    curves.plot_study(path, {"_model_$a$": rows} if labels else {})


CHARTS = [precision_recall, f1, confusion, label_image, history, study]


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    monkeypatch.setattr(curves, "save_figure", lambda figure, path, save=curves.save_figure: save(figure, path, dpi=50))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("chart", CHARTS)
def test_charts_show_their_data(tmp_path, chart):
    images = []
    for name, arguments in (("a.png", {}), ("b.png", {"seed": 1}), ("empty.png", {"labels": 0})):
        chart(tmp_path / name, **arguments)
        images.append(cv2.imread(str(tmp_path / name)))
        assert images[-1].std() > 5
    assert not np.array_equal(images[0], images[1])
    left_over = {p.name for p in tmp_path.iterdir()} - {"a.png", "b.png", "empty.png", "results.csv"}
    assert not left_over


def test_many_classes_stay_readable(tmp_path):
    names = {k: f"class {k}" for k in range(120)}
    curves.plot_confusion_matrix(tmp_path / "matrix.png", np.eye(121), names, normalize=False)
    score = np.linspace(0, 1, 50)
    curves.plot_confidence_curve(
        tmp_path / "curve.png", score, np.tile(score, (120, 1)), score, "Recall", range(120), names
    )
    for name in ("matrix.png", "curve.png"):
        assert max(cv2.imread(str(tmp_path / name)).shape) < 1000


BAD_TABLES = ["", "epoch,train/box_loss\n1,two\n", "epoch,train/box_loss\n1\n"]


@pytest.mark.parametrize("text", BAD_TABLES)
def test_a_broken_table_is_named_and_nothing_is_written(tmp_path, text):
    table = tmp_path / "results.csv"
    table.write_text(text)
    with pytest.raises(DataError, match=r"results\.csv: cannot be read"):
        curves.plot_history(tmp_path / "results.png", table)
    assert [p.name for p in tmp_path.iterdir()] == ["results.csv"]
    with pytest.raises(DataError, match="none.csv"):
        curves.read_history(tmp_path / "none.csv")


def test_the_callers_matplotlib_is_left_alone(tmp_path):
    code = (
        "import sys, numpy as np; from utils import plots\n"
        f"plots.plot_labels({str(tmp_path / 'labels.jpg')!r}, np.zeros((0, 5)), {{}})\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_plot_label_correlogram_shows_the_diagonal_of_equal_columns(tmp_path):
    rows = np.zeros((400, 5))
    rows[:, 1:] = np.linspace(0.01, 0.99, 400)[:, None]
    curves.plot_label_correlogram(tmp_path / "equal.png", rows)
    rows[:, 2] = rows[::-1, 2]
    curves.plot_label_correlogram(tmp_path / "mirrored.png", rows)
    curves.plot_label_correlogram(tmp_path / "empty.png", np.zeros((0, 5)))
    equal, mirrored, empty = (cv2.imread(str(tmp_path / f"{name}.png")) for name in ("equal", "mirrored", "empty"))
    assert equal.shape == mirrored.shape == empty.shape
    assert (equal != mirrored).any()
    assert len(np.unique(empty.reshape(-1, 3), axis=0)) < len(np.unique(equal.reshape(-1, 3), axis=0))
