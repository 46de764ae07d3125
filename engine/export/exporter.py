"""Export: re-parameterize a copy, verify it, write a file, verify that, and only then rename it."""

from __future__ import annotations

import datetime
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from engine.cli.plugins import load_plugins
from engine.export.config import FORMATS, ExportConfig
from engine.export.formats.onnx import onnx_model, save_onnx, simplified
from engine.export.formats.onnx_nms import NmsOptions, embed_nms
from engine.export.formats.openvino import save_openvino
from engine.export.formats.torchscript import save_torchscript
from engine.export.int8 import CALIBRATION_IMAGES, quantized
from engine.export.samples import CALIBRATION_SPLITS, ImageSource, as_images, find_images
from engine.export.verification import OutputDifference, Verification, precision, verification_inputs
from engine.export.wrapper import ExportGraph, GraphShape, reparameterized_copy
from engine.runtimes.base import Runtime
from engine.runtimes.exported import ExportedRuntime
from engine.runtimes.metadata import Metadata
from engine.runtimes.pytorch import chosen_sides, grid_of
from engine.runtimes.registry import CHECKPOINT_SUFFIXES, choose_weights, open_runtime
from models.checkpoint.io import read_checkpoint
from models.loading import load_detector, require_rgb
from models.yolo import DetectionModel
from utils.device import out_of_memory, select_device
from utils.errors import CheckpointError, ConfigError, ExportError
from utils.files import make_folder
from utils.log import aligned

if TYPE_CHECKING:
    from onnx import ModelProto

LOGGER = logging.getLogger(__name__)
MEMORY_ADVICE = "a smaller --batch-size, a smaller --imgsz, or --device cpu"


@dataclass(frozen=True)
class ExportedFile:
    """An exported file.

    Attributes:
        format: key of `FORMATS`.
        path: the file, or OpenVINO's folder.
        megabytes: size of the file.
        seconds: time to write and verify it.
        comparison: difference from the re-parameterized model.
        verification: the JSON record.
    """

    format: str
    path: Path
    megabytes: float
    seconds: float
    comparison: OutputDifference
    verification: Path


@dataclass(frozen=True)
class ExportReport:
    """Result of an export: the files, and one line per format that failed."""

    exported_files: tuple[ExportedFile, ...]
    failures: tuple[str, ...]


def export(config: ExportConfig) -> ExportReport:
    """Export to the formats of `--include`.

    Returns:
        The exported files; a format that cannot be exported, or fails its verification, is in `failures` and leaves
        no file.

    Raises:
        ExportError: outputs of the re-parameterized model and the training form differ; nothing is exported.
        UserError: options, weights or folders that cannot be used.
    """
    load_plugins(config.plugin)
    device = select_device(config.device)
    if config.half and device.type == "cpu":
        LOGGER.warning(
            "--half on a CPU: float16 files are written and verified; they are smaller, not faster, on a CPU"
        )
    for flag, reason in config.without_effect().items():
        LOGGER.warning("%s has no effect: %s", flag, reason)
    exported_files: list[ExportedFile] = []
    failures: list[str] = []
    for weights in choose_weights(config.weights):
        job = Job.prepare(config, Path(weights), device)
        for name in dict.fromkeys(config.include):
            try:
                exported_files.append(job.make(name))
            except ExportError as error:
                failures.append(str(error))
                LOGGER.error("%s: %s: %s", weights, error, job.remaining_file(name))
    LOGGER.info("%s", summary(exported_files))
    return ExportReport(tuple(exported_files), tuple(failures))


@dataclass
class Job:
    """The export of one checkpoint.

    Attributes:
        weights: the checkpoint.
        deployed: re-parameterized model, float32, on `device`.
        shape: input of the graph.
        metadata: metadata of the exported files.
        images: images for the calibration of int8 ranges.
        verification: verification of the re-parameterized model.
    """

    config: ExportConfig
    weights: Path
    device: torch.device
    deployed: DetectionModel
    shape: GraphShape
    metadata: Metadata
    images: ImageSource
    verification: Verification
    _graph: ModelProto | None = None

    @classmethod
    def prepare(cls, config: ExportConfig, weights: Path, device: torch.device) -> Job:
        """Read the checkpoint, re-parameterize a copy of the model, and verify that it computes the same."""
        if weights.is_file() and weights.suffix.lower() not in CHECKPOINT_SUFFIXES:
            raise ConfigError(f"--weights {weights}: is exported already; give a checkpoint (.pt)")
        checkpoint = read_checkpoint(weights)
        make_folder(weights.parent)
        model = load_detector(weights, device)
        require_rgb(model)
        shape = input_shape(config, model)
        images = find_images(config.data, checkpoint.metadata)
        calibration = find_images(config.data, checkpoint.metadata, CALIBRATION_SPLITS) if config.int8 else images
        model.check_size(shape.height, shape.width)
        inputs = verification_inputs(images, shape)
        for height, width in {shape.example[2:], *(batch.shape[2:] for batch in inputs)}:
            model.check_size(
                height, width, advice="without --dynamic, which is traced and verified at small sizes, too"
            )
        deployed = reparameterized_copy(model)
        with out_of_memory(shape.example, MEMORY_ADVICE):
            verification = Verification(model, deployed, inputs, images.origin, device)
        done = verification.deployment
        LOGGER.info(
            "Re-parameterized model verified equal: rows within %.2g px and %.2g in score, %d of %d boxes matched",
            done.row_px, done.row_score, done.matched, done.reference,
        )  # fmt: skip
        about = {"task": "detect", "precision": precision(config), "layout": config.layout}
        about |= describe(model, weights)
        if config.nms:
            about["nms_options"] = _nms_options(config).describe()
        metadata = Metadata(
            names=dict(model.names), stride=shape.grid, imgsz=(shape.height, shape.width), batch=shape.batch,
            dynamic=shape.dynamic, nms=config.nms, about=about,
        )  # fmt: skip
        return cls(config, weights, device, deployed, shape, metadata, calibration, verification)

    def final_path(self, name: str) -> Path:
        """Return the path of an exported file: beside the weights, with `_int8` in the name for int8."""
        mark = "_int8" if self.config.int8 else ""
        return self.weights.with_name(f"{self.weights.stem}{mark}{FORMATS[name].suffix}")

    def make(self, name: str) -> ExportedFile:
        """Write one format, run it, compare, and rename it to its final name.

        Raises:
            ExportError: the file cannot be written, or its outputs differ; no file is left.
        """
        start = time.perf_counter()
        final = self.final_path(name)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=final.parent) as scratch:
            made = Path(scratch) / final.name
            with out_of_memory(self.shape.example, MEMORY_ADVICE):
                self._write(name, made)
                comparison = self._verified(name, made)
            _move(made, final)
        verification_path = final.with_name(f"{final.name}.proof.json")
        self.verification.write(
            verification_path, final.name, comparison, self.config, {"versions": self._versions(name)}
        )
        seconds = time.perf_counter() - start
        return ExportedFile(name, final, _megabytes(final), seconds, comparison, verification_path)

    def _verified(self, name: str, file: Path) -> OutputDifference:
        """Run a file and compare its outputs.

        Raises:
            ExportError: it cannot be run, or its outputs differ.
        """
        try:
            runtime = _opened(file, self.device)
            assert isinstance(runtime, ExportedRuntime)
            return self.verification.of_file(name, runtime, self.config)
        except CheckpointError as error:
            raise ExportError(f"{name}: {str(error).removeprefix(f'{file}: ')}") from error

    def remaining_file(self, name: str) -> str:
        """Return, after a failure, whether an older file exists under the final name."""
        final = self.final_path(name)
        return f"nothing was written; {final} is from an earlier export" if final.exists() else "nothing was written"

    def _write(self, name: str, path: Path) -> None:
        about = {**self.metadata.about, "versions": json.dumps(self._versions(name))}
        metadata = replace(self.metadata, about=about)
        writers = {"torchscript": self._write_torchscript, "onnx": self._write_onnx, "openvino": self._write_openvino}
        writers[name](path, metadata)

    def _write_torchscript(self, path: Path, metadata: Metadata) -> None:
        save_torchscript(self._traceable(self.config.half), path, metadata, self.shape)

    def _write_onnx(self, path: Path, metadata: Metadata) -> None:
        save_onnx(self._onnx(self.config.half), path, metadata, self.shape)

    def _write_openvino(self, path: Path, metadata: Metadata) -> None:
        path.mkdir()
        # OpenVINO converts the weights itself and needs the float32 graph.
        save_openvino(self._onnx(half=False), path, self.weights.stem, metadata, self.config.half)

    def _versions(self, name: str) -> dict[str, str]:
        """Return the versions of the packages involved."""
        packages = ["torch", *FORMATS[name].packages.values()]
        if self.config.simplify and name != "torchscript":
            packages.append("onnxslim")
        return {package: version(package) for package in packages}

    def _traceable(self, half: bool) -> ExportGraph:
        model = deepcopy(self.deployed).half() if half else self.deployed
        return ExportGraph(model, torch.float16 if half else torch.float32, self.config.layout).eval()

    def _onnx(self, half: bool) -> ModelProto:
        """Return the ONNX graph for the options; float32 graphs are traced once."""
        if half or self._graph is None:
            graph = onnx_model(self._traceable(half), self.shape, self.config.opset)
            if half:
                return self._finished(graph)
            self._graph = self._finished(graph)
        return deepcopy(self._graph)

    def _finished(self, graph: ModelProto) -> ModelProto:
        c = self.config
        if c.simplify:
            graph = simplified(graph)
        if c.int8:
            graph = quantized(graph, self._calibration())
        if c.nms:
            embed_nms(graph, _nms_options(c))
        return graph

    def _calibration(self) -> list[NDArray[np.float32]]:
        images = as_images(self.images.load(CALIBRATION_IMAGES, self.shape.height, self.shape.width))
        size = 1 if self.shape.dynamic else self.shape.batch
        LOGGER.info("--int8: calibrated on %d images of %s", len(images), self.images.origin)
        if len(images) < size:
            images = images.repeat(-(-size // len(images)), 1, 1, 1)
        return [part.numpy() for part in images.split(size) if len(part) == size]


def input_shape(config: ExportConfig, model: DetectionModel) -> GraphShape:
    """Return the input of the graph, sides rounded up to multiples of the stride with a warning."""
    grid = grid_of(model)
    sides = chosen_sides(config.imgsz, config.is_given("imgsz"), [model])
    asked = sides[0], sides[-1]
    height, width = (-(-side // grid) * grid for side in asked)
    if (height, width) != asked:
        LOGGER.warning("--imgsz %d %d: rounded up to %d %d, multiples of the stride %d", *asked, height, width, grid)
    return GraphShape(config.batch_size, height, width, config.dynamic, grid)


def describe(model: DetectionModel, weights: Path) -> dict[str, str]:
    """Return the metadata of an exported file, without local paths."""
    first = model.spec.layers[0]
    name = first.module
    if model.model.routes[0].gives_levels:
        name += f" {dict(first.args) if not isinstance(first.args, tuple) else list(first.args)}"
    return {
        "description": f"detector exported from {weights.name}",
        "backbone": name,
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "spec": json.dumps(model.yaml, default=str),
    } | ({} if model.best_conf is None else {"best_conf": f"{model.best_conf:.4f}"})


def _nms_options(c: ExportConfig) -> NmsOptions:
    return NmsOptions(c.conf_thres, c.iou_thres, c.topk_per_class, c.topk_all, c.agnostic_nms)


def _opened(path: Path, device: torch.device) -> Runtime:
    """Open a file without logging its temporary name; its NMS is what the user asked for."""
    logger = logging.getLogger("engine.runtimes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return open_runtime([str(path)], device)
    finally:
        logger.setLevel(level)


def _move(made: Path, final: Path) -> None:
    """Rename a file, or a folder, replacing an older one."""
    if final.is_dir():
        old = made.with_name("old")
        os.replace(final, old)
        try:
            os.replace(made, final)
        except OSError:
            os.replace(old, final)
            raise
        shutil.rmtree(old)
    else:
        os.replace(made, final)


def _megabytes(path: Path) -> float:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files) / 1e6


def summary(exported_files: Sequence[ExportedFile]) -> str:
    """Return the table of the exported files, and the commands that run them."""
    if not exported_files:
        return "nothing was exported"
    rows: list[tuple[object, ...]] = [("format", "MB", "seconds", "px apart", "score apart", "boxes matched")]
    for a in exported_files:
        c = a.comparison
        px, score = ("-" if v is None else f"{v:.2g}" for v in (c.row_px, c.row_score))
        rows.append((a.format, f"{a.megabytes:.1f}", f"{a.seconds:.1f}", px, score, f"{c.matched}/{c.reference}"))
    lines = aligned(rows)
    for a in exported_files:
        lines.append(f"python detect.py --weights {a.path} --source data/images")
        lines.append(f"python val.py --weights {a.path} --data <data.yaml>")
    return "\n".join(lines)
