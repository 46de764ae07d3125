"""The inputs of a verification, the answers of each form to them, and the record of it."""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.export.check_outputs import (
    IOU_THRES,
    TOLERANCES,
    Detector,
    NmsRule,
    OutputDifference,
    choose_conf,
    compare_boxes,
    compare_rows,
    run,
)
from engine.export.config import ExportConfig
from engine.export.samples import ImageSource, as_images, random_images
from engine.export.wrapper import ExportGraph, GraphShape
from engine.runtimes.exported import ExportedRuntime
from engine.runtimes.onnxruntime import OnnxRuntime
from models.yolo import DetectionModel
from utils.errors import ExportError
from utils.files import atomic_path

LOGGER = logging.getLogger(__name__)
IMAGES, NOISES = 4, 2
FREE_SIZES = (
    " (made with --dynamic: a model whose steps depend on the size, such as RepMLPNet with tile_order published, cannot"
    " be exported with free sizes; leave --dynamic out)"
)


def verification_inputs(source: ImageSource, shape: GraphShape) -> list[Tensor]:
    """Real images and random images, (b, 3, h, w) float32 in [0, 1] each.

    Where sizes are free, also other sizes: smaller, square and not, in batches of 1 to 3.
    """
    images = source.load(IMAGES, shape.height, shape.width)
    inputs = [as_images(images), random_images(NOISES, images, shape.height, shape.width)]
    if shape.dynamic:
        grid = shape.grid
        cells = shape.height // grid, shape.width // grid
        others = [(1, cells[0], max(cells[1] // 2, 1)), (3, max(cells[0] // 2, 1), max(cells[1] * 3 // 4, 1))]
        others += [(2, 2, 2), (1, cells[0] + 1, cells[1])]
        for batch, rows, columns in others:
            inputs.append(as_images(source.load(batch, rows * grid, columns * grid)))
    return inputs


class Verification:
    """Compares the forms of one detector.

    Args:
        model: training form, in evaluation mode.
        deployed: re-parameterized model.
        inputs: from `proof_inputs`.
        origin: where the images are from.
        device: where the models are.

    Raises:
        ExportError: the re-parameterized model does not compute what the training form does.
    """

    def __init__(
        self,
        model: DetectionModel,
        deployed: DetectionModel,
        inputs: Sequence[Tensor],
        origin: str,
        device: torch.device,
    ) -> None:
        self.inputs, self.origin, self.device = list(inputs), origin, device
        training = run(self._eager(model), self.inputs)
        self.rows = run(self._eager(deployed), self.inputs)  # what files are compared with
        self.conf = choose_conf(training)
        self.deployment = compare_rows("re-parameterized model", training, self.rows, TOLERANCES["float32"], self.conf)
        if self.deployment.problems:
            raise ExportError(
                "verification failed at stage 1, training model -> re-parameterized model: "
                + "; ".join(self.deployment.problems)
            )

    def _eager(self, model: DetectionModel) -> Any:
        graph = ExportGraph(model).eval()
        return lambda images: graph(images.to(self.device))

    def of_file(self, name: str, runtime: ExportedRuntime, config: ExportConfig) -> OutputDifference:
        """Compare an exported file with the re-parameterized model.

        Raises:
            ExportError: it computes something else.
        """
        tolerance = TOLERANCES[precision(config)]
        stage = f"{name} file"
        if config.nms:
            comparison = self._boxes(stage, runtime, config)
        else:
            found = run(lambda images: in_batches(runtime, runtime.fixed_batch, images), self.inputs)
            rows = self.rows
            if config.layout == "v8":  # without objectness
                rows = [torch.cat((r[..., :4], torch.ones_like(r[..., :1]), r[..., 4:5] * r[..., 5:]), 2) for r in rows]
            comparison = compare_rows(stage, rows, found, tolerance, self.conf)
        if comparison.problems:
            raise ExportError(
                f"{name}: verification failed at stage 2, re-parameterized model -> exported file: "
                f"{'; '.join(comparison.problems)}" + (FREE_SIZES if config.dynamic else "")
            )
        return comparison

    def _boxes(self, stage: str, runtime: ExportedRuntime, config: ExportConfig) -> OutputDifference:
        conf = config.conf_thres
        if isinstance(runtime, OnnxRuntime):  # it can be given the threshold at which there is enough to compare
            conf = min(conf, self.conf)
            runtime.overrides["conf_thres"] = torch.tensor([conf]).numpy()
        found = run(lambda images: in_batches(runtime.output, runtime.fixed_batch, images), self.inputs)
        boxes = [[image[image[:, 4] > 0] for image in batch] for batch in found]
        limits = config.topk_per_class, config.topk_all
        nms_time = NmsRule(conf, config.iou_thres, config.agnostic_nms, *limits)
        comparison = compare_boxes(stage, self.rows, boxes, TOLERANCES[precision(config)], nms_time)
        if not comparison.reference:
            LOGGER.warning("%s: no box scores above --conf-thres %g: the verification compared none", stage, conf)
        return comparison

    def write(
        self, path: Path, exported_file: str, comparison: OutputDifference, config: ExportConfig, about: dict[str, Any]
    ) -> None:
        """Write the record of a verification as JSON."""
        kind = precision(config)
        record = {
            "exported file": exported_file,
            "date": datetime.datetime.now().isoformat(timespec="seconds"),
            "precision": kind,
            **about,
            "inputs": {
                "images": self.origin,
                "shapes": [list(images.shape) for images in self.inputs],
                "random": f"{NOISES} images with the images' mean and deviation per channel",
            },
            "NMS": {"conf": self.conf, "iou": config.iou_thres if config.nms else IOU_THRES},
            "tolerance": {"re-parameterized model": asdict(TOLERANCES["float32"]), "file": asdict(TOLERANCES[kind])},
            "stages": [self.deployment.to_dict(), comparison.to_dict()],
        }
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def precision(config: ExportConfig) -> str:
    """Key of `TOLERANCES` for what is exported."""
    return "int8" if config.int8 else "float16" if config.half else "float32"


def in_batches(call: Detector, limit: int | None, images: Tensor) -> Tensor:
    """Run images (B, 3, H, W) in pieces of at most `limit`."""
    return torch.cat([call(part) for part in images.split(limit or len(images))])
