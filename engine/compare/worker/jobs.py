"""Jobs of a candidate's process: structure, memory, latency, export, training, validation."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.cli.config import Hyperparameters, TrainConfig, ValConfig
from engine.cli.plugins import load_plugins
from engine.compare.measure import machine
from engine.compare.measure.bootstrap import ImageBootstrap
from engine.compare.measure.detector import (
    Inference,
    Recipe,
    SampleFiles,
    SampleImages,
    Subject,
    TrainingStep,
    addresses,
    kept_for_backward,
    visit,
    warm_up,
)
from engine.compare.worker.setting import Setting
from engine.evaluate.coco import coco_installed
from engine.evaluate.evaluator import EvalOptions, build_loader, evaluate, prepare, split_annotations
from engine.evaluate.outputs import CocoSink
from engine.export.config import ExportConfig
from engine.export.exporter import export
from engine.export.wrapper import reparameterized_copy
from engine.runtimes.base import Runtime
from engine.runtimes.pytorch import PyTorchRuntime, grid_of
from engine.runtimes.registry import open_runtime
from engine.train.trainer import train
from models.backbones.base import FeatureLevel
from models.checkpoint.io import read_checkpoint, write_checkpoint
from models.loading import load_detector, spec_without_weights
from models.yolo import DetectionModel
from utils.device import select_device
from utils.errors import ExportError
from utils.files import find_file, make_folder
from utils.log import configure_logging
from utils.seed import seed_everything

# COCO's bounds of small, medium and large objects: areas in pixels of the original image.
AREAS = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, math.inf)}
COCO_PLACE = {"small": 3, "medium": 4, "large": 5}  # among COCO's twelve metrics


@dataclass
class State:
    """What a process keeps between jobs.

    Attributes:
        setting: of the candidate.
        device: set by `setup`.
        subject: what is being timed.
        baseline_mb: resident memory before the model is built.
    """

    setting: Setting
    device: torch.device = torch.device("cpu")
    subject: Subject | None = None
    baseline_mb: float = 0.0


def setup(state: State) -> None:
    """Select the device, limit threads and memory, load plugins."""
    setting = state.setting
    if setting.threads:
        torch.set_num_threads(setting.threads)
    state.device = select_device(setting.device)
    if state.device.type == "cuda":
        torch.cuda.set_device(state.device)
    else:
        machine.limit_memory(setting.memory)
    load_plugins(list(setting.plugin))
    configure_logging()
    state.baseline_mb = machine.resident_mb()


def build(state: State) -> DetectionModel:
    """Return the candidate's detector: from its YAML with fixed random weights, or from its checkpoint."""
    file, names = state.setting.file, state.setting.names
    if file.suffix.lower() in (".yaml", ".yml"):
        seed_everything(0)
        model = DetectionModel(file, nc=len(names))
        model.names = dict(names)
    else:
        model = load_detector(file)
    return model.to(state.device)


def initial(state: State, *, checkpoint: str) -> float:
    """Write the candidate's model with its random weights, unless it is a checkpoint itself.

    Returns:
        Size of the file in MB.
    """
    path = Path(checkpoint)
    if path != state.setting.file:
        model = build(state)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"names": dict(model.names), "stride": [float(s) for s in model.stride]}
        write_checkpoint(path, {"spec": spec_without_weights(model.yaml), "state": model.cpu().state_dict(), **content})
    return path.stat().st_size / machine.MB


def structure(state: State, *, imgsz: int, checkpoint: str) -> dict[str, Any]:
    """Return parameters and GFLOPs of the parts, levels, strides and size of the checkpoint, which is written.

    Args:
        state: of the process.
        imgsz: side in pixels; rounded up to the model's grid.
        checkpoint: see `initial`.
    """
    model = build(state).eval()
    side = on_grid(imgsz, model)
    info, deployed = model.info(side), reparameterized_copy(model).info(side)
    return {
        "parts": {p.name: {"parameters": p.parameters, "gflops": finite(p.gflops)} for p in info.parts},
        "parameters": info.parameters,
        "gflops": finite(info.gflops),
        "deployed_parameters": deployed.parameters,
        "deployed_gflops": finite(deployed.gflops),
        "levels": levels_read(model),
        "strides": [int(s) for s in model.stride],
        "side": side,
        "disk_mb": initial(state, checkpoint=checkpoint),
    }


def levels_read(model: DetectionModel) -> list[list[int]]:
    """Return (stride, channels) of each map of the `backbone:` section that other rows read, high resolution first."""
    inside: dict[int, FeatureLevel] = {}
    for route in model.model.routes:
        if route.layer.section == "backbone":
            inside |= {slot: level for slot, level in zip(route.outputs, route.levels) if slot is not None}
    read = {slot for route in model.model.routes if route.layer.section == "head" for slot in route.sources}
    found = {(level.stride, level.channels) for slot, level in inside.items() if slot in read}
    return [list(pair) for pair in sorted(found)]


def finite(value: float) -> float | None:
    """Return the number, or None for values that JSON cannot represent."""
    return float(value) if math.isfinite(value) else None


def on_grid(imgsz: int, model: DetectionModel) -> int:
    """Round the size up to a multiple of the model's stride, at least two cells, as train.py does."""
    grid = grid_of(model)
    return max(-(-imgsz // grid) * grid, 2 * grid)


def training_memory(state: State, *, sample: SampleFiles, recipe: dict[str, Any], batch: int) -> dict[str, Any]:
    """Return the peak memory of two training steps, and what a forward pass keeps for the backward pass.

    Args:
        state: of a fresh process: the peak is that of its whole life.
        sample: image files with labels.
        recipe: options of train.py.
        batch: images per step.
    """
    step = _training_step(state, sample, recipe, batch)
    found = memory_of(state, lambda: warm_up(step))
    kept = kept_for_backward(step.loss, addresses(step.model))
    return {**found, "kept_mb": kept / machine.MB, "batch": batch, "amp": str(step.step.amp or torch.float32)[6:]}


def _training_step(state: State, sample: SampleFiles, recipe: dict[str, Any], batch: int) -> TrainingStep:
    model = build(state)
    config = TrainConfig(**{**recipe, "imgsz": on_grid(recipe["imgsz"], model)})
    hyp = Hyperparameters.from_yaml(find_file(config.hyp, "data/hyps"))
    return TrainingStep(model, SampleImages.load(sample), Recipe(config, hyp), batch, state.device)


def memory_of(state: State, work: Callable[[], Any]) -> dict[str, Any]:
    """Do some work; return the peak of memory and the result of the work.

    CUDA: the allocator's peak during the work. CPU: the peak of the process since its start, and its memory before the
    model was built.
    """
    cuda = state.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(state.device)
    result = work()
    if cuda:
        peak = torch.cuda.max_memory_allocated(state.device) / machine.MB
        return {
            "peak_mb": peak,
            "reserved_mb": torch.cuda.max_memory_reserved(state.device) / machine.MB,
            "took": result,
        }
    return {"peak_mb": machine.peak_mb(), "baseline_mb": state.baseline_mb, "took": result}


def open_inference(
    state: State, *, weights: str, sample: SampleFiles, batch: int, imgsz: int, training_form: bool
) -> dict[str, Any]:
    """Open a detector to be timed, and warm up.

    Args:
        state: of the process; for the peak of memory a fresh one.
        weights: checkpoint, or exported file.
        sample: image files with labels.
        batch: images per call.
        imgsz: side in pixels.
        training_form: the model as it is trained, not re-parameterized.

    Returns:
        `took` (seconds of a call), `peak_mb`, `side`.
    """
    state.subject = None
    runtime: Runtime
    if training_form:
        model = load_detector(weights, state.device).requires_grad_(False).to(memory_format=torch.channels_last)
        runtime = PyTorchRuntime.from_model(model, state.device)
    else:
        runtime = open_runtime([weights], state.device)
    side = runtime.imgsz[0] if runtime.imgsz else max(-(-imgsz // runtime.stride), 2) * runtime.stride
    subject = Inference(runtime, SampleImages.load(sample), batch, side)
    state.subject = subject
    return {**memory_of(state, lambda: warm_up(subject)), "side": side}


def open_training(state: State, *, sample: SampleFiles, recipe: dict[str, Any], batch: int) -> dict[str, Any]:
    """Prepare training steps to be timed, and warm up. Arguments as `training_memory`."""
    state.subject = None
    step = _training_step(state, sample, recipe, batch)
    state.subject = step
    took = warm_up(step)
    step.rest()
    return {"took": took}


def visit_subject(state: State, *, calls: int) -> dict[str, float]:
    """Time one turn; see `engine.compare.measure.detector.visit`."""
    assert state.subject is not None
    return visit(state.subject, calls)


def close_subject(state: State) -> None:
    """Free what was timed."""
    state.subject = None
    if state.device.type == "cuda":
        torch.cuda.empty_cache()


def export_file(
    state: State,  # noqa: ARG001
    *,
    weights: str,
    folder: Path,
    format: str,
    batch: int,
    imgsz: int,
    data: str,
) -> dict[str, Any]:
    """Export a checkpoint with its verification.

    Args:
        state: of the process.
        weights: checkpoint.
        folder: where the file goes.
        format: 'onnx', 'openvino' or 'torchscript'.
        batch, imgsz: of the graph.
        data: dataset YAML: images for the verification.

    Raises:
        ExportError: it cannot be made, or its outputs differ from the model's.
    """
    copy = make_folder(folder) / "model.pt"
    shutil.copyfile(weights, copy)
    report = export(
        ExportConfig(weights=[str(copy)], include=[format], batch_size=batch, imgsz=[imgsz], data=data, device="cpu")
    )
    if report.failures:
        raise ExportError(report.failures[0])
    (made,) = report.exported_files
    return {
        "path": str(made.path),
        "disk_mb": made.megabytes,
        "verification": {"px": made.comparison.row_px, "score": made.comparison.row_score},
    }


def run_training(state: State, *, recipe: dict[str, Any], folder: str) -> dict[str, Any]:  # noqa: ARG001
    """Train; an interrupted training in the same folder is continued, a finished one is not repeated.

    Args:
        state: of the process.
        recipe: options of train.py.
        folder: of the run.
    """
    place = Path(folder)
    last = place / "weights" / "last.pt"
    config = TrainConfig(**{**recipe, "project": str(place.parent), "name": place.name, "exist_ok": True})
    if last.is_file():
        if read_checkpoint(last).train is None:
            return {"best": str(place / "weights" / "best.pt"), "resumed": False}
        config = TrainConfig(resume=str(last), device=recipe["device"], workers=recipe["workers"])
    result = train(config)
    return {"best": str(result.best), "resumed": bool(config.resume)}


def run_validation(
    state: State, *, weights: str, data: str, imgsz: int, task: str, batch: int, workers: int, scratch: str
) -> dict[str, Any]:
    """Return the accuracy of a checkpoint: overall, per class, and for small, medium and large objects (COCO's areas).

    Args:
        state: of the process.
        weights: checkpoint.
        data, imgsz, task, batch, workers: as val.py.
        scratch: folder for COCO's files.
    """
    config, described, runtime = prepare(
        ValConfig(
            weights=[weights], data=data, imgsz=imgsz, task=task, batch_size=batch, workers=workers,
            device=str(state.device), save_json=coco_installed(),
        )
    )  # fmt: skip
    annotations = split_annotations(config, described)
    loader = build_loader(config, annotations, runtime, rect=True)
    sink = CocoSink.for_data(described, annotations, described.names) if config.save_json else None
    bootstrap = ImageBootstrap()
    sinks = (bootstrap, sink) if sink else (bootstrap,)
    result = evaluate(runtime, loader, EvalOptions(names=described.names, sinks=sinks))
    loader.close()
    figures = sink.write(Path(scratch) / "predictions.json") if sink else None
    counts = objects_by_area(annotations.records)
    return {
        "map50": result.map50,
        "map": result.map,
        "precision": result.mp,
        "recall": result.mr,
        "images": result.images,
        "bootstrap": [round(value, 6) for value in bootstrap.map_values()],
        "objects": counts,
        "areas": {k: figures[COCO_PLACE[k]] if figures and counts[k] else None for k in AREAS},
        "classes": {
            described.names[c]: {
                "map50": float(result.ap50[k]),
                "map": float(result.ap[k]),
                "objects": int(result.nt[c]),
            }
            for k, c in enumerate(result.classes.tolist())
        },
    }


def objects_by_area(records: Any) -> dict[str, int]:
    """Count small, medium and large labeled objects."""
    areas = [r.labels[:, 3] * r.labels[:, 4] * r.height * r.width for r in records]
    together = np.concatenate([np.zeros(0), *areas])
    return {name: int(((low <= together) & (together < high)).sum()) for name, (low, high) in AREAS.items()}


JOBS: dict[str, Callable[..., Any]] = {
    "setup": setup,
    "initial": initial,
    "structure": structure,
    "training_memory": training_memory,
    "open_inference": open_inference,
    "open_training": open_training,
    "visit": visit_subject,
    "close": close_subject,
    "export": export_file,
    "train": run_training,
    "validate": run_validation,
}
