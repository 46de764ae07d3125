"""Self-contained reports rendered from the templates of this package. jinja2 escapes all text."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from numpy.typing import NDArray

from data.images import read
from engine.evaluate.worst_images import ImageErrors
from utils.draw import class_name
from utils.errors import DataError
from utils.files import atomic_path
from utils.plots import new_figure

# Okabe and Ito's colors, distinguishable with any color vision.
LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
IMAGE_SIDE = 720
PLOT_SIDE = 1200


@dataclass(frozen=True)
class EmbeddedImage:
    """An image in the page: data URL, caption, file name."""

    address: str
    caption: str
    name: str = ""


def digits(value: object) -> str:
    """Format floats (metrics) with three decimals, or `-` if not finite; other values unchanged."""
    if isinstance(value, float):
        return f"{value:.3f}" if math.isfinite(value) else "-"
    return str(value)


ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
ENVIRONMENT.filters["digits"] = digits


def render(template: str, **values: Any) -> str:
    """Return a template of this package filled with values; bytes of file names that are not UTF-8 become `?`."""
    text = ENVIRONMENT.get_template(template).render(**values)
    return text.encode("utf-8", "replace").decode("utf-8")


def write_text(path: Path, text: str) -> Path:
    """Write a text file atomically."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def data_url(content: bytes, kind: str) -> str:
    """Return the content of an image file as a data URL; `kind` is png, jpeg or svg+xml."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def embedded(image: NDArray[np.uint8], side: int, suffix: str = ".jpg") -> str:
    """Return an image (H, W, 3) uint8 BGR, scaled down to at most `side` pixels a side, as a data URL."""
    scale = min(1.0, side / max(image.shape[:2]))
    if scale < 1:
        size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8)
    options = [cv2.IMWRITE_JPEG_QUALITY, 85] if suffix == ".jpg" else [cv2.IMWRITE_PNG_COMPRESSION, 9]
    _, content = cv2.imencode(suffix, image, options)
    return data_url(content.tobytes(), "jpeg" if suffix == ".jpg" else "png")


def image_files(folder: Path, captions: Mapping[str, str]) -> list[EmbeddedImage]:
    """Return the images of a folder that exist, by file name and caption."""
    found = []
    for name, caption in captions.items():
        try:
            image = read(folder / name)
        except DataError:
            continue
        suffix = ".png" if name.endswith(".png") else ".jpg"
        found.append(EmbeddedImage(embedded(image, PLOT_SIDE, suffix), caption, name))
    return found


def line_chart(
    title: str, epochs: Sequence[float], lines: Mapping[str, Sequence[float]], best: float | None
) -> EmbeddedImage | None:
    """Plot values over epochs as SVG; None where no value is finite.

    Args:
        title: title above the chart.
        epochs: (n,) ascending.
        lines: (n,) values by label; non-finite ones are left out.
        best: epoch to mark; None = none.
    """
    from matplotlib import rc_context  # lazy: a training without plots does not need it
    from matplotlib.ticker import MaxNLocator

    values = np.array(list(lines.values()), np.float64)
    if not np.isfinite(values).any():
        return None
    figure = new_figure(3.9, 2.6)
    axes = figure.add_subplot()
    for k, (label, row) in enumerate(zip(lines, values)):
        finite = np.isfinite(row)
        marker = "o" if finite.sum() == 1 else ""
        axes.plot(np.asarray(epochs)[finite], row[finite], marker=marker, color=LINE_COLORS[k % 5], label=label)
    if best is not None:
        axes.axvline(best, color="0.5", ls="--", lw=1)
    low, high = (
        np.nanmin(values, where=np.isfinite(values), initial=0.0),
        np.nanmax(values, where=np.isfinite(values), initial=0.0),
    )
    axes.set_ylim(1.05 * low, 1.05 * high if high > low else low + 1)
    axes.set_title(title, fontsize=10, loc="left", weight="bold")
    axes.set_xlabel("epoch", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=8)
    axes.grid(color="0.92")
    small = {"handlelength": 1.0, "handletextpad": 0.4, "columnspacing": 0.8}  # beside the longest title
    axes.legend(
        fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.1, **small
    )
    content = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    return EmbeddedImage(data_url(content.getvalue(), "svg+xml"), title)


@dataclass(frozen=True)
class ReportImage:
    """A validation image with its boxes.

    Attributes:
        found: detections and missed labels.
        name: file name.
        address: data URL; empty if the file can no longer be read.
        error: why it cannot be read.
        boxes: (kind, text, left, top, width, height) in pixels of the image; kind is correct, missed or wrong.
    """

    found: ImageErrors
    name: str
    address: str
    error: str
    boxes: tuple[tuple[str, str, float, float, float, float], ...]

    def font_size(self, scale: float = 1.0) -> float:
        """Return the height of the texts in pixels of the image; a larger `scale` is for images shown small."""
        return scale * max(self.found.shape) / 45

    def fits(self, text: str, left: float, scale: float = 1.0) -> bool:
        """Return whether a text that begins at `left` (pixels) fits into the image; letters are 0.65 em wide."""
        return left + 0.65 * self.font_size(scale) * len(text) <= self.found.shape[1]


def worst_image(found: ImageErrors, names: Mapping[int, str]) -> ReportImage:
    """Return a validation image and its boxes, correct ones below the others."""
    address = error = ""
    try:
        address = embedded(read(found.path), IMAGE_SIDE)
    except DataError as problem:
        error = str(problem)
    rows = [("correct", *row) for row in found.right.tolist()]
    rows += [("missed", *row[1:], None, row[0]) for row in found.missed.tolist()]
    rows += [("wrong", *row) for row in found.wrong.tolist()]
    boxes = []
    for kind, x1, y1, x2, y2, confidence, index in rows:
        name = class_name(names, int(index))
        text = name if confidence is None else f"{name} {confidence:.2f}"
        boxes.append((kind, text, x1, y1, max(x2 - x1, 0.0), max(y2 - y1, 0.0)))
    return ReportImage(found, Path(found.path).name, address, error, tuple(boxes))
