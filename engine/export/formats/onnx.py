"""ONNX files: torch's exporter, passes over the graph, metadata."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from engine.export.formats.onnx_graph import lower_to_17, opset_of, remove_unused_constants, reorder_gelu, strip_traces
from engine.export.wrapper import ExportGraph, GraphShape
from engine.runtimes.metadata import Metadata
from utils.errors import ExportError

if TYPE_CHECKING:
    from onnx import ModelProto

LOGGER = logging.getLogger(__name__)
NATIVE_OPSET = 18  # native operator set of torch's exporter
LARGEST_SIDE = 8192
LIMIT = 2**31  # maximum size of a protobuf file
GRAPH_BYTES = 2**26  # upper bound for everything except the weights


def onnx_model(graph: ExportGraph, shape: GraphShape, opset: int) -> ModelProto:
    """Return a detector as an ONNX `ModelProto` without stack traces: input `images`, output `output0`.

    Args:
        graph: detector on the CPU or a GPU, in evaluation mode.
        shape: input of the graph.
        opset: ONNX operator set.

    Raises:
        ExportError: torch's exporter failed, or the weights do not fit into one file.
    """
    check_size(graph)
    device = next(graph.parameters()).device
    example = torch.rand(shape.example, device=device)
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph,
                (example,),
                dynamo=True,
                dynamic_shapes=_free_dimensions(shape) if shape.dynamic else None,
                input_names=["images"],
                output_names=["output0"],
                opset_version=max(opset, NATIVE_OPSET),
                verbose=False,
            )
        assert program is not None
        model = program.model_proto
    except Exception as error:  # anything that a layer, torch.export or a conversion raises
        raise ExportError(f"onnx: {_exporter_problem(error, shape.dynamic)}") from error
    strip_traces(model)
    reorder_gelu(model)
    if opset < NATIVE_OPSET <= opset_of(model):
        lower_to_17(model)
    remove_unused_constants(model)
    if opset_of(model) != opset:
        raise ExportError(f"--opset {opset}: torch's exporter wrote operator set {opset_of(model)} instead")
    return model


def check_size(graph: nn.Module) -> None:
    """Refuse weights that do not fit into one file, before any work.

    Raises:
        ExportError: 2 GB or more, the graph included.
    """
    size = sum(t.numel() * t.element_size() for t in (*graph.parameters(), *graph.buffers()))
    if size >= LIMIT - GRAPH_BYTES:
        raise ExportError(_too_large(size))


def _too_large(size: int) -> str:
    return f"onnx: {size / 1e9:.3g} GB; one file holds 2 GB: use --half, a smaller model, or torchscript"


def _free_dimensions(shape: GraphShape) -> dict[str, Any]:
    from torch.export import Dim

    most = LARGEST_SIDE // shape.grid
    height, width = (Dim(name, min=1, max=most) * shape.grid for name in ("height_cells", "width_cells"))
    return {"images": {0: Dim("batch", min=1, max=1024), 2: height, 3: width}}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress lines and loggers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _exporter_problem(error: Exception, dynamic: bool) -> str:
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    reason = lines[0][:300] if lines else type(error).__name__
    if dynamic:
        return f"this model cannot be exported with free sizes (--dynamic): {reason}; leave --dynamic out"
    return f"torch's exporter failed: {reason}"


def simplified(model: ModelProto) -> ModelProto:
    """Simplify the graph with onnxslim.

    Raises:
        ExportError: it failed.
    """
    import onnxslim

    try:
        with _quiet():
            return onnxslim.slim(model)
    except Exception as error:  # of a third-party optimizer
        raise ExportError(f"--simplify: onnxslim failed: {str(error).strip().splitlines()[0]}") from error


def save_onnx(model: ModelProto, path: Path, metadata: Metadata, shape: GraphShape) -> None:
    """Name free dimensions, add the metadata, check, and write one file.

    Raises:
        ExportError: above 2 GB, or not valid.
    """
    import onnx

    if shape.dynamic:
        _name_dimensions(model)
    del model.metadata_props[:]
    for key, value in metadata.to_texts().items():
        model.metadata_props.add(key=key, value=value)
    model.producer_name, model.producer_version = "yolov5-backbones", ""
    if model.ByteSize() >= LIMIT:
        raise ExportError(_too_large(model.ByteSize()))
    try:
        onnx.checker.check_model(model, full_check=False)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"onnx: the graph is not valid: {str(error).strip().splitlines()[0]}") from error
    onnx.save(model, str(path))


def _name_dimensions(model: ModelProto) -> None:
    """Replace the exporter's expressions of free dimensions by readable names."""
    sides = model.graph.input[0].type.tensor_type.shape.dim
    for axis, name in {0: "batch", 2: "height", 3: "width"}.items():
        sides[axis].dim_param = name
    rows = model.graph.output[0].type.tensor_type.shape.dim
    for axis, name in {0: "batch", 1: "anchors", 2: "anchors"}.items():  # of 1 and 2 one is fixed
        if not rows[axis].dim_value:
            rows[axis].dim_param = name
