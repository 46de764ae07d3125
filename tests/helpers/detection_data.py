"""A small dataset of noise images with known boxes."""

from __future__ import annotations

import cv2
import numpy as np

NAMES = {0: "disc", 1: "bar", 2: "dot"}


SIZES = [(60, 80), (80, 60), (64, 64), (50, 111), (97, 71), (64, 64)]  # height, width


def boxes_of(number):
    """Labels of a test image, (n, 5) class, xywhn; the last image has none."""
    rng = np.random.default_rng(number)
    count = 0 if number == len(SIZES) - 1 else 3
    wh = rng.uniform(0.15, 0.3, (count, 2))
    center = np.array([[0.2, 0.25], [0.7, 0.3], [0.4, 0.75]])[:count] + rng.uniform(-0.03, 0.03, (count, 2))
    return np.concatenate((rng.permutation(3)[:count, None], center, wh), 1)


def write_data(folder, names=NAMES, splits=("train", "val"), labelled=True):
    rng = np.random.default_rng(0)
    for split in splits:
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
        for number, (height, width) in enumerate(SIZES):
            image = rng.integers(0, 255, (height, width, 3)).astype(np.uint8)
            cv2.imwrite(str(folder / f"images/{split}/p{number}.png"), image)
            if labelled and len(boxes_of(number)):
                lines = [" ".join([str(int(c)), *(f"{v:.6f}" for v in box)]) for c, *box in boxes_of(number)]
                (folder / f"labels/{split}/p{number}.txt").write_text("\n".join(lines) + "\n")
    lines = ["path: ."] + [f"{s}: images/{s}" for s in splits] + ["names:"] + [f"  {k}: {v}" for k, v in names.items()]
    (folder / "set.yaml").write_text("\n".join(lines) + "\n")
    return folder / "set.yaml"
