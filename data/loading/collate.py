"""Samples to batches: stack, turn BGR images into RGB planes, number the labels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch.utils.data import get_worker_info

from data.augment.warp import Labels
from data.letterbox import FILL, Image
from utils.structures import Batch, Sample


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one size.

    Returns:
        Images (B, 3, H, W) uint8 RGB; targets (M, 6) with the sample's index in the batch first.
    """
    shapes = {s.image.shape for s in samples}
    if len(shapes) != 1:
        raise ValueError(f"images of different sizes in one batch: {sorted(shapes)}")
    height, width, _ = shapes.pop()
    images = _empty((len(samples), 3, height, width))
    planes = images.numpy()
    for plane, sample in zip(planes, samples):
        cv2.split(sample.image, [plane[2], plane[1], plane[0]])  # writes in place: no transposed copy
    return Batch(
        images,
        torch.from_numpy(_number([s.labels for s in samples])),
        tuple(s.path for s in samples),
        tuple(s.shapes for s in samples),
    )


def collate_quad(samples: Sequence[Sample], rng: np.random.Generator) -> Batch:
    """Turn every four samples into one of twice the side: either the four side by side, or the first one enlarged.

    The last image of a batch that does not divide by four keeps what samples there are, with gray in the free places.

    Returns:
        As `collate`, with a quarter of the images; no geometry (`shapes` holds None).
    """
    joined = []
    for start in range(0, len(samples), 4):
        group = samples[start : start + 4]
        whole = len(group) == 4 and rng.random() < 0.5
        image, labels = _enlarge(group[0]) if whole else _side_by_side(group)
        joined.append(Sample(image, labels, group[0].path, None, group[0].index))
    return collate(joined)


def _empty(shape: tuple[int, ...]) -> torch.Tensor:
    """Return an uninitialized uint8 tensor; in a worker it is allocated in shared memory, to be sent without a copy."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as PyTorch's own collate function does it
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def _enlarge(sample: Sample) -> tuple[Image, Labels]:
    height, width = sample.image.shape[:2]
    return cv2.resize(sample.image, (2 * width, 2 * height), interpolation=cv2.INTER_LINEAR), sample.labels


def _side_by_side(group: Sequence[Sample]) -> tuple[Image, Labels]:
    height, width = group[0].image.shape[:2]
    image = np.full((2 * height, 2 * width, 3), FILL, np.uint8)
    rows = []
    for k, sample in enumerate(group):
        down, right = divmod(k, 2)
        image[down * height : (down + 1) * height, right * width : (right + 1) * width] = sample.image
        labels = sample.labels.copy()
        labels[:, 1:3] += np.array((right, down), np.float32)
        labels[:, 1:] /= 2
        rows.append(labels)
    return image, np.concatenate(rows, 0)


def _number(labels: Sequence[Labels]) -> Labels:
    """Return all rows (M, 6), each with the index of its image in front."""
    out = np.zeros((sum(map(len, labels)), 6), np.float32)
    out[:, 0] = np.repeat(np.arange(len(labels)), [len(rows) for rows in labels])
    out[:, 1:] = np.concatenate(labels, 0)
    return out
