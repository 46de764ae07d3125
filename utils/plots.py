"""Charts from arrays: curves, confusion matrix, training history, label statistics, accuracy over sizes.

Each function writes one PNG or JPEG file atomically. Figures are drawn on their own canvas: no window system,
no state shared with the caller's matplotlib, no font except matplotlib's own. Imports no torch, so that the
process of `engine.evaluate.chart_process` starts quickly.
"""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from utils.errors import DataError
from utils.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Names = Mapping[int, str]

DPI = 200
LEGEND_CLASSES = 20  # with more classes, lines of classes are gray and unlabeled
MATRIX_NUMBERS = 30  # with more classes, cells show no values
MATRIX_NAMES = 99  # with more classes, axes show no names
DRAWN_BOXES = 1000
MEAN_COLOR, GRAY, SMOOTH_COLOR = "tab:blue", "0.75", "tab:orange"


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """Return an empty figure (size in inches) on the Agg canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path, dpi: int = DPI) -> None:
    """Write the figure as PNG or JPEG, by the suffix."""
    from PIL import Image

    figure.set_dpi(dpi)
    with _no_glyph_warnings():
        figure.canvas.draw()  # once; `savefig` draws twice
    data = io.BytesIO()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])  # type: ignore[attr-defined]
    image.save(data, "PNG" if Path(path).suffix == ".png" else "JPEG", compress_level=1, quality=90)
    with atomic_path(path) as part:
        part.write_bytes(data.getvalue())


@contextmanager
def _no_glyph_warnings() -> Iterator[None]:
    """Suppress the warnings about glyphs that the font lacks; they are drawn as boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _name(names: Names, number: int) -> str:
    """Return a class name that matplotlib shows literally: `$` escaped, a leading `_` visible."""
    text = str(names.get(number, number)).replace("$", r"\$")
    return " " + text if text.startswith("_") else text


# ---- curves of an evaluation ----------------------------------------------------------------------------------------


def plot_precision_recall(
    path: str | Path, recall: np.ndarray, precision: np.ndarray, ap50: np.ndarray, classes: Sequence[int], names: Names
) -> None:
    """Plot precision over recall at IoU 0.5.

    Args:
        path: file to write.
        recall: (k,) in ascending order.
        precision: (nc, k) precision of each class.
        ap50: (nc,) average precision at IoU 0.5.
        classes: nc class numbers.
        names: class names by number.
    """
    figure = new_figure(9, 6, None)
    axes = figure.add_subplot()
    labels = [f"{_name(names, c)} {value:.3f}" for c, value in zip(classes, ap50)]
    mean = f"all classes {np.mean(ap50) if len(ap50) else 0:.3f} mAP@0.5"
    _class_lines(axes, recall, precision, labels, mean)
    _unit_axes(axes, "Recall", "Precision", "Precision-recall curve")
    save_figure(figure, path)


def plot_confidence_curve(
    path: str | Path,
    confidence: np.ndarray,
    values: np.ndarray,
    mean: np.ndarray,
    quantity: str,
    classes: Sequence[int],
    names: Names,
) -> None:
    """Plot precision, recall or F1 over the confidence threshold.

    Args:
        path: file to write.
        confidence: (k,) thresholds.
        values: (nc, k) quantity of each class.
        mean: (k,) smoothed mean of the quantity; its maximum is shown in the legend.
        quantity: name of the quantity, for the axis.
        classes: nc class numbers.
        names: class names by number.
    """
    figure = new_figure(9, 6, None)
    axes = figure.add_subplot()
    best = int(mean.argmax())
    labels = [_name(names, c) for c in classes]
    text = f"all classes {mean[best]:.2f} at {confidence[best]:.3f}"
    _class_lines(axes, confidence, values, labels, text)
    _unit_axes(axes, "Confidence", quantity, f"{quantity}-confidence curve")
    save_figure(figure, path)


def _class_lines(axes: Axes, x: np.ndarray, lines: np.ndarray, labels: Sequence[str], mean_label: str) -> None:
    """Draw a thin line per class (named if few), a thick one for the mean, and a legend beside the plot."""
    few = len(lines) <= LEGEND_CLASSES
    for k, (line, label) in enumerate(zip(lines, labels)):
        color = f"C{k % 10}" if few else GRAY
        axes.plot(x, line, "--" if few and k >= 10 else "-", linewidth=1, color=color, label=label if few else None)
    mean = lines.mean(0) if len(lines) else np.zeros_like(x)
    axes.plot(x, mean, linewidth=3, color=MEAN_COLOR if not few else "black", label=mean_label)
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    # A constrained layout would measure every tick twice, which takes longer than drawing them.
    with _no_glyph_warnings():
        room = legend.get_window_extent().width / axes.figure.bbox.width
    axes.set_position((0.07, 0.08, max(0.9 - room, 0.2), 0.86))


def _unit_axes(axes: Axes, x: str, y: str, title: str) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel=x, ylabel=y, title=title)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)


def plot_confusion_matrix(path: str | Path, matrix: np.ndarray, names: Names, normalize: bool = True) -> None:
    """Plot a confusion matrix as a heat map; empty cells are blank.

    Args:
        path: file to write.
        matrix: (nc + 1, nc + 1) counts; rows predicted, columns true, background last.
        names: class names by number.
        normalize: show fractions of the column sums instead of counts.
    """
    count = len(matrix)
    shown = matrix / np.maximum(matrix.sum(0), 1e-9) if normalize else matrix
    size = min(max(5.5, 3 + 0.45 * count), 16)
    figure = new_figure(size * 1.15, size)
    axes = figure.add_subplot()
    image = axes.imshow(np.where(shown < 0.005, np.nan, shown), cmap="Blues", vmin=0, vmax=None if shown.any() else 1)
    figure.colorbar(image, ax=axes, shrink=0.8)
    axes.set(
        xlabel="True", ylabel="Predicted", title="Confusion matrix" + (" (normalized by column)" if normalize else "")
    )
    if count <= MATRIX_NAMES:
        labels = [*(_name(names, k) for k in range(count - 1)), "background"]
        small = 10 if count <= 20 else 6
        axes.set_xticks(range(count), labels, rotation=90, fontsize=small)
        axes.set_yticks(range(count), labels, fontsize=small)
    if count <= MATRIX_NUMBERS:
        middle = np.nanmax(shown) / 2 if shown.any() else 1
        for row, column in zip(*np.nonzero(shown >= 0.005)):
            value = shown[row, column]
            text = f"{value:.2f}" if normalize else f"{value:.0f}"
            color = "white" if value > middle else "black"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=9 if count <= 12 else 6)
    axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="0.92", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    save_figure(figure, path)


# ---- training -------------------------------------------------------------------------------------------------------


def read_history(csv_path: str | Path) -> dict[str, np.ndarray]:
    """Return the columns of a results.csv by name (without the padding), (epochs,) float64 each.

    Raises:
        DataError: a file that cannot be read, is empty, or contains anything other than numbers.
    """
    try:
        with open(csv_path, newline="", encoding="utf-8") as stream:
            rows = [[cell.strip() for cell in row] for row in csv.reader(stream) if row]
        head, values = rows[0], np.array(rows[1:], np.float64).reshape(-1, len(rows[0]))
    except (OSError, IndexError, ValueError, csv.Error) as error:
        raise DataError(f"{csv_path}: cannot be read as results.csv (a header and rows of numbers): {error}") from error
    return dict(zip(head, values.T))


def plot_history(path: str | Path, csv_path: str | Path) -> None:
    """Plot losses and metrics of a training over its epochs, with a smoothed line.

    Args:
        path: file to write.
        csv_path: results.csv of the run.
    """
    history = read_history(csv_path)
    epochs = history.get("epoch", np.arange(len(next(iter(history.values())))))
    figure = new_figure(13, 6)
    grid = figure.subplots(2, 5)
    train, val = ([name for name in history if name.startswith(split)] for split in ("train/", "val/"))
    metrics = [name for name in history if name.startswith("metrics/")]
    for axes, name in zip(grid.flat, (*train[:3], *metrics[:2], *val[:3], *metrics[2:])):
        axes.set_title(name, fontsize=11)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        values = history.get(name)
        if values is None or not len(values):
            continue
        axes.plot(epochs, values, marker="." if len(values) < 60 else "", linewidth=1.6, color=MEAN_COLOR)
        if len(values) >= 10:
            axes.plot(epochs, _gaussian(values), linestyle=":", linewidth=2, color=SMOOTH_COLOR, label="smoothed")
        axes.set_ylim(bottom=0 if name.startswith("metrics") else None)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in grid[1]:
        axes.set_xlabel("epoch")
    if grid[0, 0].get_legend_handles_labels()[0]:
        grid[0, 0].legend(frameon=False)
    save_figure(figure, path)


def _gaussian(values: np.ndarray, sigma: float = 3.0) -> np.ndarray:
    """Return values (n,) smoothed with a Gaussian filter; the ends are padded with their values."""
    reach = int(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return np.convolve(np.pad(values, reach, mode="edge"), kernel / kernel.sum(), mode="valid")


def plot_labels(path: str | Path, labels: np.ndarray, names: Names) -> None:
    """Plot the labels of a dataset: instances per class, overlaid boxes, their centers and their sizes.

    Args:
        path: file to write.
        labels: (n, 5) class, normalized cxcywh.
        names: class names by number.
    """
    labels = np.asarray(labels, np.float64).reshape(-1, 5)
    figure = new_figure(10, 10)
    (bars, boxes), (centers, sizes) = figure.subplots(2, 2)
    _class_bars(bars, labels[:, 0].astype(int), names)
    _box_polygons(boxes, labels)
    for axes, columns, words in ((centers, (1, 2), ("x", "y")), (sizes, (3, 4), ("width", "height"))):
        _joint_histogram(axes, labels[:, columns[0]], labels[:, columns[1]])
        axes.set(xlabel=words[0], ylabel=words[1])
    centers.invert_yaxis()  # as in an image, the y axis points downwards
    centers.set_title("centers (normalized)", fontsize=11)
    sizes.set_title("sizes (normalized)", fontsize=11)
    save_figure(figure, path)


def plot_label_correlogram(path: str | Path, labels: np.ndarray) -> None:
    """Plot the distributions of box centers and sizes, and the joint distribution of each pair.

    Args:
        path: file to write.
        labels: (n, 5) class, normalized cxcywh.
    """
    values = np.asarray(labels, np.float64).reshape(-1, 5)[:, 1:]
    names = ("x", "y", "width", "height")
    figure = new_figure(9, 9)
    grid = figure.subplots(4, 4, sharex="col")
    for row, column in np.ndindex(4, 4):
        axes = grid[row, column]
        if column > row:
            axes.set_axis_off()
        elif column == row:
            axes.hist(values[:, row], bins=50, range=(0, 1), color=MEAN_COLOR)
            axes.set(xlim=(0, 1), yticks=[])
        else:
            _joint_histogram(axes, values[:, column], values[:, row])
        if column == 0:
            axes.set_ylabel(names[row])
        if row == 3:
            axes.set_xlabel(names[column])
    save_figure(figure, path)


def _joint_histogram(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Show how many points (n,), (n,) in [0, 1] fall into each of 50 x 50 cells; empty cells are blank."""
    counts, *_ = np.histogram2d(x, y, bins=50, range=((0, 1), (0, 1)))
    shown = np.where(counts > 0, counts, np.nan).T
    axes.imshow(shown, extent=(0, 1, 0, 1), origin="lower", cmap="viridis", aspect="equal", interpolation="nearest")


def _class_bars(axes: Axes, classes: np.ndarray, names: Names) -> None:
    count = max([len(names), *(classes[-1:] + 1), int(classes.max(initial=-1)) + 1, 1])
    axes.bar(range(count), np.bincount(classes, minlength=count), width=0.8, color=[f"C{k % 10}" for k in range(count)])
    axes.set(ylabel="instances", title=f"{len(classes)} labels")
    axes.title.set_fontsize(11)
    if count <= 30:
        axes.set_xticks(range(count), [_name(names, k) for k in range(count)], rotation=90, fontsize=10)
    else:
        axes.set_xlabel("class")


def _box_polygons(axes: Axes, labels: np.ndarray) -> None:
    """Draw the first boxes around a common center, so that their shapes can be compared."""
    from matplotlib.collections import LineCollection

    shown = labels[:DRAWN_BOXES]
    (x1, y1), (x2, y2) = 0.5 - shown[:, 3:].T / 2, 0.5 + shown[:, 3:].T / 2
    corners = np.stack((x1, y1, x2, y1, x2, y2, x1, y2, x1, y1), 1).reshape(-1, 5, 2)
    colors = [f"C{k % 10}" for k in shown[:, 0].astype(int)]
    axes.add_collection(LineCollection(list(corners), colors=colors, linewidths=0.6, alpha=0.6))
    axes.set(xlim=(0, 1), ylim=(1, 0), aspect="equal", xticks=[], yticks=[])
    axes.set_title(f"shapes of {len(corners)} boxes", fontsize=11)


# ---- study ----------------------------------------------------------------------------------------------------------


def plot_study(path: str | Path, studies: Mapping[str, np.ndarray]) -> None:
    """Plot accuracy against time per image over input sizes.

    Args:
        path: file to write.
        studies: (k, 4) by model name: input side in pixels, mAP50, mAP50-95, milliseconds per image.
    """
    figure = new_figure(8, 5.5)
    axes = figure.add_subplot()
    for k, (name, rows) in enumerate(studies.items()):
        rows = np.asarray(rows, np.float64).reshape(-1, 4)
        axes.plot(rows[:, 3], rows[:, 2], marker="o", color=f"C{k % 10}", label=_name({0: name}, 0))
        for side, _, value, time in rows:
            axes.annotate(f"{side:.0f}", (time, value), (3, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="milliseconds per image", ylabel="mAP@0.5:0.95", title="Accuracy and time over input sizes")
    axes.margins(0.08)  # room for the annotations
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    if studies:
        axes.legend(frameon=False)
    save_figure(figure, path)
