"""Pareto front, limits and recommendation. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

from engine.compare.config import CompareConfig
from engine.compare.measure.rounds import Spread
from engine.compare.results import CandidateResult, measured
from utils.metrics import RANKING_FLOOR


@dataclass(frozen=True)
class Point:
    """Compared values of one candidate; None where not measured.

    Attributes:
        latency: milliseconds per image.
        accuracy: mAP50-95.
        parameters_m: millions of parameters.
        gflops: at `--imgsz`.
        memory_mb: peak memory of inference.
        has_interval: whether `accuracy` is a range, from several seeds or from the bootstrap.
        head: the `--head` of the candidate, or None.
    """

    latency: Spread | None
    accuracy: Spread | None
    parameters_m: float | None
    gflops: float | None = None
    memory_mb: float | None = None
    has_interval: bool = True
    head: str | None = None


LIMITED = (("latency", "ms"), ("parameters", "M"), ("operations", "GFLOPs"), ("memory", "MB"))


@dataclass(frozen=True)
class Limits:
    """Upper bounds that a candidate must keep to qualify; None = no limit."""

    latency_ms: float | None = None
    parameters_m: float | None = None
    gflops: float | None = None
    memory_mb: float | None = None

    @classmethod
    def of(cls, config: CompareConfig) -> Limits:
        """Return the limits of the options."""
        return cls(config.max_latency_ms, config.max_params_m, config.max_gflops, config.max_memory_mb)

    def __str__(self) -> str:
        found = zip(LIMITED, astuple(self))
        return ", ".join(f"{name} at most {limit:g} {unit}" for (name, unit), limit in found if limit is not None)


@dataclass(frozen=True)
class Pick:
    """The recommended candidate.

    Attributes:
        label: its name; None when no candidate can be recommended.
        reason: one sentence.
        misses: exceeded limits by candidate; empty for those that qualify.
        front: qualifying candidates on the Pareto front, fastest first.
    """

    label: str | None
    reason: str
    misses: Mapping[str, tuple[str, ...]]
    front: tuple[str, ...] = ()


def points_of(rows: Sequence[CandidateResult], runtime: str, batch: int) -> dict[str, Point]:
    """Return the compared values of each measured candidate.

    Args:
        rows: rows of the comparison.
        runtime, batch: select the latency.
    """
    points = {}
    for row in measured(rows):
        latency = row.latency(runtime, batch)
        points[row.label] = Point(
            latency.total if latency else None,
            row.accuracy.map_range() if row.accuracy else None,
            row.parameters_m,
            row.structure["gflops"] if row.structure else None,
            latency.peak_mb if latency else None,
            row.accuracy is not None and row.accuracy.has_interval,
            row.candidate.head,
        )
    return points


def unranked_reason(points: Mapping[str, Point]) -> str:
    """Return why the accuracies of these candidates cannot be ranked, or ''."""
    trained = [point for point in points.values() if point.accuracy is not None]
    if not trained:
        return "no accuracy was measured; train with --epochs to get a recommendation"
    best = max(point.accuracy.middle for point in trained if point.accuracy)
    if best < RANKING_FLOOR:
        return (
            f"not trained long enough to rank: the best mAP50-95 is {best:.3f}; below {RANKING_FLOOR:g} differences "
            "are not meaningful"
        )
    if not all(point.has_interval for point in trained):
        return "too few validation images for an interval of mAP50-95; train with at least two --seeds"
    return ""


def front(points: Mapping[str, Point]) -> list[str]:
    """Return the candidates that no other one dominates, fastest first.

    Compared are latency and mAP50-95, or latency and parameters where accuracies cannot be ranked. A candidate is
    dominated by one that is no worse in both, and better in one beyond the measured ranges.
    """
    use_accuracy = not unranked_reason(points)
    costs: dict[str, tuple[Spread, Spread]] = {}
    for name, point in points.items():
        second = point.accuracy.scaled(-1) if use_accuracy and point.accuracy else None
        if not use_accuracy and point.parameters_m is not None:
            second = Spread(point.parameters_m, point.parameters_m, point.parameters_m)
        if point.latency is not None and second is not None:
            costs[name] = point.latency, second

    def dominates(a: str, b: str) -> bool:
        pairs = list(zip(costs[a], costs[b]))
        return all(x.middle <= y.middle for x, y in pairs) and any(x.high < y.low for x, y in pairs)

    kept = [name for name in costs if not any(dominates(other, name) for other in costs)]
    return sorted(kept, key=lambda name: costs[name][0].middle)


def excesses(point: Point, limits: Limits) -> list[tuple[str, float]]:
    """Return (description, value divided by the limit) of each limit that a candidate exceeds."""
    values = (point.latency.middle if point.latency else None, point.parameters_m, point.gflops, point.memory_mb)
    exceeded = []
    for (name, unit), value, limit in zip(LIMITED, values, astuple(limits)):
        if limit is None:
            continue
        if value is None:
            exceeded.append((f"{name} unknown", float("inf")))
        elif value > limit:
            exceeded.append((f"{name} {value:.4g} {unit} > {limit:g}", value / limit if limit else float("inf")))
    return exceeded


def pick(points: Mapping[str, Point], limits: Limits) -> Pick:
    """Return the recommended candidate.

    The best mAP50-95 among those that qualify; where others tie with it (their ranges overlap), the fastest of these;
    where latencies tie as well, the smallest. No candidate is recommended where accuracies cannot be ranked, nor one
    below `RANKING_FLOOR`.

    Args:
        points: compared values by candidate.
        limits: upper bounds to keep.
    """
    missed = {name: tuple(text for text, _ in excesses(point, limits)) for name, point in points.items()}
    qualified = {name: point for name, point in points.items() if not missed[name]}
    if not points:
        return Pick(None, "no candidate was measured", missed)
    if not qualified:
        nearest = min(points, key=lambda name: max(factor for _, factor in excesses(points[name], limits)))
        return Pick(None, f"no candidate keeps the limits; nearest is {nearest}: {', '.join(missed[nearest])}", missed)
    members = tuple(front(qualified))
    problem = unranked_reason(qualified)
    if problem:
        return Pick(None, problem, missed, members)
    among = f"of the {len(qualified)} that keep the limits ({limits})" if str(limits) else "of all"
    label, reason = _most_accurate(qualified, among)
    return Pick(label, reason, missed, members)


def _most_accurate(points: Mapping[str, Point], among: str) -> tuple[str, str]:
    accuracy = {name: point.accuracy for name, point in points.items() if point.accuracy is not None}
    best = max(accuracy.values(), key=lambda spread: spread.middle)
    ranked = {name: spread for name, spread in accuracy.items() if spread.middle >= RANKING_FLOOR}
    tied = {name: points[name] for name, spread in ranked.items() if spread.overlaps(best)}
    doubt = "; one training each: the variation between seeds is not included" if len(best.values) <= 1 else ""
    if len(tied) == 1:
        (label,) = tied
        return label, f"best mAP50-95 ({best.middle:.3f} [{best.low:.3f}, {best.high:.3f}]) {among}{doubt}"
    label, why = _fastest(tied)
    others = ", ".join(sorted(set(tied) - {label}))
    found = accuracy[label]
    return label, (
        f"{why} of those with the best mAP50-95 {among}: {found.middle:.3f} [{found.low:.3f}, {found.high:.3f}] ties "
        f"with {others}{doubt}"
    )


def _fastest(points: Mapping[str, Point]) -> tuple[str, str]:
    timed = {name: point.latency for name, point in points.items() if point.latency is not None}
    if not timed:
        return min(points, key=lambda name: points[name].parameters_m or float("inf")), "smallest"
    first = min(timed.values(), key=lambda latency: latency.middle)
    tied = [name for name, latency in timed.items() if latency.overlaps(first)]
    label = min(tied, key=lambda name: points[name].parameters_m or float("inf"))
    why = "fastest" if len(tied) == 1 else "smallest of the candidates that tie for the lowest latency"
    return label, f"{why} ({timed[label].middle:.4g} ms per image)"
