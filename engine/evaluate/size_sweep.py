"""Tasks of val.py over several models or sizes: `speed` and `study`."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from engine.cli.config import ValConfig
from engine.evaluate.accumulator import EvalResult
from engine.evaluate.evaluator import (
    EvalOptions,
    build_loader,
    evaluate,
    input_side,
    prepare,
    split_annotations,
    validate,
)
from engine.evaluate.outputs import run_folder
from engine.runtimes.registry import choose_weights
from utils.files import atomic_path
from utils.plots import plot_study

LOGGER = logging.getLogger(__name__)
STUDY_SIDES = tuple(range(256, 1536 + 128, 128))


def speed(config: ValConfig) -> list[EvalResult]:
    """Time each model on its own, with the thresholds of detection (confidence 0.25, IoU 0.45) and square images."""
    return [validate(config.replaced(weights=[path])) for path in choose_weights(config.weights)]


def study(config: ValConfig, sides: tuple[int, ...] = STUDY_SIDES) -> dict[str, np.ndarray]:
    """Measure accuracy and time of each model over input sizes.

    Writes `study_<data>_<weights>.txt` (a line per size: P, R, mAP50, mAP50-95, three losses, milliseconds per image
    of preprocess, inference and NMS) and `study.png` into the run folder.

    Args:
        config: options; `imgsz` is not used.
        sides: in pixels.

    Returns:
        (sizes, 10) by weights file.
    """
    tables = {}
    with run_folder(Path(config.project) / config.name, config.exist_ok) as run:
        plotted = {}
        weights = choose_weights(config.weights)
        for path in weights:
            rows, used = _rows(replace(config, weights=[path]), sides)
            tables[path] = rows
            name = _short(path, weights)
            with atomic_path(run.folder / f"study_{Path(config.data).stem}_{name}.txt") as part:
                np.savetxt(part, rows, fmt="%10.4g")
            plotted[name] = np.stack((used, rows[:, 2], rows[:, 3], rows[:, 7:].sum(1)), 1)
        plot_study(run.folder / "study.png", plotted)
    LOGGER.info("Results saved to %s", run.final)
    return tables


def _rows(config: ValConfig, sides: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the metrics per size (k, 10), and the sizes on the model's grid (k,)."""
    config, data, runtime = prepare(config)
    annotations = split_annotations(config, data)
    names = {0: "item"} if config.single_cls else data.names
    options = EvalOptions(
        names, config.single_cls, config.conf_thres, config.iou_thres, config.max_det,
        verbose=config.verbose, class_rows=config.verbose,
    )  # fmt: skip
    rows, used = [], []
    for wanted in sides:
        side = input_side(wanted, runtime)
        LOGGER.info("%s at %d pixels:", config.weights[0], side)
        loader = build_loader(replace(config, imgsz=side), annotations, runtime, rect=True)
        runtime.warmup((loader.batch_size, 3, side, side))
        result = evaluate(runtime, loader, options)
        loader.close()
        rows.append((result.mp, result.mr, result.map50, result.map, *result.losses, *result.speeds))
        used.append(side)
    return np.array(rows), np.array(used)


def _short(path: str, others: list[str]) -> str:
    """Return the file's stem, with its folders as prefix where several are equal (best.pt)."""
    stem = Path(path).stem
    alike = sum(Path(other).stem == stem for other in others) > 1
    return "_".join(Path(path).with_suffix("").parts[-3:]).strip("/") if alike else stem
