"""Small image sets for the data tests."""

from __future__ import annotations

import cv2
import numpy as np

from data.labels.labels import ImageRecord


def write_set(folder, count, sizes=((48, 64), (64, 48), (64, 64), (30, 64)), boxes=2, suffix=".png"):
    """Write `count` random images and return their records; image i has boxes of class i % 3."""
    records = []
    for i in range(count):
        height, width = sizes[i % len(sizes)]
        r = np.random.default_rng(i)
        coarse = r.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        path = folder / f"{i:03d}{suffix}"
        assert cv2.imwrite(str(path), cv2.resize(coarse, (width, height)))
        labels = np.zeros((boxes, 5), np.float32)
        labels[:, 0], labels[:, 1:3], labels[:, 3:] = i % 3, r.uniform(0.3, 0.7, (boxes, 2)), 0.4
        records.append(ImageRecord(path, height, width, labels, ()))
    return records
