"""Loss, NMS, metrics and box arithmetic against the reference values, within the tolerances of README.md."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.losses.anchor_based import DetectionLoss, LossConfig, build_targets
from tests.parity import rules
from utils import boxes
from utils.metrics import ConfusionMatrix, ap_per_class, compute_ap, fitness, match_detections, smooth
from utils.nms import non_max_suppression

pytestmark = pytest.mark.parity


def cases(name, **wanted):
    """Cases of a fixture as pytest parameters."""
    chosen = [c for c in rules.yolov5(name)["cases"] if all(c.get(k) == v for k, v in wanted.items())]
    assert chosen
    return pytest.mark.parametrize("case", chosen, ids=lambda c: f"{c['case']}-{c.get('text', c.get('kind', ''))}")


def as_targets(case):
    return torch.tensor(case["targets"], dtype=torch.float32).reshape(-1, 6)


# ---- loss -----------------------------------------------------------------------------------------------------------


@cases("loss")
def test_loss_values_and_gradients(case):
    criterion = DetectionLoss(
        case["anchors_px"], case["strides"], LossConfig(**case["hyp"], autobalance=case["autobalance"])
    )
    arrays = rules.raw_predictions(case["seed"], case["batch"], case["grids"], case["nc"])
    levels = len(case["strides"])
    for call in case["calls"]:
        assert criterion.balance.tolist() == pytest.approx(call["balance_before"][:levels], rel=1e-5)
        raw = [torch.from_numpy(a).requires_grad_() for a in arrays]
        output = criterion(raw, as_targets(case))
        output.total.backward()
        assert output.total.item() == pytest.approx(call["total"], rel=1e-5)
        assert output.parts.tolist() == pytest.approx([call["lbox"], call["lobj"], call["lcls"]], rel=1e-5)
        assert criterion.balance.tolist() == pytest.approx(call["balance_after"][:levels], rel=1e-5)
    for level, record, matched in zip(raw, case["grads"], case["matched_grads"]):
        assert rules.compare(record, level.grad.numpy()) < 1e-3
        for cell in matched:
            gradient = level.grad[tuple(cell["at"])].numpy().astype(np.float64)
            np.testing.assert_allclose(gradient[:5], cell["box_obj"], rtol=1e-3, atol=1e-9)
            np.testing.assert_allclose(gradient[5:].sum(), cell["cls_sum"], rtol=1e-3, atol=1e-9)
            np.testing.assert_allclose(np.abs(gradient[5:]).sum(), cell["cls_abs_sum"], rtol=1e-3, atol=1e-9)


@cases("build_targets")
def test_target_assignment(case):
    strides = torch.tensor(case["strides"])
    anchors = torch.tensor(case["anchors_px"], dtype=torch.float32).view(len(strides), -1, 2) / strides.view(-1, 1, 1)
    levels = build_targets(as_targets(case), anchors, case["grids"], case["anchor_t"])
    assert [len(rows.image) for rows in levels] == [level["n"] for level in case["levels"]]
    for rows, level in zip(levels, case["levels"]):
        columns = [level[k] for k in ("image", "anchor", "gy", "gx", "class", "box", "anchor_wh")]
        for got, expected in zip(rows, columns):
            np.testing.assert_allclose(got.numpy(), np.reshape(expected, got.shape), rtol=1e-6, atol=1e-5)


# ---- NMS ----------------------------------------------------------------------------------------------------


def sorted_certain(rows):
    """Rows with the a-priori ones (confidence 1) in one fixed order: theirs is arbitrary."""
    return rows[np.lexsort((rows[:, 0], -rows[:, 4]))]


@cases("nms")
def test_nms(case):
    shape = {k: case[k] for k in ("images", "rows") if k in case}
    prediction = torch.from_numpy(rules.decoded_predictions(case["seed"], case["nc"], **shape))
    labels = [torch.from_numpy(a) for a in rules.apriori_labels(case["seed"], case["nc"], len(prediction))]
    before = prediction.clone()
    output = non_max_suppression(
        prediction,
        case["conf_thres"],
        case["iou_thres"],
        case["classes"],
        case["agnostic"],
        case["multi_label"],
        labels if case["with_labels"] else (),
        case["max_det"],
    )
    assert torch.equal(prediction, before)
    assert [len(rows) for rows in output] == case["counts"]
    for rows, expected in zip(output, case["out"]):
        expected = sorted_certain(np.array(expected, np.float32).reshape(-1, 6))
        got = sorted_certain(rows.numpy())
        np.testing.assert_array_equal(got[:, 5], expected[:, 5])
        np.testing.assert_allclose(got[:, 4], expected[:, 4], rtol=1e-6)
        np.testing.assert_allclose(got[:, :4], expected[:, :4], atol=1e-3)


# ---- metrics --------------------------------------------------------------------------------------------------------


@cases("ap_per_class")
def test_average_precision(case):
    result = ap_per_class(*rules.ap_inputs(case["seed"], **case["inputs"]))
    assert result.tp.tolist() == case["tp"]
    assert result.fp.tolist() == case["fp"]
    assert result.classes.tolist() == case["classes"]
    for name in ("p", "r", "f1", "ap"):
        np.testing.assert_allclose(getattr(result, name), case[name], atol=1e-9)
    summary = [result.p.mean(), result.r.mean(), result.ap[:, 0].mean(), result.ap.mean()]
    assert summary == pytest.approx([case[k] for k in ("mean_p", "mean_r", "map50", "map")], abs=1e-9)
    assert fitness(np.array(summary)) == pytest.approx(case["fitness"], abs=1e-9)


@cases("compute_ap")
def test_area_under_one_curve(case):
    ap, envelope, recall = compute_ap(np.array(case["recall"]), np.array(case["precision"]))
    assert ap == pytest.approx(case["ap"], abs=1e-9)
    np.testing.assert_allclose(envelope, case["envelope_precision"], atol=1e-12)
    np.testing.assert_allclose(recall, case["envelope_recall"], atol=1e-12)


def detections_and_labels(case, seed):
    if seed is None:
        labels = np.array(case["labels"], np.float32).reshape(-1, 5)
        detections = np.array(case["detections"], np.float32).reshape(-1, 6)
    else:
        labels = rules.random_labels(seed, case["labels_n"], case["nc"])
        detections = rules.jittered_detections(seed, labels, case["nc"])
    return torch.from_numpy(detections), torch.from_numpy(labels)


@cases("matching")
def test_matching_and_confusion(case):
    detections, labels = detections_and_labels(case, case.get("seed"))
    right = match_detections(detections, labels, torch.tensor(rules.yolov5("matching")["iou_thresholds"]))
    assert ["".join("01"[int(cell)] for cell in row) for row in right] == case["correct"]
    for expected in case["confusion"]:
        matrix = ConfusionMatrix(case["nc"], expected["conf"], expected["iou_thres"])
        matrix.process_batch(detections, labels)
        np.testing.assert_array_equal(matrix.matrix, expected["matrix"])


@cases("confusion_sum")
def test_confusion_over_images(case):
    matrix = ConfusionMatrix(case["nc"], case["conf"], case["iou_thres"])
    for seed in case["seeds"]:
        matrix.process_batch(*detections_and_labels(case, seed))
    np.testing.assert_array_equal(matrix.matrix, case["matrix"])


# ---- boxes ----------------------------------------------------------------------------------------------------------

CONVERSIONS = {
    "scale_boxes": lambda b, i: boxes.scale_boxes(i["from_hw"], b, i["to_hw"], i["ratio_pad"]),
    "clip_boxes": lambda b, i: boxes.clip_boxes(b, i["hw"]),
    "xyxy2xywh": lambda b, i: boxes.xyxy2xywh(b),
    "xywh2xyxy": lambda b, i: boxes.xywh2xyxy(b),
    "xywhn2xyxy": lambda b, i: boxes.xywhn2xyxy(b, i["w"], i["h"], i["padw"], i["padh"]),
    "xyxy2xywhn": lambda b, i: boxes.xyxy2xywhn(b, i["w"], i["h"], i["clip"], i["eps"]),
}
GEOMETRY = rules.yolov5("geometry")["cases"]

CONVERTED = [c for c in GEOMETRY if c["kind"] in CONVERSIONS]


@pytest.mark.parametrize("case", CONVERTED, ids=lambda c: f"{c['case']}-{c['kind']}")
@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_box_conversions(case, kind):
    given = np.array(case["in"]["boxes"], np.float32)
    before = given.copy()
    argument = given if kind == "array" else torch.from_numpy(given)
    got = CONVERSIONS[case["kind"]](argument, case["in"])
    assert type(got) is type(argument) and got.dtype == argument.dtype
    np.testing.assert_array_equal(given, before)
    tolerance = 1e-6 if case["kind"] == "xyxy2xywhn" else 1e-3
    np.testing.assert_allclose(np.asarray(got), case["out"], atol=tolerance)


@cases("geometry", kind="iou_pairs")
def test_overlap_of_pairs(case):
    a, b = (torch.from_numpy(x) for x in rules.box_pairs(case["in"]["seed"], case["in"]["n"]))
    centerd = boxes.xyxy2xywh(a), boxes.xyxy2xywh(b)
    for name in ("IoU", "GIoU", "DIoU", "CIoU"):
        switch = {} if name == "IoU" else {name: True}
        got = boxes.bbox_iou(a, b, xywh=False, **switch)
        np.testing.assert_allclose(got, case["out"][name], atol=2e-6)
        got = boxes.bbox_iou(*centerd, xywh=True, **switch)
        np.testing.assert_allclose(got, case["out"][f"{name}_from_xywh"], atol=2e-6)
    first = centerd[0].requires_grad_()
    boxes.bbox_iou(first, centerd[1], CIoU=True).sum().backward()
    np.testing.assert_allclose(first.grad, case["out"]["CIoU_from_xywh_grad_of_first"], atol=1e-6)


@cases("geometry", kind="box_iou_matrix")
def test_overlap_of_all(case):
    a, b = rules.box_pairs(case["in"]["seed"], case["in"]["n"])
    np.testing.assert_allclose(boxes.box_iou(a, b), case["out"], atol=1e-6)
    np.testing.assert_allclose(boxes.box_iou(torch.from_numpy(a), torch.from_numpy(b)), case["out"], atol=1e-6)


@cases("geometry", kind="smooth")
def test_smoothing(case):
    for given, expected in zip(case["in"], case["out"]):
        got = smooth(np.random.RandomState(given["seed"]).rand(given["n"]), given["f"])
        assert got.argmax() == expected["argmax"]
        assert rules.compare(expected["out"], got) < 1e-6
