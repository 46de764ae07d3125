"""Passes over an ONNX graph after torch's exporter, which do not change its outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from utils.errors import ExportError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# Reductions that take their axes as an input from operator set 18 on, and as an attribute before.
_REDUCTIONS = {"ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare"}
_REDUCTIONS |= {"ReduceLogSum", "ReduceLogSumExp"}
_NEW_IN_18 = {"GroupNormalization", "Mish", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", "Col2Im"}
_NEW_IN_18 |= {"CenterCropPad", "OptionalGetElement", "OptionalHasElement"}


def strip_traces(model: ModelProto) -> None:
    """Remove the metadata of nodes: the exporter stores stack traces with local paths in them."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer]:
        if hasattr(value, "metadata_props"):
            del value.metadata_props[:]
        value.doc_string = ""
    del model.graph.metadata_props[:]
    model.graph.doc_string = model.doc_string = ""


def reorder_gelu(model: ModelProto) -> None:
    """Write every exact GELU as `(x * (1 + erf(x / sqrt 2))) * 0.5`.

    The exporter multiplies by 0.5 first, on which OpenCV 5.0 crashes. Other runtimes recognize both orders.
    """
    constants = {initializer.name for initializer in model.graph.initializer}
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    makers = {name: node for node in model.graph.node for name in node.output}
    for erf in [node for node in model.graph.node if node.op_type == "Erf"]:
        divide, add = makers.get(erf.input[0]), _only(readers, erf, "Add")
        half = _only(readers, add, "Mul")
        last = _only(readers, half, "Mul")
        if divide is None or add is None or half is None or last is None:
            continue
        x = divide.input[0]
        factors = [name for name in half.input if name in constants]
        if len(factors) != 1 or x not in last.input:
            continue
        half.input[:] = [x, add.output[0]]
        last.input[:] = [half.output[0], factors[0]]


def _only(readers: dict[str, list[NodeProto]], node: NodeProto | None, op_type: str) -> NodeProto | None:
    """Return the only consumer of `node` if it has that type."""
    found = [] if node is None else readers.get(node.output[0], [])
    return found[0] if len(found) == 1 and found[0].op_type == op_type else None


def lower_to_17(model: ModelProto) -> None:
    """Convert a graph of operator set 18 to 17, in place: reductions and splits differ.

    Raises:
        ExportError: set 17 lacks an operator, or does not support this use of it.
    """
    import onnx

    arrays = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    arrays |= {
        node.output[0]: onnx.numpy_helper.to_array(node.attribute[0].t)
        for node in model.graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    for node in model.graph.node:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        antialias = "antialias" in attributes and attributes["antialias"].i
        if node.op_type in _NEW_IN_18 or (node.op_type == "Resize" and ("axes" in attributes or antialias)):
            raise ExportError(f"--opset 17: the graph needs {node.op_type} as of set 18; use --opset 18")
        if node.op_type == "Resize":
            _drop(node, "antialias")
            _drop(node, "keep_aspect_ratio_policy")
        elif node.op_type in _REDUCTIONS and len(node.input) == 2 and node.input[1]:
            if node.input[1] not in arrays:
                raise ExportError(f"--opset 17: {node.op_type} with axes that are not constant; use --opset 18")
            axes = [int(axis) for axis in np.ravel(arrays[node.input[1]])]
            _drop(node, "noop_with_empty_axes")
            node.attribute.append(onnx.helper.make_attribute("axes", axes))
            del node.input[1]
        elif node.op_type == "Split":
            _drop(node, "num_outputs")  # without it: equal parts, one per output
        elif node.op_type == "Pad" and len(node.input) > 3:
            raise ExportError("--opset 17: Pad with axes as of set 18; use --opset 18")
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = 17


def _drop(node: NodeProto, name: str) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


def opset_of(model: ModelProto) -> int:
    """Return the version of the standard operator set of a model."""
    return max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def remove_unused_constants(model: ModelProto) -> None:
    """Remove initializers that no node reads."""
    used = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
    kept = [i for i in model.graph.initializer if i.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
