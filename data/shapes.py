"""The default dataset: drawn shapes, made on first use within seconds, without a network.

Every image has one to six shapes of known kind on a background of gradients, stripes, checks or clouds, with noise.
Color, size, rotation and place are independent of the kind; shapes may overlap, but at least 65 % of each stays visible
and at least 80 % of its box lies inside the image. Boxes enclose the part of the shape that lies in the image,
covered or not. Image i of a split is a function of (seed, split, i) alone.

The dataset is for a first training in minutes on a CPU and can be learned within a few hundred steps: saturated shapes
on paler backgrounds, most of them a fifth to half of the side, rotated by 20 degrees at most, and default kinds that
differ in how they fill their box. With any rotation, any color, and circles beside squares, a yolov5n did not
distinguish the classes after 800 steps at 160 pixels (mAP50 0.1).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from utils.errors import DataError, did_you_mean, shown
from utils.files import increment_path, is_vacant, new_folder

LOGGER = logging.getLogger(__name__)

VERSION = 2
"""Raise it whenever an image would differ: datasets drawn by an older version are then drawn again."""

MANIFEST = "shapes.json"

_MIN_VISIBLE = 0.65  # fraction of a shape that later shapes must leave uncovered
_MIN_INSIDE = 0.8  # fraction of a box that must lie inside the image
_TRIES = 30  # places tried for a shape before it is left out
_TURN = np.radians(20)  # largest rotation
_FINE = 4  # polygons are drawn at this multiple of the resolution
_SHIFT = 4  # fractional bits of polygon corners for OpenCV


@dataclass(frozen=True)
class ShapesRecipe:
    """What to draw: kinds of shapes by class number, images per split, side in pixels, seed."""

    kinds: tuple[str, ...]
    train: int = 400
    val: int = 100
    test: int = 50
    imgsz: int = 320
    seed: int = 0


def parse_shapes(value: object, names: Mapping[int, str], where: str, problems: list[str]) -> ShapesRecipe | None:
    """Read `generate:` of a dataset YAML: `shapes`, or a mapping with `kind: shapes` and the numbers of ShapesRecipe.

    Args:
        value: what the YAML holds.
        names: class number -> kind of shape.
        where: 'file:line' for messages.
        problems: mistakes are added here; with any, the result is None.
    """
    before = len(problems)
    table = {"kind": value} if isinstance(value, str) else value
    if not isinstance(table, dict) or table.get("kind") != "shapes":
        problems.append(f"{where}: generate is {shown(value)}; 'shapes' or a mapping with 'kind: shapes' is needed")
        return None
    allowed = [field.name for field in fields(ShapesRecipe) if field.name != "kinds"]
    numbers = {key: item for key, item in table.items() if key != "kind"}
    for key, item in numbers.items():
        low, high = {"imgsz": (64, 4096), "seed": (0, 2**63), "test": (0, 10**6)}.get(key, (1, 10**6))
        if key not in allowed:
            problems.append(f"{where}: generate: unknown key {shown(key)}{did_you_mean(key, allowed)}")
        elif type(item) is not int or not low <= item <= high:
            problems.append(f"{where}: generate: {key} is {shown(item)}; an integer from {low} to {high} is needed")
    problems += [
        f"{where}: generate: no shape is called {shown(name)}; there are {', '.join(_POLYGONS)}"
        for name in names.values()
        if name not in _POLYGONS
    ]
    if len(problems) > before:
        return None
    return ShapesRecipe(tuple(names[number] for number in sorted(names)), **numbers)


def ensure(root: Path, recipe: ShapesRecipe) -> None:
    """Draw the dataset unless `root` holds it already, drawn by this version with these numbers.

    Several processes may ask at once: each draws the same images beside `root`, and the first one's are kept.

    Raises:
        DataError: `root` holds something else, or cannot be written.
    """
    if _holds(root, recipe):
        return
    if not os.path.isfile(root / MANIFEST) and not is_vacant(root):
        raise DataError(f"{root}: is not empty and not a drawn dataset; move it away, or choose another 'path:'")
    try:
        LOGGER.info("drawing the shapes dataset into %s (once)", root)
        with new_folder(root) as build:
            generate(build, recipe)
            if os.path.exists(root) and not _holds(root, recipe):
                old = increment_path(root.with_name(f"{root.name}.old"))
                os.rename(root, old)
                LOGGER.warning("%s: drawn by another version or with other numbers; kept as %s", root, old)
    except OSError as error:
        if not _holds(root, recipe):  # else another process was faster
            raise DataError(f"{root}: cannot be written: {error.strerror or error}") from error


def generate(folder: Path, recipe: ShapesRecipe) -> None:
    """Draw all splits into `folder` (`images/<split>/*.jpg`, `labels/<split>/*.txt`), then the manifest.

    Args:
        folder: is made; files of the same name are overwritten.
        recipe: what to draw.
    """
    with tqdm(total=recipe.train + recipe.val + recipe.test, desc="drawing", unit="images", mininterval=0.5) as bar:
        for number, split in enumerate(("train", "val", "test")):
            (folder / "images" / split).mkdir(parents=True, exist_ok=True)
            (folder / "labels" / split).mkdir(parents=True, exist_ok=True)
            for i in range(getattr(recipe, split)):
                rng = np.random.default_rng((recipe.seed, number, i))
                image, labels = draw_scene(rng, recipe.imgsz, recipe.imgsz, recipe.kinds)
                stem = f"{split}_{i:05d}"
                _, data = cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, 92))
                data.tofile(folder / "images" / split / f"{stem}.jpg")
                rows = (f"{int(row[0])} " + " ".join(f"{v:.6f}" for v in row[1:]) + "\n" for row in labels)
                (folder / "labels" / split / f"{stem}.txt").write_text("".join(rows), encoding="utf-8")
                bar.update()
    (folder / MANIFEST).write_text(json.dumps(_manifest(recipe), indent=1) + "\n", encoding="utf-8")


def draw_scene(
    rng: np.random.Generator, height: int, width: int, kinds: Sequence[str]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Draw one image.

    Args:
        rng: source of all choices.
        height, width: pixels.
        kinds: names of shapes; their positions are the class numbers.

    Returns:
        (height, width, 3) uint8 BGR, and (n, 5) float32 labels: class, cxcywh, normalized;
        n is 1..6, later rows lie in front.
    """
    image = _background(rng, height, width)
    owner = np.zeros((height, width), np.uint8)  # number of the front shape at every pixel, 0 = background
    areas: list[int] = []
    rows: list[tuple[float, ...]] = []
    for _ in range(int(rng.choice(6, p=(0.1, 0.15, 0.2, 0.25, 0.2, 0.1))) + 1):
        kind = int(rng.integers(len(kinds)))
        for _ in range(_TRIES):
            polygon = _place(rng, kinds[kind], height, width)
            if not _inside(polygon, height, width):
                continue
            mask, (top, left), box = _mask(polygon, height, width)
            window = owner[top : top + mask.shape[0], left : left + mask.shape[1]]
            covered = mask > 127
            after = np.bincount(np.where(covered, 0, window).ravel(), minlength=len(areas) + 1)[1:]
            before = np.bincount(window.ravel(), minlength=len(areas) + 1)[1:]
            left_over = np.bincount(owner.ravel(), minlength=len(areas) + 1)[1:] - before + after
            if covered.any() and all(left_over >= _MIN_VISIBLE * np.array(areas)):
                areas.append(int(covered.sum()))
                window[covered] = len(areas)
                _paint(rng, image[top : top + mask.shape[0], left : left + mask.shape[1]], mask)
                x1, y1, x2, y2 = box
                rows.append(
                    (kind, (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
                )
                break
    noise = rng.standard_normal((height, width, 1), np.float32) * rng.uniform(1, 8)
    image = np.clip(image + noise, 0, 255)
    return image.astype(np.uint8), np.array(rows, np.float32).reshape(-1, 5)


def _holds(root: Path, recipe: ShapesRecipe) -> bool:
    try:
        found = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    folders = [root / kind / split for kind in ("images", "labels") for split in ("train", "val", "test")]
    return found == _manifest(recipe) and all(os.path.isdir(folder) for folder in folders)


def _manifest(recipe: ShapesRecipe) -> dict[str, Any]:
    return {"generator": "shapes", "version": VERSION, **asdict(recipe), "kinds": list(recipe.kinds)}


def _place(rng: np.random.Generator, kind: str, height: int, width: int) -> NDArray[np.float64]:
    """Polygon (k, 2) x, y in pixels of a shape of random size, rotation and place."""
    span = (0.18, 0.45) if rng.random() < 0.85 else (0.1, 0.18)
    size = rng.uniform(*span) * min(height, width)
    angle = rng.uniform(-_TURN, _TURN)
    stretch = np.array([1.0, rng.uniform(0.85, 1.15)])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = _POLYGONS[kind]() * stretch @ turn.T
    low, high = points.min(0), points.max(0)
    points = (points - (low + high) / 2) * (size / (high - low).max())
    return points + rng.uniform(0.02, 0.98, 2) * (width, height)


def _inside(polygon: NDArray[np.float64], height: int, width: int) -> bool:
    """Whether enough of the polygon's box lies in the image."""
    low, high = polygon.min(0), polygon.max(0)
    inner = (high.clip(0, (width, height)) - low.clip(0, (width, height))).prod()
    return bool(inner >= _MIN_INSIDE * (high - low).prod())


def _mask(
    polygon: NDArray[np.float64], height: int, width: int
) -> tuple[NDArray[np.uint8], tuple[int, int], tuple[float, float, float, float]]:
    """Fill a polygon.

    Returns:
        Coverage 0..255 (h, w) uint8 with smooth edges; (top, left) pixel of this window in the image; left, top,
        right, bottom of what lies in the image, in pixels.
    """
    left, top = (int(v) for v in np.floor(polygon.min(0)).clip(0))
    right, bottom = (int(v) for v in np.ceil(polygon.max(0) + 1).clip(None, (width, height)))
    # drawn larger and averaged: OpenCV's own smooth edges are up to a pixel too wide
    fine = np.zeros(((bottom - top) * _FINE, (right - left) * _FINE), np.uint8)
    # pixel i covers [i, i + 1) here; OpenCV puts its center at i
    corners = np.round(((polygon - (left, top)) * _FINE - 0.5) * (1 << _SHIFT)).astype(np.int32)
    cv2.fillPoly(fine, [corners], 255, cv2.LINE_8, _SHIFT)
    columns, rows = np.flatnonzero(fine.any(0)) / _FINE, np.flatnonzero(fine.any(1)) / _FINE
    box = (left + columns[0], top + rows[0], left + columns[-1] + 1 / _FINE, top + rows[-1] + 1 / _FINE)
    mask = cv2.resize(fine, (right - left, bottom - top), interpolation=cv2.INTER_AREA)
    return np.asarray(mask, np.uint8), (top, left), box


def _paint(rng: np.random.Generator, window: NDArray[np.float32], mask: NDArray[np.uint8]) -> None:
    """Blend a filling into `window` where `mask` covers it; its color differs from what is behind."""
    alpha = (mask.astype(np.float32) / 255)[..., None]
    behind = (window * alpha).sum((0, 1)) / alpha.sum()
    color = _saturated(rng)
    while np.abs(color - behind).max() < 110:
        color = _saturated(rng)
    height, width = mask.shape
    filling = np.broadcast_to(color.astype(np.float32), (height, width, 3))
    style = rng.random()
    if style < 0.4:  # shaded
        filling = filling * _ramp(rng, height, width, 0.7, 1.25)
    elif style < 0.5:  # striped
        filling = filling * np.where(_waves(rng, height, width, min(height, width) / 5) > 0, 1.0, 0.75)[..., None]
    window += alpha * (filling - window)
    if rng.random() < 0.3:  # with a dark edge
        core = cv2.erode(mask, np.ones((3, 3), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=0)
        window *= 1 - 0.6 * (alpha - core.astype(np.float32)[..., None] / 255)


def _saturated(rng: np.random.Generator) -> NDArray[np.float64]:
    """Return a color of any hue, BGR 0..255."""
    return rng.permutation(np.array([rng.uniform(0, 60), rng.uniform(0, 255), rng.uniform(190, 255)]))


def _background(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """(height, width, 3) float32 BGR 0..255."""
    first = rng.uniform(50, 205) + rng.uniform(-25, 25, 3)
    second = first + rng.choice((-1, 1)) * rng.uniform(15, 55) + rng.uniform(-15, 15, 3)
    kind = rng.integers(4)
    if kind == 0:
        blend: NDArray[Any] = _ramp(rng, height, width, 0, 1)
    elif kind == 1:  # clouds
        blend = np.sum([_clouds(rng, height, width, cells) / cells for cells in (3, 6, 12)], axis=0)
    elif kind == 2:  # stripes
        blend = 0.5 + 0.5 * _waves(rng, height, width, rng.uniform(8, 40))[..., None]
    else:  # checks
        period = rng.uniform(16, 60)
        blend = (_waves(rng, height, width, period) * _waves(rng, height, width, period) > 0)[..., None]
    image = first + (second - first) * np.asarray(blend, np.float32)
    if kind != 1 and rng.random() < 0.5:
        image += 25 * _clouds(rng, height, width, 8)
    return np.ascontiguousarray(np.clip(image, 0, 255), np.float32)


def _ramp(rng: np.random.Generator, height: int, width: int, low: float, high: float) -> NDArray[np.float32]:
    """(height, width, 1) values that rise from `low` to `high` in a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    x, y = np.cos(angle) * np.arange(width), np.sin(angle) * np.arange(height)
    plane = (x[None] + y[:, None]).astype(np.float32)
    plane -= plane.min()
    return (low + (high - low) * plane / max(float(plane.max()), 1e-6))[..., None].astype(np.float32)


def _waves(rng: np.random.Generator, height: int, width: int, period: float) -> NDArray[np.float32]:
    """(height, width) plane wave -1..1 in a random direction; `period` in pixels."""
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    step = 2 * np.pi / max(period, 2)
    x, y = np.cos(angle) * step * np.arange(width), np.sin(angle) * step * np.arange(height)
    # sin(a + b) from the sines of the two axes: height + width sines instead of height * width
    a, b = x + phase, y
    wave = np.sin(a)[None] * np.cos(b)[:, None] + np.cos(a)[None] * np.sin(b)[:, None]
    return wave.astype(np.float32)


def _clouds(rng: np.random.Generator, height: int, width: int, cells: int) -> NDArray[np.float32]:
    """(height, width, 3) smooth random values, about -1..1, with about `cells` bumps per side."""
    coarse = rng.uniform(-1, 1, (cells, cells, 3)).astype(np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.float32)


def _polygon(corners: int, radii: Sequence[float] = (1.0,)) -> NDArray[np.float64]:
    """(corners, 2) points on circles whose radii alternate as given."""
    angles = np.arange(corners) * (2 * np.pi / corners)
    radius = np.resize(np.array(radii), corners)
    return np.stack([np.sin(angles) * radius, -np.cos(angles) * radius], 1)


def _cross() -> NDArray[np.float64]:
    quarter = np.array([(0.28, 1.0), (0.28, 0.28), (1.0, 0.28)])
    turns = [np.array([[0, 1], [-1, 0]]), np.array([[-1, 0], [0, -1]]), np.array([[0, -1], [1, 0]])]
    return np.concatenate([quarter, *(quarter @ turn.T for turn in turns)])


def _ring() -> NDArray[np.float64]:
    """Return a circle and a smaller one backwards; filled by the even-odd rule this is a ring."""
    circle = _polygon(72)
    closed = np.concatenate([circle, circle[:1]])
    return np.concatenate([closed, 0.6 * closed[::-1]])


_POLYGONS: dict[str, Callable[[], NDArray[np.float64]]] = {
    "circle": lambda: _polygon(72),
    "square": lambda: _polygon(4) @ np.array([[1.0, -1.0], [1.0, 1.0]]),
    "ring": _ring,
    "triangle": lambda: _polygon(3),
    "star": lambda: _polygon(10, (1.0, 0.42)),
    "cross": _cross,
    "hexagon": lambda: _polygon(6),
    "diamond": lambda: _polygon(4) * (0.55, 1.0),
}
