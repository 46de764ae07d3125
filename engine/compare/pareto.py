"""Which candidates no other one beats, which keep the limits, and which one to take. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.compare.config import CompareConfig
from engine.compare.measure.rounds import Spread
from engine.compare.results import CandidateResult, measured


@dataclass(frozen=True)
class Point:
    """What counts for the choice.

    Attributes:
        latency: milliseconds per image; None where it could not be measured.
        accuracy: mAP50-95; None where it was not measured.
        parameters_m, gflops, memory_mb: None where unknown.
    """

    latency: Spread | None
    accuracy: Spread | None
    parameters_m: float | None
    gflops: float | None = None
    memory_mb: float | None = None


@dataclass(frozen=True)
class Limits:
    """What a candidate must keep to qualify; None = no limit."""

    latency_ms: float | None = None
    parameters_m: float | None = None
    gflops: float | None = None
    memory_mb: float | None = None

    @classmethod
    def of(cls, config: CompareConfig) -> Limits:
        """Those of the options."""
        return cls(config.max_latency_ms, config.max_params_m, config.max_gflops, config.max_memory_mb)

    def texts(self) -> list[str]:
        """Each limit in words."""
        units = {"latency_ms": "ms", "parameters_m": "M parameters", "gflops": "GFLOPs", "memory_mb": "MB"}
        return [f"at most {value:g} {units[name]}" for name, value in vars(self).items() if value is not None]


@dataclass(frozen=True)
class Pick:
    """The candidate to take.

    Attributes:
        label: its name; None when none qualifies.
        reason: one sentence.
        misses: by candidate what keeps it from qualifying; empty for those that qualify.
    """

    label: str | None
    reason: str
    misses: Mapping[str, tuple[str, ...]]


def points_of(rows: Sequence[CandidateResult], runtime: str, batch: int) -> dict[str, Point]:
    """Return the compared values of each measured candidate.

    Args:
        rows: of the comparison.
        runtime, batch: whose latency counts.
    """
    out = {}
    for row in measured(rows):
        latency = row.latency(runtime, batch)
        out[row.label] = Point(
            latency.total if latency else None,
            row.accuracy.figure("map") if row.accuracy else None,
            row.parameters_m,
            row.structure["gflops"] if row.structure else None,
            latency.peak_mb if latency else None,
        )
    return out


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Candidates that no other one beats, by rising cost.

    Args:
        points: (cost, value); one beats another when it costs no more and is worth no less, and differs in one of them.
    """
    kept = []
    for name, (cost, value) in points.items():
        beaten = any(
            c <= cost and v >= value and (c, v) != (cost, value) for other, (c, v) in points.items() if other != name
        )
        if not beaten:
            kept.append(name)
    return sorted(kept, key=lambda name: points[name])


def misses(point: Point, limits: Limits) -> tuple[str, ...]:
    """Return the reasons why a candidate does not qualify."""
    return tuple(text for text, _ in _excesses(point, limits))


def _excesses(point: Point, limits: Limits) -> list[tuple[str, float]]:
    """(in words, as a factor on the limit)."""
    checks = (
        ("latency", point.latency.middle if point.latency else None, limits.latency_ms, "ms"),
        ("parameters", point.parameters_m, limits.parameters_m, "M"),
        ("operations", point.gflops, limits.gflops, "GFLOPs"),
        ("memory", point.memory_mb, limits.memory_mb, "MB"),
    )
    out = []
    for name, value, limit, unit in checks:
        if limit is None:
            continue
        if value is None:
            out.append((f"{name} unknown", float("inf")))
        elif value > limit:
            out.append((f"{name} {value:.4g} {unit} > {limit:g}", value / limit if limit else float("inf")))
    return out


def pick(points: Mapping[str, Point], limits: Limits) -> Pick:
    """Return the recommended candidate.

    With accuracy: the best mAP50-95 among those that qualify; where others tie with it (their ranges
    over the seeds overlap), the fastest of these; where latencies tie as well, the smallest. Without
    accuracy: the fastest that qualifies.

    Args:
        points: by candidate.
        limits: to keep.
    """
    missed = {name: misses(point, limits) for name, point in points.items()}
    qualifies = {name: point for name, point in points.items() if not missed[name]}
    if not points:
        return Pick(None, "nothing was measured", missed)
    if not qualifies:
        nearest = min(points, key=lambda name: max(factor for _, factor in _excesses(points[name], limits)))
        return Pick(None, f"no candidate keeps the limits; nearest is {nearest}: {', '.join(missed[nearest])}", missed)
    judged = {name: point for name, point in qualifies.items() if point.accuracy is not None}
    among = (
        f"of the {len(qualifies)} that keep the limits ({', '.join(limits.texts())})" if limits.texts() else "of all"
    )
    if not judged:
        name, why = _fastest(qualifies)
        reason = f"{why} {among}; no accuracy was measured, train with --epochs to know more"
        return Pick(name, reason, missed)
    name, reason = _best(judged, among)
    return Pick(name, reason, missed)


def _best(judged: Mapping[str, Point], among: str) -> tuple[str, str]:
    accuracy = {name: point.accuracy for name, point in judged.items() if point.accuracy is not None}
    best = max(accuracy, key=lambda name: accuracy[name].middle)
    top = accuracy[best]
    tied = {name: judged[name] for name, spread in accuracy.items() if spread.overlaps(top)}
    seeds = len(top.values)
    doubt = "; one training each: how much seeds differ is unknown" if seeds <= 1 else ""
    if len(tied) == 1:
        return best, f"best mAP50-95 ({top.middle:.3f}) {among}{doubt}"
    name, why = _fastest(tied)
    others = ", ".join(sorted(set(tied) - {name}))
    return name, (
        f"{why} of those with the best mAP50-95 {among}: {accuracy[name].middle:.3f} is a tie with {others} "
        f"by {seeds} seeds"
    )


def _fastest(points: Mapping[str, Point]) -> tuple[str, str]:
    timed = {name: point.latency for name, point in points.items() if point.latency is not None}
    if not timed:
        return min(points, key=lambda name: points[name].parameters_m or float("inf")), "smallest"
    first = min(timed, key=lambda name: timed[name].middle)
    tied = [name for name, spread in timed.items() if spread.overlaps(timed[first])]
    name = min(tied, key=lambda name: points[name].parameters_m or float("inf"))
    why = "fastest" if len(tied) == 1 else "smallest of the fastest"
    return name, f"{why} ({timed[name].middle:.4g} ms per image)"
