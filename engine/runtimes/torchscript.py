"""TorchScript files, ours and YOLOv5's."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch

from engine.runtimes.exported import ExportedRuntime
from engine.runtimes.metadata import Metadata
from utils.errors import CheckpointError

LOGGER = logging.getLogger(__name__)
CONFIG = "config.txt"  # extra file with shape, stride and names


class TorchScriptRuntime(ExportedRuntime):
    """A TorchScript file.

    Args:
        path: the file.
        device: where to run.

    Raises:
        CheckpointError: the file cannot be opened, or has no metadata.
    """

    def __init__(self, path: str | Path, device: torch.device) -> None:
        extra = {CONFIG: ""}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # newer PyTorch recommends torch.export
                module = torch.jit.load(str(path), map_location=device, _extra_files=extra)
        except (RuntimeError, ValueError, OSError, IndexError) as error:  # IndexError: a damaged record table
            line = str(error).strip().splitlines()[0]
            raise CheckpointError(f"{path}: cannot be opened as TorchScript: {line}") from error
        self.module = module.eval()
        text: str | bytes = extra[CONFIG]
        if not text:
            raise CheckpointError(f"{path}: has no {CONFIG} (shape, stride, names) in it; export it again")
        metadata = Metadata.from_json(text.decode() if isinstance(text, bytes) else text, str(path))
        weights = next(self.module.parameters(), None)
        # Our files have float32 input in any precision; YOLOv5's float16 files have float16 input.
        foreign_half = "precision" not in metadata.about and weights is not None and weights.dtype == torch.float16
        self.dtype = torch.float16 if foreign_half else torch.float32
        free = metadata.dynamic or metadata.imgsz is None
        shape = (None, 3, None, None) if free else (metadata.batch, 3, *(metadata.imgsz or ()))
        self._describe(str(path), metadata, device, shape)
        LOGGER.info("%s: TorchScript, PyTorch %s, %s", path, torch.__version__, device)

    def _infer(self, images: torch.Tensor) -> torch.Tensor:
        try:
            out = self.module(images.to(self.dtype))
        except RuntimeError as error:  # its last line is the reason, the others are the interpreter's traceback
            line = str(error).strip().splitlines()[-1]
            raise CheckpointError(f"{self.where}: TorchScript cannot run it: {line}") from error
        return out[0] if isinstance(out, (tuple, list)) else out
