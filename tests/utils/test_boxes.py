"""Box operations on small cases computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from utils import boxes

FORMS = [np.asarray, torch.from_numpy]
CORNERS = np.array([[10, 20, 110, 220], [0.5, 0.25, 7.75, 9.5]], np.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 3, 4)])
def test_round_trips_keep_shape_and_type(form, shape):
    rng = np.random.default_rng(0)
    given = form(rng.uniform(1, 90, shape).astype(np.float32))
    for there, back in (
        (boxes.xywh2xyxy, boxes.xyxy2xywh),
        (lambda b: boxes.xywhn2xyxy(b, 640, 480), lambda b: boxes.xyxy2xywhn(b, 640, 480)),
    ):
        again = back(there(given))
        assert again.shape == given.shape and again.dtype == given.dtype and type(again) is type(given)
        np.testing.assert_allclose(again, given, atol=1e-4)


def test_integers_are_not_rounded():
    np.testing.assert_allclose(boxes.xyxy2xywh(np.array([[0, 0, 3, 5]])), [[1.5, 2.5, 3, 5]])


@pytest.mark.parametrize("form", FORMS)
def test_arguments_are_not_changed(form):
    given = form(CORNERS.copy())
    for call in (
        lambda: boxes.clip_boxes(given, (5, 5)),
        lambda: boxes.scale_boxes((640, 640), given, (480, 640)),
        lambda: boxes.xyxy2xywhn(given, 50, 50, clip=True),
        lambda: boxes.xywhn2xyxy(given, 2, 2, 1, 1),
        lambda: boxes.xyn2xy(given[:, :2], 2, 2, 1, 1),
    ):
        call()
        np.testing.assert_array_equal(np.asarray(given), CORNERS)


def test_half_precision_stays_half():
    assert boxes.xywh2xyxy(torch.ones(3, 4, dtype=torch.float16)).dtype is torch.float16


def test_scale_boxes_undoes_a_letterbox():
    # 1280x720 resized to 640x360, padded by 12 rows at the top and bottom
    original = np.array([[100, 50, 1200, 700.0]])
    fitted = original / 2 + [0, 12, 0, 12]
    for ratio_pad in (None, ((0.5, 0.5), (0.0, 12.0))):
        np.testing.assert_allclose(boxes.scale_boxes((384, 640), fitted, (720, 1280, 3), ratio_pad), original)


SEGMENTS = [
    # polygon, expected box in an image of 100 x 50 (width x height)
    ([[10, 10], [30, 5], [20, 40]], [10, 5, 30, 40]),
    ([[10, 10], [300, 5], [20, 40]], [10, 10, 20, 40]),  # one point outside
    ([[0, 0], [100, 50]], [0, 0, 100, 50]),  # border points are inside
    ([[-5, 3], [200, 10]], [0, 0, 0, 0]),  # nothing inside
]


@pytest.mark.parametrize(("segment", "expected"), SEGMENTS)
def test_segment2box(segment, expected):
    np.testing.assert_array_equal(boxes.segment2box(np.array(segment, np.float32), 100, 50), expected)


def test_segments2boxes():
    segments = [np.array([[0.1, 0.2], [0.3, 0.6]]), np.array([[0, 0], [1, 0], [0.5, 1.0]])]
    np.testing.assert_allclose(boxes.segments2boxes(segments), [[0.2, 0.4, 0.2, 0.4], [0.5, 0.5, 1, 1]])
    assert boxes.segments2boxes([]).shape == (0, 4)


def test_resampled_square_is_closed_and_even():
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    (points,) = boxes.resample_segments([square], 9)
    expected = [[0, 0], [0.5, 0], [1, 0], [1, 0.5], [1, 1], [0.5, 1], [0, 1], [0, 0.5], [0, 0]]
    np.testing.assert_allclose(points, expected, atol=1e-6)
    assert points.dtype == np.float32


OVERLAPS = [
    # a, b, IoU, GIoU, DIoU
    ([0, 0, 10, 10], [0, 0, 10, 10], 1.0, 1.0, 1.0),
    ([0, 0, 10, 10], [0, 0, 10, 5], 0.5, 0.5, 0.5 - 6.25 / 200),
    ([0, 0, 10, 10], [20, 0, 30, 10], 0.0, -1 / 3, -400 / 1000),
]


@pytest.mark.parametrize(("a", "b", "iou", "giou", "diou"), OVERLAPS)
def test_overlaps_by_hand(a, b, iou, giou, diou):
    a, b = torch.tensor([a, a], dtype=torch.float32), torch.tensor([b, b], dtype=torch.float32)
    for expected, switch in ((iou, {}), (giou, {"GIoU": True}), (diou, {"DIoU": True})):
        assert boxes.bbox_iou(a, b, xywh=False, **switch).tolist() == pytest.approx([expected] * 2, abs=1e-6)
    np.testing.assert_allclose(boxes.box_iou(a, b[:1]), [[iou]] * 2, atol=1e-6)


def test_aspect_ratio_lowers_ciou_only():
    a, b = torch.tensor([[5.0, 5, 8, 2]]), torch.tensor([[5.0, 5, 2, 8]])
    ratio = 4 / np.pi**2 * (np.arctan(0.25) - np.arctan(4)) ** 2
    iou = 4 / 28
    assert boxes.bbox_iou(a, b, DIoU=True).item() == pytest.approx(iou, abs=1e-6)
    assert boxes.bbox_iou(a, b, CIoU=True).item() == pytest.approx(iou - ratio**2 / (1 - iou + ratio), abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_bbox_ioa_and_wh_iou(form):
    one = form(np.array([0, 0, 10, 10], np.float32))
    many = form(np.array([[0, 0, 5, 5], [5, 5, 15, 15], [20, 20, 30, 30]], np.float32))
    np.testing.assert_allclose(boxes.bbox_ioa(one, many), [1, 0.25, 0], atol=1e-6)
    np.testing.assert_allclose(boxes.bbox_ioa(many, many)[0], [1, 0, 0], atol=1e-6)
    wh1, wh2 = form(np.array([[2, 4.0]])), form(np.array([[2, 4.0], [4, 2]]))
    np.testing.assert_allclose(boxes.wh_iou(wh1, wh2), [[1, 4 / 12]], atol=1e-6)
