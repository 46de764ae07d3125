"""Progress of detection: a line per image, a bar per video, a line per second for live sources."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping

import numpy as np
from tqdm import tqdm

from data.sources.frames import Frame
from engine.predict.detections import Detections, counts_text, describe

LOGGER = logging.getLogger(__name__)
LIVE_LINE_S = 1.0
VIDEO_LINE_S = 10.0  # interval of the lines that replace the bar if standard error is not a terminal


class Progress:
    """Logs each processed frame; call `close` to close the bar of an unfinished video.

    Args:
        names: class names by number.
        vid_stride: only every n-th frame of a video is processed.
    """

    def __init__(self, names: Mapping[int, str], vid_stride: int = 1) -> None:
        self._names = names
        self._stride = vid_stride
        self._video: _Video | None = None
        self._last_line: dict[int, float] = {}

    def show(self, found: Detections) -> None:
        """Log a frame, or advance the bar of its video."""
        frame = found.frame
        if self._video is not None and self._video.frame.number != frame.number:
            self.close()
        if frame.kind == "image":
            LOGGER.info("image %d/%d %s: %s", frame.number, frame.total, frame.origin, describe(found, self._names))
        elif frame.kind == "video":
            if self._video is None:
                self._video = _Video(frame, self._stride, self._names)
            self._video.add(found)
        elif self._is_due(frame.number, LIVE_LINE_S):
            LOGGER.info("stream %d/%d %s: %s", frame.number, frame.total, frame.origin, describe(found, self._names))

    def _is_due(self, key: int, interval: float) -> bool:
        now = time.monotonic()
        if now - self._last_line.get(key, -interval) < interval:
            return False
        self._last_line[key] = now
        return True

    def close(self) -> None:
        """Close the bar of a video, and log its summary."""
        if self._video is not None:
            self._video.finish()
            self._video = None


class _Video:
    """Progress bar and closing line of one video."""

    def __init__(self, frame: Frame, stride: int, names: Mapping[int, str]) -> None:
        self.frame = frame
        self._names = names
        self._head = f"video {frame.number}/{frame.total} {frame.origin}"
        self._total = -(-frame.frames // stride) or None
        short = f"video {frame.number}/{frame.total} {frame.path.name[-20:]}"  # leaves room for the remaining time
        self._bar = tqdm(total=self._total, desc=short, unit=" frames", disable=None, leave=False)
        self._start = self._line = time.monotonic()
        self._frames = 0
        self._with_boxes = 0
        self._classes: Counter[int] = Counter()
        self._shape = (0, 0)

    def add(self, found: Detections) -> None:
        self._frames += 1
        self._with_boxes += bool(len(found.boxes))
        self._classes.update(found.classes.tolist())
        self._shape = found.input_shape
        self._bar.update()
        if self._bar.disable and time.monotonic() - self._line >= VIDEO_LINE_S:
            self._line = time.monotonic()
            text = describe(found, self._names)
            LOGGER.info("%s (%d/%s): %s", self._head, self._frames, self._total or "?", text)

    def finish(self) -> None:
        self._bar.close()
        rate = self._frames / max(time.monotonic() - self._start, 1e-9)
        boxes = counts_text(np.array(sorted(self._classes.elements()), np.int64), self._names)
        LOGGER.info(
            "%s: %dx%d, %d frames, %d with detections (%s in all), %.1f frames/s",
            self._head, *self._shape, self._frames, self._with_boxes, boxes, rate,
        )  # fmt: skip
