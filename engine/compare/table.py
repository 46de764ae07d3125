"""The comparison as tables: cells with a text to show and a value to sort by; as text, Markdown and CSV. Pure."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.compare.measure.rounds import Spread, deviation, ranks
from engine.compare.pareto import Pick, points_of, unranked_reason
from engine.compare.results import AREAS, STAGES, TRAINING, CandidateResult, Latency, measured
from models.summary import PARTS
from utils.metrics import RANKING_FLOOR

NOTHING = "–"
RANGE_NOTE = (
    "Range: all seeds, and the 95 % bootstrap interval over the validation images. No rank below mAP50-95 "
    f"{RANKING_FLOOR:g}."
)


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: shown.
        value: to sort by; None sorts last.
    """

    text: str
    value: float | str | None = None


@dataclass(frozen=True)
class Table:
    """A table with a title, a note below it, and rows as long as the header."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


# ---- cells ----------------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> Cell:
    """Format a number with some significant digits and without exponent; `int` values in full."""
    if value is None:
        return Cell(NOTHING)
    return Cell(str(value) if isinstance(value, int) else significant(value, digits), float(value))


def significant(value: float, digits: int = 3) -> str:
    """`0.0123`, `1.23`, `12.3`, `123`, `1235`."""
    if value == 0:
        return "0"
    places = digits - 1 - int(f"{value:.{digits - 1}e}".split("e")[1])
    return f"{value:.{max(min(places, 6), 0)}f}"


def spread(found: Spread | None, digits: int = 3) -> Cell:
    """Median and quartiles: `12.3 [11.9, 12.8]`."""
    if found is None:
        return Cell(NOTHING)
    low, high = significant(found.low, digits), significant(found.high, digits)
    return Cell(f"{significant(found.middle, digits)} [{low}, {high}]", found.middle)


def mean(found: Spread | None, deviation: float | None) -> Cell:
    """Mean over seeds: `0.512 ± 0.008`; of one seed `0.512`."""
    if found is None:
        return Cell(NOTHING)
    more = "" if deviation is None else f" ± {deviation:.3f}"
    return Cell(f"{found.middle:.3f}{more}", found.middle)


def interval(row: CandidateResult) -> Cell:
    """Range of mAP50-95: `[0.480, 0.541]`."""
    if row.accuracy is None or not row.accuracy.has_interval:
        return Cell(NOTHING)
    found = row.accuracy.map_range()
    return Cell(f"[{found.low:.3f}, {found.high:.3f}]", found.low)


def accuracy_ranks(rows: Sequence[CandidateResult]) -> dict[str, str]:
    """Ranks by mAP50-95; none where the accuracies cannot be ranked, or for candidates below the floor."""
    points = points_of(rows, "", 0)
    if unranked_reason(points):
        return {}
    maps = {name: p.accuracy for name, p in points.items() if p.accuracy and p.accuracy.middle >= RANKING_FLOOR}
    return ranks(maps, smaller_is_better=False)


def place(found: Mapping[str, str], label: str) -> Cell:
    """Format a rank such as `2=`."""
    text = found.get(label)
    return Cell(NOTHING) if text is None else Cell(text, float(text.rstrip("=")))


def word(text: Any) -> Cell:
    """Return a cell that is sorted by its text."""
    return Cell(str(text), str(text).lower()) if text not in (None, "") else Cell(NOTHING)


# ---- tables ---------------------------------------------------------------------------------------------------------


def all_tables(rows: Sequence[CandidateResult], chosen: Pick, runtime: str, batch: int) -> list[Table]:
    """Every table that has something in it; the summary first.

    Args:
        rows: of the comparison.
        chosen: the pick.
        runtime, batch: whose latency counts in the summary.
    """
    tables = [summary(rows, chosen, runtime, batch), failures(rows), structure(rows), latency(rows), training(rows)]
    tables += [accuracy(rows), classes(rows)]
    return [table for table in tables if table.rows]


def summary(rows: Sequence[CandidateResult], chosen: Pick, runtime: str, batch: int) -> Table:
    """One line per candidate: by falling accuracy, else by rising latency; failed ones last."""
    times = {r.label: found.total for r in measured(rows) if (found := r.latency(runtime, batch))}
    maps = {r.label: r.accuracy.map_range() for r in measured(rows) if r.accuracy}
    speeds = {r.label: r.images_per_s for r in measured(rows)}
    by_time, by_map = ranks(times), accuracy_ranks(rows)
    lines = []
    order = sorted(rows, key=lambda r: _sort_key(r, maps.get(r.label), times.get(r.label)))
    for row in order:
        label, found = row.label, row.latency(runtime, batch)
        lines.append((
            word(label), Cell(_verdict(row, chosen), _verdict(row, chosen)),
            mean(maps.get(label), row.accuracy.deviation("map") if row.accuracy else None), interval(row),
            place(by_map, label),
            mean(row.accuracy.figure("map50") if row.accuracy else None,
                 row.accuracy.deviation("map50") if row.accuracy else None),
            spread(times.get(label)), place(by_time, label), number(row.parameters_m),
            number(row.structure["gflops"] if row.structure else None),
            number(speeds[label].middle if speeds.get(label) else None),  # type: ignore[union-attr]
            *_memory(found.peak_mb if found else None, found.baseline_mb if found else None),
            *_memory(*((row.training_memory or {}).get(name) for name in ("peak_mb", "baseline_mb"))),
        ))  # fmt: skip
    header = (
        "candidate", "", "mAP50-95", "range", "rank", "mAP50", "ms per image", "rank", "M parameters", "GFLOPs",
        "training images/s", "inference peak, MB", "of it model", "training peak, MB", "of it model",
    )  # fmt: skip
    note = (
        f"Latency: {runtime}, re-parameterized, batch {batch}, preprocessing, inference and NMS, median and quartiles "
        "of the rounds. Ranks marked = are ties: the ranges overlap. ± is the standard deviation over the seeds. "
        f"{RANGE_NOTE} Of it model: without what Python and libraries held before."
    )
    return _without_empty("Summary", header, lines, note)


def _sort_key(row: CandidateResult, accuracy: Spread | None, latency: Spread | None) -> tuple[bool, float, float]:
    worst = float("inf")
    return row.failure is not None, -accuracy.middle if accuracy else worst, latency.middle if latency else worst


def _memory(peak: float | None, baseline: float | None) -> tuple[Cell, Cell]:
    """Return cells for the peak memory and the model's part of it."""
    return number(peak), number(None if peak is None or baseline is None else max(peak - baseline, 0.0))


def _verdict(row: CandidateResult, chosen: Pick) -> str:
    if row.failure is not None:
        return "failed"
    if row.label == chosen.label:
        return "PICK"
    return "; ".join(chosen.misses.get(row.label, ())) or ("front" if row.label in chosen.front else "")


def structure(rows: Sequence[CandidateResult]) -> Table:
    """Parameters and operations by part, levels, strides, size on disk."""
    lines = []
    for row in measured(rows):
        s = row.structure
        if s is None:
            continue
        parts = [s["parts"][name] for name in PARTS]
        levels = ", ".join(f"{channels}@{stride}" for stride, channels in s["levels"])
        lines.append((
            word(row.label), *(number(p["parameters"] / 1e6) for p in parts), number(s["parameters"] / 1e6),
            number(s["deployed_parameters"] / 1e6), *(number(p["gflops"]) for p in parts), number(s["gflops"]),
            number(s["deployed_gflops"]), Cell(levels, levels), Cell(", ".join(map(str, s["strides"]))),
            number(s["side"]), number(s["disk_mb"]),
        ))  # fmt: skip
    header = (
        "candidate", *(f"{p}, M" for p in PARTS), "all, M", "deployed, M", *(f"{p}, GFLOPs" for p in PARTS),
        "all, GFLOPs", "deployed, GFLOPs", "levels read (channels@stride)", "strides of the head", "side", "MB on disk",
    )  # fmt: skip
    note = (
        "Millions of parameters and GFLOPs (a multiply-add is two) at the side given. Backbone: the rows of that "
        "section of the model YAML; head: the prediction layer; neck: what lies between."
    )
    return Table("Structure", header, tuple(lines), note)


def latency(rows: Sequence[CandidateResult]) -> Table:
    """Return a row per candidate, runtime, form and batch; ranks are within each of the latter three."""
    places: dict[tuple[str, str, int], dict[str, str]] = {}
    for key in {_phase(x) for row in measured(rows) for x in row.latencies}:
        times = {r.label: found.total for r in measured(rows) if (found := r.latency(key[0], key[2], key[1]))}
        places[key] = ranks(times)
    lines = []
    for key in sorted(places, key=lambda k: (k[1] == TRAINING, k[0], k[2])):
        for row in measured(rows):
            found = row.latency(key[0], key[2], key[1])
            if found is None:
                continue
            lines.append((
                word(key[0]), word(key[1]), number(key[2]), word(row.label),
                *(number(found.times[stage].middle) for stage in STAGES), spread(found.total),
                place(places[key], row.label), number(1000 / found.total.middle), number(found.disk_mb),
                *_memory(found.peak_mb, found.baseline_mb),
                number(found.verification["px"] if found.verification else None, 2),
            ))  # fmt: skip
    header = (
        "runtime", "form", "batch", "candidate", *(f"{stage}, ms" for stage in STAGES), "all, ms", "rank",
        "images/s", "file, MB", "peak, MB", "of it model", "file differs by, px",
    )  # fmt: skip
    note = (
        "Milliseconds per image, medians; of the whole also the quartiles. Lines with the same runtime, form and "
        "batch were measured in the same interleaved rounds and can be compared; ranks marked = are ties."
    )
    return _without_empty("Latency", header, lines, note)


def _phase(found: Latency) -> tuple[str, str, int]:
    return found.runtime, found.form, found.batch


def training(rows: Sequence[CandidateResult]) -> Table:
    """Speed and memory of a training step."""
    speeds = {r.label: s for r in measured(rows) if (s := r.images_per_s)}
    places = ranks(speeds, smaller_is_better=False)
    lines = []
    for row in measured(rows):
        m = row.training_memory or {}
        if not m and row.step is None:
            continue
        lines.append((
            word(row.label), spread(speeds.get(row.label)), place(places, row.label),
            number(row.step.middle if row.step else None), *_memory(m.get("peak_mb"), m.get("baseline_mb")),
            number(m.get("reserved_mb")), number(m.get("kept_mb")), number(m.get("batch")), word(m.get("amp")),
        ))  # fmt: skip
    header = (
        "candidate", "images/s", "rank", "ms per image", "peak, MB", "of it model", "reserved, MB",
        "kept for backward, MB", "batch", "precision",
    )  # fmt: skip
    note = (
        "A training step: forward, loss, backward, optimizer; without the loader. On a CPU the peak is the resident "
        "memory of the whole process; on a GPU that of PyTorch's allocator."
    )
    return _without_empty("Training step", header, lines, note)


def accuracy(rows: Sequence[CandidateResult]) -> Table:
    """Mean and standard deviation over seeds."""
    done = [row for row in measured(rows) if row.accuracy]
    places = accuracy_ranks(rows)
    lines = []
    for row in done:
        a = row.accuracy
        assert a is not None
        seeds = "as given" if a.seeds is None else ", ".join(map(str, a.seeds))
        figures = [mean(a.figure(name), a.deviation(name)) for name in ("map", "map50", "precision", "recall")]
        areas = [mean(a.area(name), _area_deviation(a.area(name))) for name in AREAS]
        lines.append(
            (
                word(row.label),
                Cell(seeds, seeds),
                figures[0],
                interval(row),
                place(places, row.label),
                *figures[1:],
                *areas,
            )
        )
    header = (
        "candidate",
        "seeds",
        "mAP50-95",
        "range",
        "rank",
        "mAP50",
        "precision",
        "recall",
        *(f"{n} objects" for n in AREAS),
    )
    note = (
        f"Mean ± standard deviation over the seeds. {RANGE_NOTE} Ranks marked = are ties: the ranges overlap. Small, "
        "medium, large: COCO mAP50-95 of objects of up to 32² px, up to 96² px, and above, in the original images."
    )
    return _without_empty("Accuracy", header, lines, note)


def _area_deviation(found: Spread | None) -> float | None:
    return deviation(found.values) if found else None


def classes(rows: Sequence[CandidateResult]) -> Table:
    """mAP50-95 by class."""
    done = [row for row in measured(rows) if row.accuracy]
    names = list(dict.fromkeys(name for row in done if row.accuracy for name in row.accuracy.classes()))
    lines = []
    for row in done:
        assert row.accuracy is not None
        found = row.accuracy.classes()
        lines.append((word(row.label), *(mean(found.get(n), _area_deviation(found.get(n))) for n in names)))
    return Table("mAP50-95 by class", ("candidate", *names), tuple(lines))


def failures(rows: Sequence[CandidateResult]) -> Table:
    """Return the failures and their reasons."""
    lines = [(word(row.label), Cell("not measured"), Cell(row.failure)) for row in rows if row.failure is not None]
    lines += [(word(row.label), Cell("in part"), Cell(note)) for row in rows for note in row.notes]
    return Table("What failed", ("candidate", "", "reason"), tuple(lines))


def _without_empty(title: str, header: Sequence[str], lines: Sequence[Sequence[Cell]], note: str) -> Table:
    """Leave out columns in which no line has anything."""
    kept = [i for i in range(len(header)) if any(line[i].text not in (NOTHING, "") for line in lines)]
    rows = tuple(tuple(line[i] for i in kept) for line in lines)
    return Table(title, tuple(header[i] for i in kept), rows, note)


# ---- forms ----------------------------------------------------------------------------------------------------------


def as_text(table: Table) -> str:
    """For a terminal: words to the left, numbers to the right."""
    lines = [table.header, *(tuple(cell.text for cell in row) for row in table.rows)]
    widths = [max(_width(line[i]) for line in lines) for i in range(len(table.header))]
    left = [
        any(isinstance(row[i].value, str) or row[i].value is None for row in table.rows) for i in range(len(widths))
    ]
    out = [f"{table.title}"]
    for line in lines:
        cells = (_padded(text, width, to_left) for text, width, to_left in zip(line, widths, left))
        out.append("  ".join(cells).rstrip())
    return "\n".join(out)


def _width(text: str) -> int:
    """Columns on a terminal: wide letters take two, marks none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(bool(unicodedata.combining(c)) for c in text)


def _padded(text: str, width: int, to_left: bool) -> str:
    space = " " * (width - _width(text))
    return text + space if to_left else space + text


def as_csv(rows: Sequence[CandidateResult], chosen: Pick) -> str:
    """One line per candidate with everything; numbers in full, columns that a script can name."""
    flat = [dict(_flat(row, chosen)) for row in rows]
    names = list(dict.fromkeys(name for line in flat for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flat(row: CandidateResult, chosen: Pick) -> Iterable[tuple[str, Any]]:
    yield "candidate", row.label
    yield "given", row.candidate.given
    yield "status", "failed" if row.failure is not None else "measured"
    yield "reason", row.failure or "; ".join(row.notes)
    yield "pick", int(row.label == chosen.label)
    yield "qualifies", int(row.failure is None and not chosen.misses.get(row.label))
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
        yield f"{head}_peak_mb", found.peak_mb
        yield f"{head}_file_mb", found.disk_mb
    if row.images_per_s:
        yield from _spread_columns("training_images_per_s", row.images_per_s)
    for name, value in (row.training_memory or {}).items():
        if name != "took":
            yield f"training_{name}", value
    yield from _flat_accuracy(row)


def _spread_columns(name: str, found: Spread) -> Iterable[tuple[str, float]]:
    yield from ((name, found.middle), (f"{name}_low", found.low), (f"{name}_high", found.high))


def _flat_accuracy(row: CandidateResult) -> Iterable[tuple[str, Any]]:
    a = row.accuracy
    if a is None:
        return
    yield "seeds", "" if a.seeds is None else " ".join(map(str, a.seeds))
    for name in ("map", "map50", "precision", "recall"):
        yield from _spread_columns(name, a.figure(name))
        yield f"{name}_deviation", a.deviation(name)
    if a.has_interval:
        yield from (("map_range_low", a.map_range().low), ("map_range_high", a.map_range().high))
    for name in AREAS:
        found = a.area(name)
        yield f"map_{name}", found.middle if found else None
    for name, figure in a.classes().items():
        yield f"map_class_{name}", figure.middle
