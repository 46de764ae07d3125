"""TorchScript files with YOLOv5's `config.txt`."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from engine.export.wrapper import ExportGraph, GraphShape, TupleGraph
from engine.runtimes.metadata import Metadata
from engine.runtimes.torchscript import CONFIG
from utils.errors import ExportError


def save_torchscript(graph: ExportGraph, path: Path, metadata: Metadata, shape: GraphShape) -> None:
    """Trace and write a TorchScript file.

    Args:
        graph: detector in evaluation mode.
        path: file to write.
        metadata: content of `config.txt`.
        shape: input of the graph. A trace is valid for all sizes if the layers use the sizes of their input; the
            verification tests this.

    Raises:
        ExportError: the tracer failed.
    """
    example = torch.rand(shape.example, device=next(graph.parameters()).device)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the verification tests what the tracer warns about
            module = torch.jit.trace(TupleGraph(graph), example, strict=False, check_trace=False)
            config = metadata.to_json((shape.batch, 3, shape.height, shape.width))
            torch.jit.save(module, str(path), _extra_files={CONFIG: config})
    except (RuntimeError, TypeError, ValueError) as error:
        raise ExportError(f"torchscript: the tracer failed: {str(error).strip().splitlines()[0][:300]}") from error
