"""Compare backbones: `python compare.py --cfg models/yolov5n.yaml models/yolov5-riformer.yaml timm/convnext_atto`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from engine.cli.parser import run_main
from engine.compare.config import CompareConfig

if TYPE_CHECKING:
    from engine.compare.runner import Comparison


def work(config: CompareConfig) -> None:
    """Run the command (the engine is imported here so that `--help` is instant)."""
    from engine.compare.runner import compare

    compare(config)


def run(**options: Any) -> Comparison:
    """Compare from Python: the command's flags as keywords, with underscores. Returns the `Comparison`."""
    from engine.compare.runner import compare

    return compare(CompareConfig.from_keywords(**options))


if __name__ == "__main__":
    sys.exit(run_main(CompareConfig, "compare.py", "Compare detectors by size, speed, memory and accuracy.", work))
