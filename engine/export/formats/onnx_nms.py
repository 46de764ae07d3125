"""NMS inside an ONNX graph, from standard operators.

Input: `output0` rows (B, N, 5 + nc). Output: `output0` (B, K, 6): xyxy in input pixels, confidence, class; sorted
by descending confidence, zeros after the last box. A row has its best class only, as in `detect.py`. The thresholds are
inputs with defaults (`conf_thres`, `iou_thres`), which a caller of ONNX Runtime can override; other runtimes use the
defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import ModelProto

# Text form of ONNX (https://onnx.ai/onnx/repo-docs/Syntax.html). B images, N rows, C classes (1 when classes are
# compared with each other), S selected boxes, K kept boxes. The first operator is inserted by `embed_nms`.
_NMS = """
<ir_version: 8, opset_import: ["" : 17]>
nms (float[B, N, {columns}] nms_rows, float[1] conf_thres = {{{conf}}}, float[1] iou_thres = {{{iou}}})
    => (float[B, {count}, 6] output0)
<int64[1] nms_0 = {{0}}, int64[1] nms_1 = {{1}}, int64[1] nms_2 = {{2}}, int64[1] nms_4 = {{4}}, int64[1] nms_5 = {{5}},
 int64[1] nms_end = {{{columns}}}, int64[1] nms_depth = {{{classes}}}, float[2] nms_off_on = {{0, 1}},
 int64[2] nms_image_and_row = {{0, 2}}, int64[1] nms_per_class = {{{per_class}}}, int64[1] nms_K = {{{count}}},
 int64[4] nms_pad_BN = {{0, 0, 0, {count}}}, int64[6] nms_pad_BNx = {{0, 0, 0, 0, {count}, 0}},
 float[1] nms_half = {{0.5}}, float[1] nms_zero = {{0}}>
{{
    nms_xywh_BN4 = Slice (nms_rows, nms_0, nms_4, nms_2)
    nms_objectness_BN1 = Slice (nms_rows, nms_4, nms_5, nms_2)
    nms_class_scores = Slice (nms_rows, nms_5, nms_end, nms_2)
    nms_scores = Mul (nms_class_scores, nms_objectness_BN1)
    nms_score_BN1, nms_label_BN1 = TopK <axis = 2> (nms_scores, nms_1)
    nms_score_BN = Squeeze (nms_score_BN1, nms_2)
    nms_score_B1N = Unsqueeze (nms_score_BN, nms_1)
    nms_label_BN = Squeeze (nms_label_BN1, nms_2)
    nms_class_of_BCN = OneHot <axis = 1> (nms_label_BN, nms_depth, nms_off_on)
    nms_score_BCN = Mul (nms_class_of_BCN, nms_score_B1N)
    nms_selected_S3 = NonMaxSuppression <center_point_box = 1>
        (nms_xywh_BN4, {compared}, nms_per_class, iou_thres, conf_thres)
    nms_place_S2 = Gather <axis = 1> (nms_selected_S3, nms_image_and_row)
    nms_kept_S = GatherND (nms_score_BN, nms_place_S2)
    nms_none_BN = Mul (nms_score_BN, nms_zero)
    nms_kept_BN = ScatterND (nms_none_BN, nms_place_S2, nms_kept_S)

    nms_xy = Slice (nms_xywh_BN4, nms_0, nms_2, nms_2)
    nms_wh = Slice (nms_xywh_BN4, nms_2, nms_4, nms_2)
    nms_half_wh = Mul (nms_wh, nms_half)
    nms_xy_1 = Sub (nms_xy, nms_half_wh)
    nms_xy_2 = Add (nms_xy, nms_half_wh)
    nms_class_BN1 = Cast <to = 1> (nms_label_BN1)
    nms_boxes_BN5 = Concat <axis = 2> (nms_xy_1, nms_xy_2, nms_class_BN1)

    nms_padded_kept = Pad (nms_kept_BN, nms_pad_BN)
    nms_best_BK, nms_index_BK = TopK <axis = 1> (nms_padded_kept, nms_K)
    nms_best_BK1 = Unsqueeze (nms_best_BK, nms_2)
    nms_index_BK1 = Unsqueeze (nms_index_BK, nms_2)
    nms_index_BK5 = Concat <axis = 2> (nms_index_BK1, nms_index_BK1, nms_index_BK1, nms_index_BK1, nms_index_BK1)
    nms_padded_boxes = Pad (nms_boxes_BN5, nms_pad_BNx)
    nms_chosen_BK5 = GatherElements <axis = 1> (nms_padded_boxes, nms_index_BK5)
    nms_is_box = Greater (nms_best_BK1, nms_zero)
    nms_is_box_float = Cast <to = 1> (nms_is_box)
    nms_chosen_or_zero = Mul (nms_chosen_BK5, nms_is_box_float)
    nms_xyxy_BK4 = Slice (nms_chosen_or_zero, nms_0, nms_4, nms_2)
    nms_class_BK1 = Slice (nms_chosen_or_zero, nms_4, nms_5, nms_2)
    output0 = Concat <axis = 2> (nms_xyxy_BK4, nms_best_BK1, nms_class_BK1)
}}
"""


@dataclass(frozen=True)
class NmsOptions:
    """Thresholds and limits; see the options of export.py."""

    conf_thres: float
    iou_thres: float
    per_class: int
    per_image: int
    agnostic: bool

    def describe(self) -> str:
        """Return a description of the options for the metadata."""
        across = ", over all classes together" if self.agnostic else f", {self.per_class} boxes per class"
        return f"confidence {self.conf_thres:g}, IoU {self.iou_thres:g}, {self.per_image} boxes per image{across}"


def embed_nms(model: ModelProto, options: NmsOptions) -> None:
    """Append NMS to a detector's graph, in place."""
    import onnx

    graph = model.graph
    columns = graph.output[0].type.tensor_type.shape.dim[2].dim_value
    nms = onnx.parser.parse_model(
        _NMS.format(
            columns=columns, classes=columns - 5, count=options.per_image, per_class=options.per_class,
            conf=options.conf_thres, iou=options.iou_thres,
            compared="nms_score_B1N" if options.agnostic else "nms_score_BCN",
        )
    ).graph  # fmt: skip
    for node in graph.node:
        node.output[:] = ["nms_rows" if name == graph.output[0].name else name for name in node.output]
        node.input[:] = ["nms_rows" if name == graph.output[0].name else name for name in node.input]
    for given, node in enumerate(nms.node):
        node.name = f"nms_node_{given}"
    nms.output[0].type.tensor_type.shape.dim[0].CopyFrom(graph.input[0].type.tensor_type.shape.dim[0])
    graph.node.extend(nms.node)
    graph.initializer.extend(nms.initializer)
    graph.input.extend(nms.input[1:])
    del graph.output[:]
    graph.output.extend(nms.output)
