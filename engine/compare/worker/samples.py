"""A candidate's detections and heat maps of a few validation images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from data.letterbox import fit, place
from engine.compare.measure.detector import SampleFiles
from engine.evaluate.accumulator import ImageOutcome
from engine.evaluate.worst_images import image_errors
from engine.predict.inference import as_tensor
from engine.report.html import embedded
from engine.runtimes.pytorch import PyTorchRuntime
from models.eigencam import heat_maps
from utils.draw import heat_map_image
from utils.structures import to_unit

SHOWN_SAMPLES = slice(0, None, 2)
"""Sample images that the report shows."""
HEAT_SIDE = 320
"""Longer side of a heat map in pixels, at most."""


class SampleDetections:
    """Collect TP, FP and FN of the images that the report shows; a sink of `EvalOptions`."""

    def __init__(self, sample: SampleFiles) -> None:
        self.found: dict[str, dict[str, Any]] = {}
        self._paths = {str(path) for path, _ in sample[SHOWN_SAMPLES]}

    def __call__(self, outcome: ImageOutcome) -> None:
        """Add one image, if it is one of the sample."""
        path = str(Path(outcome.path).resolve())
        if path in self._paths:
            found = image_errors(outcome)
            boxes = {name: getattr(found, name).tolist() for name in ("right", "wrong", "missed")}
            self.found[path] = {"shape": found.shape, **boxes}


def heat_map_urls(runtime: PyTorchRuntime, image: NDArray[np.uint8], side: int) -> dict[str, str]:
    """Return the EigenCAM of each level that the head reads, blended over the image, as data URLs by level name.

    Args:
        runtime: the detector; for an ensemble its first model is used.
        image: (H, W, 3) uint8 BGR.
        side: input side of the network in pixels.
    """
    geometry = fit(image.shape[:2], (side, side), auto=True, stride=runtime.stride)
    (left, top), (height, width) = geometry.offset, geometry.size
    pixels = to_unit(as_tensor(place(image, geometry)).to(runtime.device), runtime.dtype)
    heats = heat_maps(runtime.models[0], pixels)
    shown = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8)
    inner = {level: heat[0, top : top + height, left : left + width].numpy() for level, heat in heats.items()}
    return {level: embedded(heat_map_image(shown, heat), HEAT_SIDE) for level, heat in inner.items()}
