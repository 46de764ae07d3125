"""OpenVINO folders: `<name>.xml`, `<name>.bin`, `metadata.yaml`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.runtimes.exported import ExportedRuntime
from engine.runtimes.metadata import Metadata
from utils.errors import CheckpointError, ConfigError
from utils.yaml_lines import load_yaml

if TYPE_CHECKING:
    import openvino

LOGGER = logging.getLogger(__name__)
METADATA = "metadata.yaml"


class OpenVinoRuntime(ExportedRuntime):
    """An OpenVINO folder, or the .xml file in it.

    Args:
        path: the folder or the file.
        device: the CPU.

    Raises:
        CheckpointError: the folder has no model, or it cannot be opened.
        ConfigError: OpenVINO is not installed, or the device is not the CPU.
    """

    def __init__(self, path: str | Path, device: torch.device) -> None:
        if device.type != "cpu":
            raise ConfigError(f"--device {device}: OpenVINO runs on the CPU here; use --device cpu")
        core = openvino_core()
        file = model_file(Path(path))
        try:
            model = core.read_model(file)
            threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
            self.compiled = core.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY", **threads})
        except RuntimeError as error:
            raise CheckpointError(f"{file}: OpenVINO cannot open it: {str(error).strip().splitlines()[0]}") from error
        note = file.with_name(METADATA)
        texts = {key: str(value) for key, value in load_yaml(note, CheckpointError).items()} if note.is_file() else {}
        metadata = Metadata.from_texts(texts, str(note))
        shape, output = (
            tuple(d.get_length() if d.is_static else None for d in port.partial_shape)
            for port in (model.input(0), model.output(0))
        )
        self._describe(str(path), metadata, device, shape, output)
        LOGGER.info("%s: OpenVINO %s, CPU", path, openvino_version())

    def _infer(self, images: torch.Tensor) -> torch.Tensor:
        # The result is a view into memory that the next call overwrites.
        return torch.from_numpy(self.compiled(images.numpy())[0].copy())


def model_file(path: Path) -> Path:
    """Return the .xml file at or below `path`."""
    if path.is_file():
        return path
    found = sorted(path.glob("*.xml"))
    if len(found) != 1:
        raise CheckpointError(f"{path}: has {len(found)} .xml files; an OpenVINO folder has one")
    return found[0]


def openvino_core() -> openvino.Core:
    """Return an OpenVINO core; raise a ConfigError with the pip command if the package is missing."""
    try:
        import openvino
    except ImportError as error:
        raise ConfigError("OpenVINO folders need openvino, not installed here; pip install openvino") from error
    return openvino.Core()


def openvino_version() -> str:
    """Return the version without the hash of the build."""
    import openvino

    return openvino.__version__.split("-")[0]
