"""Fitting an image into a rectangle without distortion: resize, then gray on both sides, in YOLOv5's rounding."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from data.sizes import HW

Image = np.ndarray
"""(H, W, 3) uint8."""

FILL = 114
"""Gray value where there is no image."""


@dataclass(frozen=True)
class Fit:
    """Where an image lies in the rectangle it is fitted into, in pixels.

    Attributes:
        size: (height, width) of the resized image.
        ratio: (width, height) scale factors.
        pad: (width, height) padding on each side before it is rounded; may end in .5.
        offset: (left, top) of the resized image.
        shape: (height, width) of the whole.
    """

    size: HW
    ratio: tuple[float, float]
    pad: tuple[float, float]
    offset: tuple[int, int]
    shape: HW


def fit(
    size: HW, new_shape: HW, auto: bool = False, scaleFill: bool = False, scaleup: bool = True, stride: int = 32
) -> Fit:
    """Return the geometry of `letterbox` for an image of (height, width) `size`."""
    (h, w), (new_h, new_w) = size, new_shape
    scale = min(new_h / h, new_w / w)
    if not scaleup:
        scale = min(scale, 1.0)
    ratio = (scale, scale)
    inner_w, inner_h = max(round(w * scale), 1), max(round(h * scale), 1)
    spare_w, spare_h = new_w - inner_w, new_h - inner_h
    if auto:
        spare_w, spare_h = spare_w % stride, spare_h % stride
    elif scaleFill:
        spare_w, spare_h, inner_w, inner_h = 0, 0, new_w, new_h
        ratio = (new_w / w, new_h / h)
    pad_w, pad_h = spare_w / 2, spare_h / 2
    left, top = round(pad_w - 0.1), round(pad_h - 0.1)
    shape = (inner_h + top + round(pad_h + 0.1), inner_w + left + round(pad_w + 0.1))
    return Fit((inner_h, inner_w), ratio, (pad_w, pad_h), (left, top), shape)


def letterbox(
    im: Image,
    new_shape: int | HW = (640, 640),
    color: tuple[int, int, int] = (FILL, FILL, FILL),
    auto: bool = True,
    scaleFill: bool = False,
    scaleup: bool = True,
    stride: int = 32,
) -> tuple[Image, tuple[float, float], tuple[float, float]]:
    """Resize an image to fit a rectangle, keep its shape, and fill the rest with one color.

    Args:
        im: (H, W, 3) uint8.
        new_shape: (height, width) of the rectangle; one number means a square.
        color: fill, in the channel order of `im`.
        auto: cut the fill to what whole strides need (the smallest rectangle).
        scaleFill: stretch to the rectangle instead.
        scaleup: enlarge small images too.
        stride: of `auto`.

    Returns:
        The image, (width, height) scale factors, and (width, height) padding of one side in pixels (may end in .5;
        then the second side has the odd pixel).
    """
    wanted = (new_shape, new_shape) if isinstance(new_shape, int) else (new_shape[0], new_shape[1])
    f = fit(im.shape[:2], wanted, auto, scaleFill, scaleup, stride)
    return place(im, f, color), f.ratio, f.pad


def place(im: Image, f: Fit, color: tuple[int, int, int] = (FILL, FILL, FILL)) -> Image:
    """Resize an image (H, W, 3) and pad it to `f.shape` as described by `f`; linear interpolation."""
    gray = color[0] == color[1] == color[2]
    out = np.full((*f.shape, 3), color[0] if gray else color, np.uint8)  # one value fills a hundred times faster
    (left, top), (h, w) = f.offset, f.size
    inner = out[top : top + h, left : left + w]
    if im.shape[:2] == f.size:
        inner[...] = im
    else:
        cv2.resize(im, (w, h), dst=inner, interpolation=cv2.INTER_LINEAR)
    return out
