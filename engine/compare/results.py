"""Measured values of a candidate, and their conversion to JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.compare.candidates import Candidate
from engine.compare.measure.detector import STAGES, STEP, TOTAL
from engine.compare.measure.rounds import Spread, deviation, over_seeds

DEPLOYED, TRAINING = "deployed", "training"  # forms in which latency is measured
FORM_NAMES = {DEPLOYED: "re-parameterized model", TRAINING: "training form"}
AREAS = ("small", "medium", "large")
METRICS = ("map50", "map", "precision", "recall")


@dataclass(frozen=True)
class Latency:
    """Latency of a candidate in one form and runtime.

    Attributes:
        runtime: key of `RUNTIMES`.
        form: DEPLOYED or TRAINING.
        batch: images per call.
        side: input side in pixels.
        times: milliseconds per image by stage, and `total`.
        peak_mb: PyTorch's allocator on CUDA, the peak of a fresh process on a CPU.
        baseline_mb: resident memory before the model was built (CPU).
        disk_mb: size of the file that was run.
        verification: largest differences of the exported file from the model (pixels, confidence).
    """

    runtime: str
    form: str
    batch: int
    side: int
    times: Mapping[str, Spread]
    peak_mb: float
    baseline_mb: float | None = None
    disk_mb: float | None = None
    verification: Mapping[str, float | None] | None = None

    @property
    def total(self) -> Spread:
        """Milliseconds per image, all stages."""
        return self.times[TOTAL]


@dataclass(frozen=True)
class Accuracy:
    """Validation of a candidate's trainings.

    Attributes:
        seeds: seeds of the trainings; None for a given checkpoint.
        results: one per training, see `engine.compare.worker.jobs.CandidateJobs.validate`.
    """

    seeds: tuple[int, ...] | None
    results: tuple[Mapping[str, Any], ...]

    def metric(self, name: str) -> Spread:
        """Return one of `METRICS` over the trainings."""
        return over_seeds([float(result[name]) for result in self.results])

    @property
    def has_interval(self) -> bool:
        """Whether a range of mAP50-95 is known: from several seeds, or from resampled validation images."""
        return len(self.results) > 1 or all(result["bootstrap"] for result in self.results)

    def map_range(self) -> Spread:
        """Return mAP50-95 with a range that includes all seeds and the 95 % bootstrap interval of their mean."""
        seeds = self.metric("map")
        bootstrap = [result["bootstrap"] for result in self.results]
        if not all(bootstrap):
            return seeds
        low, high = np.percentile(np.mean(bootstrap, axis=0), (2.5, 97.5)).tolist()
        return Spread(seeds.middle, min(low, seeds.low), max(high, seeds.high), seeds.values)

    def area(self, name: str) -> Spread | None:
        """Return mAP50-95 of small, medium or large objects; None without objects or COCO metrics."""
        values = [result["areas"][name] for result in self.results]
        return None if any(v is None for v in values) else over_seeds([float(v) for v in values])

    def classes(self) -> dict[str, Spread]:
        """Return mAP50-95 by class name."""
        names = self.results[0]["classes"]
        return {name: over_seeds([r["classes"][name]["map"] for r in self.results]) for name in names}

    def to_plain(self) -> dict[str, Any]:
        """Return plain values for JSON, with means and deviations."""
        found = {name: self.metric(name) for name in METRICS}
        summary = {name: {"mean": x.middle, "deviation": deviation(x.values)} for name, x in found.items()}
        results = [{name: value for name, value in result.items() if name != "samples"} for result in self.results]
        return {"seeds": self.seeds, "results": results, **summary}


@dataclass
class CandidateResult:
    """One candidate, completed stage by stage.

    Attributes:
        candidate: measured candidate.
        weights: checkpoint whose speed is measured: trained, given, or with random weights.
        weights_key: identifies it in keys of stored results.
        structure: see `engine.compare.worker.jobs.CandidateJobs.structure`.
        training_memory: see `open_training` of `engine.compare.worker.jobs.CandidateJobs`.
        training_fits: False when a training step ran out of memory.
        latencies: latencies by runtime, form and batch.
        step: milliseconds per image of a training step.
        accuracy: None where nothing was trained or validated.
        failure: reason of a failure; None for a candidate that was measured.
        notes: parts that could not be measured, with the reason.
    """

    candidate: Candidate
    weights: Path | None = None
    weights_key: str = ""
    structure: dict[str, Any] | None = None
    training_memory: dict[str, Any] | None = None
    training_fits: bool = True
    latencies: list[Latency] = field(default_factory=list)
    step: Spread | None = None
    accuracy: Accuracy | None = None
    failure: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Name of the candidate."""
        return self.candidate.label

    def latency(self, runtime: str, batch: int, form: str = DEPLOYED) -> Latency | None:
        """Return the measurement, or None."""
        key = (runtime, batch, form)
        return next((x for x in self.latencies if (x.runtime, x.batch, x.form) == key), None)

    @property
    def parameters_m(self) -> float | None:
        """Millions of parameters of the training form."""
        return self.structure["parameters"] / 1e6 if self.structure else None

    @property
    def images_per_s(self) -> Spread | None:
        """Images per second of training (without the loader)."""
        if self.step is None:
            return None
        low, high, values = 1000 / self.step.high, 1000 / self.step.low, self.step.values
        return Spread(1000 / self.step.middle, low, high, tuple(1000 / value for value in values))

    def to_plain(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        names = ("label", "failure", "notes", "structure", "training_memory")
        return {
            **{name: getattr(self, name) for name in names},
            **{name: getattr(self.candidate, name) for name in ("given", "backbone", "head")},
            "latencies": [asdict(latency) for latency in self.latencies],
            "training_step_ms": asdict(self.step) if self.step else None,
            "accuracy": self.accuracy.to_plain() if self.accuracy else None,
        }


def measured(rows: Sequence[CandidateResult]) -> list[CandidateResult]:
    """Return the rows without failures."""
    return [row for row in rows if row.failure is None]


__all__ = [
    "AREAS", "DEPLOYED", "FORM_NAMES", "METRICS", "STAGES", "STEP", "TOTAL", "TRAINING", "Accuracy", "CandidateResult",
    "Latency", "measured",
]  # fmt: skip
