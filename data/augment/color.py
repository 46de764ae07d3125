"""Training-time changes of images and labels: color and blending here, geometry gathered from its own files.

Everything is a pure function of arrays and a random generator. Geometry (mosaic, perspective, flips) is drawn as one
matrix (`warp.py`, `mosaic.py`), so each final pixel is sampled once from the decoded image.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from data.letterbox import Image

Labels = NDArray[np.float32]


def hsv_gains(image: Image, hue: float, saturation: float, value: float, rng: np.random.Generator) -> Image:
    """Multiply hue, saturation and value by random factors 1 +- at most the given gains.

    Args:
        image: (H, W, 3) uint8 BGR.

    Returns:
        A new image; `image` itself when all gains are 0.
    """
    if not (hue or saturation or value):
        return image
    factors = 1 + rng.uniform(-1, 1, 3) * (hue, saturation, value)
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
    planes = np.empty((3, *image.shape[:2]), np.uint8)
    h, s, v = planes
    cv2.split(hsv, [h, s, v])  # into one block: three new arrays cost ten times as much
    if hue:  # 180 hues in a circle: a table, as a product would not wrap around
        turned = (np.arange(256) * factors[0] % 180).astype(np.uint8)
        cv2.LUT(h, turned, dst=h)
    cv2.convertScaleAbs(s, dst=s, alpha=factors[1])  # saturates at 255; several times faster than a table
    cv2.convertScaleAbs(v, dst=v, alpha=factors[2])
    cv2.merge((h, s, v), dst=hsv)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR, dst=hsv)


def mixup(first: tuple[Image, Labels], second: tuple[Image, Labels], rng: np.random.Generator) -> tuple[Image, Labels]:
    """Blend two images of one size and keep the labels of both (https://arxiv.org/abs/1710.09412).

    Args:
        first, second: (H, W, 3) uint8 image and (n, 5) labels in the same frame.

    Returns:
        The blend, with the weight of `first` drawn from Beta(32, 32), and all labels.
    """
    share = float(rng.beta(32.0, 32.0))
    image = cv2.addWeighted(first[0], share, second[0], 1 - share, 0.0)
    return image, np.concatenate((first[1], second[1]), 0)
