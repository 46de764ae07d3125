"""Batches of one whole image each, for tiled validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from data.images import read
from data.labels.labels import ImageRecord
from engine.predict.inference import as_tensor
from utils.structures import Batch, ImageShapes


class WholeImages:
    """Iterates over images at their original size.

    Args:
        records: images with labels.
    """

    batch_size = 1

    def __init__(self, records: Sequence[ImageRecord]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Batch]:
        for record in self.records:
            image = read(record.path)
            labels = torch.from_numpy(np.ascontiguousarray(record.labels, np.float32)).reshape(-1, 5)
            targets = torch.cat((torch.zeros(len(labels), 1), labels), 1)
            shapes = ImageShapes((image.shape[0], image.shape[1]), (1.0, 1.0), (0.0, 0.0))
            yield Batch(as_tensor(image), targets, (str(record.path),), (shapes,))
