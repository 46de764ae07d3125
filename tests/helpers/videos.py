"""Videos for tests."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np


def write_video(
    path: Path, frames: int = 8, fps: float = 20.0, size: tuple[int, int] = (64, 48), code: str = "MJPG"
) -> Path:
    """Write a video of (width, height) `size` whose frame i has the gray value 20 + 10 (i mod 20)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), fps, size)
    assert writer.isOpened()
    for i in range(frames):
        writer.write(np.full((size[1], size[0], 3), 20 + 10 * (i % 20), np.uint8))
    writer.release()
    return path
