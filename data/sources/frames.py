"""Frames of an image source, and the base class of sources."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

LOGGER = logging.getLogger(__name__)
DEFAULT_FPS = 30.0
"""Frame rate of sources that do not give theirs."""


@dataclass(frozen=True)
class Frame:
    """One image of a source.

    Attributes:
        image: (H, W, 3) uint8, BGR, upright.
        path: the file, or for a stream a name that is fit for a file.
        origin: what to call the input in messages (the file's path, the stream's address).
        kind: an image file, a frame of a video file, or a frame of something live.
        number: which input this is, counted from 1.
        total: number of inputs.
        frame: position in the video, counted from 1 (live: number of frames received); 0 for an image file.
        frames: number of frames that the video's header promises; 0 = not known.
        fps: frames per second, `vid_stride` taken into account, so that what is written plays at the true speed.
    """

    image: NDArray[np.uint8]
    path: Path
    origin: str
    kind: Literal["image", "video", "live"]
    number: int = 1
    total: int = 1
    frame: int = 0
    frames: int = 0
    fps: float = DEFAULT_FPS


class Source(ABC):
    """Something that gives frames, iterated once.

    Attributes:
        live: frames come at their own pace, and those not fetched in time are dropped.
        failures: one line per input that could not be read, or not to its end; each is logged when it is met.
    """

    live: bool = False

    def __init__(self) -> None:
        self.failures: list[str] = []

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Frame, ...]]:
        """Give the frames to process together: one of a file, or the newest of every live stream."""

    def close(self) -> None:  # noqa: B027 -- most sources hold nothing after their last frame
        """Release files, cameras and threads; may be called from another thread and more than once."""

    def reject(self, message: str) -> None:
        """Log an input that cannot be read, and continue."""
        LOGGER.warning("%s", message)
        self.failures.append(message)

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
