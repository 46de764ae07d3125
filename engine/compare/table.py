"""Tables of a comparison: cells with a text to show and a value to sort by; as text and CSV. Pure functions."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from engine.compare.measure.rounds import Spread, deviation, ranks
from engine.compare.pareto import Pick, points_of, unranked_reason
from engine.compare.results import AREAS, METRICS, STAGES, TRAINING, Accuracy, CandidateResult, Latency, measured
from models.summary import PARTS
from utils.metrics import RANKING_FLOOR

R = TypeVar("R")
NOTHING = "–"
RANGE_NOTE = (
    "Range: all seeds, and the 95 % bootstrap interval over the validation images. No rank below mAP50-95 "
    f"{RANKING_FLOOR:g}."
)
TIES_NOTE = "Ranks marked = are ties: the ranges overlap."
MODEL_NOTE = "Of it model: without what Python and libraries held before."


@dataclass(frozen=True)
class Cell:
    """One cell: the text that is shown, and the value to sort by; None sorts last."""

    text: str
    value: float | str | None = None


@dataclass(frozen=True)
class Table:
    """A table with a title, a note below it, and rows as long as the header."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


Columns = Sequence[tuple[str, Callable[[R], Cell]]]


def build_table(title: str, rows: Iterable[R], columns: Columns[R], note: str = "") -> Table:
    """Return a table of the columns in which at least one row has a value."""
    cells = [[make(row) for _, make in columns] for row in rows]
    kept = [i for i in range(len(columns)) if any(line[i].text not in (NOTHING, "") for line in cells)]
    return Table(title, tuple(columns[i][0] for i in kept), tuple(tuple(line[i] for i in kept) for line in cells), note)


# ---- cells ----------------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> Cell:
    """Format a number with some significant digits and without exponent; `int` values in full."""
    if value is None:
        return Cell(NOTHING)
    return Cell(str(value) if isinstance(value, int) else significant(value, digits), float(value))


def significant(value: float, digits: int = 3) -> str:
    """Return `0.0123`, `1.23`, `12.3`, `123`, `1235`."""
    if value == 0:
        return "0"
    decimals = digits - 1 - int(f"{value:.{digits - 1}e}".split("e")[1])
    return f"{value:.{max(min(decimals, 6), 0)}f}"


def spread(found: Spread | None) -> Cell:
    """Format median and quartiles: `12.3 [11.9, 12.8]`."""
    if found is None:
        return Cell(NOTHING)
    middle, low, high = map(significant, (found.middle, found.low, found.high))
    return Cell(f"{middle} [{low}, {high}]", found.middle)


def mean(found: Spread | None) -> Cell:
    """Format the mean over seeds: `0.512 ± 0.008`; of one seed `0.512`."""
    if found is None:
        return Cell(NOTHING)
    std = deviation(found.values)
    return Cell(f"{found.middle:.3f}" + ("" if std is None else f" ± {std:.3f}"), found.middle)


def text(value: object) -> Cell:
    """Format a text; it is sorted without regard to case."""
    return Cell(NOTHING) if value is None else Cell(str(value), str(value).lower())


def metric(name: str) -> Callable[[CandidateResult], Cell]:
    """Return the column of an accuracy metric: mean and standard deviation over the seeds."""
    return lambda row: mean(row.accuracy.metric(name) if row.accuracy else None)


def interval(row: CandidateResult) -> Cell:
    """Format the range of mAP50-95: `[0.480, 0.541]`."""
    if row.accuracy is None or not row.accuracy.has_interval:
        return Cell(NOTHING)
    found = row.accuracy.map_range()
    return Cell(f"[{found.low:.3f}, {found.high:.3f}]", found.low)


def rank(found: Mapping[str, str]) -> Callable[[CandidateResult], Cell]:
    """Return the column of ranks such as `2=`."""

    def cell(row: CandidateResult) -> Cell:
        place = found.get(row.label)
        return Cell(NOTHING) if place is None else Cell(place, float(place.rstrip("=")))

    return cell


def accuracy_ranks(rows: Sequence[CandidateResult]) -> dict[str, str]:
    """Return ranks by mAP50-95; none where the accuracies cannot be ranked, or for candidates below the floor."""
    points = points_of(rows, "", 0)
    if unranked_reason(points):
        return {}
    maps = {name: p.accuracy for name, p in points.items() if p.accuracy and p.accuracy.middle >= RANKING_FLOOR}
    return ranks(maps, smaller_is_better=False)


def peak(memory: Mapping[str, Any] | None) -> Cell:
    """Format the peak memory."""
    return number((memory or {}).get("peak_mb"))


def peak_of_model(memory: Mapping[str, Any] | None) -> Cell:
    """Format the peak memory without the baseline."""
    top, base = ((memory or {}).get(name) for name in ("peak_mb", "baseline_mb"))
    return number(None if top is None or base is None else max(top - base, 0.0))


# ---- tables ---------------------------------------------------------------------------------------------------------


def all_tables(rows: Sequence[CandidateResult], pick: Pick, runtime: str, batch: int) -> list[Table]:
    """Return every table that has rows; the summary first.

    Args:
        rows: of the comparison.
        pick: recommendation.
        runtime: whose latency counts in the summary.
        batch: whose latency counts in the summary.
    """
    tables = [summary(rows, pick, runtime, batch), failures(rows), structure(rows), latency(rows), training(rows)]
    tables += [accuracy(rows), classes(rows)]
    return [table for table in tables if table.rows]


def summary(rows: Sequence[CandidateResult], pick: Pick, runtime: str, batch: int) -> Table:
    """Return a row per candidate: by descending accuracy, else by ascending latency; failed ones last."""
    found = {row.label: row.latency(runtime, batch) for row in rows}
    times = {r.label: x.total for r in measured(rows) if (x := found[r.label])}

    def sort_key(row: CandidateResult) -> tuple[bool, float, float]:
        time, inf = times.get(row.label), float("inf")
        by_map = -row.accuracy.metric("map").middle if row.accuracy else inf
        return row.failure is not None, by_map, time.middle if time else inf

    def memory(row: CandidateResult) -> Mapping[str, Any]:
        return vars(x) if (x := found[row.label]) else {}

    columns: Columns[CandidateResult] = [
        ("candidate", lambda r: text(r.label)),
        ("", lambda r: text(_verdict(r, pick))),
        ("mAP50-95", metric("map")),
        ("range", interval),
        ("rank", rank(accuracy_ranks(rows))),
        ("mAP50", metric("map50")),
        ("ms per image", lambda r: spread(times.get(r.label))),
        ("rank", rank(ranks(times))),
        ("M parameters", lambda r: number(r.parameters_m)),
        ("GFLOPs", lambda r: number((r.structure or {}).get("gflops"))),
        ("training images/s", lambda r: number(r.images_per_s.middle if r.images_per_s else None)),
        ("inference peak, MB", lambda r: peak(memory(r))),
        ("of it model", lambda r: peak_of_model(memory(r))),
        ("training peak, MB", lambda r: peak(r.training_memory)),
        ("of it model", lambda r: peak_of_model(r.training_memory)),
    ]
    note = (
        f"Latency: {runtime}, re-parameterized, batch {batch}, preprocessing, inference and NMS, median and quartiles "
        f"of the rounds. {TIES_NOTE} ± is the standard deviation over the seeds. {RANGE_NOTE} {MODEL_NOTE}"
    )
    return build_table("Summary", sorted(rows, key=sort_key), columns, note)


def _verdict(row: CandidateResult, pick: Pick) -> str:
    if row.failure is not None:
        return "failed"
    if row.label == pick.label:
        return "PICK"
    return "; ".join(pick.misses.get(row.label, ())) or ("front" if row.label in pick.front else "")


def structure(rows: Sequence[CandidateResult]) -> Table:
    """Return parameters and operations by part, levels, strides, size on disk."""
    columns: Columns[tuple[str, dict[str, Any]]] = [
        ("candidate", lambda x: text(x[0])),
        *((f"{p}, M", lambda x, p=p: number(x[1]["parts"][p]["parameters"] / 1e6)) for p in PARTS),
        ("all, M", lambda x: number(x[1]["parameters"] / 1e6)),
        ("deployed, M", lambda x: number(x[1]["deployed_parameters"] / 1e6)),
        *((f"{p}, GFLOPs", lambda x, p=p: number(x[1]["parts"][p]["gflops"])) for p in PARTS),
        ("all, GFLOPs", lambda x: number(x[1]["gflops"])),
        ("deployed, GFLOPs", lambda x: number(x[1]["deployed_gflops"])),
        ("levels read (channels@stride)", lambda x: text(", ".join(f"{c}@{s}" for s, c in x[1]["levels"]))),
        ("strides of the head", lambda x: Cell(", ".join(map(str, x[1]["strides"])))),
        ("side", lambda x: number(x[1]["side"])),
        ("MB on disk", lambda x: number(x[1]["disk_mb"])),
    ]
    note = (
        "Millions of parameters and GFLOPs (a multiply-add is two) at the side given. Backbone: the rows of that "
        "section of the model YAML; head: the prediction layer; neck: what lies between."
    )
    return build_table("Structure", [(r.label, r.structure) for r in measured(rows) if r.structure], columns, note)


def latency(rows: Sequence[CandidateResult]) -> Table:
    """Return a row per candidate, runtime, form and batch size; ranks are within each of the latter three."""
    groups: dict[tuple[bool, str, int], dict[str, tuple[CandidateResult, Latency]]] = {}
    for row in measured(rows):
        for x in row.latencies:
            groups.setdefault((x.form == TRAINING, x.runtime, x.batch), {})[row.label] = row, x
    lines = []
    for key in sorted(groups):
        in_group = ranks({label: x.total for label, (_, x) in groups[key].items()})
        lines += [(row, x, rank(in_group)(row)) for row, x in groups[key].values()]
    columns: Columns[tuple[CandidateResult, Latency, Cell]] = [
        ("runtime", lambda x: text(x[1].runtime)),
        ("form", lambda x: text(x[1].form)),
        ("batch", lambda x: number(x[1].batch)),
        ("candidate", lambda x: text(x[0].label)),
        *((f"{stage}, ms", lambda x, stage=stage: number(x[1].times[stage].middle)) for stage in STAGES),
        ("all, ms", lambda x: spread(x[1].total)),
        ("rank", lambda x: x[2]),
        ("images/s", lambda x: number(1000 / x[1].total.middle)),
        ("file, MB", lambda x: number(x[1].disk_mb)),
        ("peak, MB", lambda x: peak(vars(x[1]))),
        ("of it model", lambda x: peak_of_model(vars(x[1]))),
        ("file differs by, px", lambda x: number((x[1].verification or {}).get("px"), 2)),
    ]
    note = (
        "Milliseconds per image, medians; of the sum also the quartiles. Rows with the same runtime, form and batch "
        f"size were measured in the same interleaved rounds and can be compared. {TIES_NOTE}"
    )
    return build_table("Latency", lines, columns, note)


def training(rows: Sequence[CandidateResult]) -> Table:
    """Return speed and memory of a training step."""
    speeds = {r.label: s for r in measured(rows) if (s := r.images_per_s)}

    def memory(name: str) -> Callable[[CandidateResult], Cell]:
        return lambda row: number((row.training_memory or {}).get(name))

    columns: Columns[CandidateResult] = [
        ("candidate", lambda r: text(r.label)),
        ("images/s", lambda r: spread(speeds.get(r.label))),
        ("rank", rank(ranks(speeds, smaller_is_better=False))),
        ("ms per image", lambda r: number(r.step.middle if r.step else None)),
        ("peak, MB", memory("peak_mb")),
        ("of it model", lambda r: peak_of_model(r.training_memory)),
        ("reserved, MB", memory("reserved_mb")),
        ("kept for backward, MB", memory("kept_mb")),
        ("batch", memory("batch")),
        ("precision", lambda r: text((r.training_memory or {}).get("amp"))),
    ]
    note = (
        "A training step: forward, loss, backward, optimizer; without the loader. On a CPU the peak is the resident "
        "memory of the whole process; on a GPU that of PyTorch's allocator."
    )
    shown = [row for row in measured(rows) if row.training_memory or row.step is not None]
    return build_table("Training step", shown, columns, note)


def _seeds(row: CandidateResult) -> Cell:
    seeds = row.accuracy.seeds if row.accuracy else None
    return text("as given" if seeds is None else ", ".join(map(str, seeds)))


def accuracy(rows: Sequence[CandidateResult]) -> Table:
    """Return mean and standard deviation of the metrics over the seeds."""
    columns: Columns[CandidateResult] = [
        ("candidate", lambda r: text(r.label)),
        ("seeds", _seeds),
        ("mAP50-95", metric("map")),
        ("range", interval),
        ("rank", rank(accuracy_ranks(rows))),
        *((name, metric(key)) for name, key in (("mAP50", "map50"), ("precision", "precision"), ("recall", "recall"))),
        *(
            (f"{area} objects", lambda r, area=area: mean(r.accuracy.area(area) if r.accuracy else None))
            for area in AREAS
        ),
    ]
    note = (
        f"Mean ± standard deviation over the seeds. {RANGE_NOTE} {TIES_NOTE} Small, medium, large: COCO mAP50-95 of "
        "objects of up to 32² px, up to 96² px, and above, in the original images."
    )
    return build_table("Accuracy", [row for row in measured(rows) if row.accuracy], columns, note)


def classes(rows: Sequence[CandidateResult]) -> Table:
    """Return mAP50-95 by class."""
    found = {row.label: row.accuracy.classes() for row in measured(rows) if row.accuracy}
    names = dict.fromkeys(name for by_class in found.values() for name in by_class)
    columns: Columns[str] = [("candidate", text)]
    columns = [*columns, *((name, lambda label, name=name: mean(found[label].get(name))) for name in names)]
    return build_table("mAP50-95 by class", found, columns)


def failures(rows: Sequence[CandidateResult]) -> Table:
    """Return the failures and their reasons."""
    lines = [(text(row.label), Cell("not measured"), Cell(row.failure)) for row in rows if row.failure is not None]
    lines += [(text(row.label), Cell("in part"), Cell(note)) for row in rows for note in row.notes]
    return Table("What failed", ("candidate", "", "reason"), tuple(lines))


# ---- text and CSV ---------------------------------------------------------------------------------------------------


def as_text(table: Table) -> str:
    """Return a table for a terminal: texts aligned to the left, numbers to the right."""
    lines = [table.header, *(tuple(cell.text for cell in row) for row in table.rows)]
    widths = [max(_width(line[i]) for line in lines) for i in range(len(table.header))]
    left = [any(not isinstance(row[i].value, float) and row[i].text != NOTHING for row in table.rows)
            for i in range(len(widths))]  # fmt: skip
    out = [table.title]
    for line in lines:
        pads = (" " * (width - _width(cell)) for cell, width in zip(line, widths))
        cells = (cell + pad if is_left else pad + cell for cell, pad, is_left in zip(line, pads, left))
        out.append("  ".join(cells).rstrip())
    return "\n".join(out)


def _width(cell: str) -> int:
    """Return the columns on a terminal: wide characters take two, combining ones none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in cell)
    return len(cell) + wide - sum(bool(unicodedata.combining(c)) for c in cell)


def as_csv(rows: Sequence[CandidateResult], pick: Pick) -> str:
    """Return a line per candidate with all values in full."""
    flat = [dict(_flat(row, pick)) for row in rows]
    names = list(dict.fromkeys(name for line in flat for name in line))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _flat(row: CandidateResult, pick: Pick) -> Iterable[tuple[str, Any]]:
    yield from (("candidate", row.label), ("given", row.candidate.given))
    yield "status", "failed" if row.failure is not None else "measured"
    yield "reason", row.failure or "; ".join(row.notes)
    yield "pick", int(row.label == pick.label)
    yield "qualifies", int(row.failure is None and not pick.misses.get(row.label))
    if row.structure:
        for part, sizes in row.structure["parts"].items():
            yield from ((f"{name}_{part}", value) for name, value in sizes.items())
        for name in ("parameters", "deployed_parameters", "gflops", "deployed_gflops", "side", "disk_mb"):
            yield name, row.structure[name]
        yield "strides", " ".join(map(str, row.structure["strides"]))
        yield "levels", " ".join(f"{channels}@{stride}" for stride, channels in row.structure["levels"])
    for found in row.latencies:
        head = f"{found.runtime}_{found.form}_b{found.batch}"
        yield from _spread_columns(f"{head}_ms", found.total)
        yield from ((f"{head}_{stage}_ms", found.times[stage].middle) for stage in STAGES)
        yield from ((f"{head}_peak_mb", found.peak_mb), (f"{head}_file_mb", found.disk_mb))
    if row.images_per_s:
        yield from _spread_columns("training_images_per_s", row.images_per_s)
    yield from ((f"training_{k}", v) for k, v in (row.training_memory or {}).items() if k != "took")
    if row.accuracy:
        yield from _flat_accuracy(row.accuracy)


def _spread_columns(name: str, found: Spread) -> Iterable[tuple[str, float]]:
    yield from ((name, found.middle), (f"{name}_low", found.low), (f"{name}_high", found.high))


def _flat_accuracy(found: Accuracy) -> Iterable[tuple[str, Any]]:
    yield "seeds", "" if found.seeds is None else " ".join(map(str, found.seeds))
    for name in METRICS:
        yield from _spread_columns(name, found.metric(name))
        yield f"{name}_deviation", deviation(found.metric(name).values)
    if found.has_interval:
        yield from (("map_range_low", found.map_range().low), ("map_range_high", found.map_range().high))
    for name in AREAS:
        area = found.area(name)
        yield f"map_{name}", area.middle if area else None
    yield from ((f"map_class_{name}", by_class.middle) for name, by_class in found.classes().items())
