"""A comparison from options to report: structures, trainings, speeds, report."""

from __future__ import annotations

import glob
import logging
import multiprocessing
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from data.config import load_data_config
from engine.cli.plugins import load_plugins
from engine.compare.candidates import resolve
from engine.compare.config import CompareConfig
from engine.compare.context import Context, cache_folder
from engine.compare.measure.speed import measure_speed
from engine.compare.outputs import Report, write_all
from engine.compare.pareto import Limits, Pick, pick, points_of
from engine.compare.results import CandidateResult, measured
from engine.compare.stages import measure_structures, train_all
from engine.compare.table import as_text
from engine.evaluate.outputs import run_folder
from utils.errors import ConfigError
from utils.files import make_folder, remove_partial_files

LOGGER = logging.getLogger(__name__)
SHOWN = (
    "Summary",
    "Effects of head and backbone",
    "Latency",
    "What failed",
)  # shown in the terminal; the others are in the files only


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison.

    Attributes:
        folder: folder of the report.
        rows: one per candidate.
        pick: recommended candidate and reason.
    """

    folder: Path
    rows: tuple[CandidateResult, ...] = field(repr=False)
    pick: Pick


def compare(config: CompareConfig) -> Comparison:
    """Compare the candidates.

    Finished results are stored in `<project>/cache`: after an interruption the same command continues from there.

    Raises:
        UserError: options, names, dataset or folder that cannot be used, or no candidate that can be measured.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # a worker imports the calling script
        raise ConfigError('compare.run: a script has to call it under if __name__ == "__main__":')
    load_plugins(config.plugin)
    make_folder(config.project)
    data = load_data_config(config.data)
    rows = [CandidateResult(candidate) for candidate in resolve(config, data, cache_folder(config) / "specs")]
    with exclusive(cache_folder(config) / ".lock", f"--project {config.project}"):
        _remove_partial_files(config)
        return _compare(Context.prepare(config, data), rows)


def _remove_partial_files(config: CompareConfig) -> None:
    """Remove files left by a killed comparison in the same project; the lock is held, so no other one writes there."""
    remove_partial_files(cache_folder(config))
    for folder in Path(config.project).glob(f".{glob.escape(config.name)}.????????"):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file; ConfigError when another process holds it. The lock ends with its process."""
    make_folder(path.parent)
    try:
        with FileLock(path, timeout=0):
            yield
    except Timeout as error:
        raise ConfigError(f"{what}: in use by another compare.py; wait for it, or give another --project") from error


def _compare(context: Context, rows: list[CandidateResult]) -> Comparison:
    config = context.config
    LOGGER.info("%d candidates: %s", len(rows), ", ".join(row.label for row in rows))
    try:
        measure_structures(context, rows)
        require_candidates(rows)
        train_all(context, rows)
        conditions = measure_speed(context, rows)
    except KeyboardInterrupt:
        LOGGER.warning("interrupted; finished results are kept, the same command continues from here")
        raise
    runtime, batch = config.runtimes[0], config.batch[0]
    recommended = pick(points_of(rows, runtime, batch), Limits.of(config))
    report = Report(context, rows, recommended, conditions)
    with run_folder(Path(config.project) / config.name, config.exist_ok) as run:
        write_all(report, run.folder)
    for table in report.tables():
        if table.title in SHOWN:
            LOGGER.info("\n%s", as_text(table, shutil.get_terminal_size((200, 24)).columns))
    for line in report.warnings():
        LOGGER.warning("%s", line)
    LOGGER.info("\n%s\nResults saved to %s (open report.html)", report.verdict(), run.final)
    return Comparison(run.final, tuple(rows), recommended)


def require_candidates(rows: Sequence[CandidateResult]) -> None:
    """Raise ConfigError with the reason of every candidate if all failed."""
    if not measured(rows):
        reasons = "; ".join(f"{row.label}: {row.failure}" for row in rows)
        raise ConfigError(f"none of the {len(rows)} candidate(s) can be measured: {reasons}")
