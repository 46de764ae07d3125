"""How much each class counts in the loss (`class_weights`), and each image in the draw (`--image-weights`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from utils.errors import ConfigError, did_you_mean, listed, shown


def labels_to_class_weights(labels: Sequence[NDArray[np.floating]], num_classes: int) -> NDArray[np.float64]:
    """Return inverse class frequencies: 1 / count (a class without labels counts as one), scaled to sum 1.

    Args:
        labels: per image (n, 5), class first.

    Returns:
        (num_classes,) float64.
    """
    weights = 1 / np.maximum(label_counts(labels, num_classes), 1)
    return weights / weights.sum()


def label_counts(labels: Sequence[NDArray[np.floating]], num_classes: int) -> NDArray[np.float64]:
    """Return the number of labels of each class, (num_classes,) float64; `labels` as in `labels_to_class_weights`."""
    return np.bincount(_classes(labels), minlength=num_classes).astype(np.float64)


def balanced_class_weights(labels: Sequence[NDArray[np.floating]], num_classes: int) -> NDArray[np.float64]:
    """Return `labels_to_class_weights` scaled so that their mean over the labels is 1; 1 for classes without labels.

    (Those would get the largest weights of all, for outputs that have nothing to learn but zero.)
    """
    counts = label_counts(labels, num_classes)
    weights = labels_to_class_weights(labels, num_classes)
    if counts.any():
        weights *= counts.sum() / (weights * counts).sum()
    return np.where(counts > 0, weights, 1.0)


def class_loss_weights(
    wanted: str | Sequence[float] | Mapping[str | int, float] | None,
    names: Mapping[int, str],
    labels: Sequence[NDArray[np.floating]],
    where: str,
) -> tuple[float, ...] | None:
    """Resolve the hyperparameter `class_weights` for the classes of a dataset.

    Args:
        wanted: None, `'balanced'`, a number per class, or numbers by class name or number (1 for the others).
        names: class names by number, 0 and on.
        labels: per training image (n, 5), class first.
        where: file that holds it.

    Returns:
        A weight per class; None = no class weights.

    Raises:
        ConfigError: another number of weights than of classes, or a class that the dataset does not have.
    """
    if wanted is None:
        return None
    if isinstance(wanted, str):
        return tuple(float(w) for w in balanced_class_weights(labels, len(names)))
    if not isinstance(wanted, Mapping):
        if len(wanted) != len(names):
            have = f"the dataset has {len(names)} classes ({listed([*names.values()])})"
            raise ConfigError(f"{where}: class_weights: {len(wanted)} numbers; {have}")
        return tuple(float(w) for w in wanted)
    weights = [1.0] * len(names)
    numbers = {name: number for number, name in names.items()}
    for key, weight in wanted.items():
        text = str(key)
        number = numbers.get(text, int(text) if text.isascii() and text.isdigit() and int(text) in names else None)
        if number is None:
            near = did_you_mean(text, numbers)
            raise ConfigError(f"{where}: class_weights: no class {shown(text)}; there are {listed([*numbers])}{near}")
        weights[int(number)] = float(weight)
    return tuple(weights)


def labels_to_image_weights(
    labels: Sequence[NDArray[np.floating]], num_classes: int, class_weights: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Return the weight of each image: the sum of the class weights of its labels (0 without labels).

    In training the class weights are `labels_to_class_weights(...) * (1 - mAP per class)^2`.

    Args:
        labels: per image (n, 5), class first.
        class_weights: (num_classes,).

    Returns:
        (len(labels),) float64.
    """
    weights = np.asarray(class_weights, np.float64).reshape(num_classes)
    # No (images, classes) matrix: that takes gigabytes for a large dataset.
    owners = np.repeat(np.arange(len(labels)), [len(rows) for rows in labels])
    return np.bincount(owners, weights[_classes(labels)], minlength=len(labels)).astype(np.float64)


def _classes(labels: Sequence[NDArray[np.floating]]) -> NDArray[np.int64]:
    """Return the (N,) class of every label."""
    return np.concatenate([np.zeros(0, np.float32), *(rows[:, 0] for rows in labels)]).astype(np.int64)
