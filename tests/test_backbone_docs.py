"""docs/backbones.md says what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.backbones import BACKBONES
from models.backbones.__main__ import argument_table, describe

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", BACKBONES)
def test_sizes_are_those_of_the_list(name: str) -> None:
    first, *cells = describe(name, 640)
    assert "| " + " | ".join([f"`{first}`", *cells]) + " |" in TEXT


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
