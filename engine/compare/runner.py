"""A comparison from options to report: look at each candidate, train, measure in turns, report."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from data.config import load_data_config
from engine.cli.plugins import load_plugins
from engine.compare.candidates import resolve
from engine.compare.config import CompareConfig
from engine.compare.context import Context, cache_folder
from engine.compare.measure.speed import Speed
from engine.compare.outputs import Findings, write_all
from engine.compare.pareto import Limits, Pick, pick, points_of
from engine.compare.results import CandidateResult, measured
from engine.compare.stages import look_at_all, train_all
from engine.compare.table import as_text
from engine.evaluate.outputs import run_folder
from utils.errors import ConfigError
from utils.files import make_folder

LOGGER = logging.getLogger(__name__)
SHOWN = ("Summary", "Latency", "What failed")  # on the terminal; the rest is in the files


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        folder: of the report.
        rows: one per candidate.
        pick: which one to take, and why.
    """

    folder: Path
    rows: tuple[CandidateResult, ...]
    pick: Pick


def compare(config: CompareConfig) -> Comparison:
    """Compare as the options say.

    What is finished is kept below `<project>/cache`: after an interruption the same command goes on where it was.

    Raises:
        UserError: options, names, dataset or folder that cannot be used, or no candidate that can be measured.
    """
    load_plugins(config.plugin)
    make_folder(config.project)
    data = load_data_config(config.data)
    rows = [CandidateResult(candidate) for candidate in resolve(config, data, cache_folder(config) / "specs")]
    with exclusive(cache_folder(config) / ".lock", f"--project {config.project}"):
        return _compare(Context.prepare(config, data), rows)


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
        look_at_all(context, rows)
        some_left(rows)
        train_all(context, rows)
        conditions = Speed(context, rows).run()
    except KeyboardInterrupt:
        LOGGER.warning("interrupted; finished results are kept, the same command continues from here")
        raise
    runtime, batch = config.runtimes[0], config.batch[0]
    chosen = pick(points_of(rows, runtime, batch), Limits.of(config))
    found = Findings(config, rows, chosen, context.machine, conditions, _about(context), context.step_batch)
    with run_folder(Path(config.project) / config.name, config.exist_ok) as run:
        write_all(found, run.folder)
    for table in found.tables():
        if table.title in SHOWN:
            LOGGER.info("\n%s", as_text(table))
    LOGGER.info("\n%s\nResults saved to %s (open report.html)", found.verdict(), run.final)
    return Comparison(run.final, tuple(rows), chosen)


def some_left(rows: Sequence[CandidateResult]) -> None:
    """ConfigError that gives every candidate's reason when none is left."""
    if not measured(rows):
        reasons = "; ".join(f"{row.label}: {row.failure}" for row in rows)
        raise ConfigError(f"none of the {len(rows)} candidate(s) can be measured: {reasons}")


def _about(context: Context) -> str:
    data = context.data
    return f"{data.file.name}, split '{context.config.task}', {len(data.names)} classes"
