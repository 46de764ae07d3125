"""Tables and plots of a comparison."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from matplotlib.transforms import Bbox

from engine.compare import plots, table
from engine.compare.candidates import Candidate
from engine.compare.effects import effects_of
from engine.compare.measure.rounds import Spread
from engine.compare.pareto import Limits, Pick, points_of
from engine.compare.results import DEPLOYED, STAGES, Accuracy, CandidateResult, Latency
from engine.report.html import render


def spread(middle: float, low: float | None = None, high: float | None = None) -> Spread:
    low, high = middle if low is None else low, middle if high is None else high
    return Spread(middle, low, high, (low, high))


# ---- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.012345, "0.0123"), (1.2345, "1.23"), (12.345, "12.3"), (123.45, "123"), (1234.5, "1234"), (0, "0"),
     (9.999, "10.0"), (1e-9, "0.000000")],
)  # fmt: skip
def test_numbers(value, text):
    assert table.significant(value) == text


def result(value: float) -> dict:
    classes = {"one": {"map50": value, "map": value / 2, "objects": 3}}
    areas = {"small": value, "medium": None, "large": 0.0}
    bootstrap = [value / 2 - 0.01, value / 2 + 0.01]
    return {
        "map50": value,
        "map": value / 2,
        "bootstrap": bootstrap,
        "precision": 0.5,
        "recall": 0.5,
        "areas": areas,
        "classes": classes,
    }


@pytest.fixture
def rows() -> list[CandidateResult]:
    def row(name: str, ms: float, value: float) -> CandidateResult:
        found = CandidateResult(Candidate(name, f"{name}.yaml", Path(f"{name}.yaml"), None, name, name))
        parts = {part: {"parameters": 500_000, "gflops": 0.5} for part in ("backbone", "neck", "head")}
        found.structure = {
            "parts": parts, "parameters": 1_500_000, "gflops": 1.5, "deployed_parameters": 1_400_000,
            "deployed_gflops": 1.4, "levels": [[8, 64]], "strides": [8, 16], "side": 64, "disk_mb": 6.0,
        }  # fmt: skip
        found.training_memory = {"peak_mb": 900.0, "baseline_mb": 700.0, "kept_mb": 12.0, "batch": 2, "amp": "float32"}
        times = {s: spread(ms / 4) for s in ("preprocess", "forward", "nms")} | {"total": spread(ms, ms - 1, ms + 1)}
        found.latencies = [Latency("pytorch", DEPLOYED, 1, 64, times, 800.0, 700.0, 6.0)]
        found.step = spread(4.0, 2.0, 5.0)
        found.accuracy = Accuracy((0, 1), (result(value), result(value + 0.1)))
        return found

    failed = CandidateResult(Candidate("bro|ken", "bro|ken.yaml", Path("x"), None, "x"), failure="a|b.yaml:3: no")
    return [row("fast", 2.0, 0.4), failed, row("good", 20.0, 0.8)]


def chosen(rows: list[CandidateResult]) -> Pick:
    return Pick("good", "because", {"fast": ("latency 2 ms > 1",), "good": ()})


def cells(found: table.Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in found.rows]


def test_summary(rows):
    found = table.summary(rows, chosen(rows), "pytorch", 1)
    assert found.header[:8] == ("candidate", "", "mAP50-95", "range", "rank", "mAP50", "ms per image", "rank")
    assert cells(found) == [
        ["good", "PICK", "0.425 ± 0.035", "[0.400, 0.450]", "1", "0.850 ± 0.071", "20.0 [19.0, 21.0]", "2", "1.50",
         "1.50", "250", "800", "100", "900", "200"],
        ["fast", "latency 2 ms > 1", "0.225 ± 0.035", "[0.200, 0.250]", "2", "0.450 ± 0.071", "2.00 [1.00, 3.00]", "1",
         "1.50", "1.50", "250", "800", "100", "900", "200"],
        ["bro|ken", "failed", *["–"] * 13],
    ]  # fmt: skip
    assert found.rows[0][2].value == pytest.approx(0.425)


def test_build_table_leaves_out_empty_columns(rows):
    for row in rows:
        row.accuracy = None
    assert "mAP50" not in table.summary(rows, chosen(rows), "pytorch", 1).header
    assert "file differs by, px" not in table.latency(rows).header


def test_latency_is_ranked_within_runtime_form_and_batch(rows):
    other = replace(rows[0].latencies[0], runtime="onnx", times=rows[2].latencies[0].times)
    rows[0].latencies.append(other)
    place = table.latency(rows).header.index("rank")
    found = [(row[0], row[3], row[place]) for row in cells(table.latency(rows))]
    assert found == [("onnx", "fast", "1"), ("pytorch", "fast", "1"), ("pytorch", "good", "2")]


def test_accuracy_table(rows):
    found = table.accuracy(rows, "recipe")
    assert found.header[-3:] == ("recall", "small objects", "large objects")  # nothing medium in the dataset
    assert cells(found)[0] == [
        "fast", "0, 1", "0.225 ± 0.035", "[0.200, 0.250]", "2", "0.450 ± 0.071", "0.500 ± 0.000", "0.500 ± 0.000",
        "0.450 ± 0.071", "0.000 ± 0.000",
    ]  # fmt: skip


def test_failures_have_their_reasons(rows):
    rows[0].notes.append("onnx: no")
    found = cells(table.failures(rows))
    assert found == [["bro|ken", "not measured", "a|b.yaml:3: no"], ["fast", "in part", "onnx: no"]]


def values(rows, **changes) -> dict:
    tables = table.all_tables(rows, chosen(rows), "pytorch", 1, "recipe")
    lists = {
        "tables": tables,
        "images": [],
        "how_measured": ["a", "b"],
        "phases": [("x",)],
        "warnings": [],
        "samples": [],
    }
    texts = {"title": "T", "verdict": "v", "command": "python compare.py", "date": "now"}
    return {**lists, **texts, "machine": {"cores": 2, "torch": "2"}, **changes}


def test_markdown_tables(rows):
    lines = render("comparison.md", **values(rows, tables=[table.failures(rows)])).splitlines()
    k = lines.index("## What failed")
    assert lines[k + 1 : k + 5] == [
        "", "| candidate |  | reason |", "| --- | --- | --- |", r"| bro\|ken | not measured | a\|b.yaml:3: no |",
    ]  # fmt: skip
    assert lines[:4] == ["# Comparison", "", "v", ""]
    assert lines[-9:] == ["## How it was measured", "", "- a", "- b", "", "Machine: cores 2, torch 2.", "", "```",
                          "python compare.py", "```"][-9:]  # fmt: skip


def test_html_escapes_text_and_marks_the_pick(rows):
    rows[1].failure = "<b>&"
    page = render("comparison.html", **values(rows))
    assert "&lt;b&gt;&amp;" in page and "<b>&" not in page
    assert page.count('<tr class="picked">') == 1 and page.count('<tr class="failed">') == 1
    assert '">0.425 ± 0.035</td>' in page and 'class="n" data-v="0.42' in page


def test_text_is_aligned(rows):
    lines = table.as_text(table.training(rows), 200).splitlines()
    assert lines[0] == "Training step"
    assert lines[2].startswith("fast       250 [200, 500]    1=")
    assert len(lines[2]) == len(lines[3]) and len(lines) == 4


def test_text_leaves_out_columns_beyond_the_terminal(rows):
    lines = table.as_text(table.training(rows), 60).splitlines()
    assert max(map(len, lines[:4])) <= 60 and lines[1].endswith("peak, MB")
    assert lines[4] == "(also in the report: model only, MB; kept for backward, MB; batch; precision)"
    narrow = table.as_text(table.failures(rows), 10).splitlines()
    assert narrow[2].endswith("a|b.yaml:3: no")


def test_csv_has_one_line_per_candidate_with_full_numbers(rows):
    found = list(csv.DictReader(io.StringIO(table.as_csv(table.csv_lines(rows, chosen(rows))))))
    assert [line["status"] for line in found] == ["measured", "failed", "measured"]
    assert found[0]["pytorch_deployed_b1_ms_high"] == "3.0"
    assert found[1]["reason"] == "a|b.yaml:3: no" and found[1]["map"] == ""
    assert (found[2]["pick"], found[0]["qualifies"], found[2]["map_class_one"][:5]) == ("1", "0", "0.425")


# ---- effects of head and backbone -----------------------------------------------------------------------------------


def grid_row(backbone: str, head: str, maps: dict[int, float], ms: float = 2.0) -> CandidateResult:
    cfg = Path(f"{backbone}.yaml")
    row = CandidateResult(Candidate(f"{backbone} ({head})", str(cfg), cfg, None, "", backbone, head))
    row.latencies = [Latency("pytorch", DEPLOYED, 1, 64, dict.fromkeys((*STAGES, "total"), spread(ms)), 800.0)]
    row.accuracy = Accuracy(tuple(maps), tuple(result(2 * value) for value in maps.values())) if maps else None
    return row


@pytest.fixture
def grid() -> list[CandidateResult]:
    return [
        grid_row("a", "anchor", {0: 0.50, 1: 0.52}, ms=2), grid_row("a", "free", {0: 0.56, 1: 0.54}, ms=3),
        grid_row("b", "anchor", {0: 0.40, 1: 0.40}, ms=4), grid_row("b", "free", {0: 0.42, 1: 0.46}, ms=5),
        grid_row("c", "anchor", {0: 0.90, 1: 0.90}), grid_row("c", "free", {}),
    ]  # fmt: skip


def test_effects_are_marginal_means_of_the_full_grid(grid):
    found = effects_of(grid, "pytorch", 1)
    assert (found.heads, found.seeds, found.left_out) == (("anchor", "free"), (0, 1), ("c",))
    by_level = {effect.level: effect for effect in found.rows}
    anchor, free, a, b = (by_level[name] for name in ("anchor", "free", "a", "b"))
    assert (anchor.factor, a.factor, anchor.difference, anchor.gain, a.difference) == ("head", "backbone", *[None] * 3)
    assert free.accuracy.values == pytest.approx((0.49, 0.50)) and free.accuracy.middle == pytest.approx(0.495)
    assert free.difference.values == pytest.approx((0.04, 0.04))  # 0.49 - 0.45, 0.50 - 0.46: paired by seed
    assert b.difference.values == pytest.approx((-0.12, -0.10))
    assert a.gain.values == pytest.approx((0.06, 0.02)) and b.gain.values == pytest.approx((0.02, 0.06))
    assert (free.latency_ms, b.latency_ms) == (4, 4.5)


def test_effects_need_a_full_grid(grid):
    assert effects_of([row for row in grid if row.candidate.head == "free"], "pytorch", 1) is None
    assert effects_of(grid[4:], "pytorch", 1) is None
    other_seeds = [grid_row("a", "anchor", {0: 0.5}), grid_row("a", "free", {1: 0.5})]
    assert effects_of(other_seeds, "pytorch", 1) is None


def test_effects_table_names_recipe_and_seeds(grid):
    found = table.effects_table(effects_of(grid, "pytorch", 1), "hyp.auto.yaml, AdamW")
    assert found.header[-2:] == ("free minus anchor", "ms per image")
    assert cells(found)[1] == [
        "head", "free", "0.495 ± 0.007", "[0.490, 0.500]", "+0.040 [+0.040, +0.040]", "–", "4.00",
    ]  # fmt: skip
    assert cells(found)[3][5] == "+0.040 [+0.020, +0.060]"
    assert "seeds (0, 1)" in found.note and "Recipe of all: hyp.auto.yaml, AdamW." in found.note
    assert "not trained with every head: c" in found.note


def test_effects_are_left_out_below_the_floor(grid):
    titles = [found.title for found in table.all_tables(grid, Pick(None, "", {}), "pytorch", 1, "")]
    assert titles[1] == "Effects of head and backbone"
    for row in grid:
        row.accuracy = Accuracy((0, 1), (result(0.02), result(0.03))) if row.accuracy else None
    titles = [found.title for found in table.all_tables(grid, Pick(None, "", {}), "pytorch", 1, "")]
    assert "Effects of head and backbone" not in titles


def test_csv_of_effects_has_full_numbers(grid):
    lines = list(csv.DictReader(io.StringIO(table.as_csv(table.effect_lines(effects_of(grid, "pytorch", 1))))))
    assert [(line["factor"], line["level"]) for line in lines] == [
        ("head", "anchor"), ("head", "free"), ("backbone", "a"), ("backbone", "b"),
    ]  # fmt: skip
    assert float(lines[1]["difference_low"]) == pytest.approx(0.04) and lines[0]["difference"] == ""
    assert lines[2]["seeds"] == "0 1" and float(lines[3]["gain_high"]) == pytest.approx(0.06)


# ---- plots ----------------------------------------------------------------------------------------------------------


def test_place_labels_without_overlap():
    rng = np.random.default_rng(0)
    anchors = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in rng.uniform(100, 600, (14, 2))]
    anchors[1] = anchors[0]  # two at one place
    sizes = [(float(w), 14.0) for w in rng.uniform(40, 150, 14)]
    frame = Bbox.from_bounds(0, 0, 700, 700)
    found = plots.place_labels(anchors, sizes, frame)
    for k, box in enumerate(found):
        assert (box.width, box.height) == pytest.approx(sizes[k])
        assert plots.shared_area(box, frame) == pytest.approx(box.width * box.height)
        assert all(plots.shared_area(box, other) == 0 for other in [*found[:k], *found[k + 1 :], *anchors])


def test_marker_areas_are_proportional_to_parameters():
    assert plots.marker_area(5, 10) == pytest.approx(plots.MAX_AREA / 2)
    assert plots.marker_area(0.001, 10) == plots.MIN_AREA


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([(0.0001, 0.0004)], (0.0, 0.1)),  # noise close to zero is not magnified
        ([(0.500, 0.502), (0.503, 0.505)], (0.4525, 0.5525)),
        ([(0.2, 0.2), (0.7, 0.7)], (0.09, 0.81)),
        ([(0.4, 0.6), (0.5, 0.55)], (0.2, 0.8)),  # three times the widest range
        ([(0.97, 0.99)], (0.9, 1.0)),
    ],
)
def test_accuracy_limits_do_not_magnify_noise(ranges, expected):
    boxes = [Bbox.from_extents(1, low, 2, high) for low, high in ranges]
    assert plots.accuracy_limits(boxes) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, 0.4])
def test_summary_ranks_only_above_the_floor(rows, value):
    for row in (rows[0], rows[2]):
        row.accuracy = Accuracy((0,), (result(value + 0.001 * len(row.label)),))
    assert ("rank" in table.accuracy(rows, "").header) == (value > 0)


def test_plots_are_written(rows, tmp_path):
    points = points_of(rows, "pytorch", 1)
    plots.plot_pareto(tmp_path / "pareto.png", points, chosen(rows), Limits(latency_ms=10), "pytorch")
    plots.plot_latency(tmp_path / "latency.png", rows)
    plots.plot_memory(tmp_path / "memory.png", rows, "pytorch", 1)
    for name in ("pareto.png", "latency.png", "memory.png"):
        assert cv2.imread(str(tmp_path / name)).std() > 5
