"""Pieces of report.html: charts and images as text that needs no other file. All text is escaped here."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from data.images import read
from engine.evaluate.worst_images import ImageErrors
from utils.draw import class_name
from utils.errors import DataError

# Okabe and Ito's colors, which people with any color vision can tell apart; kinds of boxes differ in line style too.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 250, 52, 10, 30, 34
IMAGE_SIDE = 720
CHART_SIDE = 1200


def text(value: Any) -> str:
    """Escape a value as HTML text; bytes of file names that are not UTF-8 are dropped."""
    return escape(str(value).encode("utf-8", "replace").decode("utf-8"), quote=True)


def number(value: float) -> str:
    """Format a number with up to four digits, or `-`."""
    return f"{value:.4g}" if math.isfinite(value) else "-"


def table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ()) -> str:
    """Rows of cells; cells that are numbers stand to the right."""
    out = ["<table>"]
    if head:
        out.append("<tr>" + "".join(f"<th>{text(cell)}</th>" for cell in head) + "</tr>")
    for row in rows:
        cells = []
        for cell in row:
            is_number = isinstance(cell, (int, float)) and not isinstance(cell, bool)
            shown = number(cell) if isinstance(cell, float) else text(cell)
            cells.append(f'<td class="n">{shown}</td>' if is_number else f"<td>{shown}</td>")
        out.append("<tr>" + "".join(cells) + "</tr>")
    return "\n".join([*out, "</table>"])


def values(pairs: Mapping[str, Any]) -> str:
    """Names with their values, in columns."""
    rows = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in pairs.items())
    return f'<dl class="values">{rows}</dl>'


# ---- charts ---------------------------------------------------------------------------------------------------------


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(title: str, epochs: Sequence[float], lines: Mapping[str, Sequence[float]], best: float | None) -> str:
    """Values over epochs as SVG.

    Args:
        title: above the chart.
        epochs: (n,) rising.
        lines: by label (n,) values; those that are no numbers are left out.
        best: epoch to mark; None = none.
    """
    finite = [v for values in lines.values() for v in values if math.isfinite(v)]
    if not len(epochs) or not finite:
        return ""
    low, high = min(0.0, *finite), max(*finite, 0.0)
    high = high if high > low else low + 1
    left, right = float(min(epochs)), max(float(max(epochs)), float(min(epochs)) + 1)

    def x(value: float) -> float:
        return LEFT + (value - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{text(title)}</title>']
    for value in ticks(low, high):
        parts.append(f'<path class="grid" d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    parts += [
        f'<text x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{value:.0f}</text>'
        for value in ticks(left, right)
        if value == round(value)
    ]
    if best is not None:
        parts.append(f'<path class="best" d="M{x(best):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
    labels = []
    for k, (label, values) in enumerate(lines.items()):
        points = [f"{x(e):.1f},{y(v):.1f}" for e, v in zip(epochs, values) if math.isfinite(v)]
        color = LINES[k % len(LINES)]
        parts.append(f'<polyline points="{" ".join(points)}" stroke="{color}"/>')
        if len(points) == 1:
            parts.append(
                f'<circle cx="{points[0].split(",")[0]}" cy="{points[0].split(",")[1]}" r="3" fill="{color}"/>'
            )
        labels.append(f'<tspan fill="{color}">\u2500 {text(label)}</tspan>')
    parts.append(f'<text class="title" x="{LEFT}" y="14">{text(title)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="14" text-anchor="end">{"  ".join(labels)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 3}" text-anchor="middle">epoch</text></svg>')
    return "\n".join(parts)


# ---- images -------------------------------------------------------------------------------------------------------


def embedded(image: NDArray[np.uint8], side: int, suffix: str = ".jpg") -> str:
    """(H, W, 3) uint8 BGR, scaled down to at most `side` pixels a side, as a data address."""
    scale = min(1.0, side / max(image.shape[:2]))
    if scale < 1:
        size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8)
    options = [cv2.IMWRITE_JPEG_QUALITY, 85] if suffix == ".jpg" else [cv2.IMWRITE_PNG_COMPRESSION, 9]
    _, data = cv2.imencode(suffix, image, options)
    kind = "jpeg" if suffix == ".jpg" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data.tobytes()).decode('ascii')}"


def image_file(path: Path, caption: str) -> str:
    """Return an image file of the run with a caption, or '' if it does not exist."""
    try:
        image = read(path)
    except DataError:
        return ""
    address = embedded(image, CHART_SIDE, path.suffix if path.suffix == ".png" else ".jpg")
    return (
        f'<figure><img alt="{text(caption)}" src="{address}"><figcaption>{text(caption)} '
        f"<code>{text(path.name)}</code></figcaption></figure>"
    )


def worst_image(found: ImageErrors, names: Mapping[int, str]) -> str:
    """Return a validation image with its boxes, or a line of text if the file is no longer readable."""
    counts = f"{len(found.wrong)} false positive(s), {len(found.missed)} missed, {len(found.right)} right"
    caption = f"<figcaption>{counts} <code>{text(Path(found.path).name)}</code></figcaption>"
    try:
        address = embedded(read(found.path), IMAGE_SIDE)
    except DataError as error:
        return f"<figure><p>{text(error)}</p>{caption}</figure>"
    height, width = found.shape
    parts = [
        f'<figure><svg class="boxes" viewBox="0 0 {width} {height}" font-size="{max(height, width) / 45:.1f}">',
        f'<image width="{width}" height="{height}" href="{address}"/>',
    ]
    for kind, rows in (
        ("right", found.right.tolist()),
        ("missed", found.missed.tolist()),
        ("wrong", found.wrong.tolist()),
    ):
        for row in rows:
            box, label, score = (row[1:5], row[0], None) if kind == "missed" else (row[:4], row[5], row[4])
            parts.append(_box(kind, box, class_name(names, int(label)), score))
    return "\n".join([*parts, "</svg>", caption, "</figure>"])


def _box(kind: str, box: Sequence[float], name: str, score: float | None) -> str:
    """One box; its words are a tooltip, and written beside it unless it is right."""
    left, top, right, bottom = box
    words = text(name if score is None else f"{name} {score:.2f}")
    shape = (
        f'<g class="{kind}"><rect x="{left:.1f}" y="{top:.1f}" width="{max(right - left, 0):.1f}" '
        f'height="{max(bottom - top, 0):.1f}"><title>{kind}: {words}</title></rect>'
    )
    caption = "" if kind == "right" else f'<text x="{left:.1f}" y="{top:.1f}" dx=".15em" dy="1em">{words}</text>'
    return shape + caption + "</g>"
