"""Search space and starting points of a hyperparameter search."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
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
        key: its name in hyperparameter files.
        low, high: bounds, both included.
        log: logarithmic scale.
    """

    key: str
    low: float
    high: float
    log: bool = False


def from_plain(rows: Sequence[Sequence[object]]) -> tuple[SearchRow, ...]:
    """Rebuild rows from the output of `as_plain`; TypeError or ValueError for other content."""
    return tuple(SearchRow(str(key), float(low), float(high), bool(log)) for key, low, high, log in rows)  # type: ignore[arg-type]


def _rows(section: Mapping[str, Sequence[object]]) -> tuple[SearchRow, ...]:
    return from_plain([[key, *bounds[:2], bounds[2:] == ["log"]] for key, bounds in section.items()])


_SPACES = plain(load_yaml(Path(__file__).with_name("space.yaml")))
SPACE, SPACE_ADAM = _rows(_SPACES["SGD"]), _rows(_SPACES["Adam"])


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
    """Widen the bounds to include every starting point (zeros are left out on a log scale)."""
    rows = []
    for row in space:
        values = [p[row.key] for p in points if p[row.key] > 0 or not row.log]
        wide = replace(row, low=min([row.low, *values]), high=max([row.high, *values]))
        if wide != row:
            LOGGER.info("%s: bounds widened to %g ... %g, to include the starting values", row.key, wide.low, wide.high)
        rows.append(wide)
    return tuple(rows)


def inside(point: Point, space: Sequence[SearchRow]) -> Point:
    """Clip a point to the bounds."""
    return {row.key: min(max(point[row.key], row.low), row.high) for row in space}


def population(folder: str | Path, optimizer: str) -> dict[str, Point]:
    """Read the starting points from a folder of hyperparameter files (*.yaml) in alphabetical order.

    Args:
        folder: holds the files.
        optimizer: that of the trainings; files made for another one are left out, with a warning.

    Raises:
        ConfigError: no such folder, no YAML file in it, or invalid files.
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
            LOGGER.warning("%s: left out: made for %s, not %s", path, hyp.optimizer, optimizer)
            continue
        points[path.name] = point
    if problems:
        raise ConfigError("--evolve_population: " + "; ".join(problems))
    return points


def as_plain(space: Sequence[SearchRow]) -> list[list[object]]:
    """Rows as JSON can hold them."""
    return [list(astuple(row)) for row in space]


def with_values(hyp: Mapping[str, object], point: Mapping[str, float]) -> dict[str, object]:
    """All hyperparameters in their order, those of `point` replaced."""
    return {key: point.get(key, value) for key, value in hyp.items()}
