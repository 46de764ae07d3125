"""What a hyperparameter search varies, between which bounds, and where it starts. No optuna here."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from engine.cli.config import Hyperparameters
from utils.errors import ConfigError

LOGGER = logging.getLogger(__name__)
Point = dict[str, float]


@dataclass(frozen=True)
class SearchRow:
    """One hyperparameter that is varied.

    Attributes:
        key: its name in hyperparameter files.
        low, high: bounds, both included.
        log: whether ratios count rather than differences, so that 0.001 to 0.01 is as wide as 0.01 to 0.1.
    """

    key: str
    low: float
    high: float
    log: bool = False


# Rates and gains by ratio, probabilities and strengths by difference. Not varied: iou_t (the loss does not use it),
# anchors (auto-anchor fits them), and nominal_batch, clip_norm and optimizer, which belong to machine and recipe.
SPACE: tuple[SearchRow, ...] = (
    SearchRow("lr0", 1e-3, 0.1, log=True),
    SearchRow("lrf", 0.01, 1.0, log=True),
    SearchRow("momentum", 0.6, 0.98),
    SearchRow("weight_decay", 1e-5, 5e-3, log=True),
    SearchRow("warmup_epochs", 0.0, 5.0),
    SearchRow("warmup_momentum", 0.0, 0.95),
    SearchRow("warmup_bias_lr", 0.0, 0.2),
    SearchRow("box", 0.02, 0.2, log=True),
    SearchRow("cls", 0.1, 4.0, log=True),
    SearchRow("cls_pw", 0.5, 2.0, log=True),
    SearchRow("obj", 0.2, 4.0, log=True),
    SearchRow("obj_pw", 0.5, 2.0, log=True),
    SearchRow("anchor_t", 2.0, 8.0, log=True),
    SearchRow("fl_gamma", 0.0, 2.0),
    SearchRow("hsv_h", 0.0, 0.1),
    SearchRow("hsv_s", 0.0, 0.9),
    SearchRow("hsv_v", 0.0, 0.9),
    SearchRow("degrees", 0.0, 45.0),
    SearchRow("translate", 0.0, 0.5),  # at a half, the middle of the image can lie on its edge
    SearchRow("scale", 0.0, 0.9),
    SearchRow("shear", 0.0, 10.0),
    SearchRow("perspective", 0.0, 0.001),
    SearchRow("flipud", 0.0, 1.0),
    SearchRow("fliplr", 0.0, 1.0),
    SearchRow("mosaic", 0.0, 1.0),
    SearchRow("mixup", 0.0, 1.0),
    SearchRow("copy_paste", 0.0, 1.0),  # without effect unless labels are polygons
)
# In place of the rows of SPACE: steps of Adam and AdamW are of the size of the rate, whatever the gradient.
SPACE_ADAM: tuple[SearchRow, ...] = (
    SearchRow("lr0", 1e-5, 0.01, log=True),
    SearchRow("weight_decay", 1e-5, 0.1, log=True),
    SearchRow("warmup_bias_lr", 0.0, 0.02),
)


def space_for(optimizer: str) -> tuple[SearchRow, ...]:
    """Return the search space for an optimizer."""
    other = {row.key: row for row in SPACE_ADAM} if optimizer.startswith("Adam") else {}
    return tuple(other.get(row.key, row) for row in SPACE)


def point_of(hyp: Hyperparameters, where: str) -> Point:
    """Return the varied hyperparameters.

    Raises:
        ConfigError: a value that is not finite.
    """
    values = hyp.to_dict()
    point = {row.key: float(values[row.key]) for row in SPACE}
    bad = [key for key, value in point.items() if not math.isfinite(value)]
    if bad:
        raise ConfigError(f"{where}: {', '.join(bad)}: a finite number is needed to start a hyperparameter search from")
    return point


def widened(points: Sequence[Point], space: Sequence[SearchRow]) -> tuple[SearchRow, ...]:
    """Widen the bounds to include every starting point (zeros have no place on a log scale and are left out)."""
    rows = []
    for row in space:
        values = [p[row.key] for p in points if p[row.key] > 0 or not row.log]
        wide = replace(row, low=min([row.low, *values]), high=max([row.high, *values]))
        if wide != row:
            LOGGER.info("%s: searched from %g to %g, which holds the starting values", row.key, wide.low, wide.high)
        rows.append(wide)
    return tuple(rows)


def inside(point: Point, space: Sequence[SearchRow]) -> Point:
    """Clip a point to the bounds."""
    return {row.key: min(max(point[row.key], row.low), row.high) for row in space}


def population(folder: str | Path, optimizer: str) -> dict[str, Point]:
    """Read the starting points from a folder of hyperparameter files (*.yaml) in alphabetical order.

    Args:
        folder: where they are.
        optimizer: that of the trainings; files made for another one are left out, with a warning.

    Raises:
        ConfigError: no such folder, no file in it, or files that hold something else.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"--evolve_population {folder}: no such folder; give one with hyperparameter files (*.yaml)")
    files = sorted(p for p in folder.iterdir() if p.suffix in (".yaml", ".yml") and not p.name.startswith("."))
    if not files:
        raise ConfigError(f"--evolve_population {folder}: holds no *.yaml file")
    points, problems = {}, []
    for path in files:
        try:
            hyp = Hyperparameters.from_yaml(path)
            point = point_of(hyp, str(path))
        except ConfigError as error:
            problems.append(str(error))
            continue
        if hyp.optimizer not in (None, optimizer):
            LOGGER.warning("%s: left out, since it is made for %s, not %s", path, hyp.optimizer, optimizer)
            continue
        points[path.name] = point
    if problems:
        raise ConfigError("--evolve_population: " + "; ".join(problems))
    return points


def as_plain(space: Sequence[SearchRow]) -> list[list[object]]:
    """Rows as JSON can hold them."""
    return [list(astuple(row)) for row in space]


def from_plain(rows: Sequence[Sequence[object]]) -> tuple[SearchRow, ...]:
    """Rows from `as_plain`; TypeError or ValueError when they are something else."""
    return tuple(SearchRow(str(key), float(low), float(high), bool(log)) for key, low, high, log in rows)  # type: ignore[arg-type]


def with_values(hyp: Mapping[str, object], point: Mapping[str, float]) -> dict[str, object]:
    """All hyperparameters in their order, those of `point` replaced."""
    return {key: point.get(key, value) for key, value in hyp.items()}
