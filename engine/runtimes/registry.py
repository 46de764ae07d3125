"""Choice of the runtime by the kind of file."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from engine.runtimes.base import Runtime
from engine.runtimes.exported import ExportedRuntime
from engine.runtimes.onnxruntime import OnnxRuntime
from engine.runtimes.opencv_dnn import OpenCvRuntime
from engine.runtimes.openvino import OpenVinoRuntime
from engine.runtimes.pytorch import PyTorchRuntime, chosen_sides
from engine.runtimes.torchscript import TorchScriptRuntime
from utils.device import amp_dtype
from utils.errors import CheckpointError, ConfigError, did_you_mean
from utils.files import exists_as_file, is_listable, newest_weights

LOGGER = logging.getLogger(__name__)
CHECKPOINT_SUFFIXES = (".pt", ".pth")
DNN = "dnn"
EXPORT_HINT = "other formats: export the .pt file again with export.py --include onnx"

Opener = Callable[[Path, torch.device, str], Runtime]
# A new runtime is one module and one row here: suffix -> (path, device, provider) -> runtime.
OPENERS: Mapping[str, Opener] = {
    ".onnx": OnnxRuntime,
    ".torchscript": lambda path, device, _: TorchScriptRuntime(path, device),
    ".xml": lambda path, device, _: OpenVinoRuntime(path, device),
    DNN: lambda path, device, _: OpenCvRuntime(path, device),
}


def choose_weights(weights: Sequence[str], runs: str | Path = "runs/train") -> list[str]:
    """Return the given weights (best.pt for a run folder), or those of the newest trained run; log the choice.

    Raises:
        CheckpointError: none given, and there is no trained run.
    """
    if weights:
        return [_of_run_folder(name) for name in weights]
    found = newest_weights(runs)
    if found is None:
        raise CheckpointError(f"--weights: none given, and there is no {runs}/*/weights/best.pt; train, or name a file")
    LOGGER.info("--weights not given: the newest trained run is used, %s", found)
    return [str(found)]


def _of_run_folder(name: str) -> str:
    """Return `weights/best.pt` of a training run's folder, any other name unchanged."""
    best = next((path for path in (Path(name, "weights/best.pt"), Path(name, "best.pt")) if os.path.isfile(path)), None)
    if best is None:
        return name
    LOGGER.info("%s: using %s", name, best)
    return str(best)


def split_device(text: str) -> tuple[str, str]:
    """Split `--device` into PyTorch's device and the name of an ONNX Runtime provider ('' for none).

    `tensorrt` and `tensorrt:1` mean a GPU with that provider, `openvino` the CPU with its own.
    """
    name, _, number = text.strip().lower().partition(":")
    if name == "tensorrt":
        return number or "0", name
    return ("cpu", name) if name == "openvino" else (text, "")


def open_runtime(
    weights: Sequence[str],
    device: torch.device,
    *,
    half: bool = False,
    amp: str = "auto",
    augment: bool = False,
    dnn: bool = False,
    provider: str = "",
) -> Runtime:
    """Open model files for detection; several checkpoints are an ensemble.

    Args:
        weights: checkpoints, or one exported file (or OpenVINO folder).
        device: where to run.
        half: float16 where the device has it; exported files keep their own precision.
        amp: mixed precision of checkpoints: `'fp16'`, `'bf16'`; `'auto'` and `'off'` for none.
        augment: test-time augmentation; checkpoints only.
        dnn: run an ONNX file with OpenCV.
        provider: ONNX Runtime provider, see `split_device`.

    Raises:
        CheckpointError: a file is missing, or cannot be used.
        ConfigError: an option that the kind of file does not support, or a package that is not installed.
    """
    autocast = mixed_precision(amp, half, device)
    kinds = [_kind(name) for name in weights]
    exported_files = [name for name, kind in zip(weights, kinds) if kind in OPENERS]
    if dnn and (len(exported_files) != 1 or kinds != [".onnx"]):
        raise ConfigError(f"--dnn: OpenCV runs one ONNX file, not {', '.join(weights)}; leave it out, or name one")
    if provider and kinds != [".onnx"]:
        raise ConfigError(f"--device {provider}: for one ONNX file only, not for {', '.join(weights)}")
    if not exported_files:
        return PyTorchRuntime(weights, device, half=half, autocast=autocast, augment=augment)
    if len(weights) > 1:
        raise ConfigError(f"--weights: {exported_files[0]} is run alone; an ensemble consists of several .pt files")
    if augment:
        raise ConfigError(f"--augment: needs a .pt file; {exported_files[0]} is an exported file")
    if autocast is not None:
        raise ConfigError(f"--amp {amp}: needs a .pt file; {exported_files[0]} keeps the precision of its export")
    if half:
        LOGGER.warning("--half is ignored for %s: its precision is that of the export", exported_files[0])
    opener = OPENERS[DNN if dnn else kinds[0]]
    return opener(Path(exported_files[0]), device, provider)


def sides_for(runtime: Runtime, sides: Sequence[int], given: bool) -> list[int]:
    """Return `--imgsz`; where it is not given, the size that the weights were trained or exported for.

    Args:
        runtime: the opened weights.
        sides: values of `--imgsz`, one or two (height, width).
        given: whether the user chose them.

    Returns:
        One or two numbers. YOLOv5's files do not state a size and keep 640.
    """
    if not isinstance(runtime, ExportedRuntime):
        return chosen_sides(sides, given, getattr(runtime, "models", ()))
    exported = runtime.metadata.imgsz
    if given or exported is None or runtime.imgsz is not None:
        return list(sides)
    LOGGER.info("--imgsz not given: %d x %d is used, the size of the export", *exported)
    return list(exported) if exported[0] != exported[1] else [exported[0]] * len(sides)


def mixed_precision(amp: str, half: bool, device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype of `--amp` in val.py and detect.py, or None for no autocast.

    Unlike in training, `auto` means float32 (or `--half`), so that metrics stay comparable.

    Raises:
        ConfigError: a dtype that the device does not support, or that contradicts `--half`.
    """
    if half and amp in ("bf16", "off"):
        raise ConfigError(f"--half: means float16, which contradicts --amp {amp}; leave one of them out")
    return None if amp == "auto" else amp_dtype(amp, device)


def _kind(name: str) -> str:
    """Return the key of `OPENERS`, '' for checkpoints.

    Raises:
        CheckpointError: no runtime for this kind of file.
    """
    path = Path(name)
    if os.path.isdir(path):
        if not any(path.glob("*.xml")):
            raise CheckpointError(
                f"{name}: a folder without weights/best.pt (a training run) or an .xml file (OpenVINO); {EXPORT_HINT}"
            )
        return ".xml"
    suffix = path.suffix.lower()
    if suffix in OPENERS:
        if not exists_as_file(path, CheckpointError):
            near = [p.name for p in path.parent.iterdir()] if is_listable(path.parent) else []
            raise CheckpointError(f"{name}: no such file{did_you_mean(path.name, near)}")
        return suffix
    if path.is_file() and suffix not in CHECKPOINT_SUFFIXES:
        allowed = ", ".join((*CHECKPOINT_SUFFIXES, *(key for key in OPENERS if key != DNN), "an OpenVINO folder"))
        raise CheckpointError(f"{name}: files of this kind cannot be run; allowed: {allowed}; {EXPORT_HINT}")
    return ""
