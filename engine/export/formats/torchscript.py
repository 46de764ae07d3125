"""TorchScript files with YOLOv5's `config.txt` in them."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from engine.export.wrapper import ExportGraph, GraphShape, TupleGraph
from engine.runtimes.metadata import Metadata
from engine.runtimes.torchscript import CONFIG
from utils.errors import ExportError


def save_torchscript(graph: ExportGraph, path: Path, metadata: Metadata, shape: GraphShape) -> None:
    """Trace and write.

    Args:
        graph: in evaluation mode.
        path: file to write.
        metadata: goes into `config.txt`.
        shape: of the input. Traces keep sizes as numbers of the input where layers compute with them, so one trace may
            serve all sizes; the verification finds out whether it does.

    Raises:
        ExportError: the tracer cannot do it.
    """
    example = torch.rand(shape.example, device=next(graph.parameters()).device)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the tracer: what they warn of is what the verification looks at
            module = torch.jit.trace(TupleGraph(graph), example, strict=False, check_trace=False)
            config = metadata.to_json((shape.batch, 3, shape.height, shape.width))
            torch.jit.save(module, str(path), _extra_files={CONFIG: config})
    except (RuntimeError, TypeError, ValueError) as error:
        raise ExportError(f"torchscript: the tracer failed: {str(error).strip().splitlines()[0][:300]}") from error
