"""Plots of a comparison: Pareto front, latency by stage, memory. Drawn without pyplot and its global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox

from engine.compare.pareto import Limits, Pick, Point, unranked_reason
from engine.compare.results import FORM_NAMES, STAGES, CandidateResult, Latency, measured
from engine.compare.table import significant
from utils.plots import new_figure, save_figure

DPI = 130
MIN_AREA, MAX_AREA = 60.0, 1400.0  # of markers, in square points
STAGE_COLORS = {"preprocess": "#8da0cb", "forward": "#4878a8", "nms": "#e0a058"}
BLUE, LIGHT, GRAY, FRONT, PICKED = "#4878a8", "0.8", "0.55", "#c0392b", "#2e8b57"
MARKERS = {None: "o", "anchor": "o", "free": "s"}  # a diamond for other heads
GAP = 4.0  # clearance around a label in pixels
RINGS = 24  # distances at which a label is tried
DIRECTIONS = ((1, 0), (1, 1), (0, 1), (1, -1), (0, -1), (-1, 0), (-1, 1), (-1, -1))
MIN_SPAN = 0.1  # of mAP50-95 on the axis: smaller differences are not magnified
LOG_RATIO = 12  # a logarithmic axis above this ratio of the largest to the smallest value


# ---- labels that do not overlap -------------------------------------------------------------------------------------


def place_labels(anchors: Sequence[Bbox], sizes: Sequence[tuple[float, float]], frame: Bbox) -> list[Bbox]:
    """Return a box for each label, near its anchor: the first free one, or the one with the least overlap.

    Args:
        anchors: boxes of the labeled markers, in pixels.
        sizes: (width, height) of the labels.
        frame: area for the labels.
    """
    placed: list[Bbox] = []
    for anchor, (width, height) in zip(anchors, sizes):

        def cost(box: Bbox) -> float:
            hidden = box.width * box.height - shared_area(box, frame)
            others = (shared_area(box.padded(GAP / 2), other) for other in (*anchors, *placed))
            return (10 * hidden if hidden > 1e-6 else 0.0) + sum(others)

        boxes = [
            Bbox.from_bounds(
                (anchor.x0 - reach - width, (anchor.x0 + anchor.x1 - width) / 2, anchor.x1 + reach)[dx + 1],
                (anchor.y0 - reach - height, (anchor.y0 + anchor.y1 - height) / 2, anchor.y1 + reach)[dy + 1],
                width,
                height,
            )
            for reach in GAP + np.arange(RINGS) * 0.6 * height
            for dx, dy in DIRECTIONS
        ]
        placed.append(next((box for box in boxes if cost(box) == 0), None) or min(boxes, key=cost))
    return placed


def shared_area(a: Bbox, b: Bbox) -> float:
    """Return the area of the intersection in square pixels."""
    common = Bbox.intersection(a, b)
    return float(common.width * common.height) if common is not None else 0.0


# ---- accuracy against latency ---------------------------------------------------------------------------------------


def plot_pareto(path: Path, points: Mapping[str, Point], pick: Pick, limits: Limits, what: str) -> None:
    """Plot mAP50-95, or parameters without accuracies, against latency; the marker area is the number of parameters.

    Args:
        path: PNG to write.
        points: compared values by candidate; those without latency are left out.
        pick: recommendation and Pareto front, highlighted.
        limits: only the latency limit is drawn.
        what: description of the latency, for the axis label.
    """
    figure = new_figure(9.5, 6.2)
    figure.set_dpi(DPI)  # labels are placed in pixels
    axes = figure.add_subplot()
    has_accuracy = any(point.accuracy for point in points.values())
    ranges = {label: box for label, point in points.items() if (box := _ranges(point, has_accuracy))}
    largest = max((points[label].parameters_m or 0.0 for label in ranges), default=1.0) or 1.0
    areas = {label: marker_area(points[label].parameters_m or 0.0, largest) for label in ranges}
    centers = {label: _center(points[label], has_accuracy) for label in ranges}
    reason = unranked_reason(points)
    members = () if has_accuracy and reason else pick.front  # that front is one of latency and parameters
    front = [centers[label] for label in members if label in centers]
    if len(front) > 1:
        axes.step(*zip(*front), where="post", color=FRONT, lw=1.2, zorder=1, label="Pareto front")
    for label in sorted(ranges, key=lambda label: -areas[label]):  # small markers on top
        color = PICKED if label == pick.label else FRONT if label in members else GRAY
        (x, y), box = centers[label], ranges[label]
        marker, alpha = MARKERS.get(points[label].head, "D"), 0.35 if pick.misses.get(label) else 0.8
        axes.scatter([x], [y], s=areas[label], color=color, marker=marker, linewidths=0, zorder=2, alpha=alpha)
        axes.plot([box.x0, box.x1], [y, y], [x, x], [box.y0, box.y1], color="0.2", lw=0.8, zorder=3)
    _set_limits(axes, list(ranges.values()), has_accuracy)
    if limits.latency_ms is not None:
        axes.axvline(limits.latency_ms, color="0.3", lw=0.9, ls="--", label=f"limit {limits.latency_ms:g} ms")
    title = "Accuracy against latency" if has_accuracy else "Parameters against latency"
    axes.set_title(title + (f" ({reason.partition(':')[0]})" if has_accuracy and reason else ""), fontsize=12)
    axes.set_xlabel(f"milliseconds per image ({what})")
    axes.set_ylabel("mAP50-95" if has_accuracy else "parameters, M (no accuracy was measured)")
    axes.grid(color="0.93")
    axes.set_axisbelow(True)
    note = f"marker area: parameters (largest {largest:.3g} M); lines: quartiles of the latency"
    axes.text(0.01, 0.985, note + (", range of mAP50-95" if has_accuracy else ""), transform=axes.transAxes,
              fontsize=8, color="0.35", va="top")  # fmt: skip
    _write_legend(figure, axes, [points[label].head for label in ranges])
    _write_labels(figure, axes, centers, areas, pick.label)
    save_figure(figure, path, DPI)


def _center(point: Point, has_accuracy: bool) -> tuple[float, float]:
    assert point.latency is not None
    y = point.accuracy.middle if has_accuracy and point.accuracy else point.parameters_m
    return point.latency.middle, y or 0.0


def _ranges(point: Point, has_accuracy: bool) -> Bbox | None:
    """Return latency and accuracy (or parameters) of a point, low to high; None where one is missing."""
    if point.latency is None or (point.accuracy if has_accuracy else point.parameters_m) is None:
        return None
    y = _center(point, has_accuracy)[1]
    low, high = (point.accuracy.low, point.accuracy.high) if has_accuracy and point.accuracy else (y, y)
    return Bbox.from_extents(point.latency.low, low, point.latency.high, high)


def marker_area(parameters_m: float, largest_m: float) -> float:
    """Return the marker area in square points: proportional to the parameters, but large enough to be seen."""
    return max(MAX_AREA * parameters_m / largest_m, MIN_AREA)


def accuracy_limits(boxes: Sequence[Bbox]) -> tuple[float, float]:
    """Return axis limits of mAP50-95: a span of at least `MIN_SPAN` and of three times the widest range."""
    low, high = min(box.y0 for box in boxes), max(box.y1 for box in boxes)
    span = max(1.44 * (high - low), MIN_SPAN, 3 * max(box.y1 - box.y0 for box in boxes))
    bottom = min(max((low + high - span) / 2, 0.0), max(1.0 - span, 0.0))
    return bottom, bottom + span


def _set_limits(axes: Axes, boxes: Sequence[Bbox], has_accuracy: bool) -> None:
    """Set axis limits that do not magnify noise: from zero, or logarithmic where values differ by `LOG_RATIO`."""
    if not boxes:
        return
    extents = np.array([box.extents for box in boxes])
    for name, low, high in zip("xy", extents[:, :2].min(0), extents[:, 2:].max(0)):
        if name == "y" and has_accuracy:
            axes.set_ylim(*accuracy_limits(boxes))
        elif high > LOG_RATIO * low > 0:
            axes.set(**{f"{name}scale": "log", f"{name}lim": (low / 1.6, high * 1.9)})
            axis = axes.xaxis if name == "x" else axes.yaxis
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
        else:
            axes.set(**{f"{name}lim": (0, 1.35 * high or 1)})


def _write_legend(figure: Figure, axes: Axes, heads: Sequence[str | None]) -> None:
    """Write the legend below the axes: front, limit, and the markers of the heads."""
    handles = list(axes.get_legend_handles_labels()[0])
    handles += [
        Line2D([], [], color=GRAY, ls="", marker=MARKERS.get(head, "D"), ms=9, label=f"{head} head")
        for head in dict.fromkeys(heads)
        if head
    ]
    if handles:
        figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), frameon=False, fontsize=9)


def _write_labels(
    figure: Figure,
    axes: Axes,
    centers: Mapping[str, tuple[float, float]],
    areas: Mapping[str, float],
    picked: str | None,
) -> None:
    """Write the names beside the markers, with a thin line to those that are not next to theirs."""
    figure.canvas.draw()
    figure.set_layout_engine("none")  # positions are in pixels from here on
    scale = figure.dpi / 72
    anchors, texts = [], []
    for label, center in centers.items():
        x, y = axes.transData.transform(center)
        radius = (areas[label] / np.pi) ** 0.5 * scale
        anchors.append(Bbox.from_extents(x - radius, y - radius, x + radius, y + radius))
        weight = "bold" if label == picked else "normal"
        white = {"fc": "white", "ec": "none", "alpha": 0.9, "pad": 0.5}  # lines stay behind the name
        text = axes.text(0, 0, _literal(label), fontsize=9, weight=weight, transform=None, zorder=4, bbox=white)
        texts.append(text)
    sizes = [(box.width, box.height) for box in (text.get_window_extent() for text in texts)]
    window = axes.get_window_extent()
    frame = Bbox.from_extents(window.x0, window.y0, window.x1, window.y1 - 16 * scale)  # without the note on top
    for text, anchor, box in zip(texts, anchors, place_labels(anchors, sizes, frame)):
        text.set_position((box.x0, box.y0 + 0.22 * box.height))
        x, y = (anchor.x0 + anchor.x1) / 2, (anchor.y0 + anchor.y1) / 2
        near = min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)
        if np.hypot(near[0] - x, near[1] - y) > anchor.width / 2 + 2 * GAP:
            arrow = {"arrowstyle": "-", "color": "0.5", "lw": 0.6}
            axes.annotate("", near, (x, y), xycoords="figure pixels", textcoords="figure pixels", arrowprops=arrow)


# ---- bars -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A stacked bar.

    Attributes:
        parts: (length, color) from left to right.
        text: written behind it.
        span: ends of a thin line that shows the range.
    """

    parts: tuple[tuple[float, str], ...]
    text: str
    span: tuple[float, float] = (0.0, 0.0)


Panel = tuple[str, str, list[Bar | None]]
"""Title, unit, and a bar per candidate; None for one that failed."""


def plot_latency(path: Path, rows: Sequence[CandidateResult]) -> None:
    """Plot latency by stage: a panel per runtime, form and batch size, a bar per candidate."""
    shown = measured(rows)
    keys = dict.fromkeys((x.form, x.runtime, x.batch) for row in shown for x in row.latencies)
    panels: list[Panel] = []
    for form, runtime, batch in keys:
        bars = [_latency_bar(row.latency(runtime, batch, form)) for row in shown]
        panels.append((f"{runtime}, {FORM_NAMES[form]}, batch {batch}", "milliseconds per image", bars))
    _plot_bars(path, [row.label for row in shown], panels, STAGE_COLORS)


def _latency_bar(latency: Latency | None) -> Bar | None:
    if latency is None:
        return None
    parts = tuple((latency.times[stage].middle, STAGE_COLORS[stage]) for stage in STAGES)
    return Bar(parts, significant(latency.total.middle), (latency.total.low, latency.total.high))


def plot_memory(path: Path, rows: Sequence[CandidateResult], runtime: str, batch: int) -> None:
    """Plot peak memory of inference and of a training step, and the memory kept for the backward pass."""
    shown = [row for row in measured(rows) if row.latency(runtime, batch) or row.training_memory]
    inference = [row.latency(runtime, batch) for row in shown]
    training = [row.training_memory or {} for row in shown]
    step = f"training step, batch {next((m['batch'] for m in training if m), '?')}"
    unit = "MB (gray: Python and libraries)"
    panels: list[Panel] = [
        (f"inference, {runtime}, batch {batch}: peak", unit,
         [_memory_bar(x.peak_mb, x.baseline_mb) if x else None for x in inference]),
        (f"{step}: peak", unit, [_memory_bar(m.get("peak_mb"), m.get("baseline_mb")) for m in training]),
        (f"{step}: kept for backward", "MB", [_memory_bar(m.get("kept_mb")) for m in training]),
    ]  # fmt: skip
    _plot_bars(path, [row.label for row in shown], panels if shown else [])


def _memory_bar(peak: float | None, baseline: float | None = None) -> Bar | None:
    if peak is None:
        return None
    base = min(baseline or 0.0, peak)
    text = significant(peak) + (f" (model {significant(peak - base)})" if baseline else "")
    return Bar(((base, LIGHT), (peak - base, BLUE)), text)


def _plot_bars(
    path: Path, labels: Sequence[str], panels: Sequence[Panel], legend: Mapping[str, str] | None = None
) -> None:
    """Write the panels, at most three side by side; no file without panels."""
    if not panels:
        return
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = new_figure(2.2 + 4.4 * columns, 1.1 + lines * (0.9 + 0.34 * len(labels)))
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes in grid[len(panels) :]:
        axes.axis("off")
    for number, (axes, (title, unit, bars)) in enumerate(zip(grid, panels)):
        for y, bar in enumerate(bars):
            if bar is None:
                axes.text(0, y, " failed", va="center", fontsize=8, color="0.4")
                continue
            end = 0.0
            for length, color in bar.parts:
                axes.barh(y, length, left=end, color=color, height=0.66)
                end += length
            axes.plot(bar.span, [y, y], color="0.15", lw=1 if any(bar.span) else 0)
            axes.text(max(end, bar.span[1]), y, f"  {bar.text}", va="center", fontsize=8)
        names = [_literal(label) for label in labels] if number % columns == 0 else [""] * len(labels)
        axes.set_yticks(range(len(labels)), names, fontsize=9)
        axes.set(ylim=(len(labels) - 0.5, -0.5), xlim=(0, axes.get_xlim()[1] * 1.3))
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(unit, fontsize=9)
    if legend:
        patches = [Patch(color=color, label=name) for name, color in legend.items()]
        figure.legend(handles=patches, loc="outside upper center", ncols=len(legend), frameon=False, fontsize=9)
    save_figure(figure, path, DPI)


def _literal(label: str) -> str:
    """Return a name that matplotlib shows literally; long ones are cut at the start."""
    text = label if len(label) <= 34 else "..." + label[-31:]
    return text.replace("$", r"\$")
