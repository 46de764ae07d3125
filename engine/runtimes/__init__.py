"""Ways to run a detector, chosen by the kind of file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.runtimes.base import Runtime
from engine.runtimes.pytorch import PyTorchRuntime
from utils.errors import CheckpointError, ConfigError
from utils.files import newest_weights

LOGGER = logging.getLogger(__name__)
CHECKPOINT_SUFFIXES = (".pt", ".pth")


def choose_weights(weights: Sequence[str], runs: str | Path = "runs/train") -> list[str]:
    """The given weights; where none are given, those of the newest trained run, which is said.

    Raises:
        CheckpointError: none given, and nothing was trained here.
    """
    if weights:
        return list(weights)
    found = newest_weights(runs)
    if found is None:
        raise CheckpointError(f"--weights: none given, and there is no {runs}/*/weights/best.pt; train, or name a file")
    LOGGER.info("--weights not given: the newest trained run is used, %s", found)
    return [str(found)]


def open_runtime(
    weights: Sequence[str],
    device: torch.device,
    *,
    half: bool = False,
    augment: bool = False,
    dnn: bool = False,
) -> Runtime:
    """Open model files for detection; several are an ensemble.

    Args:
        weights: checkpoints.
        device: where to run.
        half: half precision where the device has it.
        augment: test-time augmentation.
        dnn: run ONNX files by OpenCV.

    Raises:
        CheckpointError: a file that is missing, or cannot be used.
        ConfigError: a kind of file, or an option, that is not there yet.
    """
    if dnn:
        raise ConfigError("--dnn: ONNX files cannot be run yet; leave it out and give a .pt file")
    for name in weights:
        path = Path(name)
        if path.is_file() and path.suffix.lower() not in CHECKPOINT_SUFFIXES:
            allowed = ", ".join(CHECKPOINT_SUFFIXES)
            raise CheckpointError(f"{name}: files of this kind cannot be run yet; allowed: {allowed}")
    return PyTorchRuntime(weights, device, half=half, augment=augment)
