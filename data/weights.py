"""How much each class and each picture counts when pictures are drawn by weight (`--image-weights`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def labels_to_class_weights(labels: Sequence[NDArray[np.floating]], num_classes: int) -> NDArray[np.float64]:
    """Weights that fall with a class's frequency: 1 / count (a class without labels counts as one), scaled to sum 1.

    Args:
        labels: per picture (n, 5), class first.

    Returns:
        (num_classes,) float64.
    """
    counts = np.zeros(num_classes)
    for rows in labels:
        counts += np.bincount(rows[:, 0].astype(np.int64), minlength=num_classes)
    weights = 1 / np.maximum(counts, 1)
    return weights / weights.sum()


def labels_to_image_weights(
    labels: Sequence[NDArray[np.floating]], num_classes: int, class_weights: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Weight of each picture: the sum of the class weights of its labels (0 without labels).

    In training the class weights are `labels_to_class_weights(...) * (1 - mAP per class)^2`.

    Args:
        labels: per picture (n, 5), class first.
        class_weights: (num_classes,).

    Returns:
        (len(labels),) float64.
    """
    counts = [np.bincount(rows[:, 0].astype(np.int64), minlength=num_classes) for rows in labels]
    return np.asarray(counts, np.float64).reshape(-1, num_classes) @ np.asarray(class_weights, np.float64)
