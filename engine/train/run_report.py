"""report.html of a training run: a self-contained file."""

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
from engine.evaluate.worst_images import SHOWN_CONF, ImageErrors
from engine.loggers.run_logger import best_epoch
from engine.report.html import EmbeddedImage, image_files, line_chart, render, worst_image, write_text
from models.yolo import DetectionModel
from utils.device import describe_device
from utils.errors import DataError, hide_passwords
from utils.files import ROOT
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
    "F1_curve.png": "F1 over the confidence",
    "P_curve.png": "Precision over the confidence",
    "R_curve.png": "Recall over the confidence",
    "confusion_matrix.png": "Confusion matrix",
}
EXAMPLES = {
    "labels.jpg": "Labels of the training split",
    "labels_correlogram.jpg": "Joint distributions of box centers and sizes",
    "train_batch0.jpg": "First training batch, as the network receives it",
    "val_batch0_labels.jpg": "First validation batch: labels",
    "val_batch0_pred.jpg": "First validation batch: detections",
}
PACKAGES = ("torch", "torchvision", "timm", "numpy", "opencv-python", "opencv-python-headless", "pillow", "onnx")


@dataclass(frozen=True)
class RunFacts:
    """Content of a report besides the files of the run folder.

    Attributes:
        names: class names by number.
        options, hyp: resolved values, plain.
        layers: table of the network's rows.
        model: size of the model in one line.
        device: training device in one line.
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
    """Collect the content of a training report.

    Args:
        config: resolved options.
        hyp: hyperparameters.
        model: the trained model.
        device: training device.
        result: validation of the best weights, or None.
        worst: images with the most errors, the worst first.
    """
    return RunFacts(
        names=model.names,
        options=config.to_dict(),
        hyp=hyp.to_dict(),
        layers=hide_passwords(model.layer_table()),
        model=str(model.info(config.imgsz)),
        device=describe_device(device),
        result=result,
        worst=worst,
    )


def write_report(folder: Path, facts: RunFacts) -> Path:
    """Write `report.html` into a run folder atomically and return its path.

    Curves are drawn from results.csv; images of the folder are embedded where they exist.
    """
    best, last = best_epoch(folder)
    trained = Path(str(facts.options.get("cfg") or facts.options.get("weights") or "")).name
    r = facts.result
    tiles: list[tuple[Any, str]] = []
    if r is not None:
        tiles += [(r.map50, "mAP 0.5"), (r.map, "mAP 0.5:0.95"), (r.mp, "precision"), (r.mr, "recall")]
        tiles.append((r.images, "validation images"))
    if best:
        tiles += [(int(best["best/epoch"]), "best epoch"), (last + 1, "epochs done")]
    page = render(
        "run.html",
        title=folder.name,
        subtitle=f"{trained} on {Path(str(facts.options.get('data', ''))).name}, {facts.options.get('imgsz')} pixels",
        tiles=tiles,
        charts=_charts(folder, best.get("best/epoch")),
        classes=_classes(facts),
        curves=image_files(folder, CURVES),
        worst=[worst_image(found, facts.names) for found in facts.worst],
        confidence=SHOWN_CONF,
        examples=image_files(folder, EXAMPLES),
        facts=facts,
        environment=environment(facts.device),
    )
    return write_text(folder / "report.html", page)


def _charts(folder: Path, best: float | None) -> list[EmbeddedImage]:
    try:
        history = read_history(folder / "results.csv")
    except DataError:
        return []
    epochs = history.get("epoch", np.zeros(0)).tolist()
    found = [
        line_chart(title, epochs, {k: history[name].tolist() for k, name in lines.items() if name in history}, best)
        for title, lines in CHARTS.items()
    ]
    return [chart for chart in found if chart is not None]


def _classes(facts: RunFacts) -> list[tuple[Any, ...]]:
    """Return a row for all classes and one for each: name, labels, precision, recall, AP 0.5, AP 0.5:0.95."""
    r = facts.result
    if r is None:
        return []
    rows = zip(r.classes.tolist(), *(values.tolist() for values in (r.p, r.r, r.ap50, r.ap)))
    return [
        ("all", int(r.nt.sum()), r.mp, r.mr, r.map50, r.map),
        *((facts.names.get(c, str(c)), int(r.nt[c]), *metrics) for c, *metrics in rows),
    ]


def environment(device: str) -> dict[str, str]:
    """Return time, command, versions, machine and commit of the run, as far as known."""
    found = {
        "finished": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": hide_passwords(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
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
