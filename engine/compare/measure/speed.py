"""Stage 3: latency and training speed of all candidates, measured in interleaved rounds."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from engine.compare.config import PYTORCH, CompareConfig
from engine.compare.context import Context, safe
from engine.compare.measure.machine import MB, clocks
from engine.compare.measure.rounds import Spread, calls_per_visit, rounds_that_fit, run_rounds
from engine.compare.results import DEPLOYED, FORM_NAMES, STEP, TRAINING, CandidateResult, Latency, measured
from engine.compare.stages import BAR, TRANSIENT
from engine.compare.store import digest
from engine.compare.worker.process import JobFailedError, Worker

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """A measurement of all candidates in the same rounds.

    Attributes:
        runtime: key of `RUNTIMES`.
        form: DEPLOYED, TRAINING (inference of the form that is trained), or STEP (a training step).
        batch: images per call.
    """

    runtime: str
    form: str
    batch: int

    def __str__(self) -> str:
        what = "training step" if self.form == STEP else f"{self.runtime}, {FORM_NAMES[self.form]}"
        return f"{what}, batch {self.batch}"


def groups_of_phases(config: CompareConfig, step_batch: int) -> list[list[Phase]]:
    """Return the phases in groups that share the candidates' processes: one group per runtime and form.

    Small batches come before large ones, so that the peak memory of a process is that of the phase. (That of a training
    step is measured with the structure.)
    """
    batches, step = sorted(config.batch), Phase(PYTORCH, STEP, step_batch)
    groups = [[Phase(name, DEPLOYED, batch) for batch in batches] for name in config.runtimes]
    if PYTORCH not in config.runtimes:
        return [*groups, [step]]
    after = config.runtimes.index(PYTORCH) + 1
    return [*groups[:after], [*(Phase(PYTORCH, TRAINING, batch) for batch in batches), step], *groups[after:]]


class PhaseRun:
    """One phase: open and warm up all candidates, and measure them in rounds.

    Args:
        context: context of the comparison.
        phase: measured phase.
        workers: processes by label; those that are missing are started.

    Attributes:
        results: plain values by label, which are stored.
        is_final: False after a failure that may not occur again.
    """

    def __init__(self, context: Context, phase: Phase, workers: dict[str, Worker]) -> None:
        self.context, self.phase, self.workers = context, phase, workers
        self.results: dict[str, dict[str, Any]] = {}
        self.is_final = True

    def measure(self, rows: Sequence[CandidateResult]) -> dict[str, Any]:
        """Fill the results. Returns the conditions: rounds, calls per turn, clocks before and after."""
        files = {row.label: self._file(row) for row in rows}
        before, config = clocks(self.context.device), self.context.config
        pending = [row for row in rows if row.label not in self.results]
        for row in pending:  # all processes start before the first one is waited for
            if row.label not in self.workers:
                self.workers[row.label] = self.context.worker(row)
        opened = {
            row.label: found
            for row in tqdm(pending, desc=f"warm-up: {self.phase}", bar_format=BAR, leave=False)
            if (found := self._open(row, files[row.label].pop("path", "")))
        }
        took = {label: float(found["took"]) for label, found in opened.items()}
        rounds = rounds_that_fit(took, config.seconds, config.rounds)
        calls = {label: calls_per_visit(seconds) for label, seconds in took.items()}
        with tqdm(total=rounds * len(took), desc=str(self.phase), unit="turn", bar_format=BAR) as bar:
            spreads = run_rounds(
                list(took), rounds, lambda label: self._run(label, "visit", calls=calls[label]), bar.update
            )
        for label, times in spreads.items():
            self._run(label, "close")
            memory = {k: v for k, v in opened[label].items() if k in ("side", "peak_mb", "baseline_mb")}
            self.results[label] = {**files[label], **memory, "times": {k: asdict(x) for k, x in times.items()}}
        after = clocks(self.context.device)
        return {"phase": str(self.phase), "rounds": rounds, "calls": calls, "before": before, "after": after}

    def _file(self, row: CandidateResult) -> dict[str, Any]:
        """Return path, size and verification of the file to run; export it if the runtime needs that."""
        if self.phase.runtime == PYTORCH:
            path = row.weights
            return {"path": str(path), "disk_mb": path.stat().st_size / MB if path and path.is_file() else None}
        config, name = self.context.config, f"{safe(row.label)}-{row.weights_key}"
        folder = self.context.exports / name / f"{self.phase.runtime}-{self.phase.batch}"
        with self.context.worker(row) as worker:  # separate process: an export would count as memory of the inference
            try:
                return worker.run(
                    "export", weights=str(row.weights), folder=folder, format=self.phase.runtime,
                    batch=self.phase.batch, imgsz=config.imgsz, data=config.data,
                )  # fmt: skip
            except JobFailedError as error:
                self._fail(row.label, error)
                return {}

    def _open(self, row: CandidateResult, path: str) -> dict[str, Any] | None:
        sample, batch = self.context.sample, self.phase.batch
        if self.phase.form == STEP:
            recipe = self.context.step_recipe(row)
            return self._run(row.label, "open_training", sample=sample, recipe=recipe, batch=batch)
        return self._run(
            row.label, "open_inference", weights=path, sample=sample, batch=batch, imgsz=self.context.config.imgsz,
            training_form=self.phase.form == TRAINING,
        )  # fmt: skip

    def _run(self, label: str, job: str, **arguments: Any) -> Any:  # noqa: ANN401
        """Run a job of a candidate; None when it fails, which is then its result."""
        try:
            return self.workers[label].run(job, **arguments)
        except JobFailedError as error:
            self._fail(label, error)
            return None

    def _fail(self, label: str, error: JobFailedError) -> None:
        self.results[label] = {"failure": error.reason}
        self.is_final = self.is_final and error.kind not in TRANSIENT
        LOGGER.warning("%s: %s: %s", label, self.phase, error.reason)


def measure_speed(context: Context, rows: Sequence[CandidateResult]) -> list[dict[str, Any]]:
    """Measure phase by phase; stored phases are not measured again.

    Args:
        context: context of the comparison.
        rows: the candidates; latencies and training speed are added to them.

    Returns:
        Conditions of each phase.
    """
    conditions: list[dict[str, Any]] = []
    try:
        for group in groups_of_phases(context.config, context.step_batch):
            missing = [phase for phase in group if not _take_stored(context, phase, rows, conditions)]
            if missing:
                _write_initial(context, rows)
                _measure_group(context, missing, measured(rows), conditions)
    finally:
        for folder in (context.exports, context.initial):
            shutil.rmtree(folder, ignore_errors=True)
    return conditions


def _key(context: Context, phase: Phase, rows: Sequence[CandidateResult]) -> str:
    """Return the key of a phase: its results belong to the candidates that were measured in the same rounds."""
    weights = [[row.candidate.key, row.weights_key] for row in measured(rows)]
    return digest([vars(phase), weights, context.measuring_key, context.config.rounds, context.config.seconds])


def _take_stored(
    context: Context, phase: Phase, rows: Sequence[CandidateResult], conditions: list[dict[str, Any]]
) -> bool:
    stored = context.store.find("speed", _key(context, phase, rows))
    if stored is None:
        return False
    for row, result in zip(measured(rows), stored["results"], strict=True):
        _add(row, phase, result)
    conditions.append({**stored["conditions"], "stored": True})
    return True


def _write_initial(context: Context, rows: Sequence[CandidateResult]) -> None:
    """Write the checkpoints of candidates with a stored structure but without stored random weights."""
    for row in measured(rows):
        if row.weights is not None and not row.weights.is_file():
            try:
                with context.worker(row) as worker:
                    worker.run("write_initial", checkpoint=str(row.weights))
            except JobFailedError as error:
                row.failure = error.reason


def _measure_group(
    context: Context, phases: Sequence[Phase], rows: Sequence[CandidateResult], conditions: list[dict[str, Any]]
) -> None:
    workers: dict[str, Worker] = {}
    try:
        with logging_redirect_tqdm():
            for phase in phases if rows else ():
                run = PhaseRun(context, phase, workers)
                conditions.append(run.measure(rows))
                results = [run.results[row.label] for row in rows]
                for row, result in zip(rows, results):
                    _add(row, phase, result)
                if run.is_final:
                    content = {"results": results, "conditions": conditions[-1]}
                    about = [str(phase), [row.label for row in rows]]
                    context.store.save("speed", _key(context, phase, rows), content, about)
    finally:
        for worker in workers.values():
            worker.close()


def _add(row: CandidateResult, phase: Phase, result: Mapping[str, Any]) -> None:
    """Add a result to its candidate."""
    if "failure" in result:
        row.notes.append(f"{phase}: {result['failure']}")
        return
    times = {name: Spread.from_plain(spread) for name, spread in result["times"].items()}
    if phase.form == STEP:
        row.step = times[STEP]
    else:
        row.latencies.append(Latency(**vars(phase), **{**result, "times": times}))
