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
class Findings:
    """Everything there is to report.

    Attributes:
        config: options.
        rows: candidates.
        chosen: the pick.
        machine: description.
        conditions: per phase: rounds, calls, clocks.
        data: the dataset in words.
        step_batch: images of the measured training step.
    """

    config: CompareConfig
    rows: Sequence[CandidateResult]
    chosen: Pick
    machine: Mapping[str, Any]
    conditions: Sequence[Mapping[str, Any]]
    data: str
    step_batch: int

    @property
    def command(self) -> str:
        """The command line that gives this comparison."""
        return shlex.join(self.config.command_words())

    @property
    def reference(self) -> tuple[str, int]:
        """Runtime and batch that count for image, limits and pick."""
        return self.config.runtimes[0], self.config.batch[0]

    def tables(self) -> list[Table]:
        """All tables."""
        return all_tables(self.rows, self.chosen, *self.reference)

    def verdict(self) -> str:
        """Return the pick in one sentence."""
        if self.chosen.label is None:
            names = ", ".join(self.chosen.front)
            return f"No pick: {self.chosen.reason}." + (f" Pareto front: {names}." if names else "")
        return f"Pick: {self.chosen.label}: {self.chosen.reason}."


def how_measured(found: Findings) -> list[str]:
    """Return sentences about the measurements."""
    accuracies = [row.accuracy for row in found.rows if row.accuracy]
    text = render(
        "how_measured.txt",
        config=found.config,
        data=found.data,
        conf=CONF,
        iou=IOU,
        step_batch=found.step_batch,
        floor=RANKING_FLOOR,
        hyp=Path(found.config.hyp).name,
        cuda=found.machine.get("device") == "cuda",
        trained=any(accuracy.seeds is not None for accuracy in accuracies),
        given=any(accuracy.seeds is None for accuracy in accuracies),
        untrained=any(row.failure is None and row.accuracy is None for row in found.rows),
    )
    return text.splitlines()


def phases_table(found: Findings) -> list[tuple[str, ...]]:
    """Return header and rows: rounds, clocks and load of each phase; nothing without phases."""
    header = ("phase", "rounds", "core clocks before, MHz", "after", "load before", "after", "GPU before", "after")
    rows = []
    for phase in found.conditions:
        sides = (phase["before"], phase["after"])
        rows.append((
            phase["phase"] + (" (stored)" if phase.get("stored") else ""), str(phase["rounds"]),
            *(" to ".join(map(str, side.get("cpu_mhz") or [NOTHING])) for side in sides),
            *(str(side.get("load", NOTHING)) for side in sides),
            *(", ".join(f"{k} {v}" for k, v in (side.get("gpu") or {}).items()) or NOTHING for side in sides),
        ))  # fmt: skip
    return [header, *rows] if rows else []


def write_all(found: Findings, folder: Path) -> None:
    """Write results.json, results.csv, results.md, the plots, and report.html."""
    draw(found, folder)
    values = {
        "title": "Comparison of detectors",
        "verdict": found.verdict(),
        "tables": found.tables(),
        "images": image_files(folder, IMAGES),
        "how_measured": how_measured(found),
        "phases": phases_table(found),
        "machine": {name.replace("_", " "): value for name, value in found.machine.items()},
        "command": found.command,
        "date": datetime.datetime.now().isoformat(sep=" ", timespec="minutes"),
    }
    write_text(folder / "results.json", as_json(found))
    write_text(folder / "results.csv", as_csv(found.rows, found.chosen))
    write_text(folder / "results.md", render("comparison.md", **values))
    write_text(folder / "report.html", render("comparison.html", **values))


def draw(found: Findings, folder: Path) -> None:
    """Write the plots for which there is something to plot."""
    runtime, batch = found.reference
    points, limits = points_of(found.rows, runtime, batch), Limits.of(found.config)
    if any(point.latency for point in points.values()):
        what = f"{runtime}, re-parameterized model, batch {batch}"
        plots.plot_pareto(folder / "pareto.png", points, found.chosen, limits, what)
    plots.plot_latency(folder / "latency.png", found.rows)
    plots.plot_memory(folder / "memory.png", found.rows, runtime, batch)


def as_json(found: Findings) -> str:
    """Return everything as JSON, the values of every round included."""
    content = {
        "command": found.command,
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "options": found.config.to_dict(),
        "data": found.data,
        "machine": dict(found.machine),
        "pick": asdict(found.chosen),
        "limits": asdict(Limits.of(found.config)),
        "how_measured": how_measured(found),
        "candidates": [row.to_plain() for row in found.rows],
        "phases": list(found.conditions),
    }
    return json.dumps(content, indent=1, default=str) + "\n"
