"""Training-time augmentation; the names that YOLOv5's users import from this module."""

from data.augment.warp import box_candidates
from data.letterbox import letterbox

__all__ = ["box_candidates", "letterbox"]
