"""NMS inside an ONNX graph, from standard operators.

In: `output0` rows (B, N, 5 + nc). Out: `output0` (B, K, 6): left, top, right, bottom in input pixels, score, class; by
falling score, rows of zeros after the last box. The class of a row is its best one, as in `detect.py`. The thresholds
are inputs with defaults (`conf_thres`, `iou_thres`: ONNX Runtime lets a caller override them; other readers take the
defaults).

Shape legend: B images, N rows, C classes (1 when they suppress each other), S selected boxes, K boxes kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ROWS = "rows"


@dataclass(frozen=True)
class NmsOptions:
    """Thresholds and limits; see the options of export.py."""

    conf_thres: float
    iou_thres: float
    per_class: int
    per_image: int
    agnostic: bool

    def describe(self) -> str:
        """In words, for metadata."""
        across = ", over all classes together" if self.agnostic else f", {self.per_class} boxes per class"
        return f"score {self.conf_thres:g}, IoU {self.iou_thres:g}, {self.per_image} boxes per image{across}"


class _Nodes:
    """Collects nodes and constants; every method returns the name of its result."""

    def __init__(self, onnx: Any) -> None:
        self.onnx = onnx
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def op(self, op_type: str, inputs: Sequence[str], name: str = "", **attributes: Any) -> str:
        return self.ops(op_type, inputs, [name or f"nms_{op_type}_{len(self.nodes)}"], **attributes)[0]

    def ops(self, op_type: str, inputs: Sequence[str], names: Sequence[str], **attributes: Any) -> Sequence[str]:
        label = f"nms_node_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(op_type, list(inputs), list(names), name=label, **attributes))
        return names

    def constant(self, value: Any, dtype: Any, name: str = "") -> str:
        name = name or f"nms_constant_{len(self.constants)}"
        self.constants.append(self.onnx.numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def columns(self, of: str, start: int, stop: int) -> str:
        """`of[..., start:stop]` of a tensor of three dimensions."""
        ends = [self.constant([value], np.int64) for value in (start, stop, 2)]
        return self.op("Slice", [of, *ends])


def embed_nms(model: Any, options: NmsOptions) -> None:
    """Append NMS to a detector's graph, in place."""
    import onnx

    graph = model.graph
    old = graph.output[0].name
    columns = graph.output[0].type.tensor_type.shape.dim[2].dim_value
    for node in graph.node:
        node.output[:] = [ROWS if name == old else name for name in node.output]
        node.input[:] = [ROWS if name == old else name for name in node.input]
    n = _Nodes(onnx)
    boxes_BN4, score_BN, label_BN = _scores(n, columns)
    kept_BN = _suppressed(n, boxes_BN4, score_BN, label_BN, options, columns - 5)
    _best(n, boxes_BN4, kept_BN, label_BN, options.per_image, old)
    graph.node.extend(n.nodes)
    graph.initializer.extend(n.constants)
    batch = graph.input[0].type.tensor_type.shape.dim[0]
    size = batch.dim_value or batch.dim_param or None
    del graph.output[:]
    graph.output.append(onnx.helper.make_tensor_value_info(old, 1, [size, options.per_image, 6]))
    for name in ("conf_thres", "iou_thres"):
        graph.input.append(onnx.helper.make_tensor_value_info(name, 1, [1]))


def _scores(n: _Nodes, columns: int) -> tuple[str, str, str]:
    """Boxes (B, N, 4) as center and size, the best score (B, N), its class (B, N) int64."""
    boxes, objectness = n.columns(ROWS, 0, 4), n.columns(ROWS, 4, 5)
    scores_BNC = n.op("Mul", [n.columns(ROWS, 5, columns), objectness])
    one, last = n.constant([1], np.int64), n.constant([2], np.int64)
    score_BN1, label_BN1 = n.ops("TopK", [scores_BNC, one], ["nms_score", "nms_label"], axis=2)
    return boxes, n.op("Squeeze", [score_BN1, last]), n.op("Squeeze", [label_BN1, last])


def _suppressed(n: _Nodes, boxes: str, score: str, label: str, options: NmsOptions, classes: int) -> str:
    """(B, N): the score of the boxes that stand, zero for the others."""
    scores_B1N = n.op("Unsqueeze", [score, n.constant([1], np.int64)])
    scores_BCN = scores_B1N
    if not options.agnostic:
        depth, values = n.constant(classes, np.int64), n.constant([0, 1], np.float32)
        hot_BCN = n.op("OneHot", [label, depth, values], axis=1)
        scores_BCN = n.op("Mul", [hot_BCN, scores_B1N])
    limit = n.constant([options.per_class], np.int64)
    thresholds = [n.constant([options.iou_thres], np.float32, "iou_thres")]
    thresholds.append(n.constant([options.conf_thres], np.float32, "conf_thres"))
    selected_S3 = n.op("NonMaxSuppression", [boxes, scores_BCN, limit, *thresholds], center_point_box=1)
    place_S2 = n.op("Gather", [selected_S3, n.constant([0, 2], np.int64)], axis=1)  # image, row
    zeros_BN = n.op("Mul", [score, n.constant(0, np.float32)])
    return n.op("ScatterND", [zeros_BN, place_S2, n.op("GatherND", [score, place_S2])])


def _best(n: _Nodes, boxes: str, kept: str, label: str, count: int, output: str) -> None:
    """Emit the `count` best boxes as (B, count, 6), padded with zeros."""
    corners_BN4 = _corners(n, boxes)
    pads_2, pads_3 = n.constant([0, 0, 0, count], np.int64), n.constant([0, 0, 0, 0, count, 0], np.int64)
    k = n.constant([count], np.int64)
    best_BK, index_BK = n.ops("TopK", [n.op("Pad", [kept, pads_2]), k], ["nms_best", "nms_index"], axis=1)
    last = n.constant([2], np.int64)
    index_BK1 = n.op("Unsqueeze", [index_BK, last])
    numbers_BN1 = n.op("Unsqueeze", [n.op("Cast", [label], to=1), last])
    both_BN5 = n.op("Pad", [n.op("Concat", [corners_BN4, numbers_BN1], axis=2), pads_3])
    index_BK5 = n.op("Concat", [index_BK1] * 5, axis=2)
    chosen_BK5 = n.op("GatherElements", [both_BN5, index_BK5], axis=1)
    best_BK1 = n.op("Unsqueeze", [best_BK, last])
    standing = n.op("Cast", [n.op("Greater", [best_BK1, n.constant(0, np.float32)])], to=1)
    chosen_BK5 = n.op("Mul", [chosen_BK5, standing])
    parts = [n.columns(chosen_BK5, 0, 4), best_BK1, n.columns(chosen_BK5, 4, 5)]
    n.op("Concat", parts, name=output, axis=2)


def _corners(n: _Nodes, boxes: str) -> str:
    center, size = n.columns(boxes, 0, 2), n.columns(boxes, 2, 4)
    half = n.op("Mul", [size, n.constant(0.5, np.float32)])
    return n.op("Concat", [n.op("Sub", [center, half]), n.op("Add", [center, half])], axis=2)
