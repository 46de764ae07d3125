"""Operators, estimated kernel launches, host waits and copies on a simulated CUDA device, by phase and model.

    python -m benchmarks.launches [--models yolov5n yolov5s ...]

The counts depend on the code alone, not on the machine: a training step (float16, two images), a validated batch (32
images) and a detected frame. The device is `tests/helpers/pretend_cuda`; what it cannot show is in docs/gpu.md.

Results: benchmarks/results/launches.json and .md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.report import machine, markdown_table, write_results
from engine.cli.config import Hyperparameters, TrainConfig
from engine.devices.distributed import World
from engine.runtimes.pytorch import PyTorchRuntime
from engine.train.ema import ModelEma
from engine.train.freeze import Frozen
from engine.train.optimizer import build_optimizer, parameter_groups
from engine.train.setup import ModelParts, build_loss
from engine.train.step import TrainStep
from models.yolo import DetectionModel
from tests.helpers.pretend_cuda import Record, pretend_cuda
from utils.files import ROOT
from utils.nms import non_max_suppression

GPU = torch.device("cuda", 0)
MODELS = (
    "yolov5n",
    "yolov5s",
    "yolov5s:free",
    "yolov5-riformer-s",
    "yolov5-repmlp-s",
    "yolov5-revvit-s",
    "yolov5-nextvit-s",
)
COLUMNS = ("ops", "launches", "waits", "copies")
SIDE = 64  # the counts hardly depend on it
TARGETS = torch.tensor([[k % 2, k, 0.2 + k / 20, 0.5, 0.05 + k / 15, 0.1 + k / 12] for k in range(10)])  # of all levels
Counts = dict[str, int]


def counts(record: Record) -> Counts:
    """Return the totals of a record."""
    return {column: record.total(getattr(record, column)) for column in COLUMNS}


@contextmanager
def phase(record: Record, table: dict[str, Counts], name: str) -> Iterator[None]:
    """Store what the block adds to the record under a name."""
    before = counts(record)
    yield
    table[name] = {column: value - before[column] for column, value in counts(record).items()}


def build(name: str) -> DetectionModel:
    """Return a model YAML's network on the device; `name:head` replaces its head."""
    name, _, head = name.partition(":")
    return DetectionModel(ROOT / f"models/{name}.yaml", nc=80, head=head or None).to(GPU)


def train_step(name: str, amp: str = "fp16") -> TrainStep:
    """Return a training step of a model YAML on the device, with the trainer's optimizer."""
    model = build(name).to(memory_format=torch.channels_last).train()
    config = TrainConfig(imgsz=SIDE, amp=amp)
    hyp = Hyperparameters.from_yaml(ROOT / "data/hyps/hyp.scratch-low.yaml")
    optimizer = build_optimizer("SGD", parameter_groups(model, 5e-4), 0.01, 0.9)
    parts = ModelParts(model, ModelEma(model), Frozen(), build_loss(model, hyp, config), 32)
    step = TrainStep(parts, optimizer, config, 10.0, GPU, World())
    step.scaler = torch.amp.GradScaler("cuda", init_scale=1.0, enabled=step.scaler.is_enabled())
    return step


def count_training(name: str, record: Record, amp: str = "fp16") -> dict[str, Counts]:
    """Count the second training step of a model: the first one allocates."""
    step = train_step(name, amp)
    images = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8).to(GPU)
    table: dict[str, Counts] = {}

    def timed(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with phase(record, table, label):
                return function(*arguments)

        return call

    for number in range(2):
        if number == 1:
            step.network = timed("forward", step.network)  # type: ignore[assignment]
            step.criterion = timed("loss", step.criterion)  # type: ignore[assignment]
            step.ema.update = timed("EMA", step.ema.update)  # type: ignore[method-assign]
        with phase(record, table, "backward"):
            step.backward(images, TARGETS, (0, number))
        with phase(record, table, "optimizer"):
            step.step()
    total = {c: table["backward"][c] + table["optimizer"][c] for c in COLUMNS}
    inner = {"backward": ("forward", "loss"), "optimizer": ("EMA",)}
    for outer, names in inner.items():
        table[outer] = {c: table[outer][c] - sum(table[name][c] for name in names) for c in COLUMNS}
    order = ("forward", "loss", "backward", "optimizer", "EMA")
    return {**{label: table[label] for label in order}, "training step": total}


def count_inference(name: str, record: Record) -> dict[str, Counts]:
    """Count a validated batch (without its metrics, which are computed on the CPU) and a detected frame."""
    runtime = PyTorchRuntime.from_model(build(name).eval(), GPU)
    table: dict[str, Counts] = {}
    for label, batch, options in (("validated batch of 32", 32, (0.001, 0.6)), ("detected frame", 1, (0.25, 0.45))):
        images = torch.randint(0, 256, (batch, 3, SIDE, SIDE), dtype=torch.uint8)
        confidences = torch.linspace(0, 1, runtime(images).shape[1], device=GPU)
        with phase(record, table, label):
            rows = runtime(images)
            rows[..., 4] = confidences
            non_max_suppression(rows, *options, multi_label=batch > 1)
    return table


def main() -> None:
    """Count and write the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="names in models/, with :free for the other head")
    options = parser.parse_args()
    rows, results = [], {}
    for name in options.models:
        with pretend_cuda() as record:
            table = {**count_training(name, record), **count_inference(name, record)}
        results[name] = table
        rows += [[name, label, *(f"{value[c]:,}" for c in COLUMNS)] for label, value in table.items()]
    text = (
        "# Kernel launches, host waits and copies\n\nCounted on a simulated CUDA device (`python -m "
        "benchmarks.launches`); launches are estimates.\n\n" + markdown_table(["model", "phase", *COLUMNS], rows)
    )
    write_results("launches", {"machine": machine(torch.device("cpu")), "counts": results}, text)


if __name__ == "__main__":
    main()
