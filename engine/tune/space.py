"""Search space and starting points of a hyperparameter search."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engine.cli.config import Hyperparameters
from utils.errors import ConfigError
from utils.yaml_lines import load_yaml, plain

LOGGER = logging.getLogger(__name__)
Point = dict[str, float]


@dataclass(frozen=True)
class SearchRow:
    """One hyperparameter that is varied.

    Attributes:
        key: name in hyperparameter files.
        low, high: bounds, both included.
        log: logarithmic scale.
    """

    key: str
    low: float
    high: float
    log: bool = False


Space = tuple[SearchRow, ...]
_SECTIONS = plain(load_yaml(Path(__file__).with_name("space.yaml")))


def space_for(optimizer: str, head: str) -> Space:
    """Return the search space for an optimizer and the module name of a head."""
    rows = _SECTIONS["SGD"] | (_SECTIONS["Adam"] if optimizer.startswith("Adam") else {}) | _SECTIONS[head]
    return tuple(SearchRow(key, bounds[0], bounds[1], "log" in bounds) for key, bounds in rows.items())


def point_of(hyp: Hyperparameters, space: Space, where: str) -> Point:
    """Return the varied hyperparameters.

    Raises:
        ConfigError: a value that is not finite.
    """
    values = hyp.to_dict()
    point = {row.key: float(values[row.key]) for row in space}
    bad = [key for key, value in point.items() if not math.isfinite(value)]
    if bad:
        raise ConfigError(f"{where}: {', '.join(bad)}: a finite number is needed to start a hyperparameter search from")
    return point


def widened(points: Sequence[Point], space: Space) -> Space:
    """Widen the bounds to include every starting point (zeros are left out on a log scale)."""
    rows = []
    for row in space:
        values = [p[row.key] for p in points if p[row.key] > 0 or not row.log]
        wide = replace(row, low=min([row.low, *values]), high=max([row.high, *values]))
        if wide != row:
            LOGGER.info("%s: bounds widened to %g ... %g, to include the starting values", row.key, wide.low, wide.high)
        rows.append(wide)
    return tuple(rows)


def inside(point: Point, space: Space) -> Point:
    """Clip a point to the bounds."""
    return {row.key: min(max(point[row.key], row.low), row.high) for row in space}


def population(folder: str | Path, optimizer: str, space: Space) -> dict[str, Point]:
    """Read the starting points from a folder of hyperparameter files (*.yaml) in alphabetical order.

    Args:
        folder: contains the files.
        optimizer: optimizer of the trainings; files made for another one are skipped with a warning.
        space: search space.

    Raises:
        ConfigError: no such folder, no YAML file in it, or invalid files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"--evolve_population {folder}: no such folder; give one with hyperparameter files (*.yaml)")
    files = sorted(p for p in folder.iterdir() if p.suffix in (".yaml", ".yml") and not p.name.startswith("."))
    if not files:
        raise ConfigError(f"--evolve_population {folder}: contains no *.yaml file")
    points, problems = {}, []
    for path in files:
        try:
            hyp = Hyperparameters.from_yaml(path)
            point = point_of(hyp, space, str(path))
        except ConfigError as error:
            problems.append(str(error))
            continue
        if hyp.optimizer in (None, optimizer):
            points[path.name] = point
        else:
            LOGGER.warning("%s: left out: made for %s, not %s", path, hyp.optimizer, optimizer)
    if problems:
        raise ConfigError("--evolve_population: " + "; ".join(problems))
    return points


def with_values(hyp: Mapping[str, object], point: Mapping[str, float]) -> dict[str, object]:
    """Return all hyperparameters in their order, those of `point` replaced."""
    return {key: point.get(key, value) for key, value in hyp.items()}
