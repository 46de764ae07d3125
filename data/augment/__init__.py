"""Training-time augmentation, under the names that YOLOv5's users import from one module."""

from data.augment.color import hsv_gains, mixup
from data.augment.config import AugmentConfig
from data.augment.mosaic import LabeledImage, mosaic4, mosaic9
from data.augment.warp import (
    Canvas,
    Tile,
    Warp,
    box_candidates,
    draw_warp,
    render,
    transform_labels,
)
from data.letterbox import FILL, fit, letterbox

__all__ = [
    "FILL",
    "AugmentConfig",
    "Canvas",
    "LabeledImage",
    "Tile",
    "Warp",
    "box_candidates",
    "draw_warp",
    "fit",
    "hsv_gains",
    "letterbox",
    "mixup",
    "mosaic4",
    "mosaic9",
    "render",
    "transform_labels",
]
