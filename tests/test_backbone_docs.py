"""docs/backbones.md and docs/heads.md agree with the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.backbones import BACKBONES
from models.backbones.__main__ import argument_table, describe
from models.yolo import DetectionModel

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", BACKBONES)
def test_sizes_are_those_of_the_list(name: str) -> None:
    first, *cells = describe(name, 640)
    assert "| " + " | ".join([f"`{first}`", *cells]) + " |" in TEXT


@pytest.mark.parametrize(
    ("row", "kind", "reg_max"),
    [("`Detect`", None, None), ("`AnchorFreeDetect`", "free", None), ("`AnchorFreeDetect`, `reg_max: 8`", "free", 8)],
)
def test_cost_of_heads_is_that_of_the_models(row: str, kind: str | None, reg_max: int | None) -> None:
    spec = DetectionModel("yolov5n.yaml", head=kind).yaml
    if reg_max is not None:
        spec["head"][-1][3] = [*spec["head"][-1][3][:1], {"reg_max": reg_max}]
    info = DetectionModel(spec).info(640)
    cells = f"| {row} | {info.parameters:,} | {info.gflops:.1f} | {info.parts[-1].gflops:.1f} |"
    assert cells in (ROOT / "docs/heads.md").read_text(encoding="utf-8")


def test_coverage_is_that_of_the_last_run() -> None:
    for line in (ROOT / "benchmarks" / "results" / "timm_coverage.md").read_text(encoding="utf-8").strip().splitlines():
        assert line in TEXT


@pytest.mark.parametrize("name", ["RIFormer", "RevViT", "RepMLPNet", "NextViT"])
def test_tables_of_arguments_are_those_of_the_classes(name: str) -> None:
    rows = argument_table(name)
    assert len(rows) > 15 and all(meaning for _, _, meaning in rows)
    section = TEXT.partition(f"### Arguments of {name}\n")[2].partition("\n#")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    assert lines[1:] == [f"| `{title}` | `{default}` | {meaning} |" for title, default, meaning in rows]
