"""The third stage: latency and training speed of all candidates, measured in interleaved rounds."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from engine.compare.config import PYTORCH, CompareConfig
from engine.compare.context import Context, safe
from engine.compare.measure.machine import MB, clocks
from engine.compare.measure.rounds import Spread, calls_per_visit, play, rounds_that_fit
from engine.compare.results import DEPLOYED, STAGES, STEP, TOTAL, TRAINING, CandidateResult, Latency, measured
from engine.compare.stages import BAR, TRANSIENT
from engine.compare.store import digest
from engine.compare.worker.process import JobFailedError, Worker

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """What is measured of all candidates in the same rounds.

    Attributes:
        runtime: key of `RUNTIMES`.
        form: DEPLOYED, TRAINING (detection by the form that is trained), or STEP (a step of training).
        batch: images per call.
    """

    runtime: str
    form: str
    batch: int

    def __str__(self) -> str:
        what = "training step" if self.form == STEP else f"{self.runtime}, {self.form} form"
        return f"{what}, batch {self.batch}"


def groups_of_phases(config: CompareConfig, step_batch: int) -> list[list[Phase]]:
    """Phases whose candidates' processes may be the same: one group per runtime.

    Re-parameterized models come first, small batches before large ones, so that the peak of memory is that of the
    phase.
    """
    batches = sorted(config.batch)
    groups = [[Phase(name, DEPLOYED, batch) for batch in batches] for name in config.runtimes]
    extra = [Phase(PYTORCH, STEP, step_batch)]
    if PYTORCH not in config.runtimes:
        return [*groups, extra]
    groups[config.runtimes.index(PYTORCH)] += [Phase(PYTORCH, TRAINING, batch) for batch in batches] + extra
    return groups


@dataclass
class Turn:
    """A candidate in a phase.

    Attributes:
        row: the candidate.
        file: what is run: checkpoint or exported file.
        about: of the export: size, verification.
        opened: what opening gave: `took`, `peak_mb` ...
        kind, reason: of its failure, if it failed.
    """

    row: CandidateResult
    file: str
    about: Mapping[str, Any]
    opened: dict[str, Any] | None = None
    kind: str = ""
    reason: str = ""

    def fail(self, error: JobFailedError) -> None:
        """Take note of a failure."""
        self.kind, self.reason = error.kind, error.reason


class Speed:
    """Measures phase by phase; what an earlier run has finished is not measured again.

    Args:
        context: of the comparison.
        rows: the candidates; latencies and training speed are added to them.
    """

    def __init__(self, context: Context, rows: Sequence[CandidateResult]) -> None:
        self.context = context
        self.rows = measured(rows)
        self.conditions: list[dict[str, Any]] = []  # per phase: rounds, calls, clocks

    def run(self) -> list[dict[str, Any]]:
        """Measure everything. Returns the conditions of each phase: rounds, calls per turn, clocks before and after."""
        try:
            for group in groups_of_phases(self.context.config, self.context.step_batch):
                missing = [phase for phase in group if not self._take_known(phase)]
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

    def _take_known(self, phase: Phase) -> bool:
        """Use what is kept: measured in the same rounds for the same candidates."""
        known = self.context.store.find("speed", self._key(phase))
        if known is None:
            return False
        for row, result in zip(self.rows, known["results"], strict=True):
            _add(row, phase, result)
        self.conditions.append({**known["conditions"], "stored": True})
        return True

    def _measure_group(self, phases: Sequence[Phase]) -> None:
        for row in self.rows:
            if row.weights is not None and not row.weights.is_file():  # known from an earlier run, which removed it
                try:
                    with self.context.worker(row) as worker:
                        worker.run("initial", checkpoint=str(row.weights))
                except JobFailedError as error:
                    row.failure = error.reason
        self.rows = measured(self.rows)
        files = {phase: self._files(phase) for phase in phases}
        with ExitStack() as stack, logging_redirect_tqdm():
            workers: dict[str, Worker] = {}
            stack.callback(_close_all, workers)
            for phase in phases:
                self._measure(phase, files[phase], workers)

    def _files(self, phase: Phase) -> list[Turn]:
        """Return what each candidate runs in a phase, exporting it first where the runtime needs it."""
        if phase.runtime == PYTORCH:
            return [Turn(row, str(row.weights), {"disk_mb": _size_mb(row.weights)}) for row in self.rows]
        turns = []
        bar = tqdm(self.rows, desc=f"export: {phase.runtime}, batch {phase.batch}", bar_format=BAR)
        for row in bar:
            bar.set_postfix_str(row.label)
            turn = Turn(row, "", {})
            folder = self.context.exports / f"{safe(row.label)}-{row.weights_key}" / f"{phase.runtime}-{phase.batch}"
            with self.context.worker(row) as worker:
                try:
                    made = worker.run(
                        "export", weights=str(row.weights), folder=str(folder), format=phase.runtime,
                        batch=phase.batch, imgsz=self.context.config.imgsz, data=self.context.config.data,
                    )  # fmt: skip
                    turn.file, turn.about = (
                        made["path"],
                        {"disk_mb": made["disk_mb"], "verification": made["verification"]},
                    )
                except JobFailedError as error:
                    turn.fail(error)
            turns.append(turn)
        return turns

    def _measure(self, phase: Phase, turns: Sequence[Turn], workers: dict[str, Worker]) -> None:
        """Open, warm up, make the rounds, close, and keep what came out."""
        before = clocks(self.context.device)
        for turn in turns:
            self._start(turn, workers)
        for turn in tqdm(turns, desc=f"warm-up: {phase}", bar_format=BAR, leave=False):
            self._open(phase, turn, workers)
        ready = {turn.row.label: turn for turn in turns if turn.opened}
        took = {label: float(turn.opened["took"]) for label, turn in ready.items() if turn.opened}
        config = self.context.config
        rounds = rounds_that_fit(took, config.seconds, config.rounds)
        calls = {label: calls_per_visit(seconds) for label, seconds in took.items()}

        def ask(label: str) -> Mapping[str, float] | None:
            try:
                return workers[label].run("visit", calls=calls[label])
            except JobFailedError as error:
                ready[label].fail(error)
                return None

        with tqdm(total=rounds * len(ready), desc=str(phase), unit="turn", bar_format=BAR) as bar:
            spreads = play(list(ready), rounds, ask, bar.update)
        for label in spreads:
            try:
                workers[label].run("close")
            except JobFailedError:
                continue
        after = clocks(self.context.device)
        conditions = {"phase": str(phase), "rounds": rounds, "calls": calls, "before": before, "after": after}
        self._finish(phase, turns, spreads, conditions)

    def _start(self, turn: Turn, workers: dict[str, Worker]) -> None:
        """Start a process for the candidate unless it has one; all are started before the first is waited for."""
        label = turn.row.label
        if turn.reason or (label in workers and workers[label].is_alive):
            return
        if label in workers:
            workers[label].close()
        workers[label] = self.context.worker(turn.row)

    def _open(self, phase: Phase, turn: Turn, workers: Mapping[str, Worker]) -> None:
        if turn.reason:
            return
        label = turn.row.label
        sample, config = self.context.sample, self.context.config
        try:
            if phase.form == STEP:
                recipe = self.context.recipe(turn.row)
                turn.opened = workers[label].run("open_training", sample=sample, recipe=recipe, batch=phase.batch)
            else:
                turn.opened = workers[label].run(
                    "open_inference", weights=turn.file, sample=sample, batch=phase.batch, imgsz=config.imgsz,
                    training_form=phase.form == TRAINING,
                )  # fmt: skip
        except JobFailedError as error:
            turn.fail(error)

    def _finish(
        self,
        phase: Phase,
        turns: Sequence[Turn],
        spreads: Mapping[str, Mapping[str, Spread]],
        conditions: dict[str, Any],
    ) -> None:
        results = [_result(turn, spreads.get(turn.row.label)) for turn in turns]
        for turn, result in zip(turns, results):
            _add(turn.row, phase, result)
            if turn.reason:
                LOGGER.warning("%s: %s: %s", turn.row.label, phase, turn.reason)
        self.conditions.append(conditions)
        if not any(turn.kind in TRANSIENT for turn in turns):
            content = {"results": results, "conditions": conditions}
            self.context.store.keep("speed", self._key(phase), content, [str(phase), [t.row.label for t in turns]])


def _result(turn: Turn, spreads: Mapping[str, Spread] | None) -> dict[str, Any]:
    """Return a turn as plain values for storage."""
    if spreads is None or turn.opened is None:
        return {"failure": turn.reason}
    times = {name: asdict(spread) for name, spread in spreads.items()}
    opened: dict[str, Any] = {k: v for k, v in turn.opened.items() if k in ("side", "peak_mb", "baseline_mb")}
    return {**turn.about, **opened, "times": times}


def _close_all(workers: Mapping[str, Worker]) -> None:
    for worker in workers.values():
        worker.close()


def _add(row: CandidateResult, phase: Phase, result: Mapping[str, Any]) -> None:
    """Put a result into the candidate's row."""
    if "failure" in result:
        row.notes.append(f"{phase}: {result['failure']}")
        return
    times = {name: Spread.from_plain(spread) for name, spread in result["times"].items()}
    if phase.form == STEP:
        row.step = times[STEP]
        return
    assert set(times) == {*STAGES, TOTAL}
    row.latencies.append(
        Latency(
            phase.runtime, phase.form, phase.batch, result["side"], times, result["peak_mb"], result.get("baseline_mb"),
            result.get("disk_mb"), result.get("verification"),
        )
    )  # fmt: skip


def _size_mb(path: Path | None) -> float | None:
    return path.stat().st_size / MB if path is not None and path.is_file() else None
