"""Stage 3: latency and training speed of all candidates, measured in interleaved rounds."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from engine.compare.config import PYTORCH, CompareConfig
from engine.compare.context import Context, safe
from engine.compare.measure.machine import MB, clocks
from engine.compare.measure.rounds import Spread, calls_per_visit, rounds_that_fit, run_rounds
from engine.compare.results import DEPLOYED, STEP, TRAINING, CandidateResult, Latency, measured
from engine.compare.stages import BAR, TRANSIENT
from engine.compare.store import digest
from engine.compare.worker.process import JobFailedError, Worker

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """What is measured of all candidates in the same rounds.

    Attributes:
        runtime: key of `RUNTIMES`.
        form: DEPLOYED, TRAINING (inference of the form that is trained), or STEP (a training step).
        batch: images per call.
    """

    runtime: str
    form: str
    batch: int

    def __str__(self) -> str:
        what = "training step" if self.form == STEP else f"{self.runtime}, {self.form} form"
        return f"{what}, batch {self.batch}"


def groups_of_phases(config: CompareConfig, step_batch: int) -> list[list[Phase]]:
    """Return the phases in groups that share the candidates' processes: one group per runtime.

    Re-parameterized models come first, small batches before large ones, so that the peak of memory is that of the
    phase.
    """
    batches = sorted(config.batch)
    groups = [[Phase(name, DEPLOYED, batch) for batch in batches] for name in config.runtimes]
    step = Phase(PYTORCH, STEP, step_batch)
    if PYTORCH not in config.runtimes:
        return [*groups, [step]]
    groups[config.runtimes.index(PYTORCH)] += [*(Phase(PYTORCH, TRAINING, batch) for batch in batches), step]
    return groups


@dataclass
class PhaseEntry:
    """A candidate in a phase.

    Attributes:
        row: the candidate.
        file: checkpoint or exported file that is run.
        export: size and verification of the file.
        opened: what opening returned: `took`, `peak_mb`, ...; None before.
        failure: why it was not measured.
    """

    row: CandidateResult
    file: str = ""
    export: Mapping[str, Any] = field(default_factory=dict)
    opened: dict[str, Any] | None = None
    failure: JobFailedError | None = None

    def result(self, spreads: Mapping[str, Spread] | None) -> dict[str, Any]:
        """Return the plain values to store."""
        if spreads is None or self.opened is None:
            return {"failure": str(self.failure)}
        memory = {k: v for k, v in self.opened.items() if k in ("side", "peak_mb", "baseline_mb")}
        return {**self.export, **memory, "times": {name: asdict(spread) for name, spread in spreads.items()}}


class Speed:
    """Measure phase by phase; stored phases are not measured again.

    Args:
        context: of the comparison.
        rows: the candidates; latencies and training speed are added to them.
    """

    def __init__(self, context: Context, rows: Sequence[CandidateResult]) -> None:
        self.context, self.rows = context, measured(rows)
        self.conditions: list[dict[str, Any]] = []
        self.workers: dict[str, Worker] = {}

    def run(self) -> list[dict[str, Any]]:
        """Measure everything. Returns the conditions of each phase: rounds, calls per turn, clocks before and after."""
        try:
            for group in groups_of_phases(self.context.config, self.context.step_batch):
                missing = [phase for phase in group if not self._take_stored(phase)]
                if missing and self.rows:
                    self._measure_group(missing)
        finally:
            for folder in (self.context.exports, self.context.initial):
                shutil.rmtree(folder, ignore_errors=True)
        return self.conditions

    def _key(self, phase: Phase) -> str:
        config = self.context.config
        weights = [[row.candidate.key, row.weights_key] for row in self.rows]
        return digest([vars(phase), weights, self.context.measuring_key, config.rounds, config.seconds])

    def _take_stored(self, phase: Phase) -> bool:
        """Use stored results, which were measured in the same rounds for the same candidates."""
        stored = self.context.store.find("speed", self._key(phase))
        if stored is None:
            return False
        for row, result in zip(self.rows, stored["results"], strict=True):
            _add(row, phase, result)
        self.conditions.append({**stored["conditions"], "stored": True})
        return True

    def _measure_group(self, phases: Sequence[Phase]) -> None:
        for row in self.rows:
            if row.weights is not None and not row.weights.is_file():  # structure is stored, its checkpoint is not
                try:
                    with self.context.worker(row) as worker:
                        worker.run("initial", checkpoint=str(row.weights))
                except JobFailedError as error:
                    row.failure = error.reason
        self.rows = measured(self.rows)
        entries = {phase: self._entries(phase) for phase in phases}
        try:
            with logging_redirect_tqdm():
                for phase in phases:
                    self._measure(phase, entries[phase])
        finally:
            for worker in self.workers.values():
                worker.close()
            self.workers.clear()

    def _entries(self, phase: Phase) -> list[PhaseEntry]:
        """Return the candidates with their files, exported where the runtime needs it."""
        if phase.runtime == PYTORCH:
            return [PhaseEntry(row, str(row.weights), {"disk_mb": _size_mb(row.weights)}) for row in self.rows]
        entries = [PhaseEntry(row) for row in self.rows]
        for entry in tqdm(entries, desc=f"export: {phase.runtime}, batch {phase.batch}", bar_format=BAR):
            row, config = entry.row, self.context.config
            folder = self.context.exports / f"{safe(row.label)}-{row.weights_key}" / f"{phase.runtime}-{phase.batch}"
            with self.context.worker(row) as worker:
                try:
                    made = worker.run(
                        "export", weights=str(row.weights), folder=folder, format=phase.runtime, batch=phase.batch,
                        imgsz=config.imgsz, data=config.data,
                    )  # fmt: skip
                    entry.file, entry.export = made.pop("path"), made
                except JobFailedError as error:
                    entry.failure = error
        return entries

    def _measure(self, phase: Phase, entries: Sequence[PhaseEntry]) -> None:
        """Open, warm up, measure in rounds, close, and store the results."""
        before, config = clocks(self.context.device), self.context.config
        pending = [entry for entry in entries if entry.failure is None]
        for entry in pending:  # all processes start before the first one is waited for
            label = entry.row.label
            if label not in self.workers or not self.workers[label].is_alive:
                if label in self.workers:
                    self.workers[label].close()
                self.workers[label] = self.context.worker(entry.row)
        for entry in tqdm(pending, desc=f"warm-up: {phase}", bar_format=BAR, leave=False):
            self._open(phase, entry)
        ready = {entry.row.label: entry for entry in pending if entry.opened}
        took = {label: float(entry.opened["took"]) for label, entry in ready.items() if entry.opened}
        rounds = rounds_that_fit(took, config.seconds, config.rounds)
        calls = {label: calls_per_visit(seconds) for label, seconds in took.items()}

        def time_calls(label: str) -> Mapping[str, float] | None:
            try:
                return self.workers[label].run("visit", calls=calls[label])
            except JobFailedError as error:
                ready[label].failure = error
                return None

        with tqdm(total=rounds * len(ready), desc=str(phase), unit="turn", bar_format=BAR) as bar:
            spreads = run_rounds(list(ready), rounds, time_calls, bar.update)
        for label in spreads:
            try:
                self.workers[label].run("close")
            except JobFailedError:
                continue
        after = clocks(self.context.device)
        conditions = {"phase": str(phase), "rounds": rounds, "calls": calls, "before": before, "after": after}
        self._store(phase, entries, spreads, conditions)

    def _open(self, phase: Phase, entry: PhaseEntry) -> None:
        worker, sample = self.workers[entry.row.label], self.context.sample
        try:
            if phase.form == STEP:
                recipe = self.context.recipe(entry.row)
                entry.opened = worker.run("open_training", sample=sample, recipe=recipe, batch=phase.batch)
            else:
                entry.opened = worker.run(
                    "open_inference", weights=entry.file, sample=sample, batch=phase.batch,
                    imgsz=self.context.config.imgsz, training_form=phase.form == TRAINING,
                )  # fmt: skip
        except JobFailedError as error:
            entry.failure = error

    def _store(
        self,
        phase: Phase,
        entries: Sequence[PhaseEntry],
        spreads: Mapping[str, Mapping[str, Spread]],
        conditions: dict[str, Any],
    ) -> None:
        results = [entry.result(spreads.get(entry.row.label)) for entry in entries]
        for entry, result in zip(entries, results):
            _add(entry.row, phase, result)
            if entry.failure:
                LOGGER.warning("%s: %s: %s", entry.row.label, phase, entry.failure)
        self.conditions.append(conditions)
        if not any(entry.failure and entry.failure.kind in TRANSIENT for entry in entries):
            content = {"results": results, "conditions": conditions}
            self.context.store.save("speed", self._key(phase), content, [str(phase), [e.row.label for e in entries]])


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


def _size_mb(path: Path | None) -> float | None:
    return path.stat().st_size / MB if path is not None and path.is_file() else None
