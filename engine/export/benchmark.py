"""`export.py --benchmark`: accuracy and speed of every format beside PyTorch, in one run on one machine."""

from __future__ import annotations

import csv
import io
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data.config import load_data_config
from data.labels.labels import load_annotations
from data.loading.dataset import DetectionDataset
from data.loading.loader import DetectionLoader
from engine.evaluate.evaluator import EvalOptions, check_classes, evaluate
from engine.export.config import FORMATS, ExportConfig
from engine.export.exporter import ExportReport, export
from engine.runtimes.base import Runtime
from engine.runtimes.registry import choose_weights, open_runtime
from models.checkpoint.io import read_checkpoint
from utils.device import select_device, synchronize
from utils.errors import ConfigError
from utils.files import atomic_path

LOGGER = logging.getLogger(__name__)
EAGER = "pytorch"
ROUNDS = 15  # every format takes one image per round, so that all see the same moods of the machine
COLUMNS = ("format", "file", "MB", "mAP50", "mAP50-95", "ms per image", "ratio to pytorch")


@dataclass(frozen=True)
class BenchmarkRow:
    """One line of the table.

    Attributes:
        format: 'pytorch' or a key of `FORMATS`.
        file: name without folders.
        megabytes: its size.
        map50, map: accuracy on the validation split, square images.
        milliseconds: median per image, batch 1.
        ratio: speed as a multiple of PyTorch's (above 1 is faster).
    """

    format: str
    file: str
    megabytes: float
    map50: float
    map: float
    milliseconds: float
    ratio: float

    def cells(self) -> tuple[str, ...]:
        """Return the row as strings."""
        numbers = f"{self.megabytes:.1f}", f"{self.map50:.4f}", f"{self.map:.4f}", f"{self.milliseconds:.2f}"
        return self.format, self.file, *numbers, f"{self.ratio:.2f}"


@dataclass(frozen=True)
class BenchmarkReport:
    """The table, the files it was written to (CSV and Markdown), and one line per format that could not be made."""

    rows: tuple[BenchmarkRow, ...]
    files: tuple[Path, Path]
    failures: tuple[str, ...]


def benchmark(config: ExportConfig) -> BenchmarkReport:
    """Export every format of `--include` (all of them where only the default is asked for), validate and time each.

    Writes `<weights>_benchmark.csv` and `.md` beside the weights.

    Raises:
        ConfigError: no dataset, several weights, or a size that is not square.
    """
    weights = choose_weights(config.weights)
    if len(weights) != 1 or len({*config.imgsz}) != 1:
        raise ConfigError("--benchmark: takes one file of weights, and one square --imgsz")
    if config.nms:
        raise ConfigError("--benchmark: compares detectors without --nms; leave it out")
    data = config.data or str(read_checkpoint(weights[0]).metadata.get("data") or "")
    if not data:
        raise ConfigError("--benchmark: needs --data, a dataset YAML with a 'val:' split")
    default = ExportConfig().include
    include = list(FORMATS) if config.include == default and not (config.int8 or config.half) else config.include
    exported = export(replace(config, weights=weights, data=data, include=include))
    device = select_device(config.device)
    runtimes = {EAGER: open_runtime(weights, device)}
    runtimes |= {
        exported_file.format: open_runtime([str(exported_file.path)], device)
        for exported_file in exported.exported_files
    }
    side = -(-config.imgsz[0] // runtimes[EAGER].stride) * runtimes[EAGER].stride
    milliseconds = time_in_turns(runtimes, side)
    accuracy = {name: _accuracy(runtime, data, side, config.batch_size) for name, runtime in runtimes.items()}
    rows = _rows(Path(weights[0]), exported, milliseconds, accuracy)
    files = write_table(Path(weights[0]), rows, side)
    return BenchmarkReport(tuple(rows), files, exported.failures)


def time_in_turns(runtimes: Mapping[str, Runtime], side: int, rounds: int = ROUNDS) -> dict[str, float]:
    """Median milliseconds per image of `side` x `side` pixels.

    Formats take turns within a round. A file with a fixed batch above 1 is given full batches.
    """
    images = {name: torch.rand(runtime.fixed_batch or 1, 3, side, side) for name, runtime in runtimes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runtimes}
    for number in range(rounds + 2):  # the first two warm up
        for name, runtime in runtimes.items():
            start = time.perf_counter()
            runtime(images[name])
            synchronize(runtime.device)
            if number >= 2:
                seconds[name].append((time.perf_counter() - start) / len(images[name]))
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def _accuracy(runtime: Runtime, data: str, side: int, batch_size: int) -> tuple[float, float]:
    """mAP50 and mAP50-95 over the validation split; every format sees the same square images."""
    config = load_data_config(data)
    check_classes(runtime.names, config, data)
    result = evaluate(runtime, _loader(data, runtime, side, batch_size), EvalOptions(names=config.names))
    return result.map50, result.map


def _loader(data: str, runtime: Runtime, side: int, batch_size: int) -> DetectionLoader:
    config = load_data_config(data)
    annotations = load_annotations(config.split("val"), len(config.names), progress=False)
    batch = runtime.fixed_batch or batch_size
    dataset = DetectionDataset(annotations.records, side, rect=False, batch_size=batch, stride=runtime.stride)
    return DetectionLoader(dataset, batch, workers=0)


def _rows(
    weights: Path,
    exported: ExportReport,
    milliseconds: Mapping[str, float],
    accuracy: Mapping[str, tuple[float, float]],
) -> list[BenchmarkRow]:
    files = {EAGER: (weights.name, weights.stat().st_size / 1e6)}
    files |= {
        exported_file.format: (exported_file.path.name, exported_file.megabytes)
        for exported_file in exported.exported_files
    }
    return [
        BenchmarkRow(name, *files[name], *accuracy[name], took, milliseconds[EAGER] / took)
        for name, took in milliseconds.items()
    ]


def write_table(weights: Path, rows: Sequence[BenchmarkRow], side: int) -> tuple[Path, Path]:
    """Write the table as CSV and Markdown beside the weights, and log it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(row.cells() for row in rows)
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(row.cells() for row in rows)]
    markdown = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    note = f"{side} x {side} pixels, batch 1, median of {ROUNDS} rounds in turns, {torch.get_num_threads()} thread(s)."
    files = weights.with_name(f"{weights.stem}_benchmark.csv"), weights.with_name(f"{weights.stem}_benchmark.md")
    for path, content in zip(files, (text.getvalue(), f"{markdown}\n\n{note}\n")):
        with atomic_path(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    LOGGER.info("%s\n%s\nSaved to %s and %s", markdown, note, *files)
    return files
