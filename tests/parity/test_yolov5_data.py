"""Data pipeline against the reference: fits, validation samples, batch shapes, box filters, weights, anchors."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from data.anchors import RECALL_NEEDED, anchor_fit
from data.augment import box_candidates, letterbox
from data.labels.labels import ImageRecord
from data.loading.dataset import DetectionDataset
from data.loading.weights import labels_to_class_weights, labels_to_image_weights
from data.sizes import multi_scale_sizes, rect_batch_shapes, rect_order
from tests.parity import rules

pytestmark = pytest.mark.parity

RECIPE = rules.yolov5("recipe")
VAL_ITEMS = rules.yolov5("val_items")
MEAN_TOLERANCE = 0.02  # gray levels: resize implementations differ a little between OpenCV versions


@pytest.mark.parametrize("case", rules.yolov5("letterbox")["cases"], ids=lambda c: str(c["case"]))
def test_letterbox(case):
    image = rules.image_u8(case["seed"], *case["image_hw"])
    before = image.copy()
    out, ratio, pad = letterbox(
        image,
        tuple(case["new_shape"]),
        auto=case["auto"],
        scaleFill=case.get("scale_fill", False),
        scaleup=case["scaleup"],
        stride=case["stride"],
    )
    assert list(out.shape) == case["out_shape"]
    assert list(ratio) == case["ratio"]
    assert list(pad) == case["pad_wh"]
    assert out.mean() == pytest.approx(case["mean"], abs=MEAN_TOLERANCE)
    assert np.array_equal(image, before)
    if "content_top_left_bottom_right" in case:
        top, left, bottom, right = case["content_top_left_bottom_right"]
        out[top:bottom, left:right] = 114
        assert (out == 114).all()


@pytest.fixture(scope="module")
def val_records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("val_items")
    records = []
    for i, (height, width) in enumerate(VAL_ITEMS["image_hw"]):
        path = folder / f"{i:02d}.png"
        assert cv2.imwrite(str(path), rules.image_u8(i, height, width))
        classes = (i % 3, (i + 1) % 3, 2)
        side = 0.1 + 0.05 * (i % 6) + 0.02
        rows = [[classes[k], 0.2 + 0.1 * k, 0.3 + 0.15 * k, side, 0.08 + 0.03 * k] for k in range(3)]
        labels = np.array([[float(f"{v:.6f}") for v in row] for row in rows], np.float32)
        records.append(ImageRecord(path, height, width, labels, ()))
    return records


@pytest.mark.parametrize("case", VAL_ITEMS["cases"], ids=lambda c: f"{c['imgsz']}-{c['rect']}-{c['image']}")
def test_val_item(case, val_records):
    dataset = DetectionDataset(
        val_records, case["imgsz"], rect=case["rect"], batch_size=4, pad=0.5 if case["rect"] else 0.0
    )
    sample = dataset[case["image"]]
    assert [3, *sample.image.shape[:2]] == case["tensor_shape"]
    assert list(sample.shapes.original) == case["orig_hw"]
    assert list(sample.shapes.ratio) == pytest.approx(case["ratio_hw"], rel=1e-12)
    assert list(sample.shapes.pad) == case["pad_wh"]
    np.testing.assert_allclose(sample.labels, case["labels"], rtol=0, atol=2e-7)
    assert sample.image.mean() == pytest.approx(case["mean"], abs=MEAN_TOLERANCE)


@pytest.mark.parametrize("case", RECIPE["rect_batches"]["cases"], ids=lambda c: f"{c['batch']}-{c['imgsz']}-{c['pad']}")
def test_rect_batches(case):
    sizes = RECIPE["rect_batches"]["image_hw"]
    assert rect_order(sizes).tolist() == case["order"]
    shapes = rect_batch_shapes(sizes, case["batch"], case["imgsz"], case["stride"], case["pad"])
    assert [list(shape) for shape in shapes] == case["batch_shapes_hw"]


@pytest.mark.parametrize("case", RECIPE["multi_scale"], ids=lambda c: f"{c['imgsz']}-{c['stride']}")
def test_multi_scale_sizes(case):
    assert multi_scale_sizes(case["imgsz"], case["stride"]) == case["sizes"]


@pytest.mark.parametrize("case", RECIPE["anchor_fit"]["cases"], ids=lambda c: str(c["seed"]))
def test_anchor_fit(case):
    wh = rules.label_sizes(case["seed"], case["n"], case["imgsz"])
    fit = anchor_fit(wh, case["anchors_px"], case["thr"])
    found = (fit.anchors_past_thr, fit.best_possible_recall, fit.fitness, fit.mean_best, fit.mean_all)
    names = ("anchors_past_thr_per_label", "best_possible_recall", "evolve_fitness", "mean_best", "mean_all")
    assert found == pytest.approx([case[name] for name in names], rel=1e-6)
    assert fit.is_poor == case["recompute"]
    assert RECIPE["anchor_fit"]["bpr_needed"] == RECALL_NEEDED


def test_weights():
    case = RECIPE["class_weights"]
    labels = [np.zeros((len(classes), 5), np.float32) for classes in case["classes_per_image"]]
    for rows, classes in zip(labels, case["classes_per_image"]):
        rows[:, 0] = classes
    nc = case["nc"]
    weights = labels_to_class_weights(labels, nc)
    assert weights.tolist() == pytest.approx(case["class_weights"], rel=1e-6)
    plain = labels_to_image_weights(labels, nc, np.ones(nc))
    assert plain.tolist() == case["image_weights_with_unit_class_weights"]
    by_result = weights * (1 - np.array([0.5, 0.1, 0.2, 0.0])) ** 2
    found = labels_to_image_weights(labels, nc, by_result)
    assert found.tolist() == pytest.approx(case["image_weights_with_class_weights"], rel=1e-6)


BOX_CANDIDATES = [c for c in rules.yolov5("geometry")["cases"] if c["kind"] == "box_candidates"]


@pytest.mark.parametrize("case", BOX_CANDIDATES, ids=lambda c: str(c["case"]))
def test_box_candidates(case):
    given = case["in"]
    before, after = rules.box_pairs(given["seed"], given["n"])
    for area_thr, expected in zip(given["area_thr"], case["out"]):
        found = box_candidates(before.T, after.T, given["wh_thr"], given["ar_thr"], area_thr)
        assert found.tolist() == expected
