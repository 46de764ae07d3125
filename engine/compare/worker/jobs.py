"""Jobs of a candidate's process: structure, memory, latency, export, training, validation."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.formats.yolo import ImageRecord
from data.images import read
from engine.cli.config import Hyperparameters, TrainConfig, ValConfig
from engine.cli.plugins import load_plugins
from engine.compare.measure import machine
from engine.compare.measure.bootstrap import ImageBootstrap
from engine.compare.measure.detector import (
    Inference,
    SampleFiles,
    Subject,
    Times,
    TrainingStep,
    kept_for_backward,
    load_sample,
    visit,
    warm_up,
)
from engine.compare.worker.samples import SampleDetections, heat_map_urls
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
from engine.train.options import rounded_size
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


class CandidateJobs:
    """State of a candidate's process; a job is a method called by its name, which returns plain values.

    Args:
        setting: setting of the candidate.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.device = torch.device("cpu")
        self.subject: Subject | None = None
        self.baseline_mb = 0.0

    def setup(self) -> None:
        """Select the device, limit threads and memory, load plugins. The first job."""
        if self.setting.threads:
            torch.set_num_threads(self.setting.threads)
        self.device = select_device(self.setting.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            machine.limit_memory(self.setting.memory)
        load_plugins(list(self.setting.plugin))
        configure_logging()
        self.baseline_mb = machine.resident_mb()

    def build(self) -> DetectionModel:
        """Return the candidate's detector: from its YAML with fixed random weights, or from its checkpoint."""
        file, names = self.setting.file, self.setting.names
        if file.suffix.lower() in (".yaml", ".yml"):
            seed_everything(0)
            model = DetectionModel(file, nc=len(names), head=self.setting.head)
            model.names = dict(names)
        else:
            model = load_detector(file)
        return model.to(self.device)

    def write_initial(self, checkpoint: str) -> float:
        """Write the model with its random weights, unless the candidate is a checkpoint itself. Returns its MB."""
        path = Path(checkpoint)
        if path != self.setting.file:
            model = self.build()
            make_folder(path.parent)
            content = {"names": dict(model.names), "stride": [float(s) for s in model.stride]}
            state = model.cpu().state_dict()
            write_checkpoint(path, {**content, "spec": spec_without_weights(model.yaml), "state": state})
        return path.stat().st_size / machine.MB

    def structure(self, imgsz: int, checkpoint: str) -> dict[str, Any]:
        """Return parameters and GFLOPs of the parts, levels, strides and size of the checkpoint, which is written.

        Args:
            imgsz: side in pixels; rounded up to the model's grid.
            checkpoint: see `write_initial`.
        """
        model = self.build().eval()
        side = rounded_size(imgsz, grid_of(model))
        model.check_size(side, side)
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
            "disk_mb": self.write_initial(checkpoint),
        }

    # ---- speed and memory -------------------------------------------------------------------------------------------

    def open_training(self, sample: SampleFiles, recipe: dict[str, Any], batch: int) -> dict[str, Any]:
        """Prepare training steps to be timed, and warm up.

        Args:
            sample: image files with labels.
            recipe: options of train.py.
            batch: images per step.

        Returns:
            Memory of two steps, `took` (seconds of one), `kept_mb` (memory kept for the backward pass).
        """
        model = self.build()
        config = TrainConfig(**{**recipe, "imgsz": rounded_size(recipe["imgsz"], grid_of(model))})
        hyp = Hyperparameters.from_yaml(find_file(config.hyp, "data/hyps"))
        self.subject = subject = TrainingStep(model, load_sample(sample), config, hyp, batch)
        memory = self._memory_of(lambda: warm_up(subject))
        kept = kept_for_backward(subject.loss, model) / machine.MB
        return {**memory, "kept_mb": kept, "batch": batch, "amp": str(subject.step.amp or torch.float32)[6:]}

    def open_inference(
        self, weights: str, sample: SampleFiles, batch: int, imgsz: int, training_form: bool
    ) -> dict[str, Any]:
        """Open a detector to be timed, and warm up.

        Args:
            weights: checkpoint, or exported file.
            sample: image files with labels.
            batch: images per call.
            imgsz: side in pixels.
            training_form: the model as it is trained, not re-parameterized.

        Returns:
            Memory, `took` (seconds of a call) and `side`.
        """
        runtime: Runtime
        if training_form:
            model = load_detector(weights, self.device).requires_grad_(False).to(memory_format=torch.channels_last)
            runtime = PyTorchRuntime.from_model(model, self.device)
        else:
            runtime = open_runtime([weights], self.device)
        side = runtime.imgsz[0] if runtime.imgsz else rounded_size(imgsz, runtime.stride)
        self.subject = subject = Inference(runtime, load_sample(sample), batch, side)
        return {**self._memory_of(lambda: warm_up(subject)), "side": side}

    def _memory_of(self, work: Callable[[], float]) -> dict[str, Any]:
        """Run `work`; return its result as `took`, and the peak memory.

        CUDA: the allocator's peak during the work. CPU: the peak of the process since its start, and its memory before
        the model was built, so the process must be new.
        """
        if self.device.type != "cuda":
            return {"took": work(), "peak_mb": machine.peak_mb(), "baseline_mb": self.baseline_mb}
        torch.cuda.reset_peak_memory_stats(self.device)
        took = work()
        peak, reserved = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        return {"took": took, "peak_mb": peak / machine.MB, "reserved_mb": reserved / machine.MB}

    def visit(self, calls: int) -> Times:
        """Time one turn; see `engine.compare.measure.detector.visit`. Frees cached GPU memory for other candidates."""
        assert self.subject is not None
        times = visit(self.subject, calls)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return times

    def close(self) -> None:
        """Free the timed subject."""
        self.subject = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def export(self, weights: str, folder: Path, format: str, batch: int, imgsz: int, data: str) -> dict[str, Any]:
        """Export a checkpoint with its verification.

        Args:
            weights: checkpoint.
            folder: where the file is written.
            format: key of `FORMATS`.
            batch, imgsz: batch size and input side of the graph.
            data: dataset YAML: images for the verification.

        Raises:
            ExportError: the export fails, or its outputs differ from the model's.
        """
        copy = make_folder(folder) / "model.pt"
        shutil.copyfile(weights, copy)
        options: dict[str, Any] = {"include": [format], "batch_size": batch, "imgsz": [imgsz], "data": data}
        report = export(ExportConfig(weights=[str(copy)], device="cpu", **options))
        if report.failures:
            raise ExportError(report.failures[0])
        (made,) = report.exported_files
        differences = {"px": made.comparison.row_px, "score": made.comparison.row_score}
        return {"path": str(made.path), "disk_mb": made.megabytes, "verification": differences}

    # ---- accuracy ---------------------------------------------------------------------------------------------------

    def train(self, recipe: dict[str, Any], folder: str) -> str:
        """Train, or continue an interrupted training in the same folder, and return the best weights.

        Args:
            recipe: options of train.py.
            folder: run folder.
        """
        place = Path(folder)
        last, best = place / "weights" / "last.pt", place / "weights" / "best.pt"
        config = TrainConfig(**{**recipe, "project": str(place.parent), "name": place.name, "exist_ok": True})
        if last.is_file():
            if read_checkpoint(last).train is None:  # finished
                return str(best)
            own = {name: recipe[name] for name in ("device", "workers", "cache", "plugin")}
            config = TrainConfig.from_given({"resume": str(last), **own})
        return str(train(config).best)

    def validate(self, options: dict[str, Any], sample: SampleFiles, scratch: str) -> dict[str, Any]:
        """Return the accuracy of a checkpoint: overall, per class, for small, medium and large objects (COCO's areas).

        Args:
            options: options of val.py.
            sample: images of which some are returned with their detections and heat maps.
            scratch: folder for COCO's files.
        """
        config, described, runtime = prepare(
            ValConfig.from_keywords(**options, device=str(self.device), save_json=coco_installed())
        )
        annotations = split_annotations(config, described)
        loader = build_loader(config, annotations, runtime, rect=True)
        coco = CocoSink.for_data(described, annotations, described.names) if config.save_json else None
        bootstrap, detections = ImageBootstrap(), SampleDetections(sample)
        sinks = (bootstrap, detections, coco) if coco else (bootstrap, detections)
        result = evaluate(runtime, loader, EvalOptions(names=described.names, sinks=sinks))
        loader.close()
        assert isinstance(runtime, PyTorchRuntime)  # candidates are checkpoints
        for path, found in detections.found.items():
            found["heat"] = heat_map_urls(runtime, read(path), config.imgsz)
        metrics = coco.write(Path(scratch) / "predictions.json") if coco else None
        counts = objects_by_area(annotations.records)
        by_class = zip(result.classes.tolist(), result.ap50.tolist(), result.ap.tolist())
        return {
            "map50": result.map50,
            "map": result.map,
            "precision": result.mp,
            "recall": result.mr,
            "images": result.images,
            "bootstrap": [round(value, 6) for value in bootstrap.map_values()],
            "objects": counts,
            "areas": {name: metrics[k] if metrics and counts[name] else None for name, k in COCO_PLACE.items()},
            "classes": {
                described.names[c]: {"map50": ap50, "map": ap, "objects": int(result.nt[c])} for c, ap50, ap in by_class
            },
            "samples": detections.found,
        }


def levels_read(model: DetectionModel) -> list[list[int]]:
    """Return (stride, channels) of each map of the `backbone:` section that other rows read, high resolution first."""
    inside: dict[int, FeatureLevel] = {}
    for route in model.model.routes:
        if route.layer.section == "backbone":
            inside |= {slot: level for slot, level in zip(route.outputs, route.levels) if slot is not None}
    read = {slot for route in model.model.routes if route.layer.section == "head" for slot in route.sources}
    return [list(pair) for pair in sorted({(x.stride, x.channels) for slot, x in inside.items() if slot in read})]


def finite(value: float) -> float | None:
    """Return the number, or None for values that JSON cannot represent."""
    return float(value) if math.isfinite(value) else None


def objects_by_area(records: Iterable[ImageRecord]) -> dict[str, int]:
    """Count small, medium and large labeled objects."""
    areas = [r.labels[:, 3] * r.labels[:, 4] * r.height * r.width for r in records]
    together = np.concatenate([np.zeros(0), *areas])
    return {name: int(((low <= together) & (together < high)).sum()) for name, (low, high) in AREAS.items()}
