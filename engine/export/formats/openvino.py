"""OpenVINO folders, converted from the ONNX graph."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from engine.runtimes.metadata import Metadata
from engine.runtimes.openvino import METADATA
from utils.errors import ExportError

if TYPE_CHECKING:
    from onnx import ModelProto


def save_openvino(model: ModelProto, folder: Path, name: str, metadata: Metadata, half: bool) -> None:
    """Write `<name>.xml`, `<name>.bin` and `metadata.yaml`.

    Args:
        model: ONNX `ModelProto`, float32 or quantized.
        folder: existing folder.
        name: stem of the files.
        half: store weights in float16.

    Raises:
        ExportError: OpenVINO cannot read the graph.
    """
    import onnx
    import openvino

    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / f"{name}.onnx"
        onnx.save(model, str(file))
        try:
            converted = openvino.convert_model(str(file))
        except Exception as error:  # of its front ends, which share no base class
            raise ExportError(f"openvino: cannot read the graph: {str(error).strip().splitlines()[0][:300]}") from error
        openvino.save_model(converted, str(folder / f"{name}.xml"), compress_to_fp16=half)
    texts: dict[str, Any] = dict(metadata.to_texts())
    texts |= {"stride": metadata.stride, "names": dict(metadata.names)}
    (folder / METADATA).write_text(yaml.safe_dump(texts, sort_keys=False, allow_unicode=True), encoding="utf-8")
