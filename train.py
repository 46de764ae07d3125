"""Train a detector: `python train.py --cfg models/yolov5-riformer.yaml --data data/shapes.yaml`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from engine.cli.config import TrainConfig
from engine.cli.parser import run_main

if TYPE_CHECKING:
    from engine.train.trainer import TrainResult
    from engine.tune.search import EvolveResult


def start(config: TrainConfig) -> TrainResult | EvolveResult:
    """Train, or tune hyperparameters (the engine is imported here so that `--help` is instant)."""
    if config.evolve is not None or config.resume_evolve is not None:
        from engine.tune.search import evolve

        return evolve(config)
    from engine.train.trainer import train

    return train(config)


def work(config: TrainConfig) -> None:
    """Run the command."""
    start(config)


def run(**options: Any) -> TrainResult | EvolveResult:
    """Train from Python: the command's flags as keywords, with underscores.

    Returns:
        The `TrainResult`; with `evolve` or `resume_evolve` the `EvolveResult`.
    """
    return start(TrainConfig.from_keywords(**options))


if __name__ == "__main__":
    sys.exit(run_main(TrainConfig, "train.py", "Train a detector with any backbone.", work))
