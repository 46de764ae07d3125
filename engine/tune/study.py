"""Study of a hyperparameter search: a SQLite file shared by several processes."""

from __future__ import annotations

import datetime
import logging
import os
import shutil
import sqlite3
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from filelock import FileLock, Timeout

from engine.tune.space import Point, SearchRow, Space
from utils.errors import HIDDEN, ConfigError
from utils.files import atomic_path, newest_file, remove_partial_files

if TYPE_CHECKING:
    from filelock import AcquireReturnProxy
    from optuna.pruners import MedianPruner
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
"""Maximum number of starts of an interrupted trial."""
PRUNE_AFTER = 5
"""Complete trials before any trial is stopped early."""


@dataclass(frozen=True)
class Plan:
    """Settings that all trials of a study share; stored in it.

    Attributes:
        options: options of the trainings, plain values; passwords in URLs are hidden.
        hyp: hyperparameters that are not varied, and the order of all.
        space: search space.
        target: requested number of trials.
    """

    options: dict[str, Any]
    hyp: dict[str, Any]
    space: Space
    target: int

    def secret_options(self) -> dict[str, str]:
        """Return the options whose values hold hidden passwords: each process that joins needs them again."""
        return {name: text for name, text in self.options.items() if isinstance(text, str) and HIDDEN in text}


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

    def acquire(self, *args: Any, **kwargs: Any) -> AcquireReturnProxy[Self]:
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

    SQLite has no row locks: with its usual transactions, two processes could take the same waiting trial. Each
    transaction therefore starts as a write transaction and waits for its turn.
    """
    from optuna.storages import RDBStorage
    from sqlalchemy import event

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(path, timeout=WAIT, isolation_level=None, check_same_thread=False)

    storage = RDBStorage(  # `creator` takes the path, since a URL cannot represent every folder name
        f"sqlite:///{FILE}", engine_kwargs={"creator": connect}, heartbeat_interval=HEARTBEAT, grace_period=GRACE
    )
    event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return storage


def pruner(epochs: int) -> MedianPruner:
    """Return a pruner that stops trials below the median after a third of the epochs."""
    from optuna.pruners import MedianPruner

    return MedianPruner(n_startup_trials=PRUNE_AFTER, n_warmup_steps=epochs // 3)


def create(path: Path, plan: Plan, points: Mapping[str, Point]) -> tuple[Study, Plan]:
    """Create a study atomically and open it.

    Args:
        path: file to create.
        plan: shared by all trials.
        points: starting points by name, tried first in this order.
    """
    import optuna

    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / FILE
        storage = _storage(built)
        study = optuna.create_study(storage=storage, study_name=STUDY, direction="maximize")
        for name, point in points.items():
            study.enqueue_trial(point, user_attrs={"start": name}, skip_if_exists=True)
        space = [astuple(row) for row in plan.space]
        for key, value in {"hyp": plan.hyp, "space": space, "target": plan.target, "options": plan.options}.items():
            study.set_user_attr(key, value)
        storage.engine.dispose()
        with atomic_path(path) as part:
            shutil.copyfile(built, part)
    return load(path)


def find(text: str) -> Path:
    """Return the study.db that `--resume_evolve` names, as a file or its folder.

    Raises:
        ConfigError: there is none, it is not a study, or it cannot be written.
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
            f"--resume_evolve {path}: is not the study of a hyperparameter search (it has no study '{STUDY}')"
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
        stored = study.user_attrs
        space = tuple(SearchRow(*row) for row in stored["space"])
        plan = Plan(stored["options"], stored["hyp"], space, int(stored["target"]))
        study.pruner = pruner(int(plan.options["epochs"]))
    except (RuntimeError, optuna.exceptions.OptunaError) as error:  # a schema of another version, a damaged file
        raise ConfigError(f"--resume_evolve {path}: {str(error).splitlines()[0]}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"--resume_evolve {path}: is incomplete ({error}); begin a new hyperparameter search"
        ) from error
    return study, plan


def trials_of(study: Study, *states: str) -> list[FrozenTrial]:
    """Return the trials by number: those in the given states, or all."""
    return [t for t in study.get_trials(deepcopy=False) if not states or t.state.name in states]


def finished(study: Study) -> int:
    """Return the number of complete and pruned trials."""
    return len(trials_of(study, "COMPLETE", "PRUNED"))


def own_index(study: Study) -> int:
    """Return the number of different points tried or queued: repeated trials count once."""
    return sum("failed_trial" not in t.system_attrs for t in trials_of(study))


def was_interrupted(trial: FrozenTrial) -> bool:
    """Return whether the process ended before the trial did (a trial that failed stores its error)."""
    return trial.state.name == "FAIL" and "error" not in trial.user_attrs


def revive(study: Study, folder: Path) -> None:
    """Queue interrupted trials again; the lock must be held.

    Args:
        study: study of the hyperparameter search.
        folder: folder of the trials; weights of interrupted trials are removed.
    """
    import optuna

    remove_partial_files(folder, ".*")  # those of the trials may belong to running processes
    optuna.storages.fail_stale_trials(study)
    oldest = datetime.datetime.now() - datetime.timedelta(seconds=GRACE + WAIT)
    for trial in trials_of(study, "RUNNING"):  # killed before its first heartbeat: fail_stale_trials misses it
        has_begun = trial.user_attrs.get("folder") == f"trial{trial.number}"
        if not has_begun and trial.datetime_start is not None and trial.datetime_start < oldest:
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    again = optuna.storages.RetryHeartbeatStaleTrialCallback()
    retried = {number for trial in trials_of(study) for number in again.retry_history(trial)}
    for trial in study.get_trials():
        tries = len(again.retry_history(trial)) + 1
        if was_interrupted(trial) and trial.number not in retried and tries < MOST_TRIES:
            again(study, trial)
            shutil.rmtree(folder / f"trial{trial.number}" / "weights", ignore_errors=True)
            remove_partial_files(folder / f"trial{trial.number}")
            LOGGER.info("trial %d was interrupted: it is queued again", trial.number)
