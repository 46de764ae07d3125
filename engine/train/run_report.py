"""report.html: one file that tells a training run, to be opened anywhere, without a network and without other files."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.cli.config import Hyperparameters, TrainConfig
from engine.evaluate.accumulator import EvalResult
from engine.evaluate.worst_images import USE_SCORE, ImageErrors
from engine.loggers.run_logger import best_epoch
from engine.report.html import image_file, line_chart, number, table, text, values, worst_image
from models.yolo import DetectionModel
from utils.device import describe_device
from utils.errors import DataError
from utils.files import ROOT, atomic_path
from utils.plots import read_history

CHARTS: Mapping[str, Mapping[str, str]] = {
    "Box loss": {"training": "train/box_loss", "validation": "val/box_loss"},
    "Objectness loss": {"training": "train/obj_loss", "validation": "val/obj_loss"},
    "Class loss": {"training": "train/cls_loss", "validation": "val/cls_loss"},
    "Distribution focal loss": {"training": "train/dfl_loss", "validation": "val/dfl_loss"},
    "Precision, recall": {"precision": "metrics/precision", "recall": "metrics/recall"},
    "mAP": {"mAP 0.5": "metrics/mAP_0.5", "mAP 0.5:0.95": "metrics/mAP_0.5:0.95"},
    "Learning rate": {"lr0": "x/lr0", "lr1": "x/lr1", "lr2": "x/lr2"},
}
CURVES = {
    "PR_curve.png": "Precision over recall",
    "F1_curve.png": "F1 over the score",
    "P_curve.png": "Precision over the score",
    "R_curve.png": "Recall over the score",
    "confusion_matrix.png": "Confusion matrix",
}
EXAMPLES = {
    "labels.jpg": "Labels of the training split",
    "train_batch0.jpg": "First training batch, as the network is shown it",
    "val_batch0_labels.jpg": "First validation batch: labels",
    "val_batch0_pred.jpg": "First validation batch: detections",
}
PACKAGES = ("torch", "torchvision", "timm", "numpy", "opencv-python", "opencv-python-headless", "pillow", "onnx")
# A page that may load nothing at all: what is not in the file is not shown, and no script runs.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:0 auto;max-width:1240px;padding:0 16px 60px;color:#222;background:#fff}
h1{margin-bottom:0}h2{margin-top:40px;border-bottom:1px solid #ddd}nav a{margin-right:14px}
table{border-collapse:collapse;font-size:14px}td,th{padding:2px 12px 2px 0;text-align:left;vertical-align:top;
border-bottom:1px solid #eee;overflow-wrap:anywhere}td.n{text-align:right;font-variant-numeric:tabular-nums}
pre{font-size:12px;overflow-x:auto;background:#f6f6f6;padding:10px}code{color:#666}
.tiles{display:flex;flex-wrap:wrap;gap:12px;margin:18px 0}.tiles div{background:#f3f6f9;padding:8px 16px;
border-radius:6px}.tiles b{display:block;font-size:22px}
.charts,.images{display:grid;grid-template-columns:repeat(auto-fill,minmax(350px,1fr));gap:16px}
.images{grid-template-columns:repeat(auto-fill,minmax(520px,1fr))}
.values{columns:3 300px;margin:0}.values div{display:flex;border-bottom:1px solid #eee;break-inside:avoid}
dt{width:45%;color:#555;flex:none}dd{margin:0;overflow-wrap:anywhere}.facts{white-space:pre-line}
figure{margin:0}figure img,svg{width:100%;height:auto;display:block}figcaption{font-size:13px}
.chart{font:11px system-ui,sans-serif}.chart text{fill:#555}.chart .title{font-size:13px;font-weight:600;fill:#222}
.chart polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}.chart .grid{stroke:#e8e8e8}
.chart .best{stroke:#888;stroke-dasharray:3 3}
.boxes rect{fill:transparent;stroke-width:2;vector-effect:non-scaling-stroke}
.boxes text{font-weight:600;paint-order:stroke;stroke:#fff;stroke-width:.22em;stroke-linejoin:round}
.right rect{stroke:#009E73}.missed rect{stroke:#0072B2;stroke-dasharray:7 4;stroke-width:3}
.wrong rect{stroke:#D55E00;stroke-width:3}.missed text{fill:#0072B2}.wrong text{fill:#B04A00}
.key label{margin-right:22px;cursor:pointer}.key i{display:inline-block;width:26px;margin:0 6px 3px 3px;
border-top:3px solid #009E73}.key i.m{border-top:3px dashed #0072B2}.key i.w{border-color:#D55E00}
.worst:has(#right:not(:checked)) .right,.worst:has(#missed:not(:checked)) .missed,
.worst:has(#wrong:not(:checked)) .wrong{display:none}
"""


@dataclass(frozen=True)
class RunFacts:
    """What a report tells besides the files of the run folder.

    Attributes:
        names: class names by number.
        options, hyp: as resolved; plain values.
        layers: table of the network's rows.
        model: its size in one line.
        device: what it was trained on, in one line.
        result: validation of the best weights, or None.
        worst: images with the most errors, the worst first.
    """

    names: Mapping[int, str]
    options: Mapping[str, Any]
    hyp: Mapping[str, Any]
    layers: str
    model: str
    device: str
    result: EvalResult | None = None
    worst: Sequence[ImageErrors] = ()


def collect_facts(
    config: TrainConfig,
    hyp: Hyperparameters,
    model: DetectionModel,
    device: torch.device,
    result: EvalResult | None,
    worst: Sequence[ImageErrors] = (),
) -> RunFacts:
    """Collect what the report of a training contains.

    Args:
        config: resolved options.
        hyp: hyperparameters.
        model: the trained model.
        device: of the training.
        result: validation of the best weights, or None.
        worst: images with the most errors, the worst first.
    """
    return RunFacts(
        names=model.names,
        options=config.to_dict(),
        hyp=hyp.to_dict(),
        layers=model.layer_table(),
        model=str(model.info(config.imgsz)),
        device=describe_device(device),
        result=result,
        worst=worst,
    )


def write_report(folder: Path, facts: RunFacts) -> Path:
    """Write `report.html` into a run folder atomically.

    Curves are drawn from results.csv; images of the folder are embedded where they exist.

    Returns:
        The file.
    """
    sections = {
        "Curves": _curves(folder),
        "Classes": _classes(facts),
        "Precision, recall, confusion": _images(folder, CURVES),
        "Worst images": _worst(facts),
        "Data": _images(folder, EXAMPLES),
        "Layers": f'<p class="facts">{text(facts.model)}</p><pre>{text(facts.layers)}</pre>',
        "Options": values(facts.options),
        "Hyperparameters": values(facts.hyp),
        "Environment": values(environment(facts.device)),
    }
    links = "".join(f'<a href="#s{k}">{text(title)}</a>' for k, title in enumerate(sections))
    body = "\n".join(
        f'<h2 id="s{k}">{text(title)}</h2>\n{content}' for k, (title, content) in enumerate(sections.items())
    )
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(folder.name)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>\n'
        f"<h1>{text(folder.name)}</h1>\n{_summary(folder, facts)}\n<nav>{links}</nav>\n{body}\n</body></html>\n"
    )
    path = folder / "report.html"
    with atomic_path(path) as part:
        part.write_text(page, encoding="utf-8")
    return path


def _summary(folder: Path, facts: RunFacts) -> str:
    """Return the subtitle and the headline metrics."""
    best, last = best_epoch(folder)
    trained = Path(str(facts.options.get("cfg") or facts.options.get("weights") or "")).name
    line = f"{trained} on {Path(str(facts.options.get('data', ''))).name}, {facts.options.get('imgsz')} pixels"
    tiles: list[tuple[str, str]] = []
    if facts.result is not None:
        r = facts.result
        figures = (("mAP 0.5", r.map50), ("mAP 0.5:0.95", r.map), ("precision", r.mp), ("recall", r.mr))
        tiles += [(number(value), name) for name, value in figures]
        tiles.append((str(r.images), "validation images"))
    if best:
        tiles += [(f"{best['best/epoch']:.0f}", "best epoch"), (str(last + 1), "epochs done")]
    shown = "".join(f"<div><b>{text(value)}</b>{text(name)}</div>" for value, name in tiles)
    return f'<p>{text(line)}</p><div class="tiles">{shown}</div>'


def _curves(folder: Path) -> str:
    try:
        history = read_history(folder / "results.csv")
    except DataError:
        return "<p>No epoch was finished.</p>"
    epochs = history.get("epoch", np.zeros(0)).tolist()
    best = best_epoch(folder)[0].get("best/epoch")
    charts = []
    for title, lines in CHARTS.items():
        known = {label: history[column].tolist() for label, column in lines.items() if column in history}
        charts.append(line_chart(title, epochs, known, best))
    hint = "<p>The dashed line marks the epoch of best.pt (highest 0.1 mAP 0.5 + 0.9 mAP 0.5:0.95).</p>"
    return f'<div class="charts">{"".join(charts)}</div>{hint}' if any(charts) else "<p>No epoch was finished.</p>"


def _classes(facts: RunFacts) -> str:
    r = facts.result
    if r is None:
        return "<p>The run was not validated.</p>"
    rows = [("all", int(r.nt.sum()), r.mp, r.mr, r.map50, r.map)]
    for k, c in enumerate(r.classes.tolist()):
        figures = (float(values[k]) for values in (r.p, r.r, r.ap50, r.ap))
        rows.append((facts.names.get(c, str(c)), int(r.nt[c]), *figures))  # type: ignore[arg-type]
    return table(rows, ("class", "labels", "precision", "recall", "AP 0.5", "AP 0.5:0.95"))


def _images(folder: Path, captions: Mapping[str, str]) -> str:
    shown = "".join(image_file(folder / name, caption) for name, caption in captions.items())
    return f'<div class="images">{shown}</div>' if shown else "<p>No images were written (--noplots).</p>"


def _worst(facts: RunFacts) -> str:
    if not facts.worst:
        return "<p>None: no errors, or no validation.</p>"
    keys = (("wrong", "w", "false positive"), ("missed", "m", "missed label"), ("right", "", "right"))
    labels = "".join(  # the style sheet hides the boxes of a kind that is not checked
        f'<label><input type="checkbox" id="{kind}" checked><i class="{mark}"></i>{words}</label>'
        for kind, mark, words in keys
    )
    shown = "".join(worst_image(found, facts.names) for found in facts.worst)
    hint = (
        f"Most errors first: detections above a score of {USE_SCORE} (detect.py's default) against labels, at IoU 0.5. "
        "A box of the wrong class is a false positive and a miss."
    )
    return f'<div class="worst"><p>{hint}</p><p class="key">{labels}</p><div class="images">{shown}</div></div>'


def environment(device: str) -> dict[str, str]:
    """Return time, command, versions, machine and commit of the run, as far as known."""
    found = {
        "finished": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": device,
        "system": f"{platform.platform()}, {os.cpu_count()} CPUs",
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = git_commit(ROOT)
    return found | ({"commit": commit} if commit else {})


def git_commit(root: Path) -> str:
    """Return the commit of a working tree, with `(changed)` if it is dirty, or ''."""
    if not (root / ".git").exists():
        return ""
    answers = []
    for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        if done.returncode:
            return ""
        answers.append(done.stdout.strip())
    return answers[0] + (" (changed)" if answers[1] else "")
