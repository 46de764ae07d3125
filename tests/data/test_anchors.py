"""Anchors: the fit, the decision to search, and the search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.anchors import anchor_fit, box_sizes, check_anchors, kmean_anchors
from data.labels.labels import ImageRecord

YOLO = [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]]


def record(sizes, height=640, width=640):
    labels = np.array([[0, 0.5, 0.5, w / width, h / height] for w, h in sizes], np.float32).reshape(-1, 5)
    return ImageRecord(Path("x.png"), height, width, labels, ())


FITS = [  # box, anchors, threshold, best possible recall, anchors past the threshold, fitness
    ((10, 10), [10, 10], 4.0, 1.0, 1.0, 1.0),
    ((10, 20), [10, 10], 4.0, 1.0, 1.0, 0.5),
    ((10, 40), [10, 10], 4.0, 0.0, 0.0, 0.0),  # exactly at the threshold does not match
    ((10, 39), [10, 10, 10, 20], 4.0, 1.0, 2.0, 20 / 39),
    ((20, 10), [10, 20], 4.0, 1.0, 1.0, 0.5),
    ((20, 10), [10, 20], 2.0, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("box", "anchors", "thr", "recall", "past", "fitness"), FITS)
def test_anchor_fit(box, anchors, thr, recall, past, fitness):
    fit = anchor_fit([box], anchors, thr)
    assert (fit.best_possible_recall, fit.anchors_past_thr) == (recall, past)
    assert fit.fitness == pytest.approx(fitness)


def test_box_sizes_are_pixels_of_the_training_size():
    wide = record([(100, 50)], height=500, width=1000)
    assert box_sizes([wide], 640) == pytest.approx(np.array([[64, 32]]), rel=1e-6)
    zoomed = box_sizes([wide] * 200, 640, np.random.default_rng(0))
    assert 57.6 <= zoomed[:, 0].min() < 59 and 69 < zoomed[:, 0].max() <= 70.4
    assert zoomed[:, 0] / zoomed[:, 1] == pytest.approx(2.0, rel=1e-5)
    assert box_sizes([], 640).shape == (0, 2)


def test_check_anchors_keeps_a_good_fit():
    report = check_anchors([record([(12, 14), (60, 50), (150, 190)])], YOLO, 640)
    assert not report.changed and "good fit" in str(report)
    assert report.anchors.tolist() == np.reshape(YOLO, (3, 3, 2)).tolist()


def thin_boxes(count=60):
    r = np.random.default_rng(0)
    return [record(np.stack((r.uniform(300, 500, 5), r.uniform(8, 14, 5)), 1)) for _ in range(count)]


def test_check_anchors_replaces_a_poor_fit():
    records = thin_boxes()
    report = check_anchors(records, YOLO, 640, seed=1)
    assert report.changed and report.before.best_possible_recall < 0.1 and report.after.best_possible_recall > 0.99
    assert "new ones" in str(report)
    assert report.anchors.shape == (3, 3, 2)
    areas = report.anchors.reshape(9, 2).prod(1)
    assert (np.diff(areas) >= 0).all()
    again = check_anchors(records, YOLO, 640, seed=1)
    assert np.array_equal(report.anchors, again.anchors)
    coarse_first = check_anchors(records, YOLO[::-1], 640, seed=1).anchors
    assert np.array_equal(coarse_first, report.anchors[::-1])


def test_sets_without_enough_boxes_keep_their_anchors():
    assert not check_anchors([record([])], YOLO, 640).changed
    few = check_anchors([record([(400, 8)] * 4)], YOLO, 640)
    assert not few.changed and few.before.is_poor and "they stay" in str(few)


def test_kmean_anchors_finds_clusters():
    r = np.random.default_rng(0)
    centers = np.array([(10, 20), (60, 30), (100, 200)])
    wh = np.concatenate([c * r.uniform(0.95, 1.05, (100, 2)) for c in centers])
    found = kmean_anchors(wh, 3, generations=200)
    np.testing.assert_allclose(found, centers, rtol=0.05)
    assert np.array_equal(found, kmean_anchors(wh, 3, generations=200))
    start, refined = (anchor_fit(wh, kmean_anchors(wh, 3, generations=g)).fitness for g in (0, 300))
    assert refined > start
    with pytest.raises(ValueError, match="9 anchors from 2 boxes"):
        kmean_anchors([[10, 10], [20, 20], [1, 1]], 9)


@pytest.mark.parametrize("flat", [1, 3, 30])
@pytest.mark.filterwarnings("error")
def test_boxes_without_area_do_not_take_part(flat):
    sizes = [(12, 10)] * 20 + [(13, 9)] * 20
    expected = check_anchors([record(sizes)], YOLO, 640)
    found = check_anchors([record(sizes + [(192, 0)] * flat)], YOLO, 640)
    assert np.isfinite(found.anchors).all() and (found.anchors >= 2).all()
    assert found.before.best_possible_recall == expected.before.best_possible_recall
    clusters = [(200, 12)] * 30 + [(12, 200)] * 30
    assert (check_anchors([record(clusters + [(192, 0)] * flat)], YOLO, 640).anchors > 0).all()
