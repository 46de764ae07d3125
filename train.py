"""Train a detector: `python train.py --cfg models/yolov5-riformer.yaml --data data/shapes.yaml`."""

from __future__ import annotations

import sys
from typing import Any

from engine.cli import run_main
from engine.config import TrainConfig


def work(config: TrainConfig) -> None:
    """Train as the options say (the engine is imported here so that `--help` is instant)."""
    from engine.trainer import train

    train(config)


def run(**options: Any) -> Any:
    """Train from Python: the command's flags as keywords, with underscores. Returns the `TrainResult`."""
    from engine.trainer import train

    return train(TrainConfig.from_keywords(**options))


if __name__ == "__main__":
    sys.exit(run_main(TrainConfig, "train.py", "Train a detector with any backbone.", work))
