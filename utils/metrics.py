"""Detection metrics: matching, average precision, confusion matrix, fitness. NumPy, but for the matching."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from utils.boxes import box_iou

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # the ten of COCO
CURVE_POINTS = 1000  # scores at which the curves over the score are sampled
RECALL_POINTS = 101  # recalls at which a precision-recall curve is integrated, as COCO does
F1_SMOOTHING = 0.1  # width of the box filter on the mean F1 curve, as a part of the curve
FITNESS_WEIGHTS = (0.0, 0.0, 0.1, 0.9)  # of precision, recall, mAP50, mAP50-95


class Curves(NamedTuple):
    """Curves of the classes with labels, at IoU 0.5.

    Attributes:
        score: (1000,) scores 0..1.
        precision, recall, f1: (nc, 1000) over the score.
        at_recall: (1000,) recalls 0..1.
        precision_at_recall: (nc, 1000) envelope of the precision over the recall.
    """

    score: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    at_recall: np.ndarray
    precision_at_recall: np.ndarray


class APResult(NamedTuple):
    """Metrics of the classes with labels; the scalars per class are taken where the smoothed mean F1 is largest.

    Attributes:
        tp, fp: (nc,) integers of right and wrong detections at IoU 0.5.
        p, r, f1: (nc,) precision, recall and F1 at IoU 0.5.
        ap: (nc, thresholds) average precision.
        classes: (nc,) int class numbers, rising.
        curves: for the plots.
    """

    tp: np.ndarray
    fp: np.ndarray
    p: np.ndarray
    r: np.ndarray
    f1: np.ndarray
    ap: np.ndarray
    classes: np.ndarray
    curves: Curves


def smooth(y: np.ndarray, f: float = 0.05) -> np.ndarray:
    """Box filter over `f` of the length of y (n,), ends continued with their values.

    Returns:
        (n,) where the filter is odd, else (n + 1,).
    """
    width = round(len(y) * f * 2) // 2 + 1
    padded = np.concatenate((np.full(width // 2, y[0]), y, np.full(width // 2, y[-1])))
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")


def compute_ap(recall: np.ndarray, precision: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Average precision of one curve: area under its envelope, by the trapezoid rule over 101 recalls.

    Args:
        recall: (n,) rising.
        precision: (n,) at these recalls.

    Returns:
        average precision, envelope of the precision (n + 2,), recall (n + 2,): with recall 0 and 1 added at the ends.
    """
    known = np.concatenate(([0.0], recall, [1.0]))
    envelope = np.maximum.accumulate(np.concatenate(([1.0], precision, [0.0]))[::-1])[::-1]
    at = np.linspace(0, 1, RECALL_POINTS)
    value = np.interp(at, known, envelope)
    return float(((value[1:] + value[:-1]) / 2 * np.diff(at)).sum()), envelope, known


def ap_per_class(
    tp: np.ndarray, conf: np.ndarray, pred_cls: np.ndarray, target_cls: np.ndarray, eps: float = 1e-16
) -> APResult:
    """Precision, recall, F1 and average precision of every class that has labels.

    Detections of equal score stay in the order given, so the same input always gives the same figures.

    Args:
        tp: (n, thresholds) bool: which detection is right at which IoU threshold; the first column is IoU 0.5.
        conf: (n,) scores.
        pred_cls: (n,) classes of the detections.
        target_cls: (m,) classes of the labels.
    """
    order = np.argsort(-conf, kind="stable")
    tp, conf, pred_cls = tp[order], conf[order], pred_cls[order]
    classes, labels_per_class = np.unique(target_cls, return_counts=True)
    score = np.linspace(0, 1, CURVE_POINTS)
    precision_curve, recall_curve, at_recall_curve = np.zeros((3, len(classes), CURVE_POINTS))
    ap = np.zeros((len(classes), tp.shape[1]))
    for k, (number, labels) in enumerate(zip(classes, labels_per_class)):
        mine = pred_cls == number
        if not mine.any():
            continue
        right = tp[mine].cumsum(0)  # (n, thresholds)
        recall = right / (labels + eps)
        precision = right / np.arange(1, len(right) + 1)[:, None]
        falling = -conf[mine]
        recall_curve[k] = np.interp(-score, falling, recall[:, 0], left=0)
        precision_curve[k] = np.interp(-score, falling, precision[:, 0], left=1)
        for t in range(ap.shape[1]):
            ap[k, t], envelope, known = compute_ap(recall[:, t], precision[:, t])
            if t == 0:
                at_recall_curve[k] = np.interp(score, known, envelope)
    f1_curve = 2 * precision_curve * recall_curve / (precision_curve + recall_curve + eps)
    best = smooth(f1_curve.mean(0), F1_SMOOTHING).argmax() if len(classes) else 0
    p, r, f1 = precision_curve[:, best], recall_curve[:, best], f1_curve[:, best]
    hits = (r * labels_per_class).round()
    misses = (hits / (p + eps) - hits).round()
    curves = Curves(score, precision_curve, recall_curve, f1_curve, score, at_recall_curve)
    return APResult(hits, misses, p, r, f1, ap, classes.astype(int), curves)


def match_detections(detections: torch.Tensor, labels: torch.Tensor, iouv: torch.Tensor) -> torch.Tensor:
    """Decide which detections of one image are right.

    At each threshold a detection stands for the label of its class that it overlaps most; of the detections that stand
    for one label with an IoU at or above the threshold, the first in the list is right.

    Args:
        detections: (n, 6) corners, score, class; by falling score.
        labels: (m, 5) class, corners in the same frame.
        iouv: (t,) IoU thresholds.

    Returns:
        (n, t) bool, on the device of `detections`.
    """
    found, known = len(detections), len(labels)
    if not found or not known:
        return torch.zeros((found, len(iouv)), dtype=torch.bool, device=detections.device)
    iou = box_iou(labels[:, 1:], detections[:, :4])
    iou = torch.where(labels[:, :1] == detections[None, :, 5], iou, -1.0)  # (m, n)
    # Of equal overlaps the later label counts.
    best, label = iou.flip(0).max(0)
    label = known - 1 - label
    passed = best[:, None] >= iouv  # (n, t)
    place = torch.arange(found, device=detections.device)[:, None]
    first = torch.full((known, len(iouv)), found, dtype=place.dtype, device=place.device)
    first = first.scatter_reduce(0, label[:, None].expand_as(passed), torch.where(passed, place, found), "amin")
    return passed & (first[label] == place)


class ConfusionMatrix:
    """Counts of predicted (rows) against true (columns) classes; the last row and column are the background.

    Args:
        nc: number of classes.
        conf: detections count above this score.
        iou_thres: a detection meets a label above this IoU, whatever their classes.

    Attributes:
        matrix: (nc + 1, nc + 1) float64 integers.
    """

    def __init__(self, nc: int, conf: float = 0.25, iou_thres: float = 0.45) -> None:
        self.nc = nc
        self.conf = conf
        self.iou_thres = iou_thres
        self.matrix = np.zeros((nc + 1, nc + 1))

    def process_batch(self, detections: torch.Tensor | None, labels: torch.Tensor) -> None:
        """Count one image.

        Each detection goes to the label it overlaps most, each label to the one of these that overlaps it most. Labels
        left over are missed (row background). Detections left over count as false alarms (column background) only
        when at least one label was met.

        Args:
            detections: (n, 6) corners, score, class; None = no detections.
            labels: (m, 5) class, corners in the same frame.
        """
        true = labels[:, 0].long().cpu().numpy()
        detections = labels.new_zeros((0, 6)) if detections is None else detections[detections[:, 4] > self.conf]
        predicted = detections[:, 5].long().cpu().numpy()
        if not len(true) or not len(predicted):
            np.add.at(self.matrix[self.nc], true, 1)
            return
        iou = box_iou(labels[:, 1:], detections[:, :4]).cpu().numpy()  # (m, n)
        place = np.arange(len(predicted))
        label = len(true) - 1 - iou[::-1].argmax(0)  # of equal overlaps the later one counts, here and below
        overlap = np.full(iou.shape, -1.0)
        overlap[label, place] = np.where(iou[label, place] > self.iou_thres, iou[label, place], -1.0)
        chosen = len(predicted) - 1 - overlap[:, ::-1].argmax(1)  # (m,)
        met = overlap[np.arange(len(true)), chosen] > 0
        np.add.at(self.matrix, (predicted[chosen[met]], true[met]), 1)
        np.add.at(self.matrix[self.nc], true[~met], 1)
        if met.any():
            left_over = np.setdiff1d(place, chosen[met])
            np.add.at(self.matrix[:, self.nc], predicted[left_over], 1)

    def tp_fp(self) -> tuple[np.ndarray, np.ndarray]:
        """Right and wrong detections per class, (nc,) each; a false alarm on background is wrong."""
        right = self.matrix.diagonal()
        return right[:-1].copy(), (self.matrix.sum(1) - right)[:-1]


def fitness(x: np.ndarray) -> np.ndarray:
    """Return the fitness that selects the best checkpoint: 0.1 * mAP50 + 0.9 * mAP50-95.

    Args:
        x: (..., 4 or more) precision, recall, mAP50, mAP50-95, anything.

    Returns:
        (...) float64.
    """
    return np.asarray(x, np.float64)[..., :4] @ np.array(FITNESS_WEIGHTS)
