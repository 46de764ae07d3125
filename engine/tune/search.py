"""Hyperparameter search (`--evolve`) by optuna."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import shutil
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from data.config import load_data_config
from data.labels.labels import load_annotations
from engine.cli.config import Hyperparameters, TrainConfig
from engine.loggers.run_logger import METRICS
from engine.train.options import choose_hyperparameters, head_form, resolve_auto, with_recipe
from engine.train.trainer import train
from engine.tune import study as studies
from engine.tune.outputs import (
    IMPORTANCE,
    IMPORTANCE_FROM,
    YAML,
    TrialRow,
    best_of,
    command_of,
    draw,
    rows_of,
    unranked_note,
    write_files,
)
from engine.tune.space import inside, point_of, population, space_for, widened, with_values
from engine.tune.study import Plan, StudyLock
from utils.errors import ConfigError, MemoryLimitError, TrainingError, UserError
from utils.files import make_folder, make_run_folder
from utils.log import set_error_folder, world_size
from utils.metrics import fitness
from utils.plots import read_history
from utils.yaml_lines import dump_yaml

if TYPE_CHECKING:
    from optuna.samplers import TPESampler
    from optuna.study import Study
    from optuna.trial import Trial

LOGGER = logging.getLogger(__name__)
OWN_CHOICE = ("device", "workers", "cache", "noplots")
"""Options that may differ between the processes of a study; they do not affect the results of a trial."""
NO_OPTIONS = ("evolve", "resume_evolve", "evolve_population", "project", "name", "exist_ok", "resume", "local_rank")
POLL = 3.0
"""Seconds between checks of the trials of other processes."""
FAILURES = (TrainingError, MemoryLimitError, torch.OutOfMemoryError)
"""Errors of a training that depend on its hyperparameters, so the search continues."""
MOST_FAILED = 5
"""Trials of this process that may fail in a row before it ends."""


@dataclass(frozen=True)
class EvolveResult:
    """Result of a hyperparameter search.

    Attributes:
        folder: folder of study.db, evolve.csv and the other files.
        hyp: the best hyperparameters; None when no trial is complete.
        trials: complete and pruned ones.
        best_trial, fitness: number of the best trial and its fitness; -1 and 0 without one.
    """

    folder: Path
    hyp: Path | None
    trials: int
    best_trial: int
    fitness: float


def evolve(config: TrainConfig) -> EvolveResult:
    """Train with varied hyperparameters until the requested number of trials is complete or pruned.

    Args:
        config: options of the trainings; with `resume_evolve`, the stored options of the study are used.

    Raises:
        UserError: options that cannot be used; no partial files are left.
        TrainingError: several trials in a row failed.
    """
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ConfigError("--evolve: needs the package optuna: pip install optuna") from error
    if world_size() > 1:
        raise ConfigError(
            "--evolve: does not run under torchrun; start python train.py --evolve once, then the same command with "
            "--resume_evolve FOLDER and another --device for each further process"
        )
    if config.resume:
        raise ConfigError(
            "--evolve: cannot be combined with --resume; to continue with a hyperparameter search: --resume_evolve"
        )
    with studies.quiet_optuna():
        if config.resume_evolve is not None:
            return _resume(config, config.resume_evolve)
        return _start(config)


def _start(config: TrainConfig) -> EvolveResult:
    asked, config = config, with_recipe(config)  # only `asked` knows which options were given
    optimizer, hyp = _concrete_recipe(config)
    space = space_for(optimizer, head_form(config).module)
    points = {str(config.hyp): point_of(hyp, space, str(config.hyp))}
    if asked.is_given("evolve_population"):
        points |= population(config.evolve_population, optimizer, space)
    space = widened(list(points.values()), space)
    options = {k: v for k, v in config.to_dict().items() if k not in NO_OPTIONS}
    plan = Plan(options, hyp.to_dict(), space, int(config.evolve))
    folder, is_new = _new_folder(asked)
    set_error_folder(folder)
    try:
        study, plan = studies.create(folder / studies.FILE, plan, {n: inside(p, space) for n, p in points.items()})
        return SearchRun(study, plan, config, folder).run()
    except UserError:
        if not any(folder.glob("trial*/results.csv")):  # the first training could not start
            _remove(folder, is_new)
        raise


def _concrete_recipe(config: TrainConfig) -> tuple[str, Hyperparameters]:
    """Return optimizer and hyperparameters, those that `--optimizer auto` chooses included.

    Otherwise each trial would overwrite the learning rate and momentum that it tests. The hyperparameters name the
    optimizer unless it is SGD: hyp_evolve.yaml is used without the options of the search.
    """
    hyp = choose_hyperparameters(config, None)
    if config.optimizer == "auto" and config.batch_size < 1:
        raise ConfigError(
            "--evolve: --optimizer auto depends on the number of iterations: give --batch-size as a number, or "
            "--optimizer SGD, Adam or AdamW"
        )
    if "auto" in (config.optimizer, hyp.optimizer):
        data = load_data_config(config.data)
        images = len(load_annotations(data.split("train"), len(data.names), single_cls=config.single_cls).records)
        config, hyp = resolve_auto(config, hyp, 1 if config.single_cls else len(data.names), images)
        LOGGER.info("Optimizer: %s, lr0 %g, momentum %g", config.optimizer, hyp.lr0, hyp.momentum)
    return str(config.optimizer), hyp if config.optimizer == "SGD" else replace(hyp, optimizer=config.optimizer)


def _resume(config: TrainConfig, text: str) -> EvolveResult:
    path = studies.find(text)
    study, plan = studies.load(path)
    given = {f.name: getattr(config, f.name) for f in fields(TrainConfig) if config.is_given(f.name)}
    hidden = config.to_dict()  # as passwords are stored
    problems = [
        f"--{name.replace('_', '-')} is {value}, the study was started with {plan.options.get(name)}"
        for name, value in given.items()
        if name not in (*NO_OPTIONS, *OWN_CHOICE) and plan.options.get(name) not in (value, hidden[name])
    ]
    if problems:
        raise ConfigError(
            f"--resume_evolve {text}: {'; '.join(problems)}: leave it out, or start another hyperparameter search"
        )
    secret = plan.secret_options()
    if missing := [f"--{name.replace('_', '-')} {url}" for name, url in secret.items() if given.get(name, url) == url]:
        raise ConfigError(
            f"--resume_evolve {text}: passwords are not stored in a study; give again, with the password: "
            f"{' '.join(missing)}"
        )
    if config.evolve is not None and config.evolve != plan.target:
        plan = replace(plan, target=int(config.evolve))
        study.set_user_attr("target", plan.target)
    own = {name: given[name] for name in (*OWN_CHOICE, *secret) if name in given}
    return SearchRun(study, plan, TrainConfig.from_keywords(**{**plan.options, **own}), path.parent).run()


def _remove(folder: Path, is_new: bool) -> None:
    """Remove the files of `_start`, and nothing that existed before."""
    made = [folder] if is_new else [p for p in folder.iterdir() if p.name.startswith(("study.", "trial"))]
    for path in made:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _new_folder(config: TrainConfig) -> tuple[Path, bool]:
    """Make the folder of the hyperparameter search: runs/evolve/exp, exp2, ...

    Returns:
        The folder, and whether it is new (it may exist with `--exist-ok`).
    """
    project = config.project if config.is_given("project") else studies.RUNS
    wanted = Path(project) / config.run_name
    if config.exist_ok:
        if (wanted / studies.FILE).exists() or any(wanted.glob("trial*")):
            raise ConfigError(
                f"--exist-ok: {wanted} holds a hyperparameter search; to continue with it: --resume_evolve {wanted}"
            )
        is_new = not wanted.exists()
        return make_folder(wanted), is_new
    return make_run_folder(wanted), True


def _drop_weights(trial: Path) -> None:
    """Remove the weights of a trial to save disk space."""
    shutil.rmtree(trial / "weights", ignore_errors=True)


class SearchRun:
    """The trials of this process.

    Args:
        study: optuna study.
        plan: plan of the study.
        config: options of the trainings.
        folder: folder of the study.
    """

    def __init__(self, study: Study, plan: Plan, config: TrainConfig, folder: Path) -> None:
        self.study, self.plan, self.config, self.folder = study, plan, config, folder
        self.lock = StudyLock(folder / studies.LOCK, timeout=studies.WAIT)
        self.number = -1
        self.failed_in_row = 0
        self.drawn = -1

    def run(self) -> EvolveResult:
        """Run trials until there are enough of them, counting those of other processes."""
        LOGGER.info("Hyperparameter search of %d trials in %s", self.plan.target, self.folder)
        LOGGER.info("To join or resume it: %s", command_of(self.plan, self.folder))
        try:
            while self._take_turn():
                self._trial()
        except (KeyboardInterrupt, SystemExit):
            self._give_up()
            LOGGER.info("Continue with: %s", command_of(self.plan, self.folder))
            raise
        finally:
            self.lock.release()
        return self._finish()

    def _take_turn(self) -> bool:
        """Wait until a trial may start and return True with the lock held; False when there are enough."""
        logged = False
        while True:
            self.lock.acquire()
            studies.revive(self.study, self.folder)
            done, running = studies.finished(self.study), len(studies.trials_of(self.study, "RUNNING"))
            self.plan = replace(self.plan, target=int(self.study.user_attrs["target"]))
            if done + running < self.plan.target:
                return True
            self.lock.release()
            if done >= self.plan.target:
                return False
            if not logged:
                LOGGER.info("Waiting for %d trial(s) of other processes", running)
            logged = True
            time.sleep(POLL)

    def _trial(self) -> None:
        """Run one trial, log it, and update the files."""
        self.study.sampler = self._sampler()
        self.number = -1
        begin = time.time()
        try:
            self.study.optimize(self._objective, n_trials=1, catch=FAILURES)
        except UserError:
            raise
        except ValueError as error:  # optuna refuses the result of a finished trial
            if self.number < 0 or self.study.trials[self.number].state.name != "FAIL":
                raise
            LOGGER.warning("trial %d was ended by another process: %s", self.number, error)
        finally:
            self.lock.release()
            if torch.cuda.is_available():
                gc.collect()
                torch.cuda.empty_cache()
        rows = self._write()
        mine, best = next(r for r in rows if r.number == self.number), best_of(rows)
        LOGGER.info(
            "Trial %d %s in %.0f s: fitness %s; best %s; %d of %d trials done",
            self.number, mine.state, time.time() - begin, "-" if mine.fitness is None else f"{mine.fitness:.4g}",
            f"{best.fitness:.4g} in trial {best.number}" if best else "-", studies.finished(self.study),
            self.plan.target,
        )  # fmt: skip
        self._count_failures(mine.state)

    def _write(self) -> list[TrialRow]:
        """Update the files; plots only if a trial finished since the last call."""
        with self.lock:
            rows = rows_of(self.study)
            write_files(self.folder, rows, self.plan)
            if not self.config.noplots and len(rows) != self.drawn:
                draw(self.folder, rows, self.plan, self.study)
            self.drawn = len(rows)
        return rows

    def _count_failures(self, state: str) -> None:
        self.failed_in_row = self.failed_in_row + 1 if state == "failed" else 0
        if self.failed_in_row >= MOST_FAILED:
            reason = self.study.trials[self.number].user_attrs.get("error", "")
            raise TrainingError(
                f"--evolve: {MOST_FAILED} trials in a row failed, the last one with: {reason}; fix it (a lower lr0 in "
                f"the --hyp file, a smaller batch), then continue with: {command_of(self.plan, self.folder)}"
            )

    def _sampler(self) -> TPESampler:
        """Return a sampler seeded by --seed and the number of earlier points.

        A seed per process would give two processes, or a resumed study, the same draws.
        """
        from optuna.samplers import TPESampler

        seed = np.random.SeedSequence((self.config.seed, studies.own_index(self.study))).generate_state(1)
        return TPESampler(seed=int(seed[0]), constant_liar=True)

    def _objective(self, trial: Trial) -> float:
        """Train with the trial's hyperparameters. Returns the best fitness of its epochs."""
        import optuna

        self.number = trial.number
        point = {r.key: trial.suggest_float(r.key, r.low, r.high, log=r.log) for r in self.plan.space}
        folder = make_folder(self.folder / f"trial{trial.number}")
        trial.set_user_attr("folder", folder.name)
        self.lock.release()  # from here on other processes see this point
        start = trial.user_attrs.get("start")
        LOGGER.info("Trial %d%s", trial.number, f": the starting values of {start}" if start else "")
        dump_yaml(folder / "hyp.yaml", with_values(self.plan.hyp, point))
        pruned = False

        def on_epoch(epoch: int, value: float) -> bool:
            nonlocal pruned
            trial.report(value, epoch)
            pruned = epoch + 1 < self.config.epochs and trial.should_prune()
            return pruned

        try:
            result = train(self._options(folder), on_epoch)
            if not math.isfinite(result.fitness):
                raise TrainingError(f"fitness is {result.fitness}")
        except FAILURES as error:
            trial.set_user_attr("error", str(error).splitlines()[0] if str(error) else type(error).__name__)
            LOGGER.warning("trial %d failed: %s", trial.number, error)
            _drop_weights(folder)
            raise
        _drop_weights(folder)
        self._note(trial, folder, result.fitness)
        if pruned:
            raise optuna.TrialPruned(f"behind the median after {result.epochs} epochs")
        return result.fitness

    def _options(self, folder: Path) -> TrainConfig:
        return replace(
            self.config, hyp=str(folder / "hyp.yaml"), project=str(folder.parent), name=folder.name, exist_ok=True,
            evolve=None, resume_evolve=None, noplots=True, nosave=True,
            optimizer=self.plan.hyp.get("optimizer", self.config.optimizer),
        )  # fmt: skip

    def _note(self, trial: Trial, folder: Path, value: float) -> None:
        """Store fitness and the metrics of the best epoch with the trial."""
        history = read_history(folder / "results.csv")
        metrics = np.stack([history[name] for name in METRICS], axis=1)
        best = metrics[int(np.argmax(fitness(metrics)))]
        trial.set_user_attr("fitness", value)
        trial.set_user_attr("metrics", [float(v) for v in best])

    def _give_up(self) -> None:
        """Mark the running trial as interrupted, so that it is repeated without waiting for its heartbeat to expire."""
        from optuna.trial import TrialState

        self.lock.release()
        if self.number >= 0:
            with contextlib.suppress(ValueError):  # it is finished
                self.study.tell(self.number, state=TrialState.FAIL)

    def _finish(self) -> EvolveResult:
        rows = self._write()
        best, hyp = best_of(rows), self.folder / YAML
        if best is not None:
            LOGGER.info("Best fitness %.4g in trial %d: use it with --hyp %s", best.fitness, best.number, hyp)
            if unranked_note(best):
                LOGGER.warning("%s; search with more --epochs", unranked_note(best))
        if not self.config.noplots and not (self.folder / IMPORTANCE).is_file():
            LOGGER.info(
                "No %s: it needs %d complete trials of different fitness", IMPORTANCE, IMPORTANCE_FROM
            )  # fmt: skip
        LOGGER.info("Results saved to %s", self.folder)
        return EvolveResult(
            folder=self.folder, hyp=hyp if best else None, trials=studies.finished(self.study),
            best_trial=best.number if best else -1, fitness=float(best.fitness or 0.0) if best else 0.0,
        )  # fmt: skip
