"""Effects of head and backbone on accuracy: marginal means of a full grid of candidates. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.compare.measure.rounds import Spread, over_seeds
from engine.compare.results import CandidateResult, measured


@dataclass(frozen=True)
class Effect:
    """Marginal mean of one head or backbone.

    Attributes:
        factor: `head` or `backbone`.
        level: name of the head or backbone.
        accuracy: mAP50-95, mean over the other factor; spread over seeds.
        difference: from the first level, paired by seed; None for the first level.
        gain: of a backbone: mAP50-95 of the last head minus that of the first one; None for heads.
        latency_ms: mean latency over the other factor; None where not measured.
    """

    factor: str
    level: str
    accuracy: Spread
    difference: Spread | None
    gain: Spread | None
    latency_ms: float | None


@dataclass(frozen=True)
class Effects:
    """Effects of both factors.

    Attributes:
        heads: in the order of `--head`.
        rows: heads first, then backbones.
        seeds: seeds that all candidates of the grid were trained with.
        left_out: backbones that lack an accuracy with one of the heads.
    """

    heads: tuple[str, ...]
    rows: tuple[Effect, ...]
    seeds: tuple[int, ...]
    left_out: tuple[str, ...]


def effects_of(rows: Sequence[CandidateResult], runtime: str, batch: int) -> Effects | None:
    """Return the marginal means over the backbones that were trained with every head; None without such a grid.

    Args:
        rows: rows of the comparison.
        runtime, batch: select the latency.
    """
    grid = {(row.candidate.backbone, row.candidate.head): row for row in measured(rows) if row.candidate.head}
    heads = tuple(dict.fromkeys(head for _, head in grid if head))
    names = tuple(dict.fromkeys(backbone for backbone, _ in grid))
    complete = [b for b in names if all((b, h) in grid and grid[b, h].accuracy for h in heads)]
    cells = [[grid[b, h] for h in heads] for b in complete]
    found = [[_map_by_seed(row) for row in line] for line in cells]
    seeds = tuple(sorted(set.intersection(*(set(maps) for line in found for maps in line)))) if found else ()
    if len(heads) < 2 or not seeds:
        return None
    values = np.array([[[maps[seed] for seed in seeds] for maps in line] for line in found])  # backbone, head, seed
    latencies = [[row.latency(runtime, batch) for row in line] for line in cells]
    milliseconds = np.array([[x.total.middle if x else np.nan for x in line] for line in latencies])
    gains = values[:, -1] - values[:, 0]
    effects = _of_factor("head", heads, values.mean(0), milliseconds.mean(0))
    effects += _of_factor("backbone", complete, values.mean(1), milliseconds.mean(1), gains)
    return Effects(heads, tuple(effects), seeds, tuple(b for b in names if b not in complete))


def _map_by_seed(row: CandidateResult) -> dict[int, float]:
    assert row.accuracy is not None and row.accuracy.seeds is not None, "candidates with a head are trained"
    return {seed: float(result["map"]) for seed, result in zip(row.accuracy.seeds, row.accuracy.results)}


def _of_factor(
    factor: str,
    levels: Sequence[str],
    means: NDArray[np.float64],
    milliseconds: NDArray[np.float64],
    gains: NDArray[np.float64] | None = None,
) -> list[Effect]:
    """Return the effects of the levels of a factor.

    Args:
        factor: its name.
        levels: n names.
        means: (n, seeds) mAP50-95, mean over the other factor.
        milliseconds: (n,) latency, mean over the other factor.
        gains: (n, seeds) difference between the heads.
    """
    return [
        Effect(
            factor,
            level,
            over_seeds(means[k].tolist()),
            over_seeds((means[k] - means[0]).tolist()) if k else None,
            None if gains is None else over_seeds(gains[k].tolist()),
            None if np.isnan(milliseconds[k]) else float(milliseconds[k]),
        )
        for k, level in enumerate(levels)
    ]
