"""Tests of benchmarks: all import, and the summary that recipes.py writes."""

from __future__ import annotations

from importlib import import_module

from benchmarks.recipes import PLAN, family_yaml, summary
from models.yolo import DetectionModel
from utils.files import ROOT


def test_summary_has_mean_and_range_over_seeds() -> None:
    row = {"run": "a", "epoch": "3", "val_map50": "0.8", "test_map50": "", "test_map": ""}
    text = summary([{**row, "seed": "0", "val_map": "0.4"}, {**row, "seed": "1", "val_map": "0.5"}])
    assert "| a | 0, 1 | 0.800 (0.800 to 0.800) | 0.450 (0.400 to 0.500) |  |  |" in text


def test_every_family_of_the_plan_builds(tmp_path) -> None:
    names = {str(run.options["cfg"]) for run in PLAN.values()} - {"models/yolov5n.yaml"}
    assert len(names) == 5
    for name in names:
        model = DetectionModel(family_yaml(name, tmp_path), nc=3)
        assert model.stride.tolist() == [8, 16, 32]
        assert sum(p.numel() for p in model.parameters()) < 5e6


def test_every_benchmark_imports() -> None:
    names = [path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "__init__"]
    assert len(names) > 10
    for name in names:
        import_module(f"benchmarks.{name}")
