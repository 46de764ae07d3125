"""Bootstrap over validation images: how much mAP50-95 varies with the images that it is measured on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.evaluate.accumulator import ImageOutcome
from utils.metrics import compute_ap

RESAMPLES = 200
MIN_IMAGES = 10  # with fewer images the interval itself is unreliable


class ImageBootstrap:
    """Collect the matched detections of every image; a sink of `EvalOptions`."""

    def __init__(self) -> None:
        self._tp: list[NDArray[np.bool_]] = []
        self._conf: list[NDArray[np.float32]] = []
        self._detection_classes: list[NDArray[np.float32]] = []
        self._label_classes: list[NDArray[np.float32]] = []

    def __call__(self, outcome: ImageOutcome) -> None:
        """Add one image."""
        self._tp.append(outcome.correct.numpy())
        self._conf.append(outcome.detections[:, 4].numpy())
        self._detection_classes.append(outcome.detections[:, 5].numpy())
        self._label_classes.append(outcome.labels[:, 0].numpy())

    def map_values(self, resamples: int = RESAMPLES, seed: int = 0) -> list[float]:
        """Return mAP50-95 of resampled validation sets (Efron 1979, https://doi.org/10.1214/aos/1176344552).

        Each resample draws as many images as there are, with replacement. The same seed draws the same images for every
        model. AP is linear interpolation at 101 recalls, as in `utils.metrics.ap_per_class`.

        Returns:
            One value per resample; none with fewer than `MIN_IMAGES` images or without labels.
        """
        num_images = len(self._tp)
        if num_images < MIN_IMAGES or not any(map(len, self._label_classes)):
            return []
        order = np.argsort(-np.concatenate(self._conf), kind="stable")
        tp = np.concatenate(self._tp)[order]
        detection_classes = np.concatenate(self._detection_classes)[order]
        image_of_detection = np.repeat(np.arange(num_images), [len(rows) for rows in self._tp])[order]
        label_classes = np.concatenate(self._label_classes)
        image_of_label = np.repeat(np.arange(num_images), [len(rows) for rows in self._label_classes])
        masks = {c: detection_classes == c for c in np.unique(label_classes)}
        by_class = [
            (tp[mask], image_of_detection[mask], image_of_label[label_classes == c]) for c, mask in masks.items()
        ]
        rng = np.random.default_rng(seed)
        values = []
        for _ in range(resamples):
            weights = np.bincount(rng.integers(0, num_images, num_images), minlength=num_images)
            per_class = [_weighted_ap(t, weights[d], int(weights[n].sum())) for t, d, n in by_class]
            values.append(float(np.mean([ap for ap in per_class if ap is not None] or [0.0])))
        return values


def _weighted_ap(tp: NDArray[np.bool_], weights: NDArray[np.int64], num_labels: int) -> float | None:
    """Return the AP of one class, mean over the IoU thresholds.

    Args:
        tp: (n, t) by descending confidence.
        weights: (n,) how often the image of each detection was drawn.
        num_labels: labels in the resample; None is returned for 0.
    """
    if not num_labels:
        return None
    drawn = weights > 0
    if not drawn.any():
        return 0.0
    tp_count = (tp[drawn] * weights[drawn, None]).cumsum(0)
    recall, precision = tp_count / num_labels, tp_count / weights[drawn].cumsum()[:, None]
    return float(np.mean([compute_ap(recall[:, t], precision[:, t])[0] for t in range(tp.shape[1])]))
