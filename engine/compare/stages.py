"""Stages 1 and 2 of a comparison: structure and memory, training and validation."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from engine.compare.context import Context, safe
from engine.compare.results import Accuracy, CandidateResult, measured
from engine.compare.store import digest
from engine.compare.worker.process import CRASH, MEMORY, JobFailedError, Worker

LOGGER = logging.getLogger(__name__)
TRANSIENT = (MEMORY, CRASH)  # failures that may not occur again: never stored
SAVING_S = 60.0  # time for an interrupted training to save its state
BAR = "{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} {elapsed}<{remaining}"


def measure_structures(context: Context, rows: Sequence[CandidateResult]) -> None:
    """Measure structure and training memory of every candidate; failed candidates are excluded from the comparison."""
    pending = [row for row in rows if not _take_stored_structure(context, row)]
    with logging_redirect_tqdm():
        for row in tqdm(pending, desc="structure and memory", bar_format=BAR, disable=not pending):
            with context.worker(row) as worker:
                try:
                    _measure_structure(context, row, worker)
                except JobFailedError as error:
                    row.failure, row.notes = error.reason, []
                    LOGGER.warning("%s: %s", row.label, error.reason)


def _take_stored_structure(context: Context, row: CandidateResult) -> bool:
    key = digest([row.candidate.key, context.measuring_key, context.step_batch])
    row.weights, row.weights_key = row.candidate.weights or context.initial / f"{safe(row.label)}-{key}.pt", key
    stored = context.store.find("structure", key)
    if stored is not None:
        row.structure, row.training_memory = stored["structure"], stored["training_memory"]
        row.notes += stored["notes"]
    return stored is not None


def _measure_structure(context: Context, row: CandidateResult, worker: Worker) -> None:
    is_final = True
    try:  # first: the peak of memory is that of the whole process
        row.training_memory = worker.run(
            "open_training", sample=context.sample, recipe=context.step_recipe(row), batch=context.step_batch
        )
    except JobFailedError as error:
        row.notes.append(f"training step of {context.step_batch}: {error.reason}")
        row.training_fits = error.kind != MEMORY
        is_final = error.kind not in TRANSIENT
    row.structure = worker.run("structure", imgsz=context.config.imgsz, checkpoint=str(row.weights))
    if is_final:
        found = {"structure": row.structure, "training_memory": row.training_memory, "notes": row.notes}
        context.store.save("structure", row.weights_key, found, row.label)


# ---- accuracy -------------------------------------------------------------------------------------------------------


def train_all(context: Context, rows: Sequence[CandidateResult]) -> None:
    """Train every candidate once per seed, and validate; checkpoints that were given are only validated.

    All candidates are trained with the first seed before any is trained with the second.
    """
    found: dict[str, list[dict[str, Any]]] = {row.label: [] for row in rows}
    jobs: list[tuple[CandidateResult, int | None]] = [(row, None) for row in measured(rows) if row.candidate.weights]
    if context.config.epochs:
        jobs += [(row, seed) for seed in context.config.seeds for row in measured(rows) if row.candidate.cfg]
    for number, (row, seed) in enumerate(jobs, 1):
        what = "validation" if seed is None else f"training, seed {seed}"
        title = f"{number}/{len(jobs)} {row.label}, {what}"
        try:
            found[row.label].append(_train_and_validate(context, row, seed, title))
        except JobFailedError as error:
            row.notes.append(f"{what}: {error.reason}")
            LOGGER.warning("%s: %s: %s", row.label, what, error.reason)
    for row in rows:
        results = found[row.label]
        if results:
            seeds = None if row.candidate.weights else tuple(r["seed"] for r in results)
            row.accuracy = Accuracy(seeds, tuple(results))
            row.weights, row.weights_key = Path(results[0]["weights"]), results[0]["key"]


def _train_and_validate(context: Context, row: CandidateResult, seed: int | None, title: str) -> dict[str, Any]:
    """Return the stored or new validation of one training, or of a given checkpoint."""
    config = context.config
    training = digest([row.candidate.key, context.training_key if seed is not None else None, seed])
    key = digest([training, context.validation_key])
    known = context.store.find("accuracy", key)
    if known is not None and Path(known["weights"]).is_file():
        LOGGER.info("%s: stored, not repeated", title)
        return known
    if seed is not None and not row.training_fits:
        raise JobFailedError(MEMORY, "skipped: a single step needs more memory than available")
    weights, scratch = str(row.candidate.weights), context.initial
    with context.worker(row) as worker:
        if seed is not None:
            scratch = context.cache / "trainings" / f"{safe(row.label)}-seed{seed}-{training}"
            weights = _train(context, row, seed, scratch, worker, title)
        options = {
            "weights": [weights], "data": config.data, "imgsz": config.imgsz, "task": config.task,
            "batch_size": config.batch_size, "workers": config.workers,
        }  # fmt: skip
        metrics = worker.run("validate", options=options, sample=context.sample, scratch=str(scratch))
    result = {**metrics, "seed": seed, "weights": weights, "key": key}
    context.store.save("accuracy", key, result, title)
    return result


def _train(context: Context, row: CandidateResult, seed: int, folder: Path, worker: Worker, title: str) -> str:
    """Train in a process, with a progress bar over the epochs. Returns the best weights."""
    if context.config.fresh and folder.exists():
        shutil.rmtree(folder)
    log, epochs = folder / "results.csv", context.config.epochs
    done = _epochs_in(log, epochs)
    if done:
        LOGGER.info("%s: continues after %d of %d epochs", title, done, epochs)
    with tqdm(initial=done, total=epochs, desc=title, unit="epoch", bar_format=BAR) as bar:

        def tick() -> None:
            bar.update(max(_epochs_in(log, epochs) - bar.n, 0))

        try:
            best = worker.run("train", tick=tick, recipe=context.recipe(row, seed), folder=str(folder))
        except KeyboardInterrupt:
            worker.stop(SAVING_S)
            raise
        tick()
    return str(best)


def _epochs_in(path: Path, limit: int) -> int:
    """Return the number of epochs in a results.csv, at most `limit`."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError:
        return 0
    return min(max(len(lines) - 1, 0), limit)
