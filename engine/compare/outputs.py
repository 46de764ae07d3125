"""Files of a comparison: JSON, CSV, Markdown, plots, and one HTML file that contains everything."""

from __future__ import annotations

import datetime
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from engine.compare import plots
from engine.compare.config import CompareConfig
from engine.compare.context import Context
from engine.compare.effects import effects_of
from engine.compare.measure.detector import CONF, IOU
from engine.compare.pareto import Limits, Pick, points_of
from engine.compare.results import CandidateResult, measured
from engine.compare.table import NOTHING, Table, all_tables, as_csv, csv_lines, effect_lines
from engine.compare.worker.samples import SHOWN_SAMPLES
from engine.evaluate.worst_images import SHOWN_CONF, ImageErrors
from engine.report.html import ReportImage, image_files, render, worst_image, write_text
from utils.metrics import RANKING_FLOOR

IMAGES = {
    "pareto.png": "Accuracy and latency",
    "latency.png": "Latency by stage",
    "memory.png": "Memory",
}
BOX_COLUMNS = {"right": 6, "wrong": 6, "missed": 5}


@dataclass(frozen=True)
class Report:
    """Content of the report.

    Attributes:
        context: options, machine, dataset.
        rows: candidates.
        pick: recommendation.
        conditions: per phase: rounds, calls, clocks.
    """

    context: Context
    rows: Sequence[CandidateResult]
    pick: Pick
    conditions: Sequence[Mapping[str, Any]]

    @property
    def config(self) -> CompareConfig:
        """Options."""
        return self.context.config

    @property
    def command(self) -> str:
        """Command line of this comparison."""
        return shlex.join(self.config.command_words("compare.py"))

    @property
    def reference(self) -> tuple[str, int]:
        """Runtime and batch size that count for plot, limits and pick."""
        return self.config.runtimes[0], self.config.batch[0]

    @property
    def data(self) -> str:
        """Description of the dataset."""
        data = self.context.data
        return f"{data.file.name}, split '{self.config.task}', {len(data.names)} classes"

    def tables(self) -> list[Table]:
        """Return all tables."""
        return all_tables(self.rows, self.pick, *self.reference, self.context.recipe_text)

    def verdict(self) -> str:
        """Return the recommendation in one sentence."""
        if self.pick.label is None:
            names = ", ".join(self.pick.front)
            return f"No pick: {self.pick.reason}." + (f" Pareto front: {names}." if names else "")
        return f"Pick: {self.pick.label}: {self.pick.reason}."

    def warnings(self) -> list[str]:
        """Return warnings about the accuracies."""
        accuracies = [row.accuracy for row in measured(self.rows) if row.accuracy]
        if len(self.config.seeds) > 1 or all(accuracy.seeds is None for accuracy in accuracies):
            return []
        return [
            "One seed: another training of the same candidate may differ more than these candidates do. Ranges cover "
            "the validation images only; train with --seeds 0 1 2 before you rely on a difference."
        ]


def how_measured(report: Report) -> list[str]:
    """Return sentences about the measurements."""
    accuracies = [row.accuracy for row in report.rows if row.accuracy]
    text = render(
        "how_measured.txt",
        config=report.config,
        context=report.context,
        data=report.data,
        conf=CONF,
        iou=IOU,
        floor=RANKING_FLOOR,
        cuda=report.context.device.type == "cuda",
        trained=any(accuracy.seeds is not None for accuracy in accuracies),
        given=any(accuracy.seeds is None for accuracy in accuracies),
        untrained=any(row.failure is None and row.accuracy is None for row in report.rows),
    )
    return text.splitlines()


def sample_detections(report: Report) -> list[list[tuple[str, ReportImage, Mapping[str, str]]]]:
    """Return for a few validation images the label of every candidate with its detections and heat maps by level."""
    groups = []
    for path, _ in report.context.sample[SHOWN_SAMPLES]:
        group = []
        for row in measured(report.rows):
            found = row.accuracy.results[0]["samples"].get(str(path)) if row.accuracy else None
            if found:
                boxes = {name: torch.tensor(found[name]).reshape(-1, n) for name, n in BOX_COLUMNS.items()}
                errors = ImageErrors(str(path), tuple(found["shape"]), **boxes)
                group.append((row.label, worst_image(errors, report.context.data.names), found["heat"]))
        groups += [group] if group else []
    return groups


def phases_table(report: Report) -> list[tuple[str, ...]]:
    """Return header and rows: rounds, clocks and load of each phase; nothing without phases."""
    header = ("phase", "rounds", "core clocks before, MHz", "after", "load before", "after", "GPU before", "after")
    rows = []
    for phase in report.conditions:
        sides = (phase["before"], phase["after"])
        rows.append((
            phase["phase"] + (" (stored)" if phase.get("stored") else ""), str(phase["rounds"]),
            *(" to ".join(map(str, side.get("cpu_mhz") or [NOTHING])) for side in sides),
            *(str(side.get("load", NOTHING)) for side in sides),
            *(", ".join(f"{k} {v}" for k, v in (side.get("gpu") or {}).items()) or NOTHING for side in sides),
        ))  # fmt: skip
    return [header, *rows] if rows else []


def write_all(report: Report, folder: Path) -> None:
    """Write results.json, results.csv, results.md, effects.csv, the plots, and report.html."""
    draw(report, folder)
    values = {
        "title": "Comparison of detectors",
        "verdict": report.verdict(),
        "warnings": report.warnings(),
        "samples": sample_detections(report),
        "confidence": SHOWN_CONF,
        "tables": report.tables(),
        "images": image_files(folder, IMAGES),
        "how_measured": how_measured(report),
        "phases": phases_table(report),
        "machine": {name.replace("_", " "): value for name, value in report.context.machine.items()},
        "command": report.command,
        "date": datetime.datetime.now().isoformat(sep=" ", timespec="minutes"),
    }
    write_text(folder / "results.json", as_json(report))
    write_text(folder / "results.csv", as_csv(csv_lines(report.rows, report.pick)))
    effects = effects_of(report.rows, *report.reference)
    if effects:
        write_text(folder / "effects.csv", as_csv(effect_lines(effects)))
    write_text(folder / "results.md", render("comparison.md", **values))
    write_text(folder / "report.html", render("comparison.html", **values))


def draw(report: Report, folder: Path) -> None:
    """Write the plots for which there is something to plot."""
    runtime, batch = report.reference
    points, limits = points_of(report.rows, runtime, batch), Limits.of(report.config)
    if any(point.latency for point in points.values()):
        what = f"{runtime}, re-parameterized model, batch {batch}"
        plots.plot_pareto(folder / "pareto.png", points, report.pick, limits, what)
    plots.plot_latency(folder / "latency.png", report.rows)
    plots.plot_memory(folder / "memory.png", report.rows, runtime, batch)


def as_json(report: Report) -> str:
    """Return everything as JSON, the values of every round included."""
    content = {
        "command": report.command,
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "options": report.config.to_dict(),
        "data": report.data,
        "machine": report.context.machine,
        "pick": asdict(report.pick),
        "limits": asdict(Limits.of(report.config)),
        "how_measured": how_measured(report),
        "candidates": [row.to_plain() for row in report.rows],
        "phases": list(report.conditions),
    }
    return json.dumps(content, indent=1, default=str) + "\n"
