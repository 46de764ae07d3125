"""ONNX files in ONNX Runtime, on the execution provider of the device."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.runtimes.exported import ExportedRuntime
from engine.runtimes.metadata import Metadata
from utils.errors import CheckpointError, ConfigError

LOGGER = logging.getLogger(__name__)
CPU = "CPUExecutionProvider"
# `--device tensorrt` and `--device openvino` name a provider; a GPU means CUDA (an engine takes minutes to build).
NAMED_PROVIDERS = {"tensorrt": "TensorrtExecutionProvider", "openvino": "OpenVINOExecutionProvider"}
FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxRuntime(ExportedRuntime):
    """An ONNX file in ONNX Runtime.

    Args:
        path: the file.
        device: a CUDA device selects the CUDA provider.
        provider: 'tensorrt' or 'openvino'; '' = chosen by the device.

    Raises:
        CheckpointError: the file cannot be opened, or is not a detector.
        ConfigError: ONNX Runtime, or the provider, is not installed or cannot be started.
    """

    def __init__(self, path: str | Path, device: torch.device, provider: str = "") -> None:
        ort = onnxruntime_package()
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors only: warnings are about its own optimizer
        providers = choose_providers(ort.get_available_providers(), device, provider, Path(path))
        try:
            self.session = ort.InferenceSession(str(path), options, providers=providers)
            inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
            texts = self.session.get_modelmeta().custom_metadata_map
        except Exception as error:  # its C++ errors share no base class but Exception; names need not be UTF-8
            raise CheckpointError(f"{path}: ONNX Runtime cannot open it: {_first_line(error)}") from error
        if not inputs or not _is_image(inputs[0].shape) or inputs[0].type not in FLOATS or len(outputs[0].shape) != 3:
            shapes = [(i.name, i.shape, i.type) for i in [*inputs, *outputs]]
            raise CheckpointError(f"{path}: not a detector: {shapes}; needed: (B, 3, H, W) -> (B, N, 5 + nc)")
        self.input, self.dtype = inputs[0].name, FLOATS[inputs[0].type]
        self.overrides: dict[str, NDArray[Any]] = {}
        metadata = Metadata.from_texts(texts, str(path))
        shape = tuple(d if isinstance(d, int) else None for d in inputs[0].shape)
        output = tuple(d if isinstance(d, int) else None for d in outputs[0].shape)
        self._describe(str(path), metadata, device, shape, output)
        used = self.session.get_providers()
        wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
        if wanted not in used:  # it continues on the CPU where libraries of the provider are missing
            name = wanted.removesuffix("ExecutionProvider")
            raise ConfigError(
                f"--device {provider or device}: ONNX Runtime cannot start its {name} provider: are the libraries it "
                "needs installed (CUDA and cuDNN, TensorRT, OpenVINO), in the right versions? Or use --device cpu"
            )
        LOGGER.info("%s: ONNX Runtime %s, %s", path, ort.__version__, ", ".join(used))

    def _infer(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.cpu().numpy().astype(self.dtype, copy=False)
        try:
            return torch.from_numpy(self.session.run(None, {self.input: pixels, **self.overrides})[0])
        except Exception as error:  # see above
            raise CheckpointError(f"{self.where}: ONNX Runtime cannot run it: {_first_line(error)}") from error


def _is_image(shape: Sequence[object]) -> bool:
    """Return whether the dimensions are those of images (B, 3, H, W); free ones have names."""
    sizes = [d for d in shape if isinstance(d, int)]
    return len(shape) == 4 and (shape[1] == 3 or not isinstance(shape[1], int)) and all(0 < d < 2**16 for d in sizes)


def onnxruntime_package() -> ModuleType:
    """Return the package; raise a ConfigError with the pip command if it is missing."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            "ONNX files need onnxruntime, not installed here; pip install onnxruntime (with a GPU: onnxruntime-gpu)"
        ) from error
    return onnxruntime


def choose_providers(available: list[str], device: torch.device, provider: str, model: Path) -> list[Any]:
    """Return the execution providers in order of preference, the CPU last.

    Args:
        available: providers of the installed ONNX Runtime.
        device, provider: see `OnnxRuntime`.
        model: the file; TensorRT's engine cache goes into a folder beside it.

    Raises:
        ConfigError: the provider is not available.
    """
    wanted = NAMED_PROVIDERS.get(provider) or ("CUDAExecutionProvider" if device.type == "cuda" else CPU)
    if wanted not in available:
        has = ", ".join(name.removesuffix("ExecutionProvider") for name in available)
        packages = {"OpenVINOExecutionProvider": "onnxruntime-openvino"}
        pip = packages.get(wanted, "onnxruntime-gpu")
        raise ConfigError(
            f"--device {provider or device}: this ONNX Runtime has no {wanted.removesuffix('ExecutionProvider')}"
            f" (it has {has}); pip install {pip}, or use --device cpu"
        )
    gpu = {"device_id": device.index or 0}
    if wanted == "TensorrtExecutionProvider":
        cache = model.with_name(f"{model.stem}_tensorrt")
        options = {**gpu, "trt_engine_cache_enable": True, "trt_engine_cache_path": str(cache)}
        return [(wanted, options), ("CUDAExecutionProvider", gpu), CPU]
    return [CPU] if wanted == CPU else [(wanted, gpu) if device.type == "cuda" else wanted, CPU]


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
