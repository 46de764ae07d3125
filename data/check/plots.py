"""Figure of `data.check`: classes, box sizes against anchors and strides, positions and counts of boxes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data.check.statistics import SplitStatistics
from utils.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED = 30  # with more classes the axis shows numbers
STRIDES = (8, 16, 32)
COLORS = {"train": "tab:blue", "val": "tab:orange", "test": "tab:green"}
GRID = "0.92"
STEPS: dict[str, Any] = {"histtype": "step", "linewidth": 1.6}


def draw(
    path: str | Path,
    splits: Sequence[SplitStatistics],
    names: Mapping[int, str],
    anchors: NDArray[np.float64] | None,
    imgsz: int,
) -> None:
    """Write the image atomically.

    Args:
        path: .png file.
        splits: statistics of each split.
        names: class names by number.
        anchors: (levels, anchors per level, 2) in pixels, or None.
        imgsz: longer side of the network's input.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 9.5), layout="constrained")
    FigureCanvasAgg(figure)
    (bars, scatter, sizes), (centers, numbers, shapes) = figure.subplots(2, 3)
    _classes(bars, splits, names)
    _scatter(scatter, splits, anchors, imgsz)
    _sizes(sizes, splits, imgsz)
    _centers(centers, splits[0])
    _numbers(numbers, splits)
    _shapes(shapes, splits)
    with atomic_path(path) as part, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(part, dpi=110)


def _classes(axes: Axes, splits: Sequence[SplitStatistics], names: Mapping[int, str]) -> None:
    count, width = len(names), 0.8 / len(splits)
    for k, split in enumerate(splits):
        share = 100 * split.boxes / max(split.boxes.sum(), 1)
        places = np.arange(count) + (k - (len(splits) - 1) / 2) * width
        axes.bar(places, share, width, color=_color(split, k), label=f"{split.name} ({split.boxes.sum()} boxes)")
    axes.set(title="classes", ylabel="boxes, %")
    if count <= NAMED:
        texts = [" " + names[i].replace("$", r"\$") for i in range(count)]
        axes.set_xticks(range(count), texts, rotation=90 if count > 6 else 0)
    axes.legend(frameon=False)


def _scatter(axes: Axes, splits: Sequence[SplitStatistics], anchors: NDArray[np.float64] | None, imgsz: int) -> None:
    """Plot width and height of boxes; anchors as crosses, the finest stride as the area that a cell covers."""
    for k, split in enumerate(splits):
        wh = split.sizes[:: max(len(split.sizes) // 3000, 1)]
        axes.plot(*np.maximum(wh, 1).T, ".", markersize=3, alpha=0.35, color=_color(split, k), label=split.name)
    if anchors is not None:
        for level, pairs in enumerate(anchors):
            axes.plot(
                *pairs.T, "x+^s*"[level % 5], color="black", markersize=7, label=f"anchors, stride {8 * 2**level}"
            )
    axes.axvspan(1, STRIDES[0], color="tab:red", alpha=0.08)
    axes.axhspan(1, STRIDES[0], color="tab:red", alpha=0.08, label=f"side below {STRIDES[0]} pixels")
    axes.set(xscale="log", yscale="log", xlim=(1, 1.2 * imgsz), ylim=(1, 1.2 * imgsz))
    axes.set(title=f"sizes at {imgsz} pixels", xlabel="width", ylabel="height")
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _sizes(axes: Axes, splits: Sequence[SplitStatistics], imgsz: int) -> None:
    edges = np.geomspace(1, imgsz, 40).tolist()
    for k, split in enumerate(splits):
        if len(split.sizes):
            shorter = np.maximum(split.sizes.min(1), 1)
            weights = np.full(len(shorter), 100 / len(shorter))
            axes.hist(shorter, edges, weights=weights, color=_color(split, k), label=split.name, **STEPS)
    for stride in STRIDES:
        axes.axvline(stride, color="0.5", linestyle=":")
        axes.annotate(f"stride {stride}", (stride, 1), (2, -10), xycoords=("data", "axes fraction"),
                      textcoords="offset points", fontsize=8, rotation=90, va="top")  # fmt: skip
    axes.set_ylim(top=1.2 * axes.get_ylim()[1])  # room for the labels
    axes.set(xscale="log", title="shorter side of boxes", xlabel=f"pixels at {imgsz}", ylabel="boxes, %")
    axes.legend(frameon=False)


def _centers(axes: Axes, split: SplitStatistics) -> None:
    labels = np.concatenate([np.zeros((0, 5), np.float32), *(record.labels for record in split.records)])
    counts, *_ = np.histogram2d(labels[:, 2], labels[:, 1], bins=40, range=((0, 1), (0, 1)))
    axes.imshow(counts, extent=(0, 1, 1, 0), cmap="viridis", interpolation="nearest")
    axes.set(title=f"centers of boxes, {split.name}", xlabel="x (normalized)", ylabel="y")


def _numbers(axes: Axes, splits: Sequence[SplitStatistics]) -> None:
    counts = [np.array([len(record.labels) for record in split.records]) for split in splits]
    top = int(np.quantile(np.concatenate(counts), 0.995)) + 1
    edges = np.linspace(-0.5, top + 0.5, min(top + 2, 42)).tolist()
    for k, (split, values) in enumerate(zip(splits, counts)):
        weights = np.full(len(values), 100 / len(values))
        clipped = values.clip(max=top)
        axes.hist(clipped, edges, weights=weights, color=_color(split, k), label=split.name, **STEPS)
    axes.set(title="boxes per image", xlabel="boxes (the last bar: that many or more)", ylabel="images, %")
    axes.legend(frameon=False)


def _shapes(axes: Axes, splits: Sequence[SplitStatistics]) -> None:
    for k, split in enumerate(splits):
        wh = np.array([(record.width, record.height) for record in split.records])
        label = f"{split.name} ({len(wh)})"
        axes.plot(*wh.T, ".", markersize=6, alpha=0.4, color=_color(split, k), label=label)
    axes.set(title="images", xlabel="width in pixels", ylabel="height in pixels", xlim=(0, None), ylim=(0, None))
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)


def _color(split: SplitStatistics, k: int) -> str:
    return COLORS.get(split.name, f"C{k}")
