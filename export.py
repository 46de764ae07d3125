"""Export a detector: `python export.py --weights runs/train/exp/weights/best.pt --include onnx openvino`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from engine.cli.parser import run_main
from engine.export.config import ExportConfig
from utils.errors import ExportError
from utils.log import print_error

if TYPE_CHECKING:
    from engine.export.benchmark import BenchmarkReport
    from engine.export.exporter import ExportReport


def work(config: ExportConfig) -> int:
    """Run the command; return 1 if an export or its verification failed."""
    try:
        report = _job(config)
    except ExportError as error:
        print_error("export.py", error)
        return 1
    return 1 if report.failures else 0


def run(**options: Any) -> ExportReport | BenchmarkReport:
    """Export from Python: the command's flags as keywords, with underscores.

    Returns:
        The `ExportReport`; with `benchmark=True` the `BenchmarkReport`.
    """
    return _job(ExportConfig.from_keywords(**options))


def _job(config: ExportConfig) -> ExportReport | BenchmarkReport:
    from engine.export.benchmark import benchmark
    from engine.export.exporter import export

    return benchmark(config) if config.benchmark else export(config)


if __name__ == "__main__":
    sys.exit(
        run_main(ExportConfig, "export.py", "Export a detector, with a verification that it computes the same.", work)
    )
