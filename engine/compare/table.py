"""Tables of a comparison: cells with a text to show and a value to sort by; as text and CSV. Pure functions."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

from engine.compare.effects import Effect, Effects, effects_of
from engine.compare.measure.rounds import Spread, deviation, ranks
from engine.compare.pareto import Pick, points_of, unranked_reason
from engine.compare.results import (
    AREAS,
    FORM_NAMES,
    METRICS,
    STAGES,
    TRAINING,
    Accuracy,
    CandidateResult,
    Latency,
    measured,
)
from models.summary import PARTS
from utils.log import aligned, display_width
from utils.metrics import RANKING_FLOOR

R = TypeVar("R")
NOTHING = "–"
MIN_COLUMNS = 4
RANGE_NOTE = (
    "Range: all seeds, and the 95 % bootstrap interval over the validation images. No rank below mAP50-95 "
    f"{RANKING_FLOOR:g}."
)
TIES_NOTE = "Ranks marked = are ties: the ranges overlap."
MODEL_NOTE = "Model only: without the memory that Python and its libraries used before."


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


Columns = list[tuple[str, Callable[[R], Cell]]]


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
    """Format a string; sorting ignores case."""
    return Cell(NOTHING) if value is None else Cell(str(value), str(value).lower())


def signed(found: Spread | None) -> Cell:
    """Format a difference with its range: `+0.012 [+0.008, +0.017]`; of one seed `+0.012`."""
    if found is None:
        return Cell(NOTHING)
    limits = f" [{found.low:+.3f}, {found.high:+.3f}]" if len(found.values) > 1 else ""
    return Cell(f"{found.middle:+.3f}{limits}", found.middle)


def limits_of(found: Spread | None) -> Cell:
    """Format a range: `[0.480, 0.541]`."""
    return Cell(NOTHING) if found is None else Cell(f"[{found.low:.3f}, {found.high:.3f}]", found.low)


def rank(found: Mapping[str, str], label: str) -> Cell:
    """Format a rank such as `2=`."""
    place = found.get(label)
    return Cell(NOTHING) if place is None else Cell(place, float(place.rstrip("=")))


def memory_columns(prefix: str, memory: Callable[[R], Mapping[str, Any]]) -> Columns[R]:
    """Return the columns of peak memory, with and without the baseline."""

    def of_model(row: R) -> Cell:
        top, base = (memory(row).get(name) for name in ("peak_mb", "baseline_mb"))
        return number(None if top is None or base is None else max(top - base, 0.0))

    return [(f"{prefix}peak, MB", lambda row: number(memory(row).get("peak_mb"))), ("model only, MB", of_model)]


def training_memory(row: CandidateResult) -> Mapping[str, Any]:
    """Return the measured memory of a training step, or nothing."""
    return row.training_memory or {}


# ---- tables ---------------------------------------------------------------------------------------------------------


def all_tables(rows: Sequence[CandidateResult], pick: Pick, runtime: str, batch: int, recipe: str) -> list[Table]:
    """Return every table that has rows; the summary first.

    Args:
        rows: rows of the comparison.
        pick: recommendation.
        runtime, batch: select the latency of the summary.
        recipe: description of the recipe of all trainings.
    """
    effects = effects_of(rows, runtime, batch)
    tables = [summary(rows, pick, runtime, batch)]
    tables += [effects_table(effects, recipe)] if effects and not unranked_reason(points_of(rows, "", 0)) else []
    tables += [failures(rows), structure(rows), latency(rows), training(rows), accuracy(rows, recipe), classes(rows)]
    return [table for table in tables if table.rows]


def summary(rows: Sequence[CandidateResult], pick: Pick, runtime: str, batch: int) -> Table:
    """Return a row per candidate: by descending accuracy, else by ascending latency; failed ones last."""
    found = {row.label: row.latency(runtime, batch) for row in rows}
    times = {r.label: x.total for r in measured(rows) if (x := found[r.label])}
    time_ranks, accuracy_columns = ranks(times), _accuracy_columns(rows)

    def sort_key(row: CandidateResult) -> tuple[bool, float, float]:
        time, inf = times.get(row.label), float("inf")
        by_map = -row.accuracy.metric("map").middle if row.accuracy else inf
        return row.failure is not None, by_map, time.middle if time else inf

    def inference_memory(row: CandidateResult) -> Mapping[str, Any]:
        return vars(x) if (x := found[row.label]) else {}

    columns: Columns[CandidateResult] = [
        ("candidate", lambda r: text(r.label)),
        ("", lambda r: text(_verdict(r, pick))),
        *accuracy_columns[:4],
        ("ms per image", lambda r: spread(times.get(r.label))),
        ("rank", lambda r: rank(time_ranks, r.label)),
        ("M parameters", lambda r: number(r.parameters_m)),
        ("GFLOPs", lambda r: number((r.structure or {}).get("gflops"))),
        ("training images/s", lambda r: number(r.images_per_s.middle if r.images_per_s else None)),
        *memory_columns("inference ", inference_memory),
        *memory_columns("training ", training_memory),
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


def effects_table(effects: Effects, recipe: str) -> Table:
    """Return the marginal means of heads and backbones."""
    heads = effects.heads
    columns: Columns[Effect] = [
        ("factor", lambda x: text(x.factor)),
        ("level", lambda x: text(x.level)),
        ("mAP50-95", lambda x: mean(x.accuracy)),
        ("range over seeds", lambda x: limits_of(x.accuracy if len(x.accuracy.values) > 1 else None)),
        ("difference from the first", lambda x: signed(x.difference)),
        (f"{heads[-1]} minus {heads[0]}", lambda x: signed(x.gain)),
        ("ms per image", lambda x: number(x.latency_ms)),
    ]
    note = (
        "Head: mean over the backbones; backbone: mean over the heads. Brackets: smallest and largest value over the "
        f"seeds ({', '.join(map(str, effects.seeds))}), differences paired by seed. Recipe of all: {recipe}."
    )
    if effects.left_out:
        note += f" Left out, since not trained with every head: {', '.join(effects.left_out)}."
    return build_table("Effects of head and backbone", effects.rows, columns, note)


def structure(rows: Sequence[CandidateResult]) -> Table:
    """Return parameters and operations by part, levels, strides, size on disk."""
    columns: Columns[tuple[str, dict[str, Any]]] = [
        ("candidate", lambda x: text(x[0])),
        *((f"{p}, M", lambda x, p=p: number(x[1]["parts"][p]["parameters"] / 1e6)) for p in PARTS),
        ("all, M", lambda x: number(x[1]["parameters"] / 1e6)),
        ("re-parameterized, M", lambda x: number(x[1]["deployed_parameters"] / 1e6)),
        *((f"{p}, GFLOPs", lambda x, p=p: number(x[1]["parts"][p]["gflops"])) for p in PARTS),
        ("all, GFLOPs", lambda x: number(x[1]["gflops"])),
        ("re-parameterized, GFLOPs", lambda x: number(x[1]["deployed_gflops"])),
        ("levels read (channels@stride)", lambda x: text(_levels(x[1], ", "))),
        ("strides of the head", lambda x: Cell(", ".join(map(str, x[1]["strides"])))),
        ("side", lambda x: number(x[1]["side"])),
        ("MB on disk", lambda x: number(x[1]["disk_mb"])),
    ]
    note = (
        "Millions of parameters and GFLOPs (a multiply-add is two) at the side given. Backbone: the rows of that "
        "section of the model YAML; head: the prediction layer; neck: what lies between."
    )
    return build_table("Structure", [(r.label, r.structure) for r in measured(rows) if r.structure], columns, note)


def _levels(found: Mapping[str, Any], separator: str) -> str:
    return separator.join(f"{channels}@{stride}" for stride, channels in found["levels"])


def latency(rows: Sequence[CandidateResult]) -> Table:
    """Return a row per candidate, runtime, form and batch size; ranks are within each of the latter three."""
    groups: dict[tuple[bool, str, int], dict[str, Latency]] = {}
    for row in measured(rows):
        for x in row.latencies:
            groups.setdefault((x.form == TRAINING, x.runtime, x.batch), {})[row.label] = x
    lines = []
    for key in sorted(groups):
        in_group = ranks({label: x.total for label, x in groups[key].items()})
        lines += [(label, x, rank(in_group, label)) for label, x in groups[key].items()]

    def memory(line: tuple[str, Latency, Cell]) -> Mapping[str, Any]:
        return vars(line[1])

    columns: Columns[tuple[str, Latency, Cell]] = [
        ("runtime", lambda x: text(x[1].runtime)),
        ("form", lambda x: text(FORM_NAMES[x[1].form])),
        ("batch", lambda x: number(x[1].batch)),
        ("candidate", lambda x: text(x[0])),
        *((f"{stage}, ms", lambda x, stage=stage: number(x[1].times[stage].middle)) for stage in STAGES),
        ("all, ms", lambda x: spread(x[1].total)),
        ("rank", lambda x: x[2]),
        ("images/s", lambda x: number(1000 / x[1].total.middle)),
        ("file, MB", lambda x: number(x[1].disk_mb)),
        *memory_columns("", memory),
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
    speed_ranks = ranks(speeds, smaller_is_better=False)

    columns: Columns[CandidateResult] = [
        ("candidate", lambda r: text(r.label)),
        ("images/s", lambda r: spread(speeds.get(r.label))),
        ("rank", lambda r: rank(speed_ranks, r.label)),
        ("ms per image", lambda r: number(r.step.middle if r.step else None)),
        *memory_columns("", training_memory),
        ("reserved, MB", lambda r: number(training_memory(r).get("reserved_mb"))),
        ("kept for backward, MB", lambda r: number(training_memory(r).get("kept_mb"))),
        ("batch", lambda r: number(training_memory(r).get("batch"))),
        ("precision", lambda r: text(training_memory(r).get("amp"))),
    ]
    note = (
        "A training step: forward, loss, backward, optimizer; without the loader. On a CPU the peak is the resident "
        "memory of the whole process; on a GPU that of PyTorch's allocator."
    )
    shown = [row for row in measured(rows) if row.training_memory or row.step is not None]
    return build_table("Training step", shown, columns, note)


def _accuracy_columns(rows: Sequence[CandidateResult]) -> Columns[CandidateResult]:
    """Return mAP50-95, its range and rank, then the other metrics, as mean and standard deviation over the seeds.

    There are no ranks where the accuracies cannot be ranked, nor for candidates below the floor.
    """
    maps = {row.label: row.accuracy.map_range() for row in measured(rows) if row.accuracy}
    ranked = {} if unranked_reason(points_of(rows, "", 0)) else maps
    places = ranks({k: x for k, x in ranked.items() if x.middle >= RANKING_FLOOR}, smaller_is_better=False)

    def metric(name: str) -> Callable[[CandidateResult], Cell]:
        return lambda row: mean(row.accuracy.metric(name) if row.accuracy else None)

    return [
        ("mAP50-95", metric("map")),
        ("range", lambda r: limits_of(maps[r.label] if r.accuracy and r.accuracy.has_interval else None)),
        ("rank", lambda r: rank(places, r.label)),
        ("mAP50", metric("map50")),
        ("precision", metric("precision")),
        ("recall", metric("recall")),
    ]


def accuracy(rows: Sequence[CandidateResult], recipe: str) -> Table:
    """Return mean and standard deviation of the metrics over the seeds."""

    def seeds(row: CandidateResult) -> Cell:
        found = row.accuracy.seeds if row.accuracy else None
        return text("as given" if found is None else ", ".join(map(str, found)))

    columns: Columns[CandidateResult] = [
        ("candidate", lambda r: text(r.label)),
        ("seeds", seeds),
        *_accuracy_columns(rows),
        *((f"{a} objects", lambda r, a=a: mean(r.accuracy.area(a) if r.accuracy else None)) for a in AREAS),
    ]
    note = (
        f"Mean ± standard deviation over the seeds. {RANGE_NOTE} {TIES_NOTE} Small, medium, large: COCO mAP50-95 of "
        "objects of up to 32² px, up to 96² px, and above, in the original images."
    )
    shown = [row for row in measured(rows) if row.accuracy]
    if any(row.accuracy and row.accuracy.seeds is not None for row in shown):
        note += f" Recipe of all trainings: {recipe}."
    return build_table("Accuracy", shown, columns, note)


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


def as_text(table: Table, columns: int) -> str:
    """Return a table for a terminal: strings aligned to the left, numbers to the right.

    Args:
        table: table to format.
        columns: terminal width; columns that do not fit beside the first `MIN_COLUMNS` are left out.
    """
    lines = [table.header, *(tuple(cell.text for cell in row) for row in table.rows)]
    widths = [max(map(display_width, column)) for column in zip(*lines)]
    shown = max(sum(end <= columns for end in accumulate(width + 2 for width in widths)), MIN_COLUMNS)
    texts = [
        i
        for i, column in enumerate(zip(*table.rows))
        if any(not isinstance(cell.value, float) and cell.text != NOTHING for cell in column)
    ]
    out = [table.title, *aligned([line[:shown] for line in lines], texts)]
    if len(widths) > shown:
        out.append(f"(also in the report: {'; '.join(table.header[shown:])})")
    return "\n".join(out)


def as_csv(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return CSV with a column for every key, in the order of their first use."""
    out = io.StringIO()
    names = dict.fromkeys(name for line in lines for name in line)
    writer = csv.DictWriter(out, list(names), lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def csv_lines(rows: Sequence[CandidateResult], pick: Pick) -> list[dict[str, Any]]:
    """Return a line per candidate with all values in full."""
    return [dict(_flat(row, pick)) for row in rows]


def effect_lines(effects: Effects) -> list[dict[str, Any]]:
    """Return a line per head and backbone with all values in full."""
    lines = []
    for x in effects.rows:
        line: dict[str, Any] = {"factor": x.factor, "level": x.level, "seeds": " ".join(map(str, effects.seeds))}
        for name, found in (("map", x.accuracy), ("difference", x.difference), ("gain", x.gain)):
            line |= dict(_spread_columns(name, found)) if found else {}
        lines.append({**line, "latency_ms": x.latency_ms})
    return lines


def _flat(row: CandidateResult, pick: Pick) -> Iterable[tuple[str, Any]]:
    yield from (("candidate", row.label), ("given", row.candidate.given))
    yield from (("backbone", row.candidate.backbone), ("head", row.candidate.head))
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
        yield "levels", _levels(row.structure, " ")
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
