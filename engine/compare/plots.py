"""Images of a comparison: accuracy against latency with the Pareto front, latency by stage, memory.

Drawn on their own canvas, without a window system and without the caller's matplotlib state.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.compare.pareto import Limits, Pick, Point, front
from engine.compare.results import STAGES, CandidateResult, measured
from engine.compare.table import significant
from utils.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130
SMALLEST, LARGEST = 60.0, 1400.0  # areas of discs, in square points
STAGE_COLORS = {"preprocess": "#8da0cb", "forward": "#4878a8", "nms": "#e0a058"}
GRAY, FRONT, PICKED = "0.55", "#c0392b", "#2e8b57"
GAP = 4.0  # pixels between a label and what it must not touch
STEPS = 24  # rings on which a label may be placed

Box = tuple[float, float, float, float]
"""left, bottom, right, top in pixels."""


# ---- labels that do not overlap (pure) ------------------------------------------------------------------------------


def place_labels(
    anchors: Sequence[Box], sizes: Sequence[tuple[float, float]], inside: Box, obstacles: Sequence[Box] = ()
) -> list[Box]:
    """Find a place for each label, beside what it names.

    Rings around the named thing are tried from near to far, eight directions each, to the right first. A place is free
    when it lies inside, and touches neither a label placed before, nor any of the named things, nor an obstacle.

    Args:
        anchors: boxes of what is named.
        sizes: (width, height) of the labels.
        inside: where labels may be.
        obstacles: what else is not to be covered; an overlap with them weighs half.

    Returns:
        A box per label. Where nothing is free the one with the least overlap.
    """
    placed: list[Box] = []
    for anchor, size in zip(anchors, sizes):
        taken = [*anchors, *placed]
        best, least = None, float("inf")
        for box in _places(anchor, size):
            cost = sum(overlap(box, other) for other in taken) + outside(box, inside)
            cost += sum(overlap(box, other) for other in obstacles) / 2
            if cost < least:
                best, least = box, cost
            if cost == 0:
                break
        assert best is not None
        placed.append(best)
    return placed


def _places(anchor: Box, size: tuple[float, float]) -> Sequence[Box]:
    left, bottom, right, top = anchor
    width, height = size
    x, y = (left + right) / 2, (bottom + top) / 2
    out = []
    for ring in range(STEPS):
        reach = GAP + ring * height * 0.6
        columns = {1: right + reach, 0: x - width / 2, -1: left - reach - width}
        lines = {1: top + reach, 0: y - height / 2, -1: bottom - reach - height}
        for dx, dy in ((1, 0), (1, 1), (0, 1), (1, -1), (0, -1), (-1, 0), (-1, 1), (-1, -1)):
            out.append((columns[dx], lines[dy], columns[dx] + width, lines[dy] + height))
    return out


def overlap(a: Box, b: Box) -> float:
    """Area in square pixels that two boxes share, each a little larger than it is."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + GAP / 2
    height = min(a[3], b[3]) - max(a[1], b[1]) + GAP / 2
    return width * height if width > 0 and height > 0 else 0.0


def outside(box: Box, inside: Box) -> float:
    """How much of a box lies outside, in square pixels; weighs more than an overlap."""
    width, height = box[2] - box[0], box[3] - box[1]
    seen = max(0.0, min(box[2], inside[2]) - max(box[0], inside[0])) * max(
        0.0, min(box[3], inside[3]) - max(box[1], inside[1])
    )
    hidden = width * height - seen
    return 10 * hidden if hidden > 1e-6 else 0.0


# ---- accuracy against latency ---------------------------------------------------------------------------------------


def pareto_image(path: Path, points: Mapping[str, Point], chosen: Pick, limits: Limits, what: str) -> None:
    """Accuracy (without one: operations) against latency; the area of a disc is the number of parameters.

    Args:
        path: PNG to write.
        points: by candidate; those without latency are left out.
        chosen: marked.
        limits: the one on latency is drawn.
        what: whose latency.
    """
    figure = _figure(9.5, 6.2)
    axes = figure.add_subplot()
    judged = any(point.accuracy for point in points.values())
    at: dict[str, tuple[float, float]] = {}
    for label, point in points.items():
        value = (point.accuracy.middle if point.accuracy else None) if judged else point.gflops
        if point.latency is not None and value is not None:
            at[label] = (point.latency.middle, value)
    biggest = max((points[label].parameters_m or 0.0 for label in at), default=1.0) or 1.0
    areas = {label: disc_area(points[label].parameters_m or 0.0, biggest) for label in at}
    lines: list[tuple[float, float, float, float]] = []  # drawn, in data: labels are to keep off
    kept = front(at) if judged else []
    if judged and len(kept) > 1:
        lines += _draw_front(axes, [at[label] for label in kept])
    for label, (x, y) in sorted(at.items(), key=lambda item: -areas[item[0]]):  # small discs on top
        color = PICKED if label == chosen.label else FRONT if label in kept else GRAY if judged else "#4878a8"
        strength = 0.35 if chosen.misses.get(label) else 0.8
        axes.scatter([x], [y], s=areas[label], color=color, linewidths=0, zorder=2, alpha=strength)
        lines += _ranges(axes, points[label], (x, y), judged)
    if limits.latency_ms is not None:
        axes.axvline(limits.latency_ms, color="0.3", lw=0.9, ls="--", label=f"limit {limits.latency_ms:g} ms")
    axes.set_xlabel(f"milliseconds per image ({what})")
    axes.set_ylabel("mAP50-95" if judged else "GFLOPs (no accuracy was measured)")
    axes.set_title("Accuracy against latency" if judged else "Operations against latency", fontsize=12)
    _room(axes, [*((x, y, x, y) for x, y in at.values()), *lines], judged)
    if limits.latency_ms is not None:
        lines.append((limits.latency_ms, axes.get_ylim()[0], limits.latency_ms, axes.get_ylim()[1]))
    axes.grid(color="0.93")
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="lower right", fontsize=9)
    _area_key(axes, biggest, judged)
    _write_labels(figure, axes, at, areas, lines, chosen.label)
    _save(figure, path)


def _draw_front(axes: Axes, places: Sequence[tuple[float, float]]) -> list[Box]:
    """Draw steps between the candidates of the front and return the ends of the lines."""
    xs, ys = zip(*places)
    axes.step(xs, ys, where="post", color=FRONT, lw=1.2, zorder=1, label="front")
    flat = [(x, y, next_x, y) for x, y, next_x in zip(xs, ys, xs[1:])]
    return flat + [(x, y, x, next_y) for x, y, next_y in zip(xs[1:], ys, ys[1:])]


def disc_area(parameters_m: float, biggest_m: float) -> float:
    """Area in square points, proportional to the number of parameters, but large enough to be seen."""
    return max(LARGEST * parameters_m / biggest_m, SMALLEST)


def _ranges(axes: Axes, point: Point, at: tuple[float, float], judged: bool) -> list[Box]:
    """Thin lines: quartiles of the latency, range of the accuracy over seeds. Returns their ends."""
    x, y = at
    assert point.latency is not None
    found = [(point.latency.low, y, point.latency.high, y)]
    if judged and point.accuracy is not None:
        found.append((x, point.accuracy.low, x, point.accuracy.high))
    for x0, y0, x1, y1 in found:
        axes.plot([x0, x1], [y0, y1], color="0.2", lw=0.8, zorder=3)
    return found


def _room(axes: Axes, lines: Sequence[Box], judged: bool) -> None:
    """Return axis limits with room for markers and labels; latency starts at zero unless candidates would overlap."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if not lines:
        return
    ends = np.array(lines).reshape(-1, 2)
    xs, ys = ends.T
    if xs.max() > 12 * xs.min():
        axes.set_xscale("log")
        axes.set_xlim(xs.min() / 1.6, xs.max() * 1.9)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        spread = xs.max() - xs.min()
        axes.set_xlim(0 if xs.min() < 0.35 * xs.max() else max(0, xs.min() - 0.8 * spread), xs.max() + 0.35 * spread)
    if not judged and ys.max() > 12 * ys.min() > 0:
        axes.set_yscale("log")
        axes.set_ylim(ys.min() / 1.9, ys.max() * 1.9)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        span = max(ys.max() - ys.min(), 0.05 * max(ys.max(), 1e-3))
        axes.set_ylim(ys.min() - 0.22 * span, ys.max() + 0.22 * span)


def _area_key(axes: Axes, biggest: float, judged: bool) -> None:
    lines = "lines: quartiles, and range over seeds" if judged else "lines: quartiles"
    axes.text(
        0.01, 0.985, f"area of a disc: parameters (largest {biggest:.3g} M); {lines}",
        transform=axes.transAxes, fontsize=8, color="0.35", va="top",
    )  # fmt: skip


def _write_labels(
    figure: Figure,
    axes: Axes,
    at: Mapping[str, tuple[float, float]],
    areas: Mapping[str, float],
    lines: Sequence[Box],
    chosen: str | None,
) -> None:
    """Names beside the discs; a thin line where one stands apart from what it names."""
    figure.canvas.draw()
    figure.set_layout_engine("none")  # places are in pixels from here on
    scale = figure.dpi / 72
    anchors, texts, sizes = [], [], []
    for label, xy in at.items():
        x, y = axes.transData.transform(xy)
        radius = (areas[label] / np.pi) ** 0.5 * scale
        anchors.append((x - radius, y - radius, x + radius, y + radius))
        weight = "bold" if label == chosen else "normal"
        text = axes.text(0, 0, _plain(label), fontsize=9, weight=weight, transform=None, zorder=4)
        extent = text.get_window_extent()
        texts.append(text)
        sizes.append((extent.width, extent.height))
    frame = axes.get_window_extent()
    key_height = 16 * scale  # the line about areas
    inside = (frame.x0 + GAP, frame.y0 + GAP, frame.x1 - GAP, frame.y1 - key_height)
    obstacles = [_upright(axes.transData.transform(np.reshape(line, (2, 2)))) for line in lines]
    legend = axes.get_legend()
    if legend is not None:
        obstacles.append(_upright(legend.get_window_extent().get_points()))
    for text, anchor, box in zip(texts, anchors, place_labels(anchors, sizes, inside, obstacles)):
        text.set_position((box[0], box[1] + 0.22 * (box[3] - box[1])))
        x, y = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
        near = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
        if np.hypot(near[0] - x, near[1] - y) > (anchor[2] - anchor[0]) / 2 + 2 * GAP:
            axes.annotate(
                "", near, (x, y), xycoords="figure pixels", textcoords="figure pixels",
                arrowprops={"arrowstyle": "-", "color": "0.5", "lw": 0.6},
            )  # fmt: skip


def _upright(ends: NDArray[np.floating]) -> Box:
    """Return the box between two corners (2, 2)."""
    (left, bottom), (right, top) = ends.min(0).tolist(), ends.max(0).tolist()
    return left, bottom, right, top


# ---- bars -----------------------------------------------------------------------------------------------------------


def latency_image(path: Path, rows: Sequence[CandidateResult]) -> None:
    """Latency by stage: a panel per runtime, form and batch, a bar per candidate."""
    phases = list(dict.fromkeys((x.form, x.runtime, x.batch) for row in measured(rows) for x in row.latencies))
    if not phases:
        return
    labels = [row.label for row in measured(rows)]
    columns = min(len(phases), 3)
    lines = -(-len(phases) // columns)
    figure = _figure(2.2 + 4.4 * columns, 1.1 + lines * (0.9 + 0.34 * len(labels)))
    panels = figure.subplots(lines, columns, squeeze=False)
    for panel in panels.flat[len(phases) :]:
        panel.axis("off")
    for number, ((form, runtime, batch), axes) in enumerate(zip(phases, panels.flat)):
        for y, row in enumerate(measured(rows)):
            found = row.latency(runtime, batch, form)
            if found is None:
                axes.text(0, y, " failed", va="center", fontsize=8, color="0.4")
                continue
            start = 0.0
            for stage in STAGES:
                width = found.times[stage].middle
                name = stage if number == 0 and y == 0 else None
                axes.barh(y, width, left=start, color=STAGE_COLORS[stage], height=0.66, label=name)
                start += width
            axes.plot([found.total.low, found.total.high], [y, y], color="0.15", lw=1)
            axes.text(max(start, found.total.high), y, f"  {significant(found.total.middle)}", va="center", fontsize=8)
        _bars(axes, labels, number % columns == 0)
        axes.set_title(f"{runtime}, {form} form, batch {batch}", fontsize=10)
        axes.set_xlabel("milliseconds per image", fontsize=9)
    handles, names = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(STAGES), frameon=False, fontsize=9)
    _save(figure, path)


def memory_image(path: Path, rows: Sequence[CandidateResult], runtime: str, batch: int) -> None:
    """Peak memory of inference and of a training step, and what is kept for the backward pass."""
    shown = [row for row in measured(rows) if row.latency(runtime, batch) or row.training_memory]
    if not shown:
        return
    labels = [row.label for row in shown]
    sizes = [row.training_memory["batch"] for row in shown if row.training_memory]
    step = f"training step, batch {sizes[0]}: " if sizes else "training step: "
    titles = (f"inference, {runtime}, batch {batch}: peak", f"{step}peak", f"{step}kept for backward")
    figure = _figure(13.5, 1.1 + 0.36 * len(labels))
    for number, (axes, title) in enumerate(zip(figure.subplots(1, 3), titles)):
        for y, row in enumerate(shown):
            found, memory = row.latency(runtime, batch), row.training_memory or {}
            if number == 0:
                value, base = (found.peak_mb, found.baseline_mb) if found else (None, None)
            elif number == 1:
                value, base = memory.get("peak_mb"), memory.get("baseline_mb")
            else:
                value, base = memory.get("kept_mb"), None
            if value is None:
                axes.text(0, y, " failed", va="center", fontsize=8, color="0.4")
                continue
            axes.barh(y, value, color="#4878a8", height=0.66)
            more = ""
            if base:
                axes.barh(y, min(base, value), color="0.8", height=0.66)
                more = f" (model {significant(max(value - base, 0.0))})"
            axes.text(value, y, f"  {significant(value)}{more}", va="center", fontsize=8)
        _bars(axes, labels, number == 0)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("MB (gray: Python and libraries)" if number < 2 else "MB", fontsize=9)
    _save(figure, path)


def _bars(axes: Axes, labels: Sequence[str], named: bool) -> None:
    """Names to the left, the first candidate on top, room for the numbers to the right."""
    axes.set_yticks(
        range(len(labels)), [_plain(label) for label in labels] if named else [""] * len(labels), fontsize=9
    )
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.3)
    axes.spines[["top", "right"]].set_visible(False)


def _plain(label: str) -> str:
    """Return a name that matplotlib shows literally; long ones are cut at the start."""
    text = label if len(label) <= 34 else "..." + label[-31:]
    return text.replace("$", r"\$")


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as part, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(part, dpi=DPI)
