"""Which training-time changes are made to images, and how strongly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class AugmentConfig:
    """Strength or probability of each change; 0 leaves it out. Names and meaning as in hyperparameter files.

    Attributes:
        hsv_h, hsv_s, hsv_v: largest relative change of hue, saturation and value.
        degrees: largest rotation, in degrees.
        translate: largest shift, as a fraction of the image's sides.
        scale: largest relative change of size.
        shear: largest shear, in degrees.
        perspective: largest perspective term, per pixel (0 .. 0.001).
        flipud, fliplr: probability of an upside-down, a left-right flip.
        mosaic: probability of joining images instead of taking one.
        mosaic9: fraction of the mosaics that join nine images instead of four.
        mixup: probability of blending a mosaic with a second one.
        copy_paste: fraction of the objects with polygons that are mirrored and pasted.
    """

    hsv_h: float = 0.0
    hsv_s: float = 0.0
    hsv_v: float = 0.0
    degrees: float = 0.0
    translate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    perspective: float = 0.0
    flipud: float = 0.0
    fliplr: float = 0.0
    mosaic: float = 0.0
    mosaic9: float = 0.0
    mixup: float = 0.0
    copy_paste: float = 0.0

    @classmethod
    def from_hyp(cls, hyp: Mapping[str, float]) -> AugmentConfig:
        """Return the augmentation keys of a hyperparameter mapping; other keys are ignored."""
        return cls(**{f.name: float(hyp[f.name]) for f in fields(cls) if f.name in hyp})
