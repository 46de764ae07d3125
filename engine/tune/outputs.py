"""Output files of a hyperparameter search: evolve.csv, hyp_evolve.yaml, evolve.png, importance.png."""

from __future__ import annotations

import csv
import io
import logging
import math
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from engine.cli.config import TrainConfig
from engine.loggers.run_logger import METRICS
from engine.tune.space import SearchRow, Space, with_values
from engine.tune.study import Plan, trials_of, was_interrupted
from utils.files import atomic_path
from utils.metrics import RANKING_FLOOR
from utils.plots import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from optuna.study import Study

LOGGER = logging.getLogger(__name__)
CSV, YAML, IMAGE, IMPORTANCE = "evolve.csv", "hyp_evolve.yaml", "evolve.png", "importance.png"
IMPORTANCE_FROM, IMPORTANCE_SURE = 5, 50
"""Minimum numbers of complete trials to compute importances, and for reliable ones."""
STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
SHOWN = ("complete", "pruned")
_COLUMNS = 6


@dataclass(frozen=True)
class TrialRow:
    """A finished trial.

    Attributes:
        number: trial number.
        state: complete, pruned, failed, or interrupted (its process ended early).
        fitness: None when nothing was validated.
        metrics: precision, recall, mAP50, mAP50-95 of its best epoch, or nothing.
        epochs: number of validated epochs.
        point: hyperparameters.
    """

    number: int
    state: str
    fitness: float | None
    metrics: tuple[float, ...]
    epochs: int
    point: Mapping[str, float]


def rows_of(study: Study) -> list[TrialRow]:
    """Return the finished trials by number."""
    rows = []
    for trial in trials_of(study, *STATES):
        epochs = trial.intermediate_values
        fitness = trial.user_attrs.get("fitness", max(epochs.values(), default=None))
        state = "interrupted" if was_interrupted(trial) else STATES[trial.state.name]
        metrics = tuple(trial.user_attrs.get("metrics", ()))
        rows.append(TrialRow(trial.number, state, fitness, metrics, len(epochs), trial.params))
    return rows


def best_of(rows: Sequence[TrialRow]) -> TrialRow | None:
    """Return the completed trial with the highest fitness (the first of equal ones), or None."""
    complete = [r for r in rows if r.state == "complete" and r.fitness is not None]
    return max(complete, key=lambda r: (r.fitness or 0.0, -r.number), default=None)


def unranked_note(best: TrialRow | None) -> str:
    """Return why the trials cannot be ranked, or ''."""
    if best is None or (best.fitness or 0.0) >= RANKING_FLOOR:
        return ""
    return f"not trained long enough to rank: fitness below {RANKING_FLOOR:g}"


def command_of(plan: Plan, folder: Path) -> str:
    """Return the command line that joins the hyperparameter search; hidden passwords must be filled in."""
    secret = [word for name, text in plan.secret_options().items() for word in (f"--{name.replace('_', '-')}", text)]
    return shlex.join(["python", "train.py", "--evolve", str(plan.target), "--resume_evolve", str(folder), *secret])


def first_command(plan: Plan) -> str:
    """Return the command line that started the hyperparameter search, without line breaks."""
    config = TrainConfig(**{**plan.options, "evolve": plan.target})
    return " ".join(shlex.join(config.command_words("train.py")).split())


def write_files(folder: Path, rows: Sequence[TrialRow], plan: Plan) -> None:
    """Write evolve.csv, and hyp_evolve.yaml once a trial is complete."""
    write_csv(folder / CSV, rows, plan.space)
    best = best_of(rows)
    if best is not None:
        write_hyp(folder / YAML, best, plan, sum(r.state in SHOWN for r in rows))


def draw(folder: Path, rows: Sequence[TrialRow], plan: Plan, study: Study) -> None:
    """Write evolve.png, and importance.png once there are enough trials."""
    plot_trials(folder / IMAGE, rows, plan.space)
    found = importances(study)
    if found:
        plot_importances(folder / IMPORTANCE, found, sum(r.state == "complete" for r in rows))


def write_csv(path: Path, rows: Sequence[TrialRow], space: Space) -> None:
    """Write one row per trial; cells without a value are empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trial", "state", "fitness", *METRICS, "epochs", *(row.key for row in space)])
    for row in rows:
        metrics = row.metrics or [None] * len(METRICS)
        values = [row.fitness, *metrics, row.epochs, *(row.point.get(r.key) for r in space)]
        writer.writerow([row.number, row.state, *("" if v is None else f"{v:.6g}" for v in values)])
    with atomic_path(path) as part:
        part.write_text(out.getvalue(), encoding="utf-8")


def write_hyp(path: Path, best: TrialRow, plan: Plan, count: int) -> None:
    """Write the best hyperparameters as a YAML for `--hyp`, with their origin as comments."""
    names = ("precision", "recall", "mAP50", "mAP50-95")
    head = [
        f"Best of {count} trials: trial {best.number}, fitness {best.fitness:.3f} (0.1 mAP50 + 0.9 mAP50-95)",
        ", ".join(f"{name} {value:.3f}" for name, value in zip(names, best.metrics)),
        unranked_note(best),
        f"Found by: {first_command(plan)}",
        f"Use: python train.py --hyp {path.name}",
    ]
    text = "".join(f"# {line}\n" for line in head if line)
    text += yaml.safe_dump(with_values(plan.hyp, best.point), sort_keys=False, allow_unicode=True)
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def importances(study: Study) -> dict[str, float]:
    """Return how much each hyperparameter distinguishes the best trials (PED-ANOVA, https://arxiv.org/abs/2304.10255).

    Returns:
        Importances by name, sum 1, largest first; empty with too few complete trials or equal fitness.
    """
    import optuna

    values = [t.value for t in trials_of(study, "COMPLETE") if t.value is not None]
    if len(values) < IMPORTANCE_FROM or min(values) == max(values):
        return {}
    quantile = min(0.5, max(0.1, 5 / len(values)))  # at least five trials, where there are ten
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=quantile)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {key: value for key, value in found.items() if math.isfinite(value)} if any(found.values()) else {}


def plot_trials(path: Path, rows: Sequence[TrialRow], space: Space) -> None:
    """Plot fitness over each hyperparameter: later trials lighter, pruned ones hollow, the best one a star.

    The best trial is not marked where the trials cannot be ranked. The fitness axis starts at 0.
    """
    shown = [r for r in rows if r.state in SHOWN and r.fitness is not None]
    best = best_of(rows)
    note = unranked_note(best)
    lines = math.ceil(len(space) / _COLUMNS)
    figure = new_figure(2.7 * _COLUMNS, 2.3 * lines + 0.4)
    grid = np.asarray(figure.subplots(lines, _COLUMNS, sharey=True, squeeze=False))
    for axes, row in zip(grid.flat, space):
        _panel(axes, row, shown, None if note else best)
    for axes in grid.flat[len(space) :]:
        axes.remove()
    for axes in grid[:, 0]:
        axes.set_ylabel("fitness")
    grid[0, 0].set_ylim(0, max([1.15 * (r.fitness or 0.0) for r in shown] + [2 * RANKING_FLOOR]))
    counts = ", ".join(f"{sum(r.state == state for r in rows)} {state}" for state in STATES.values())
    title = f"{counts}; a dot per trial, later ones lighter; hollow: pruned; one training each"
    if best is not None:
        title += f"; {note}" if note else f"; star: the best, trial {best.number}, {best.fitness:.3f}"
    figure.suptitle(title, fontsize=12)
    save_figure(figure, path, 100)


def _panel(axes: Axes, row: SearchRow, shown: Sequence[TrialRow], best: TrialRow | None) -> None:
    last = max((r.number for r in shown), default=0)
    for is_pruned in (True, False):
        dots = [r for r in shown if (r.state == "pruned") == is_pruned]
        x, y = [r.point[row.key] for r in dots], [r.fitness or 0.0 for r in dots]
        order: dict[str, Any] = {"c": [r.number for r in dots], "cmap": "viridis", "vmin": 0, "vmax": last * 1.1 or 1}
        axes.scatter(x, y, s=22, **({"facecolors": "none", "edgecolors": "0.6"} if is_pruned else order))
    if best is not None:
        axes.scatter(best.point[row.key], best.fitness or 0.0, marker="*", s=130, c="tab:red", zorder=3)
    axes.set_title(row.key + (f" = {best.point[row.key]:.3g}" if best else ""), fontsize=10)
    axes.set_xscale("log" if row.log else "linear")
    center = math.sqrt(row.low * row.high) if row.log else (row.low + row.high) / 2
    ticks = (row.low, center, row.high)
    axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
    axes.minorticks_off()
    axes.tick_params(labelsize=8)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)


def plot_importances(path: Path, found: Mapping[str, float], count: int) -> None:
    """Plot the importances as bars, largest on top."""
    figure = new_figure(8, 0.27 * len(found) + 1.2)
    axes = figure.add_subplot()
    bars = axes.barh(list(found)[::-1], list(found.values())[::-1], height=0.7)
    axes.bar_label(bars, fmt=" %.2f", fontsize=8)
    doubt = "" if count >= IMPORTANCE_SURE else "; too few: mostly chance"
    axes.set(xlabel="importance", title=f"What distinguishes the best trials ({count} trials{doubt})")
    axes.margins(x=0.1, y=0.01)
    axes.tick_params(labelsize=9)
    save_figure(figure, path, 120)
