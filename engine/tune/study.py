"""Study of a hyperparameter search: a SQLite file shared by several processes."""

from __future__ import annotations

import datetime
import logging
import os
import shutil
import sqlite3
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from engine.tune.space import Point, SearchRow, as_plain, from_plain
from utils.errors import ConfigError
from utils.files import newest_file

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial

LOGGER = logging.getLogger(__name__)
STUDY, FILE, LOCK = "evolve", "study.db", "study.lock"
RUNS = "runs/evolve"
HEARTBEAT, GRACE = 15, 60
"""Seconds between heartbeats of a running trial, and without one until it counts as killed."""
WAIT = 120
"""Seconds that a process waits for the study or the lock while others use it."""
MOST_TRIES = 5
"""How often an interrupted trial is started."""
PRUNE_AFTER = 5
"""Complete trials before any trial is stopped early."""


@dataclass(frozen=True)
class Plan:
    """What all trials of a study share; stored in it.

    Attributes:
        options: those of the trainings, plain values.
        hyp: hyperparameters that are not varied, and the order of all.
        space: what is varied.
        target: requested number of trials.
    """

    options: dict[str, Any]
    hyp: dict[str, Any]
    space: tuple[SearchRow, ...]
    target: int


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Silence optuna's log and its warnings about experimental features; trials are logged by this program."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


class StudyLock(FileLock):
    """A lock between processes, which ends with the process that holds it."""

    def acquire(self, *args: Any, **kwargs: Any) -> Any:
        """Wait until the lock is free and take it.

        Raises:
            ConfigError: other processes hold it for too long, or the file cannot be written.
        """
        try:
            return super().acquire(*args, **kwargs)
        except (Timeout, OSError) as error:
            raise ConfigError(f"{self.lock_file}: cannot be locked for {WAIT} s: {error}") from error


def _storage(path: Path) -> RDBStorage:
    """Open the SQLite file as Optuna storage.

    sqlite knows no row locks: with its usual transactions, two processes could take the same waiting trial. Each
    transaction therefore begins as a writing one, and waits for its turn.
    """
    from optuna.storages import RDBStorage
    from sqlalchemy import event

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(path, timeout=WAIT, isolation_level=None, check_same_thread=False)

    storage = RDBStorage(  # the path goes by `creator`, since a URL cannot hold each name that a folder may have
        f"sqlite:///{FILE}", engine_kwargs={"creator": connect}, heartbeat_interval=HEARTBEAT, grace_period=GRACE
    )
    event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return storage


def pruner(epochs: int) -> Any:
    """Return a pruner that stops trials below the median after a third of the epochs."""
    from optuna.pruners import MedianPruner

    return MedianPruner(n_startup_trials=PRUNE_AFTER, n_warmup_steps=epochs // 3)


def create(path: Path, plan: Plan, points: Mapping[str, Point]) -> Study:
    """Create a study.

    Args:
        path: file to create.
        plan: shared by all trials.
        points: tried first, in this order, by name.
    """
    import optuna

    study = optuna.create_study(
        storage=_storage(path), study_name=STUDY, direction="maximize", pruner=pruner(plan.options["epochs"])
    )
    tried: list[Point] = []
    for name, point in points.items():
        if point not in tried:
            study.enqueue_trial(point, user_attrs={"start": name})
            tried.append(point)
    study.set_user_attr("hyp", plan.hyp)
    study.set_user_attr("space", as_plain(plan.space))
    study.set_user_attr("target", plan.target)
    study.set_user_attr("options", plan.options)  # written last: it marks the study as complete
    return study


def find(text: str) -> Path:
    """Return the study.db that `--resume_evolve` names, as a file or its folder.

    Raises:
        ConfigError: there is none, it holds something else, or it cannot be written.
    """
    path = Path(text)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        newest = newest_file(RUNS, f"*/{FILE}")
        near = f"; the newest one is {newest.parent}" if newest else ""
        raise ConfigError(
            f"--resume_evolve {text}: no such study; give the folder of a hyperparameter search or its {FILE}{near}"
        )
    if not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
        raise ConfigError(f"--resume_evolve {path}: the file and its folder have to be writable")
    try:  # rw: a killed process may have left a journal to be rolled back
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, timeout=WAIT)) as connection:
            names = [row[0] for row in connection.execute("SELECT study_name FROM studies")]
    except sqlite3.Error as error:
        raise ConfigError(f"--resume_evolve {path}: is not the study of a hyperparameter search: {error}") from error
    if STUDY not in names:
        raise ConfigError(
            f"--resume_evolve {path}: is not the study of a hyperparameter search (it holds no study '{STUDY}')"
        )
    return path


def load(path: Path) -> tuple[Study, Plan]:
    """Open a study that `find` found.

    Raises:
        ConfigError: it was written by another version of optuna, or is incomplete.
    """
    import optuna

    try:
        study = optuna.load_study(study_name=STUDY, storage=_storage(path))
        kept = study.user_attrs
        plan = Plan(kept["options"], kept["hyp"], from_plain(kept["space"]), int(kept["target"]))
        study.pruner = pruner(int(plan.options["epochs"]))
    except (RuntimeError, optuna.exceptions.OptunaError) as error:  # a schema of another version, a damaged file
        raise ConfigError(f"--resume_evolve {path}: {str(error).splitlines()[0]}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"--resume_evolve {path}: is incomplete ({error}); begin a new hyperparameter search"
        ) from error
    return study, plan


def trials_of(study: Study) -> list[FrozenTrial]:
    """All trials, by number."""
    return study.get_trials(deepcopy=False)


def finished(study: Study) -> int:
    """Return the number of complete and pruned trials."""
    return sum(t.state.name in ("COMPLETE", "PRUNED") for t in trials_of(study))


def running(study: Study) -> int:
    """Return the number of running trials of all processes."""
    return sum(t.state.name == "RUNNING" for t in trials_of(study))


def own_index(study: Study) -> int:
    """Return the number of different points tried or queued: repeated trials count once."""
    return sum("again" not in t.user_attrs for t in trials_of(study))


def was_interrupted(trial: FrozenTrial) -> bool:
    """Return whether the process ended before the trial did (a trial that failed stores its error)."""
    return trial.state.name == "FAIL" and "error" not in trial.user_attrs


def revive(study: Study, folder: Path) -> None:
    """Queue interrupted trials again; the lock has to be held.

    Args:
        study: of the hyperparameter search.
        folder: of the trials; weights of interrupted trials are removed.
    """
    import optuna

    optuna.storages.fail_stale_trials(study)
    now = datetime.datetime.now()
    for trial in trials_of(study):  # killed before its first heartbeat
        begun = "folder" in trial.user_attrs
        waiting = trial.state.name == "RUNNING" and not begun
        start = trial.datetime_start
        if waiting and start is not None and (now - start).total_seconds() > GRACE + WAIT:
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    again = {t.user_attrs.get("again") for t in trials_of(study)}
    for trial in trials_of(study):
        tries = int(trial.user_attrs.get("tries", 1))
        if not was_interrupted(trial) or trial.number in again or tries >= MOST_TRIES:
            continue
        point = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        attributes = {"again": trial.number, "tries": tries + 1}
        if "start" in trial.user_attrs:
            attributes["start"] = trial.user_attrs["start"]
        study.enqueue_trial(point, user_attrs=attributes)
        shutil.rmtree(folder / f"trial{trial.number}" / "weights", ignore_errors=True)
        LOGGER.info("trial %d was interrupted: it is queued again", trial.number)
