"""`export.py --benchmark`: accuracy and speed of every format and of PyTorch, in one run."""

from __future__ import annotations

import csv
import io
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.config import DataConfig, load_data_config
from data.labels.labels import load_annotations
from data.loading.dataset import DetectionDataset
from data.loading.loader import DetectionLoader
from engine.evaluate.evaluator import EvalOptions, check_classes, evaluate
from engine.export.config import FORMATS, ExportConfig, missing_packages
from engine.export.exporter import export
from engine.runtimes.base import Runtime
from engine.runtimes.pytorch import chosen_sides
from engine.runtimes.registry import choose_weights, open_runtime
from models.checkpoint.io import read_checkpoint
from utils.device import select_device, synchronize
from utils.errors import ConfigError
from utils.files import atomic_path

LOGGER = logging.getLogger(__name__)
EAGER = "pytorch"
ROUNDS = 15  # one batch per format and round, so that the load of the machine affects all formats alike
COLUMNS = ("format", "file", "MB", "mAP50", "mAP50-95", "ms per image", "ratio to pytorch")


@dataclass(frozen=True)
class BenchmarkRow:
    """One row of the table.

    Attributes:
        format: 'pytorch' or a key of `FORMATS`.
        file: name without folders.
        megabytes: size of the file.
        map50, map: mAP on the validation split, square images.
        milliseconds: median per image.
        ratio: speed relative to PyTorch (above 1 is faster).
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
    """The table, its files (CSV and Markdown), and one line per format that failed."""

    rows: tuple[BenchmarkRow, ...]
    files: tuple[Path, Path]
    failures: tuple[str, ...]


def benchmark(config: ExportConfig) -> BenchmarkReport:
    """Export every format of `--include` (without it, each whose packages are installed), validate and time each.

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
    exported = export(config.replaced(weights=weights, data=data, include=formats(config)))
    device = select_device(config.device)
    runtimes = {EAGER: open_runtime(weights, device)}
    runtimes |= {file.format: open_runtime([str(file.path)], device) for file in exported.exported_files}
    sides = chosen_sides(config.imgsz, config.is_given("imgsz"), getattr(runtimes[EAGER], "models", ()))
    side = -(-sides[0] // runtimes[EAGER].stride) * runtimes[EAGER].stride
    milliseconds = time_in_turns(runtimes, side, config.batch_size)
    dataset = load_data_config(data)
    check_classes(runtimes[EAGER].names, dataset, weights[0])
    path = Path(weights[0])
    sizes = {EAGER: (path.name, path.stat().st_size / 1e6)}
    sizes |= {file.format: (file.path.name, file.megabytes) for file in exported.exported_files}
    rows = [
        BenchmarkRow(
            name, *sizes[name], *_accuracy(runtime, dataset, side, config.batch_size), milliseconds[name],
            milliseconds[EAGER] / milliseconds[name],
        )
        for name, runtime in runtimes.items()
    ]  # fmt: skip
    files = write_table(path, rows, side, config.batch_size)
    return BenchmarkReport(tuple(rows), files, exported.failures)


def formats(config: ExportConfig) -> list[str]:
    """Return the formats of `--include`; without it, --half and --int8 those whose packages are installed."""
    if config.is_given("include") or config.int8 or config.half:
        return config.include
    missing = {name: missing_packages(form.packages) for name, form in FORMATS.items()}
    for name, packages in missing.items():
        if packages:
            LOGGER.warning("%s is left out: pip install %s", name, " ".join(packages))
    return [name for name in FORMATS if not missing[name]]


def time_in_turns(runtimes: Mapping[str, Runtime], side: int, batch: int = 1, rounds: int = ROUNDS) -> dict[str, float]:
    """Return the median milliseconds per image of `side` x `side` pixels, in batches of `batch` images.

    Formats take turns within a round.
    """
    images = torch.rand(batch, 3, side, side)
    seconds: dict[str, list[float]] = {name: [] for name in runtimes}
    for number in range(rounds + 2):  # the first two warm up
        for name, runtime in runtimes.items():
            start = time.perf_counter()
            runtime(images)
            synchronize(runtime.device)
            if number >= 2:
                seconds[name].append((time.perf_counter() - start) / batch)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def _accuracy(runtime: Runtime, data: DataConfig, side: int, batch_size: int) -> tuple[float, float]:
    """Return mAP50 and mAP50-95 on the validation split; every format gets the same square images."""
    annotations = load_annotations(data.split("val"), len(data.names), progress=False)
    batch = runtime.fixed_batch or batch_size
    dataset = DetectionDataset(annotations.records, side, rect=False, batch_size=batch, stride=runtime.stride)
    result = evaluate(runtime, DetectionLoader(dataset, batch, workers=0), EvalOptions(names=data.names))
    return result.map50, result.map


def write_table(weights: Path, rows: Sequence[BenchmarkRow], side: int, batch: int) -> tuple[Path, Path]:
    """Write the table as CSV and Markdown beside the weights, and log it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(row.cells() for row in rows)
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(row.cells() for row in rows)]
    markdown = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    threads = torch.get_num_threads()
    note = f"{side} x {side} pixels, batch {batch}, median of {ROUNDS} rounds in turns, {threads} thread(s)."
    files = weights.with_name(f"{weights.stem}_benchmark.csv"), weights.with_name(f"{weights.stem}_benchmark.md")
    for path, content in zip(files, (text.getvalue(), f"{markdown}\n\n{note}\n")):
        with atomic_path(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    LOGGER.info("%s\n%s\nSaved to %s and %s", markdown, note, *files)
    return files
