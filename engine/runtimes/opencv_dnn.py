"""ONNX files in OpenCV's DNN module (`--dnn`)."""

from __future__ import annotations

import logging
from pathlib import Path

import cv2
import torch

from engine.runtimes.exported import ExportedRuntime, Shape
from engine.runtimes.metadata import Metadata
from engine.runtimes.onnxruntime import OnnxRuntime
from utils.errors import CheckpointError, ConfigError

LOGGER = logging.getLogger(__name__)


class OpenCvRuntime(ExportedRuntime):
    """An ONNX file in OpenCV DNN, on the CPU; graphs of a fixed shape are the safest.

    Args:
        path: the file.
        device: the CPU.

    Raises:
        CheckpointError: a file with NMS, or with operators that OpenCV does not have (it names them).
        ConfigError: another device than the CPU.
    """

    def __init__(self, path: str | Path, device: torch.device) -> None:
        if device.type != "cpu":
            raise ConfigError(f"--dnn: OpenCV runs on the CPU here, not on {device}; use --device cpu")
        metadata, shape, output = describe_onnx(Path(path))
        if metadata.nms:  # OpenCV 5.0 divides by zero, which ends the process
            raise CheckpointError(
                f"{path}: exported with --nms, on which OpenCV crashes; leave out --dnn, or export without --nms"
            )
        try:
            self.net = cv2.dnn.readNetFromONNX(str(path))
        except cv2.error as error:
            raise CheckpointError(f"{path}: OpenCV {cv2.__version__} cannot read it: {_reason(error)}") from error
        self._describe(str(path), metadata, device, shape, output)
        LOGGER.info("%s: OpenCV DNN %s, CPU", path, cv2.__version__)

    def _infer(self, images: torch.Tensor) -> torch.Tensor:
        self.net.setInput(images.numpy())
        try:
            return torch.from_numpy(self.net.forward())
        except cv2.error as error:
            raise CheckpointError(f"{self.where}: OpenCV {cv2.__version__} cannot run it: {_reason(error)}") from error


def describe_onnx(path: Path) -> tuple[Metadata, Shape, Shape]:
    """Return metadata, input and output shape of an ONNX file; dimensions are None where they are free.

    Raises:
        CheckpointError: the file cannot be opened, or is not a detector.
    """
    opened = OnnxRuntime(path, torch.device("cpu"))
    session = opened.session
    shape, output = (
        tuple(d if isinstance(d, int) else None for d in given.shape)
        for given in (session.get_inputs()[0], session.get_outputs()[0])
    )
    return opened.metadata, shape, output


def _reason(error: cv2.error) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
