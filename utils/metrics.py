"""Detection metrics: matching, average precision, confusion matrix, fitness.

Average precision follows COCO (https://arxiv.org/abs/1405.0312): precision envelope, 101 recalls, IoU 0.50:0.05:0.95;
it is integrated with the trapezoid rule, as in YOLOv5. Notation: nc classes, n detections, m labels, t IoU thresholds;
TP, FP and FN are true positives, false positives and false negatives.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from utils.boxes import box_iou

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # COCO: 0.50:0.05:0.95
CURVE_POINTS = 1000  # confidences at which the curves are sampled
RECALL_POINTS = 101  # 101-point interpolation of COCO
F1_SMOOTHING = 0.1  # width of the box filter on the mean F1 curve, as a fraction of its length
RANKING_FLOOR = 0.05  # mAP50-95 or fitness below which models are not ranked: differences are noise
FITNESS_WEIGHTS = (0.0, 0.0, 0.1, 0.9)  # of precision, recall, mAP50, mAP50-95


class Curves(NamedTuple):
    """Curves of the classes that have labels, at IoU 0.5.

    Attributes:
        confidence: (1000,) in [0, 1].
        precision, recall, f1: (nc, 1000) over confidence.
        at_recall: (1000,) in [0, 1].
        precision_at_recall: (nc, 1000) precision envelope over recall.
    """

    confidence: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    at_recall: np.ndarray
    precision_at_recall: np.ndarray


class APResult(NamedTuple):
    """Metrics of the classes that have labels, at the confidence with the largest smoothed mean F1.

    Attributes:
        tp, fp: (nc,) number of TP and FP at IoU 0.5.
        p, r, f1: (nc,) precision, recall and F1 at IoU 0.5.
        ap: (nc, t) average precision.
        classes: (nc,) int class indices in ascending order.
        curves: curves for the plots.
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
    """Smooth y (n,) with a box filter over the fraction `f` of its length; the ends are padded with their values.

    Returns:
        (n,) for an odd filter width, else (n + 1,).
    """
    width = round(len(y) * f * 2) // 2 + 1
    padded = np.concatenate((np.full(width // 2, y[0]), y, np.full(width // 2, y[-1])))
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")


def compute_ap(recall: np.ndarray, precision: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Compute average precision: area under the precision envelope, trapezoid rule over 101 recalls.

    Args:
        recall: (n,) in ascending order.
        precision: (n,) at these recalls.

    Returns:
        Average precision, precision envelope (n + 2,) and recall (n + 2,), with recall 0 and 1 added at the ends.
    """
    recall = np.concatenate(([0.0], recall, [1.0]))
    envelope = np.maximum.accumulate(np.concatenate(([1.0], precision, [0.0]))[::-1])[::-1]
    at = np.linspace(0, 1, RECALL_POINTS)
    value = np.interp(at, recall, envelope)
    return float(((value[1:] + value[:-1]) / 2 * np.diff(at)).sum()), envelope, recall


def ap_per_class(
    tp: np.ndarray, conf: np.ndarray, pred_cls: np.ndarray, target_cls: np.ndarray, eps: float = 1e-16
) -> APResult:
    """Compute precision, recall, F1 and average precision of every class that has labels.

    Detections of equal confidence keep their order, so the result is deterministic.

    Args:
        tp: (n, t) bool, whether a detection is a TP at each IoU threshold; column 0 is IoU 0.5.
        conf: (n,) confidence.
        pred_cls: (n,) predicted classes.
        target_cls: (m,) classes of the labels.
        eps: added to denominators.
    """
    order = np.argsort(-conf, kind="stable")
    tp, conf, pred_cls = tp[order], conf[order], pred_cls[order]
    classes, num_labels = np.unique(target_cls, return_counts=True)
    confidence = np.linspace(0, 1, CURVE_POINTS)
    precision_curve, recall_curve, at_recall_curve = np.zeros((3, len(classes), CURVE_POINTS))
    ap = np.zeros((len(classes), tp.shape[1]))
    for k, (c, labels) in enumerate(zip(classes, num_labels)):
        mask = pred_cls == c
        if not mask.any():
            continue
        tp_count = tp[mask].cumsum(0)  # (n, t): TP among the first 1 ... n detections
        recall = tp_count / (labels + eps)
        precision = tp_count / np.arange(1, len(tp_count) + 1)[:, None]
        recall_curve[k] = np.interp(-confidence, -conf[mask], recall[:, 0], left=0)
        precision_curve[k] = np.interp(-confidence, -conf[mask], precision[:, 0], left=1)
        for t in range(ap.shape[1]):
            ap[k, t], envelope, at = compute_ap(recall[:, t], precision[:, t])
            if t == 0:
                at_recall_curve[k] = np.interp(confidence, at, envelope)
    f1_curve = 2 * precision_curve * recall_curve / (precision_curve + recall_curve + eps)
    best = smooth(f1_curve.mean(0), F1_SMOOTHING).argmax() if len(classes) else 0
    p, r, f1 = precision_curve[:, best], recall_curve[:, best], f1_curve[:, best]
    num_tp = (r * num_labels).round()
    num_fp = (num_tp / (p + eps) - num_tp).round()
    curves = Curves(confidence, precision_curve, recall_curve, f1_curve, confidence, at_recall_curve)
    return APResult(num_tp, num_fp, p, r, f1, ap, classes.astype(int), curves)


def match_detections(detections: torch.Tensor, labels: torch.Tensor, iouv: torch.Tensor) -> torch.Tensor:
    """Match the detections of one image to its labels.

    Each detection is assigned the label of its class with the largest IoU. Of the detections assigned to one label with
    an IoU of at least the threshold, the first one is a TP.

    Args:
        detections: (n, 6) xyxy, confidence, class, in descending order of confidence.
        labels: (m, 5) class, xyxy in the same coordinates.
        iouv: (t,) IoU thresholds.

    Returns:
        (n, t) bool on the device of `detections`: whether each detection is a TP.
    """
    n, m = len(detections), len(labels)
    if not n or not m:
        return torch.zeros((n, len(iouv)), dtype=torch.bool, device=detections.device)
    iou = box_iou(labels[:, 1:], detections[:, :4])
    iou = torch.where(labels[:, :1] == detections[None, :, 5], iou, -1.0)  # (m, n)
    # For equal IoU the later label is chosen.
    best, label = iou.flip(0).max(0)
    label = m - 1 - label
    matched = best[:, None] >= iouv  # (n, t)
    index = torch.arange(n, device=detections.device)[:, None]
    first = torch.full((m, len(iouv)), n, dtype=index.dtype, device=index.device)
    first = first.scatter_reduce(0, label[:, None].expand_as(matched), torch.where(matched, index, n), "amin")
    return matched & (first[label] == index)


class ConfusionMatrix:
    """Confusion matrix of predicted (rows) and true (columns) classes; the last row and column are the background.

    Args:
        nc: number of classes.
        conf: minimum confidence of a detection.
        iou_thres: minimum IoU of a match; classes may differ.

    Attributes:
        matrix: (nc + 1, nc + 1) float64 counts.
    """

    def __init__(self, nc: int, conf: float = 0.25, iou_thres: float = 0.45) -> None:
        self.nc = nc
        self.conf = conf
        self.iou_thres = iou_thres
        self.matrix = np.zeros((nc + 1, nc + 1))

    def process_batch(self, detections: torch.Tensor | None, labels: torch.Tensor) -> None:
        """Add the detections and labels of one image.

        Each detection is assigned the label with the largest IoU, and each label keeps the detection with the largest
        IoU. Other labels are FN (row background). Other detections are FP (column background), but are only counted if
        at least one label was matched, as in YOLOv5.

        Args:
            detections: (n, 6) xyxy, confidence, class; None = no detections.
            labels: (m, 5) class, xyxy in the same coordinates.
        """
        true = labels[:, 0].long().cpu().numpy()
        detections = labels.new_zeros((0, 6)) if detections is None else detections[detections[:, 4] > self.conf]
        predicted = detections[:, 5].long().cpu().numpy()
        if not len(true) or not len(predicted):
            np.add.at(self.matrix[self.nc], true, 1)
            return
        iou = box_iou(labels[:, 1:], detections[:, :4]).cpu().numpy()  # (m, n)
        index = np.arange(len(predicted))
        label = len(true) - 1 - iou[::-1].argmax(0)  # for equal IoU the later one is chosen, here and below
        candidates = np.full(iou.shape, -1.0)
        candidates[label, index] = np.where(iou[label, index] > self.iou_thres, iou[label, index], -1.0)
        best = len(predicted) - 1 - candidates[:, ::-1].argmax(1)  # (m,)
        matched = candidates[np.arange(len(true)), best] > 0
        np.add.at(self.matrix, (predicted[best[matched]], true[matched]), 1)
        np.add.at(self.matrix[self.nc], true[~matched], 1)
        if matched.any():
            unmatched = np.setdiff1d(index, best[matched])
            np.add.at(self.matrix[:, self.nc], predicted[unmatched], 1)

    def tp_fp(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of TP and FP per class, (nc,) each."""
        tp = self.matrix.diagonal()
        return tp[:-1].copy(), (self.matrix.sum(1) - tp)[:-1]


def fitness(x: np.ndarray) -> np.ndarray:
    """Return the fitness that selects the best checkpoint: 0.1 * mAP50 + 0.9 * mAP50-95.

    Args:
        x: (..., k) with k >= 4: precision, recall, mAP50, mAP50-95; further columns are ignored.

    Returns:
        float64 of the shape of x without the last axis.
    """
    return np.asarray(x, np.float64)[..., :4] @ np.array(FITNESS_WEIGHTS)
