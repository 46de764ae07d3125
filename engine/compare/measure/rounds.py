"""Interleaved rounds (A B C, A B C, ...) and their statistics: medians, quartiles, ranks with ties."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FEWEST_ROUNDS = 5
VISIT_S = 0.2  # seconds of a turn, which has at least one call
MOST_CALLS = 20


@dataclass(frozen=True)
class Spread:
    """A value measured several times.

    Attributes:
        middle, low, high: median and quartiles of rounds; mean, smallest and largest of seeds.
        values: one per round, or per seed.
    """

    middle: float
    low: float
    high: float
    values: tuple[float, ...] = ()

    @classmethod
    def from_plain(cls, content: Mapping[str, Any]) -> Spread:
        """Rebuild from the output of `dataclasses.asdict`, possibly read from JSON."""
        return cls(**{**content, "values": tuple(content["values"])})

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return median and quartiles (linear interpolation)."""
        low, middle, high = np.percentile(np.asarray(values, np.float64), (25, 50, 75)).tolist()
        return cls(middle, low, high, tuple(values))

    def scaled(self, factor: float) -> Spread:
        """Return the spread times a factor."""
        low, high = sorted((self.low * factor, self.high * factor))
        return Spread(self.middle * factor, low, high, tuple(v * factor for v in self.values))

    def overlaps(self, other: Spread) -> bool:
        """Return whether the ranges overlap."""
        return self.low <= other.high and other.low <= self.high


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Yield (round, name): every name once per round, always in the same order."""
    for number in range(rounds):
        for name in names:
            yield number, name


def calls_per_visit(call_s: float) -> int:
    """Return how many calls are timed per turn of a candidate whose call takes `call_s` seconds."""
    return max(1, min(MOST_CALLS, int(VISIT_S / max(call_s, 1e-9))))


def rounds_that_fit(call_s: Mapping[str, float], seconds: float, most: int) -> int:
    """Return how many rounds fit into a time.

    Args:
        call_s: seconds of a call by candidate.
        seconds: time for all candidates together.
        most: maximum number of rounds; at least `FEWEST_ROUNDS` (or `most`, if fewer) run even if they take longer.
    """
    one = sum(took * (calls_per_visit(took) + 1) for took in call_s.values())
    return max(min(most, FEWEST_ROUNDS), min(most, int(seconds / one) if one > 0 else most))


def run_rounds(
    names: Sequence[str], rounds: int, measure: Callable[[str], Mapping[str, float] | None], tick: Callable[[], object]
) -> dict[str, dict[str, Spread]]:
    """Measure in rounds.

    Args:
        names: candidates, in the order of their turns.
        rounds: number of rounds.
        measure: returns the values of one turn; None if the candidate failed, which is then skipped.
        tick: called after every turn.

    Returns:
        By candidate (without failed ones), by name of the value.
    """
    found: dict[str, list[Mapping[str, float]]] = {name: [] for name in names}
    failed: set[str] = set()
    for _, name in turns(names, rounds):
        if name not in failed:
            values = measure(name)
            if values is None:
                failed.add(name)
            else:
                found[name].append(values)
        tick()
    return {
        name: {key: Spread.of([values[key] for values in rows]) for key in rows[0]}
        for name, rows in found.items()
        if name not in failed
    }


def ranks(spreads: Mapping[str, Spread], smaller_is_better: bool = True) -> dict[str, str]:
    """Return ranks: one more than the number of candidates that are better and whose range does not overlap.

    `=` marks ties with at least one other candidate: of three in a row, each of which overlaps with the next, the first
    two are `1=` and the third, which does not overlap with the first, is `2=`.
    """

    def is_better(a: Spread, b: Spread) -> bool:
        return not a.overlaps(b) and (a.middle < b.middle) == smaller_is_better

    out: dict[str, str] = {}
    for name, spread in spreads.items():
        others = [other for key, other in spreads.items() if key != name]
        place = 1 + sum(is_better(other, spread) for other in others)
        out[name] = f"{place}=" if any(spread.overlaps(other) for other in others) else str(place)
    return out


def over_seeds(values: Sequence[float]) -> Spread:
    """Return mean, minimum and maximum over seeds."""
    return Spread(math.fsum(values) / len(values), min(values), max(values), tuple(values))


def deviation(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation; None for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
