"""Options of export.py and the table of formats. Imports no torch: `--help` is instant."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

from engine.cli.config import IMGSZ_NAMES, MANY, Options, flag, option
from utils.errors import ConfigError, did_you_mean

# Supported ONNX operator sets; 16 and below lack LayerNormalization, few runtimes read those above 22.
OPSETS = (17, 22)


@dataclass(frozen=True)
class Format:
    """A format of exported files.

    Attributes:
        suffix: file name suffix after the stem of the weights.
        packages: required packages: import name -> pip name.
        half_on_cpu: float16 files can be written and verified on a CPU.
        refuses: options that it does not support, with the reason.
    """

    suffix: str
    packages: Mapping[str, str]
    half_on_cpu: bool
    refuses: Mapping[str, str]


_ONNX_PACKAGES = {"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"}
FORMATS: dict[str, Format] = {
    "torchscript": Format(
        ".torchscript",
        {},
        half_on_cpu=False,
        refuses={
            "int8": "the quantizer is that of ONNX Runtime; export onnx or openvino",
            "nms": "NMS is embedded as an ONNX operator; export onnx or openvino",
        },
    ),
    "onnx": Format(".onnx", _ONNX_PACKAGES, half_on_cpu=True, refuses={}),
    "openvino": Format("_openvino_model", {**_ONNX_PACKAGES, "openvino": "openvino"}, half_on_cpu=True, refuses={}),
}
# Formats of YOLOv5's export.py that are not written here, and what to do instead.
_TENSORFLOW = "TensorFlow formats are not written; export onnx, which its converters read"
REFUSED_FORMATS: dict[str, str] = {
    "engine": "engine files are not written; export onnx and run it with --device tensorrt (docs/export.md)",
    "coreml": "CoreML is not written; export onnx or torchscript, which coremltools reads",
    "saved_model": _TENSORFLOW,
    "pb": _TENSORFLOW,
    "tflite": _TENSORFLOW,
    "edgetpu": _TENSORFLOW,
    "tfjs": _TENSORFLOW,
    "paddle": "Paddle is not written; export onnx, which X2Paddle reads",
    "ncnn": "ncnn is not written; export torchscript, which pnnx reads",
    "mnn": "MNN is not written; export onnx, which MNNConvert reads",
    "rknn": "RKNN is not written; export onnx, which rknn-toolkit2 reads",
}
NMS_OPTIONS = ("agnostic_nms", "topk_per_class", "topk_all", "iou_thres", "conf_thres")
_NO_TENSORFLOW = "belongs to TensorFlow formats, which are not written"
_NO_ENGINE = "belongs to TensorRT engine files, which are not written; onnx runs with --device tensorrt"


@dataclass(frozen=True)
class ExportConfig(Options):
    """Options of export.py."""

    data: str = option(
        "", "dataset YAML: images for verification, int8 calibration and --benchmark (default: the one trained on)"
    )
    weights: list[str] = option([], "one or more .pt files; none = the newest trained run", str, form=MANY)
    imgsz: list[int] = option([640, 640], "height width, or one number", int, form=MANY, aliases=IMGSZ_NAMES, low=1)
    batch_size: int = option(1, "batch of the exported graph", int, low=1)
    device: str = option("cpu", "cpu, or a GPU number")
    half: bool = flag("float16 weights; torchscript needs a GPU for it")
    inplace: bool = flag("in-place head", missing="the head is never in place; leave it out")
    keras: bool = flag("Keras file", missing=_NO_TENSORFLOW)
    optimize: bool = flag("TorchScript for mobile", missing="PyTorch Mobile is discontinued; leave it out")
    int8: bool = flag("int8 weights and activations, calibrated on --data (onnx, openvino)")
    per_tensor: bool = flag("per-tensor quantization", missing=_NO_TENSORFLOW)
    dynamic: bool = flag("free batch, height and width")
    cache: str = option("", "TensorRT timing cache", missing=_NO_ENGINE)
    simplify: bool = flag("simplify the ONNX graph with onnxslim")
    mlmodel: bool = flag("old CoreML format", missing="CoreML is not written")
    opset: int = option(17, "ONNX operator set", int, low=OPSETS[0], high=OPSETS[1])
    verbose: bool = flag("TensorRT log", missing=_NO_ENGINE)
    workspace: int = option(4, "TensorRT memory in GB", int, missing=_NO_ENGINE)
    layout: str = option(
        "v5", "output: v5 = (B, N, 5 + nc) with objectness; v8 = (B, 4 + nc, N), cxcywh and class confidences",
        choices=("v5", "v8"),
    )  # fmt: skip
    nms: bool = flag("embed NonMaxSuppression (onnx, openvino): output (B, --topk-all, 6)")
    agnostic_nms: bool = flag("with --nms: NMS over all classes together")
    topk_per_class: int = option(100, "with --nms: boxes kept per class and image", int, low=1)
    topk_all: int = option(100, "with --nms: boxes kept per image", int, low=1)
    iou_thres: float = option(0.45, "with --nms: IoU threshold", float, low=0.0, high=1.0)
    conf_thres: float = option(0.25, "with --nms: confidence threshold", float, low=0.0, high=1.0)
    include: list[str] = option(["torchscript"], f"formats: {', '.join(FORMATS)}", str, form=MANY)
    benchmark: bool = flag("measure accuracy and speed of every format of --include, and of PyTorch")
    plugin: list[str] = option([], "Python files that register backbones of your own", str, form=MANY)

    def check(self) -> None:
        """Check as `Options.check`, and also formats, combinations of options, and installed packages."""
        super().check()
        problems = [_format_problem(name) for name in self.include if name not in FORMATS]
        if len(self.imgsz) > 2:
            problems.append(f"--imgsz: {len(self.imgsz)} numbers; allowed are one (square) or two (height width)")
        if self.half and self.int8:
            problems.append("--half and --int8 exclude each other; leave one out")
        if self.nms and self.layout != "v5":
            problems.append(f"--layout {self.layout}: not with --nms, whose output is (B, --topk-all, 6) boxes")
        problems += [p for name in self.include if name in FORMATS for p in self._refusals(name)]
        if problems:
            raise ConfigError("; ".join(dict.fromkeys(problems)))
        for name in self.include:
            require_packages(name, FORMATS[name].packages)
        if self.simplify and set(self.include) != {"torchscript"}:
            require_packages("--simplify", {"onnxslim": "onnxslim"})

    def without_effect(self) -> dict[str, str]:
        """Return the options that were given but have no effect with the others, and why."""
        reasons = dict.fromkeys(NMS_OPTIONS, "it belongs to --nms") if not self.nms else {}
        if set(self.include) == {"torchscript"} and not self.benchmark:
            reasons |= dict.fromkeys(("simplify", "opset"), "it belongs to onnx and openvino")
        return {f"--{name.replace('_', '-')}": why for name, why in reasons.items() if self.is_given(name)}

    def _refusals(self, name: str) -> list[str]:
        refuses = FORMATS[name].refuses
        out = [f"--{option}: not for {name}: {why}" for option, why in refuses.items() if getattr(self, option)]
        if self.half and self.device.strip().lower() in ("", "cpu") and not FORMATS[name].half_on_cpu:
            out.append(f"--half: {name} in float16 needs a GPU (--device 0); on a CPU: onnx, openvino")
        return out


def _format_problem(name: str) -> str:
    if name in REFUSED_FORMATS:
        return f"--include {name}: {REFUSED_FORMATS[name]}"
    return f"--include {name}: unknown format; allowed: {', '.join(FORMATS)}{did_you_mean(name, FORMATS)}"


def missing_packages(packages: Mapping[str, str]) -> list[str]:
    """Return the pip names of the packages (import name -> pip name) that are not installed."""
    return [pip for module, pip in packages.items() if importlib.util.find_spec(module) is None]


def require_packages(wish: str, packages: Mapping[str, str]) -> None:
    """Raise a ConfigError with the pip command unless all packages (import name -> pip name) are installed."""
    if missing := missing_packages(packages):
        names = " ".join(missing)
        raise ConfigError(f"{wish}: needs {', '.join(missing)}, not installed here; pip install {names}")
