"""Metrics of cases with known results."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from utils.metrics import IOU_THRESHOLDS, ConfusionMatrix, ap_per_class, compute_ap, fitness, match_detections, smooth

IOUV = torch.from_numpy(IOU_THRESHOLDS).float()


def test_perfect_detector():
    labels = np.array([0, 0, 3, 3, 3])
    result = ap_per_class(np.ones((5, 10), bool), np.linspace(0.5, 0.9, 5), labels, labels)
    assert result.classes.tolist() == [0, 3]
    assert result.tp.tolist() == [2, 3] and result.fp.tolist() == [0, 0]
    # the curve ends at recall 1 with precision 0: the last of 100 steps counts half
    np.testing.assert_allclose(result.ap, 0.995)
    np.testing.assert_allclose([result.p, result.r, result.f1], 1)


def test_ties_keep_the_given_order():
    labels = np.zeros(4)
    right = np.array([True, False, True, False] * 50)[:, None].repeat(10, 1)
    equal = ap_per_class(right, np.full(200, 0.5), np.zeros(200), labels)
    falling = ap_per_class(right, np.linspace(0.9, 0.1, 200), np.zeros(200), labels)
    np.testing.assert_array_equal(equal.ap, falling.ap)
    shuffled_among_others = np.concatenate((np.full(200, 0.5), np.full(200, 0.4)))
    both = ap_per_class(np.concatenate((right, ~right)), shuffled_among_others, np.zeros(400), np.zeros(400))
    again = ap_per_class(np.concatenate((~right, right)), shuffled_among_others[::-1], np.zeros(400), np.zeros(400))
    np.testing.assert_array_equal(both.ap, again.ap)


@pytest.mark.parametrize("detections", [0, 6])
@pytest.mark.parametrize("labels", [0, 4])
def test_no_true_positives(detections, labels):
    result = ap_per_class(
        np.zeros((detections, 10), bool), np.linspace(0.1, 0.9, detections), np.zeros(detections), np.zeros(labels)
    )
    assert result.ap.shape == (min(labels, 1), 10) and not result.ap.any()
    assert not result.p.any() and not result.r.any() and not result.tp.any()
    assert result.curves.precision_at_recall.shape == (min(labels, 1), 1000)


def test_classes_without_labels_do_not_count():
    result = ap_per_class(np.ones((3, 1), bool), np.array([0.9, 0.8, 0.7]), np.array([0, 7, 7]), np.array([0]))
    assert result.classes.tolist() == [0] and result.ap.shape == (1, 1)


def test_envelope_never_rises():
    ap, envelope, recall = compute_ap(np.array([0.2, 0.4, 0.6]), np.array([0.5, 1.0, 0.75]))
    assert envelope.tolist() == [1, 1, 1, 0.75, 0] and recall.tolist() == [0, 0.2, 0.4, 0.6, 1]
    assert 0.6 < ap < 0.75


def test_smoothing_keeps_ends_and_level():
    np.testing.assert_allclose(smooth(np.full(1000, 3.0), 0.1), 3)
    assert smooth(np.eye(1000)[500], 0.1).max() == pytest.approx(1 / 101)


BOX = [10.0, 10, 110, 110]
FAR = [300.0, 300, 400, 400]
MATCHES = [
    # detections (box, class), labels (class, box), TP at IoU 0.5, description
    ([(BOX, 0)], [(0, BOX)], [True], "equal"),
    ([(BOX, 1)], [(0, BOX)], [False], "wrong class"),
    ([(BOX, 0), (BOX, 0)], [(0, BOX)], [True, False], "a label matches one detection, the first"),
    ([(FAR, 0), (BOX, 0)], [(0, BOX)], [False, True], "FP before TP"),
    ([(BOX, 0), (BOX, 1)], [(0, BOX), (1, BOX)], [True, True], "two classes at one position"),
    ([(BOX, 0), (FAR, 0)], [(0, BOX), (0, FAR)], [True, True], "two places"),
    (
        [([0, 0, 100, 100], 0), ([0, 0, 100, 55], 0)],
        [(0, [0, 0, 100, 60]), (0, [0, 40, 100, 100])],
        [True, True],
        "equal IoU with both: matched with the later one, the other label stays free",
    ),
    ([], [(0, BOX)], [], "no detections"),
    ([(BOX, 0)], [], [False], "no labels"),
]


def tensors(detections, labels):
    found = torch.tensor([[*box, 0.9, number] for box, number in detections]).reshape(-1, 6)
    return found, torch.tensor([[number, *box] for number, box in labels]).reshape(-1, 5)


@pytest.mark.parametrize(("detections", "labels", "right", "text"), MATCHES)
def test_matching(detections, labels, right, text):
    got = match_detections(*tensors(detections, labels), IOUV)
    assert got.shape == (len(detections), 10) and got.dtype == torch.bool
    assert got[:, 0].tolist() == right


def test_matching_equals_the_rule_one_by_one():
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.uniform(0, 400, (60, 5)).astype(np.float32))
    labels[:, 0] = torch.from_numpy(rng.integers(0, 3, 60))
    labels[:, 3:] = labels[:, 1:3] + 100
    found = labels[rng.integers(0, 60, 300)][:, [1, 2, 3, 4, 0, 0]]
    found[:, :4] += torch.from_numpy(rng.normal(0, 8, (300, 4)).astype(np.float32))
    got = match_detections(found, labels, IOUV)
    for t, threshold in enumerate(IOUV.tolist()):
        taken = set()
        for k, (x1, y1, x2, y2, _, number) in enumerate(found.tolist()):
            overlaps = []
            for j, (other, a1, b1, a2, b2) in enumerate(labels.tolist()):
                w, h = max(0, min(x2, a2) - max(x1, a1)), max(0, min(y2, b2) - max(y1, b1))
                union = (x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - w * h
                overlaps.append((w * h / union if other == number else -1, j))
            best, j = max(overlaps)
            expected = best >= threshold and j not in taken
            if best >= threshold:
                taken.add(j)
            assert got[k, t].item() == expected, (k, t)


def test_confusion_matrix_counts():
    matrix = ConfusionMatrix(2)
    matrix.process_batch(*tensors([(BOX, 1), (FAR, 0)], [(0, BOX)]))  # wrong class, FP
    matrix.process_batch(None, torch.tensor([[1, *BOX]]))  # FN
    matrix.process_batch(torch.tensor([[*BOX, 0.25, 1]]), torch.tensor([[1, *BOX]]))  # not above the threshold: FN
    assert matrix.matrix.tolist() == [[0, 0, 1], [1, 0, 0], [0, 2, 0]]
    right, wrong = matrix.tp_fp()
    assert right.tolist() == [0, 0] and wrong.tolist() == [1, 1]


def test_confusion_matrix_sum_of_columns_is_the_labels():
    rng = np.random.default_rng(1)
    matrix = ConfusionMatrix(4)
    total = np.zeros(4)
    for _ in range(5):
        labels = torch.from_numpy(rng.uniform(0, 300, (20, 5)).astype(np.float32))
        labels[:, 0] = torch.from_numpy(rng.integers(0, 4, 20))
        labels[:, 3:] = labels[:, 1:3] + 60
        found = torch.cat((labels[:, 1:] + 5, torch.ones(20, 1), labels[:, :1].flip(0)), 1)
        matrix.process_batch(found, labels)
        total += np.bincount(labels[:, 0].long(), minlength=4)
    assert matrix.matrix.sum(0)[:4].tolist() == total.tolist()


def test_fitness_weights():
    assert fitness(np.array([1, 1, 0.5, 0.2])) == pytest.approx(0.05 + 0.18)
    assert fitness(np.ones((3, 7))).shape == (3,)
