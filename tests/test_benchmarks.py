"""Tests of benchmarks: all import, the summary of recipes.py, the processes of side_by_side.py."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from unittest.mock import patch

import pytest

from benchmarks import side_by_side
from benchmarks.recipes import EDITED, PLAN, VARIANTS, summary, written_hyp, written_yaml
from engine.cli.config import Hyperparameters
from engine.train import schedule
from models.heads import AnchorFreeDetect
from models.losses import anchor_free
from models.yolo import DetectionModel
from utils.files import ROOT


def test_summary_has_mean_and_range_over_seeds() -> None:
    row = {"run": "a", "epoch": "3", "val_map50": "0.8", "test_map50": "", "test_map": ""}
    text = summary([{**row, "seed": "0", "val_map": "0.4"}, {**row, "seed": "1", "val_map": "0.5"}])
    assert "| a | 0, 1 | 0.800 (0.800 to 0.800) | 0.450 (0.400 to 0.500) |  |  |" in text


def test_every_written_model_of_the_plan_builds(tmp_path) -> None:
    names = {str(run.options["cfg"]) for run in PLAN.values()} - {"models/yolov5n.yaml"}
    assert names == EDITED.keys() and len(names) == 8
    for name in names:
        model = DetectionModel(written_yaml(name, tmp_path), nc=3)
        assert model.stride.tolist() == [8, 16, 32]
        assert sum(p.numel() for p in model.parameters()) < 5e6


def test_changed_necks(tmp_path) -> None:
    channels = {}
    for name in ("reg8", "reg8-neck1.25", "neck0.75"):
        head = DetectionModel(written_yaml(name, tmp_path), nc=3).model[-1]
        channels[name] = head.reg_max, [branch[0].conv.in_channels for branch in head.box]
    assert channels == {
        "reg8": (8, [64, 128, 256]),
        "reg8-neck1.25": (8, [80, 160, 320]),
        "neck0.75": (16, [48, 96, 192]),
    }


def test_changed_hyperparameters(tmp_path) -> None:
    path = written_hyp("mixup", "hyp.auto.yaml", {"mixup": 0.1}, tmp_path)
    values = Hyperparameters.from_yaml(path)
    assert values.mixup == 0.1 and values == replace(Hyperparameters.from_yaml("data/hyps/hyp.auto.yaml"), mixup=0.1)
    with pytest.raises(ValueError, match="no mixupp"):
        written_hyp("mixup", "hyp.auto.yaml", {"mixupp": 0.1}, tmp_path)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_changes_the_code_and_is_undone(name) -> None:
    def build() -> AnchorFreeDetect:
        return DetectionModel("models/yolov5n-free.yaml", nc=3).model[-1]

    with patch.object(*VARIANTS[name]):
        changed, top_k = build(), anchor_free.TOP_K
        factors = [schedule.lr_factor(epoch, 10, 0.1, False) for epoch in (3, 5, 10)]
    assert factors == pytest.approx([1, 1, 0.1] if name == "flat" else [0.73, 0.55, 0.1])
    head = build()
    assert all(branch[-1].bias.any() for branch in head.box) and anchor_free.TOP_K == 10
    assert any(branch[-1].bias.any() for branch in changed.box) == (name != "uniform")
    assert all(branch[-1].bias.any() for branch in changed.cls)
    assert schedule.lr_factor(3, 10, 0.1, False) == pytest.approx(0.73)
    assert top_k == (13 if name == "top13" else 10)
    assert {len(branch) for branch in changed.cls} == ({3} if name == "dense" else {5})


def test_every_benchmark_imports() -> None:
    names = [path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "__init__"]
    assert len(names) > 10
    for name in names:
        import_module(f"benchmarks.{name}")


CHECKOUT = """
import subprocess, sys
block = b"x" * (int(sys.argv[1]) << 20)
subprocess.run([sys.executable, "-c", "import time; block = b'x' * (30 << 20); time.sleep(0.5)"], check=True)
"""


def test_side_by_side_measures_the_process_and_its_child(tmp_path, monkeypatch) -> None:
    (tmp_path / "val.py").write_text(CHECKOUT)
    found = side_by_side.run(side_by_side.Row("val", "val.py {size}"), tmp_path, {"size": "90"}, ())
    assert 0.5 < found.result < 30
    assert 90 < found.peak_mib < 150
    assert 30 < found.child_mib < 80
    with pytest.raises(SystemExit, match="val in .*: status 1"):
        side_by_side.run(side_by_side.Row("val", "val.py"), tmp_path, {}, ["not a number"])

    kernels = tmp_path / "kernels"
    kernels.mkdir()
    monkeypatch.setattr(side_by_side, "KERNELS", kernels)
    (tmp_path / "speed.py").write_text("VALUE = 12.5")
    (kernels / "speed.py").write_text("import sys, speed\nprint('result:', speed.VALUE + float(sys.argv[1]))")
    row = side_by_side.Row("speed", "2", "speed.py", "ms")
    run = side_by_side.run(row, tmp_path, {}, ())
    assert run.result == 14.5, "the module of the checkout"
    table = side_by_side.summary([row], {"speed": {"this": [run], "peer": [run._replace(result=29.0)]}})
    assert "| speed | peer | 29.0 ms | 29.0 to 29.0 |" in table and "| 0.50 |" in table
