"""Validate a detector: `python val.py --weights runs/train/exp/weights/best.pt --data data/shapes.yaml`."""

from __future__ import annotations

import gc
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from engine.cli.config import ValConfig
from engine.cli.parser import resume_collection, run_main

if TYPE_CHECKING:
    import numpy as np

    from engine.evaluate.accumulator import EvalResult


def work(config: ValConfig) -> None:
    """Run the command."""
    gc.disable()  # until everything is imported
    _job(config)


def run(**options: Any) -> EvalResult | list[EvalResult] | dict[str, np.ndarray]:
    """Validate from Python: the command's flags as keywords, with underscores.

    Returns:
        The `EvalResult`; with task 'speed' a list of them, with 'study' tables by weights file.
    """
    return _job(ValConfig.from_keywords(**options))


def _job(config: ValConfig) -> EvalResult | list[EvalResult] | dict[str, np.ndarray]:
    """Run the task; the engine is imported here so that `--help` is instant."""
    from engine.evaluate.chart_process import ChartProcess

    plots = not config.noplots and config.task not in ("speed", "study")
    with ChartProcess() if plots else nullcontext() as charts:  # starts before torch is imported
        from engine.evaluate.evaluator import validate
        from engine.evaluate.size_sweep import speed, study

        resume_collection()
        if config.task == "study":
            return study(config)
        return speed(config) if config.task == "speed" else validate(config, charts)


if __name__ == "__main__":
    sys.exit(run_main(ValConfig, "val.py", "Validate a detector on a dataset.", work))
