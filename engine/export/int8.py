"""int8 weights and activations by ONNX Runtime's static quantizer."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from utils.errors import ExportError

if TYPE_CHECKING:
    from onnx import ModelProto

LOGGER = logging.getLogger(__name__)
CALIBRATION_IMAGES = 64
QUANTIZED = ("Conv", "MatMul", "Gemm")


class _Feed:
    """Feeds images to the quantizer, one batch at a time."""

    def __init__(self, batches: Sequence[NDArray[np.float32]]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch}


def quantized(model: ModelProto, batches: Sequence[NDArray[np.float32]]) -> ModelProto:
    """Quantize convolutions and matrix products to int8 with QuantizeLinear and DequantizeLinear pairs.

    Weights get a scale per output channel, activations one per tensor, from the minimum and maximum over the images.
    The decoding after the last convolutions stays float32, also the matrix product of the anchor-free head: pixel
    positions need more than 8 bits.

    Args:
        model: ONNX `ModelProto`, float32.
        batches: inputs of the graph, (B, 3, H, W) float32 in [0, 1].

    Raises:
        ExportError: the quantizer failed.
    """
    import onnx
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(_Feed, q.CalibrationDataReader):  # type: ignore[misc,unused-ignore]  # the quantizer checks the base class
        pass

    with tempfile.TemporaryDirectory() as scratch:
        source, prepared, result = (str(Path(scratch) / name) for name in ("a.onnx", "b.onnx", "c.onnx"))
        onnx.save(model, source)
        try:
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            q.quantize_static(
                prepared,
                result,
                Reader(batches),
                quant_format=q.QuantFormat.QDQ,
                op_types_to_quantize=list(QUANTIZED),
                nodes_to_exclude=expectations(onnx.load(prepared)),
                per_channel=True,
                activation_type=q.QuantType.QUInt8,
                weight_type=q.QuantType.QInt8,
                calibrate_method=q.CalibrationMethod.MinMax,
            )
            return onnx.load(result)
        except Exception as error:  # the quantizer raises plain exceptions of many kinds
            raise ExportError(f"--int8: the quantizer failed: {str(error).strip().splitlines()[0][:300]}") from error


def expectations(model: ModelProto) -> list[str]:
    """Return the names of the matrix products of a softmax with a constant: box distances, expected values over bins.

    Those of attention have no constant factor.
    """
    constants = {initializer.name for initializer in model.graph.initializer}
    constants |= {name for node in model.graph.node if node.op_type == "Constant" for name in node.output}
    softmax = {name for node in model.graph.node if node.op_type == "Softmax" for name in node.output}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    return [node.name for node in products if node.input[0] in softmax and node.input[1] in constants]
