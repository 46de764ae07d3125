"""ONNX files in OpenCV's DNN module (`--dnn`)."""

from __future__ import annotations

import logging
from pathlib import Path

import cv2
import torch

from engine.runtimes.exported import ExportedRuntime
from engine.runtimes.onnxruntime import OnnxRuntime
from utils.errors import CheckpointError, ConfigError

LOGGER = logging.getLogger(__name__)


class OpenCvRuntime(ExportedRuntime):
    """An ONNX file in OpenCV DNN, on the CPU; graphs of a fixed shape are the safest.

    Args:
        path: the file.
        device: the CPU.

    Raises:
        CheckpointError: a file with NMS, or with operators that OpenCV lacks (the message names them).
        ConfigError: a device other than the CPU.
    """

    def __init__(self, path: str | Path, device: torch.device) -> None:
        if device.type != "cpu":
            raise ConfigError(f"--dnn: OpenCV runs on the CPU here, not on {device}; use --device cpu")
        opened = OnnxRuntime(path, device)  # describes the file
        if opened.metadata.nms:  # OpenCV 5.0 divides by zero, which ends the process
            raise CheckpointError(
                f"{path}: exported with --nms, on which OpenCV crashes; leave out --dnn, or export without --nms"
            )
        try:
            self.net = cv2.dnn.readNetFromONNX(str(path))
        except cv2.error as error:
            raise CheckpointError(f"{path}: OpenCV {cv2.__version__} cannot read it: {_reason(error)}") from error
        self._describe(str(path), opened.metadata, device, opened.input_shape, opened.output_shape)
        LOGGER.info("%s: OpenCV DNN %s, CPU", path, cv2.__version__)

    def _infer(self, images: torch.Tensor) -> torch.Tensor:
        self.net.setInput(images.numpy())
        try:
            return torch.from_numpy(self.net.forward())
        except cv2.error as error:
            raise CheckpointError(f"{self.where}: OpenCV {cv2.__version__} cannot run it: {_reason(error)}") from error


def _reason(error: cv2.error) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
