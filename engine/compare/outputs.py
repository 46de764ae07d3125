"""What a comparison leaves behind: JSON, CSV, Markdown, images, and one HTML file with all of it."""

from __future__ import annotations

import base64
import datetime
import html
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.compare import plots as images
from engine.compare.config import CompareConfig
from engine.compare.measure.detector import CONF, IOU
from engine.compare.pareto import Limits, Pick, points_of
from engine.compare.results import CandidateResult
from engine.compare.table import Table, all_tables, as_csv, as_markdown
from utils.files import atomic_path
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
    """Return sentences about what was done."""
    c = found.config
    cuda = found.machine.get("device") == "cuda"
    memory = (
        "Memory is the peak of PyTorch's CUDA allocator."
        if cuda
        else "Memory is the peak resident memory of a fresh process, Python and libraries included (about the same "
        "for all; given apart as 'before the model')."
    )
    lines = [
        f"Data: {found.data}. Input {c.imgsz} x {c.imgsz} pixels, rounded up to what a model needs.",
        "Every candidate runs in processes of its own. They take turns in rounds (A B C, A B C ...), so that a machine "
        "that gets slower or faster does so for all. A turn begins with a call that does not count; then come 1 to 20 "
        "calls (0.2 seconds), of which the median counts. Figures are medians over the rounds, brackets the "
        "quartiles. Two calls warm up before the first round. The device is synchronized after every stage.",
        f"Latency: preprocessing (letterbox and color order of a decoded image), network, and NMS (score {CONF:g}, "
        f"overlap {IOU:g}), on real images of the dataset.",
        "Exported files were made with a fixed size and batch, and each was verified equal to its model before it was "
        "timed.",
        f"A training step (batch {found.step_batch}) is forward, loss, backward, clipping and optimizer "
        f"({c.optimizer}, --amp {c.amp}), without the loader, on one batch.",
        memory,
        "Two values tie (=) when their ranges overlap: quartiles of the rounds; for mAP50-95 all seeds and the 95 % "
        "bootstrap interval over the validation images (200 resamples). A rank is one more than the number of "
        f"candidates that are better beyond that. Accuracies below mAP50-95 {RANKING_FLOOR:g} are not ranked.",
        "The Pareto front holds the candidates that no other one dominates in latency and mAP50-95 (in latency and "
        "parameters where accuracies cannot be ranked): at least as good in both and better beyond the ranges in one.",
    ]
    if any(row.accuracy and row.accuracy.seeds is not None for row in found.rows):
        seeds = ", ".join(map(str, c.seeds))
        lines.append(
            f"Accuracy: every candidate was trained with the same recipe and budget: {c.epochs} epochs at {c.imgsz} "
            f"pixels, batch {c.batch_size}, {c.optimizer}, --amp {c.amp}, {Path(c.hyp).name}, seeds {seeds}; no early "
            f"stop. Of each run the best epoch (by the val split) was validated on the split '{c.task}'. Speed was "
            "measured with the weights of the first seed."
        )
    if any(row.accuracy and row.accuracy.seeds is None for row in found.rows):
        lines.append("Checkpoints that were given are validated as they are; how long they were trained is not known.")
    if any(row.failure is None and row.accuracy is None for row in found.rows):
        lines.append("Models with random weights find nothing, so that their NMS has next to nothing to do.")
    return lines


def conditions_table(found: Findings) -> list[tuple[str, ...]]:
    """Per phase: rounds, clocks and load before and after."""
    lines: list[tuple[str, ...]] = [
        ("phase", "rounds", "core clocks before, MHz", "after", "load before", "after", "GPU before", "after")
    ]
    for phase in found.conditions:
        before, after = phase["before"], phase["after"]
        lines.append((
            phase["phase"] + (" (stored)" if phase.get("stored") else ""), str(phase["rounds"]),
            *(" to ".join(map(str, side.get("cpu_mhz") or ["–"])) for side in (before, after)),
            *(str(side.get("load", "–")) for side in (before, after)),
            *(", ".join(f"{k} {v}" for k, v in (side.get("gpu") or {}).items()) or "–" for side in (before, after)),
        ))  # fmt: skip
    return lines


def write_all(found: Findings, folder: Path) -> None:
    """Write results.json, results.csv, results.md, the images, and report.html."""
    drawn = draw(found, folder)
    text = {
        "results.json": as_json(found),
        "results.csv": as_csv(found.rows, found.chosen),
        "results.md": markdown(found, drawn),
        "report.html": as_html(found, folder, drawn),
    }
    for name, content in text.items():
        with atomic_path(folder / name) as part:
            part.write_text(content, encoding="utf-8")


def draw(found: Findings, folder: Path) -> list[str]:
    """Write the images. Returns the names of those for which there was something to draw."""
    runtime, batch = found.reference
    points, limits = points_of(found.rows, runtime, batch), Limits.of(found.config)
    if any(point.latency for point in points.values()):
        what = f"{runtime}, re-parameterized model, batch {batch}"
        images.plot_pareto(folder / "pareto.png", points, found.chosen, limits, what)
    images.plot_latency(folder / "latency.png", found.rows)
    images.plot_memory(folder / "memory.png", found.rows, runtime, batch)
    return [name for name in IMAGES if (folder / name).is_file()]


def as_json(found: Findings) -> str:
    """Everything, every round's figure included."""
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


def markdown(found: Findings, drawn: Sequence[str]) -> str:
    """For a README or a paper."""
    parts = ["# Comparison", found.verdict()]
    parts += [as_markdown(table).rstrip() for table in found.tables()]
    parts += [f"![{IMAGES[name]}]({name})" for name in drawn]
    parts += ["## How it was measured", "\n".join(f"- {line}" for line in how_measured(found))]
    parts += ["Machine: " + machine_text(found.machine) + ".", f"```\n{found.command}\n```"]
    return "\n\n".join(parts) + "\n"


def machine_text(machine: Mapping[str, Any]) -> str:
    """`processor ..., cores 8, ...`."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine.items())


# ---- HTML -----------------------------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1280px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.pick { background: #eaf5ee; border-left: 4px solid #2e8b57; padding: .7rem 1rem; font-size: 1.05rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th { cursor: pointer; text-align: left; border-bottom: 2px solid #888; padding: .3rem .6rem; vertical-align: bottom; }
th::after { content: " \\2195"; color: #bbb; } th.up::after { content: " \\2191"; color: #222; }
th.down::after { content: " \\2193"; color: #222; }
td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; } td.n { text-align: right; white-space: nowrap; }
tr.pick-row td { background: #eaf5ee; font-weight: 600; } tr.failed td { color: #a33; }
.note { color: #666; font-size: 13px; } img { max-width: 100%; } code, pre { background: #f4f4f4; }
pre { padding: .7rem 1rem; white-space: pre-wrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: 13px; }
dt { color: #666; } dd { margin: 0; }
"""
SCRIPT = """
document.querySelectorAll("table.sortable th").forEach(function (th) {
  th.addEventListener("click", function () {
    var table = th.closest("table"), body = table.tBodies[0], place = th.cellIndex;
    var up = !th.classList.contains("up");
    table.querySelectorAll("th").forEach(function (other) { other.classList.remove("up", "down"); });
    th.classList.add(up ? "up" : "down");
    Array.from(body.rows).sort(function (a, b) {
      var x = a.cells[place].dataset.v, y = b.cells[place].dataset.v;
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      var p = Number(x), q = Number(y);
      var order = isNaN(p) || isNaN(q) ? (x < y ? -1 : x > y ? 1 : 0) : p - q;
      return up ? order : -order;
    }).forEach(function (row) { body.appendChild(row); });
  });
});
"""


def as_html(found: Findings, folder: Path, drawn: Sequence[str]) -> str:
    """One file that needs no other: tables that sort at a click, images inside, how it was measured."""
    first, *others = [html_table(table, found.chosen.label) for table in found.tables()]
    images = [_image(folder / name, IMAGES[name]) for name in drawn]
    how = "".join(f"<li>{html.escape(line)}</li>" for line in how_measured(found))
    machine = "".join(
        f"<dt>{html.escape(name.replace('_', ' '))}</dt><dd>{html.escape(str(value))}</dd>"
        for name, value in found.machine.items()
    )
    head, *lines = conditions_table(found)
    phases = _plain_table(head, lines) if lines else ""
    body = [
        "<h1>Comparison of detectors</h1>",
        f'<p class="pick">{html.escape(found.verdict())}</p>',
        first,
        *images,
        *others,
        f"<h2>How it was measured</h2><ul>{how}</ul>",
        f"<h2>Rounds, clocks and load</h2>{phases}" if phases else "",
        f"<h2>Machine and versions</h2><dl>{machine}</dl>",
        f"<h2>Command</h2><pre>{html.escape(found.command)}</pre>",
        f'<p class="note">{datetime.datetime.now().isoformat(sep=" ", timespec="minutes")}</p>',
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Comparison of detectors</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + f"\n<script>{SCRIPT}</script>\n</body></html>\n"
    )


def html_table(table: Table, picked: str | None) -> str:
    """Return a sortable HTML table with the row of the pick highlighted."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.header)
    lines = []
    for row in table.rows:
        texts = [cell.text for cell in row]
        kind = ' class="failed"' if texts[1:2] == ["failed"] else ""
        if picked is not None and "PICK" in texts:
            kind = ' class="pick-row"'
        cells = []
        for cell in row:
            value = "" if cell.value is None else f' data-v="{html.escape(str(cell.value))}"'
            number = ' class="n"' if isinstance(cell.value, float) else ""
            cells.append(f"<td{number}{value}>{html.escape(cell.text)}</td>")
        lines.append(f"<tr{kind}>{''.join(cells)}</tr>")
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f'<h2>{html.escape(table.title)}</h2><div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>{note}"
    )


def _plain_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<td><b>{html.escape(name)}</b></td>" for name in head)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in line) + "</tr>" for line in lines)
    return f'<div class="scroll"><table><tr>{top}</tr>{rows}</table></div>'


def _image(path: Path, title: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
