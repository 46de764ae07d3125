"""Files of a comparison: JSON, CSV, Markdown, plots, and one HTML file with all of it."""

from __future__ import annotations

import datetime
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.compare import plots
from engine.compare.config import CompareConfig
from engine.compare.measure.detector import CONF, IOU
from engine.compare.pareto import Limits, Pick, points_of
from engine.compare.results import CandidateResult
from engine.compare.table import NOTHING, Table, all_tables, as_csv
from engine.report.html import image_files, render, write_text
from utils.metrics import RANKING_FLOOR

IMAGES = {
    "pareto.png": "Accuracy and latency",
    "latency.png": "Latency by stage",
    "memory.png": "Memory",
}


@dataclass(frozen=True)
class Report:
    """Content of the report.

    Attributes:
        config: options.
        rows: candidates.
        pick: recommendation.
        machine: description.
        conditions: per phase: rounds, calls, clocks.
        data: description of the dataset.
        step_batch: images of the measured training step.
    """

    config: CompareConfig
    rows: Sequence[CandidateResult]
    pick: Pick
    machine: Mapping[str, Any]
    conditions: Sequence[Mapping[str, Any]]
    data: str
    step_batch: int

    @property
    def command(self) -> str:
        """Command line of this comparison."""
        return shlex.join(self.config.command_words("compare.py"))

    @property
    def reference(self) -> tuple[str, int]:
        """Runtime and batch size that count for plot, limits and pick."""
        return self.config.runtimes[0], self.config.batch[0]

    def tables(self) -> list[Table]:
        """Return all tables."""
        return all_tables(self.rows, self.pick, *self.reference)

    def verdict(self) -> str:
        """Return the recommendation in one sentence."""
        if self.pick.label is None:
            names = ", ".join(self.pick.front)
            return f"No pick: {self.pick.reason}." + (f" Pareto front: {names}." if names else "")
        return f"Pick: {self.pick.label}: {self.pick.reason}."


def how_measured(report: Report) -> list[str]:
    """Return sentences about the measurements."""
    accuracies = [row.accuracy for row in report.rows if row.accuracy]
    text = render(
        "how_measured.txt",
        config=report.config,
        data=report.data,
        conf=CONF,
        iou=IOU,
        step_batch=report.step_batch,
        floor=RANKING_FLOOR,
        hyp=Path(report.config.hyp).name,
        cuda=report.machine.get("device") == "cuda",
        trained=any(accuracy.seeds is not None for accuracy in accuracies),
        given=any(accuracy.seeds is None for accuracy in accuracies),
        untrained=any(row.failure is None and row.accuracy is None for row in report.rows),
    )
    return text.splitlines()


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
    """Write results.json, results.csv, results.md, the plots, and report.html."""
    draw(report, folder)
    values = {
        "title": "Comparison of detectors",
        "verdict": report.verdict(),
        "tables": report.tables(),
        "images": image_files(folder, IMAGES),
        "how_measured": how_measured(report),
        "phases": phases_table(report),
        "machine": {name.replace("_", " "): value for name, value in report.machine.items()},
        "command": report.command,
        "date": datetime.datetime.now().isoformat(sep=" ", timespec="minutes"),
    }
    write_text(folder / "results.json", as_json(report))
    write_text(folder / "results.csv", as_csv(report.rows, report.pick))
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
        "machine": dict(report.machine),
        "pick": asdict(report.pick),
        "limits": asdict(Limits.of(report.config)),
        "how_measured": how_measured(report),
        "candidates": [row.to_plain() for row in report.rows],
        "phases": list(report.conditions),
    }
    return json.dumps(content, indent=1, default=str) + "\n"
