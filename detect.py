"""Detect objects: `python detect.py --weights runs/train/exp/weights/best.pt --source data/images`."""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING, Any

from engine.cli.config import DetectConfig
from engine.cli.parser import resume_collection, run_main

if TYPE_CHECKING:
    from engine.predict.predictor import DetectReport


def work(config: DetectConfig) -> int:
    """Run the command; return 1 if an input could not be read (imports the engine here: `--help` is instant)."""
    gc.disable()  # until everything is imported
    from engine.predict.predictor import detect

    resume_collection()
    return 1 if detect(config).failures else 0


def run(**options: Any) -> DetectReport:
    """Detect from Python: the command's flags as keywords, with underscores. Returns the `DetectReport`."""
    from engine.predict.predictor import detect

    return detect(DetectConfig.from_keywords(**options))


if __name__ == "__main__":
    sys.exit(run_main(DetectConfig, "detect.py", "Detect objects in images, videos and streams.", work))
