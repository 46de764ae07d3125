"""Speedup by re-parameterization and exported files, per family, as ratios within one run.

    python -m benchmarks.export_speed [--models yolov5n.yaml yolov5-riformer.yaml ...] [--imgsz 640] [--rounds 7]

Every detector has random weights (they do not matter for time). Its forms take turns within a round: training form in
evaluation mode, re-parameterized model, and the exported files in their runtimes; one image each. A ratio is the
median of the rounds' ratios: above 1, the form is faster than the one it is compared with. Nothing is verified here:
export.py does that.

Results: benchmarks/results/export_speed.json and .md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import machine, markdown_table, write_results
from engine.export.formats.onnx import onnx_model, save_onnx
from engine.export.formats.openvino import save_openvino
from engine.export.formats.torchscript import save_torchscript
from engine.export.wrapper import ExportGraph, GraphShape, reparameterized_copy
from engine.runtimes.base import Runtime
from engine.runtimes.metadata import Metadata
from engine.runtimes.pytorch import PyTorchRuntime, grid_of
from engine.runtimes.registry import open_runtime
from models.yolo import DetectionModel

MODELS = (
    "yolov5n.yaml",
    "yolov5-riformer.yaml",
    "yolov5-revvit.yaml",
    "yolov5-repmlp.yaml",
    "yolov5-nextvit.yaml",
    "yolov5-timm.yaml",
)
TRAINING, REPARAMETERIZED = "training form", "re-parameterized model"
FILES = ("torchscript", "onnx", "openvino")
CPU = torch.device("cpu")


def forms(cfg: str, imgsz: int, folder: Path, files: tuple[str, ...]) -> dict[str, Runtime]:
    """Return the training, re-parameterized and exported forms of a detector."""
    torch.manual_seed(0)
    model = DetectionModel(cfg, nc=3).eval().requires_grad_(False)
    reparameterized = reparameterized_copy(model)
    grid = grid_of(model)
    side = -(-imgsz // grid) * grid
    shape = GraphShape(1, side, side, False, grid)
    metadata = Metadata(names={0: "a", 1: "b", 2: "c"}, stride=grid, imgsz=(side, side), batch=1)
    graph = ExportGraph(reparameterized).eval()
    name = Path(cfg).stem
    paths = {kind: folder / f"{name}{suffix}" for kind, suffix in zip(FILES, (".torchscript", ".onnx", "_openvino"))}
    if "torchscript" in files:
        save_torchscript(graph, paths["torchscript"], metadata, shape)
    if "onnx" in files or "openvino" in files:
        onnx = onnx_model(graph, shape, opset=17)
        save_onnx(onnx, paths["onnx"], metadata, shape)
        if "openvino" in files:
            paths["openvino"].mkdir()
            save_openvino(onnx, paths["openvino"], name, metadata, half=False)
    ready: dict[str, Runtime] = {
        TRAINING: PyTorchRuntime.from_model(model.to(memory_format=torch.channels_last), CPU),
        REPARAMETERIZED: PyTorchRuntime.from_model(reparameterized.to(memory_format=torch.channels_last), CPU),
    }
    return ready | {kind: open_runtime([str(paths[kind])], CPU) for kind in files}


def measure(
    runtimes: Mapping[str, Runtime], image: torch.Tensor, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Return the seconds per round of every form."""
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in runtimes}
    for number in range(options.warmup + options.rounds):
        for name, runtime in runtimes.items():
            start = clock()
            runtime(image)
            if number >= options.warmup:
                taken[name].append(clock() - start)
    return taken


def ratio(taken: Mapping[str, list[float]], name: str, to: str) -> float:
    """Return the speedup of `name` over `to`."""
    return statistics.median(b / a for a, b in zip(taken[name], taken[to]))


def text(results: dict[str, Any]) -> str:
    files = results["files"]
    ours = "re-parameterized"
    header = ["model", "training form, ms", f"{ours} over training", *(f"{kind} over {ours}" for kind in files)]
    lines = [
        [
            row["model"],
            f"{1000 * statistics.median(row['seconds'][TRAINING]):.0f}",
            f"{row['ratios'][REPARAMETERIZED]:.2f}",
            *(f"{row['ratios'][kind]:.2f}" for kind in files),
        ]
        for row in results["rows"]
    ]
    about = (
        f"{results['imgsz']} x {results['imgsz']} pixels, batch 1, float32, {results['clock']} time; medians of "
        f"{results['rounds']} interleaved rounds. Above 1 = faster. PyTorch forms run in channels_last."
    )
    return f"# Re-parameterized models and exported files\n\n{about}\n\n{markdown_table(header, lines)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of re-parameterized models and exported files, as ratios.")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="model YAMLs")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2, help="discarded rounds")
    parser.add_argument("--threads", type=int, default=0, help="threads of every runtime; 0 = PyTorch's default")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a busy machine")
    parser.add_argument("--files", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--name", default="export_speed", help="name of the two result files")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    about = {**machine(CPU), **{package: version(package) for package in ("onnxruntime", "openvino")}}
    rows: list[dict[str, Any]] = []
    for cfg in options.models:
        with tempfile.TemporaryDirectory() as folder:
            runtimes = forms(cfg, options.imgsz, Path(folder), tuple(options.files))
            side = (runtimes[options.files[0]].imgsz or (options.imgsz,))[0]
            taken = measure(runtimes, torch.rand(1, 3, side, side), options)
            ratios = {REPARAMETERIZED: ratio(taken, REPARAMETERIZED, TRAINING)}
            ratios |= {kind: ratio(taken, kind, REPARAMETERIZED) for kind in options.files}
            rows.append({"model": Path(cfg).stem, "seconds": taken, "ratios": ratios})
            del runtimes
        results = {"machine": about, **vars(options), "rows": rows}
        write_results(options.name, results, text(results))  # after each: a long run may be interrupted


if __name__ == "__main__":
    main()
