"""Detection on one batch: preprocessing, inference, NMS, boxes scaled back to the original images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from data.letterbox import letterbox
from data.sources.frames import Frame
from engine.predict.detections import Detections
from engine.runtimes.base import Runtime
from utils.boxes import clip_boxes, scale_boxes
from utils.device import Profile
from utils.nms import non_max_suppression


@dataclass(frozen=True)
class Prepared:
    """Frames and their network input.

    Attributes:
        frames: B frames.
        images: (B, 3, H, W) RGB, uint8 or floating point in [0, 1].
        letterboxed: the images were resized and centered; otherwise only padded at the right and bottom.
    """

    frames: tuple[Frame, ...]
    images: torch.Tensor
    letterboxed: bool = True


@dataclass(frozen=True)
class NmsSettings:
    """Arguments of `non_max_suppression`."""

    conf_thres: float = 0.25
    iou_thres: float = 0.45
    classes: Sequence[int] | None = None
    agnostic: bool = False
    multi_label: bool = False
    max_det: int = 1000


def preprocess(
    images: Sequence[NDArray[np.uint8]], size: tuple[int, int], stride: int = 32, auto: bool = False
) -> torch.Tensor:
    """Letterbox images and stack them.

    Args:
        images: (H, W, 3) uint8 BGR each.
        size: (height, width) of the input.
        stride: sides of the smallest rectangle are multiples of it.
        auto: pad to the smallest rectangle (images of one shape) instead of to `size`.

    Returns:
        (B, 3, height, width) uint8 RGB in channels_last memory layout.
    """
    auto = auto and len({image.shape for image in images}) == 1
    fitted = [letterbox(image, size, auto=auto, stride=stride)[0] for image in images]
    return as_tensor(*fitted)


def as_tensor(*images: NDArray[np.uint8]) -> torch.Tensor:
    """Stack images (H, W, 3) uint8 BGR of one shape as (B, 3, H, W) uint8 RGB in channels_last memory layout."""
    pixels = torch.from_numpy(np.stack([cv2.cvtColor(image, cv2.COLOR_BGR2RGB) for image in images]))
    return pixels.permute(0, 3, 1, 2)  # BHWC -> BCHW


def prepare(frames: tuple[Frame, ...], size: tuple[int, int], stride: int, auto: bool) -> Prepared:
    """Preprocess frames; for the arguments see `preprocess`."""
    return Prepared(frames, preprocess([frame.image for frame in frames], size, stride, auto))


def infer(
    runtime: Runtime, prepared: Prepared, nms: NmsSettings, inference_time: Profile, nms_time: Profile
) -> list[Detections]:
    """Run inference and NMS on one batch.

    Args:
        runtime: the detector.
        prepared: B images of one shape.
        nms: thresholds and limits.
        inference_time, nms_time: accumulate the time of the two stages, the device synchronized after each.

    Returns:
        One record per frame; boxes in pixels of the frame, clipped to it.
    """
    count = len(prepared.frames)
    with inference_time:
        limit = runtime.fixed_batch or count
        decoded = torch.cat([runtime(part) for part in prepared.images.split(limit)])
    with nms_time:
        kept = non_max_suppression(
            decoded, nms.conf_thres, nms.iou_thres, nms.classes, nms.agnostic, nms.multi_label, max_det=nms.max_det
        )
        kept = [rows.cpu() for rows in kept]
    height, width = prepared.images.shape[2:]
    out = []
    for frame, rows in zip(prepared.frames, kept):
        original = frame.image.shape[:2]
        boxes = rows[:, :4]
        boxes = scale_boxes((height, width), boxes, original) if prepared.letterboxed else clip_boxes(boxes, original)
        rows = torch.cat((boxes, rows[:, 4:]), 1).float()
        out.append(Detections(frame, rows.numpy(), (height, width), inference_time.last / count))
    return out
