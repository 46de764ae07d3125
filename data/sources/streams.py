"""Live sources: cameras, network streams and the screen.

Each stream has a thread that reads continuously and keeps only the newest frame, so that the delay of a slow detector
does not grow. A network stream that is lost is opened again a few times; a camera or
recording that ends is not.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from data.sources.frames import DEFAULT_FPS, Frame, Source
from utils.errors import DataError, UserError, hide_passwords
from utils.files import check_regular

LOGGER = logging.getLogger(__name__)
RECONNECTS = 5
"""Attempts to reopen a lost network stream."""
OPEN_TIMEOUT_MS = 10_000
BATCH_PATIENCE_S = 0.5
"""Seconds that a batch waits for the slower of several streams."""


def stream_name(address: str) -> str:
    """Return a name for a stream URL: without password, characters other than letters, digits, dots and dashes as `_`.

    >>> stream_name("rtsp://user:secret@10.0.0.8:554/live/1")
    '10.0.0.8_554_live_1'
    """
    plain = re.sub(r"^[a-z0-9+]+://", "", hide_passwords(address), flags=re.IGNORECASE).replace("***", "")
    return re.sub(r"[^\w.\-]+", "_", plain).strip("._") or "stream"


class StreamReader(threading.Thread):
    """Reads one stream and keeps its newest frame.

    Args:
        address: camera number, URL, or a video file; a recording is read once, at its own rate, as if it were live.
        updated: notified whenever a frame arrives or the stream ends; shared by the readers of one source.
        vid_stride: keep every n-th frame.
        retry_wait: seconds before the first new attempt; doubled each time.
    """

    def __init__(
        self, address: str, updated: threading.Condition, vid_stride: int = 1, retry_wait: float = 1.0
    ) -> None:
        super().__init__(name="stream", daemon=True)
        self.address = address
        self.shown = hide_passwords(address.replace(" ", "%20"))  # a password may hold spaces
        self.fps = DEFAULT_FPS
        self.opened = False
        self.connected = False
        self.ended = False
        self.failure: str | None = None
        self._updated = updated
        self._stride = vid_stride
        self._retry_wait = retry_wait
        self._stop_asked = threading.Event()
        self._newest: tuple[NDArray[np.uint8], int] | None = None
        self._received = 0
        self._remote = "://" in address
        self._finite = not self._remote and not (address.isascii() and address.isdigit())

    def run(self) -> None:
        try:
            self._read_all()
        except UserError as error:
            self.failure = str(error)
        except cv2.error as error:
            self.failure = f"{self.shown}: reading stopped: {str(error).strip().splitlines()[-1]}"
        finally:
            with self._updated:
                self.connected, self.ended = False, True
                self._updated.notify_all()

    def stop(self) -> None:
        """Ask the thread to end after the current frame."""
        self._stop_asked.set()

    def take(self) -> tuple[NDArray[np.uint8], int] | None:
        """Return the newest frame (H, W, 3) with its number, or None if it was taken. Requires the lock `updated`."""
        newest, self._newest = self._newest, None
        return newest

    @property
    def has_frame(self) -> bool:
        """Whether `take` would give a frame."""
        return self._newest is not None

    def _open(self) -> cv2.VideoCapture | None:
        if self._remote:
            limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, OPEN_TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, OPEN_TIMEOUT_MS]
            capture = cv2.VideoCapture(self.address, cv2.CAP_FFMPEG, limits)
        elif self._finite:
            check_regular(self.address)
            capture = cv2.VideoCapture(self.address)
        else:
            capture = cv2.VideoCapture(int(self.address))
        if not capture.isOpened():
            capture.release()
            return None
        self._finite = self._finite or (self._remote and capture.get(cv2.CAP_PROP_FRAME_COUNT) > 0)
        rate = capture.get(cv2.CAP_PROP_FPS)
        self.fps = (rate if 0 < rate <= 1000 else DEFAULT_FPS) / self._stride
        return capture

    def _read_all(self) -> None:
        attempt = 0
        while not self._stop_asked.is_set():
            capture = self._open()
            if capture is not None:
                before = self._received
                try:
                    self._read_until_lost(capture)
                finally:
                    capture.release()
                if self._stop_asked.is_set() or (self._finite and self._received > before):
                    return
                attempt = 0 if self._received > before else attempt
            if not self._remote or not self.opened or attempt == RECONNECTS:
                self.failure = f"{self.shown}: " + ("the stream was lost" if self.opened else "cannot be opened")
                return
            self.connected = False
            attempt += 1
            wait = self._retry_wait * 2 ** (attempt - 1)
            LOGGER.warning("%s: no frames; opening it again in %g s (%d/%d)", self.shown, wait, attempt, RECONNECTS)
            self._stop_asked.wait(wait)

    def _read_until_lost(self, capture: cv2.VideoCapture) -> None:
        position = 0
        due = time.monotonic()
        while not self._stop_asked.is_set() and capture.grab():
            position += 1
            if self._finite:  # a recording is decoded faster than it plays
                due += 1.0 / (self.fps * self._stride)
                self._stop_asked.wait(max(0.0, due - time.monotonic()))
            if (position - 1) % self._stride:
                continue
            good, image = capture.retrieve()
            if not good:
                continue
            with self._updated:
                self._received += 1
                self._newest = (image, self._received)  # type: ignore[assignment]
                self.opened = self.connected = True
                self._updated.notify_all()


class StreamSource(Source):
    """The newest frames of one or several live streams, one batch after the other until all have ended.

    Args:
        addresses: camera numbers, URLs or video files.
        vid_stride: use every n-th frame.
        retry_wait: seconds before a lost network stream is opened again; doubled with every attempt.

    Raises:
        DataError: none of the streams can be opened.
    """

    live = True

    def __init__(self, addresses: Sequence[str], vid_stride: int = 1, retry_wait: float = 1.0) -> None:
        super().__init__()
        self._updated = threading.Condition()
        self._readers = [StreamReader(a, self._updated, vid_stride, retry_wait) for a in addresses]
        self._names = _distinct([stream_name(a) for a in addresses])
        self._closed = False
        for reader in self._readers:
            reader.start()
        with self._updated:
            self._updated.wait_for(lambda: all(r.opened or r.ended for r in self._readers), 2 * OPEN_TIMEOUT_MS / 1000)
        if all(r.ended and not r.opened for r in self._readers):
            hint = "; is the camera number right, and may this user read it?" if addresses[0].isdigit() else ""
            reasons = "; ".join(r.failure or f"{r.shown}: gives no frames" for r in self._readers)
            raise DataError(reasons + hint)
        for number, reader in enumerate(self._readers, 1):
            if reader.opened:
                LOGGER.info("stream %d/%d %s: %.4g frames/s", number, len(self._readers), reader.shown, reader.fps)

    def __iter__(self) -> Iterator[tuple[Frame, ...]]:
        reported: set[int] = set()
        while not self._closed:
            batch = self._next_batch()
            for number, reader in enumerate(self._readers):
                if reader.failure and reader.ended and number not in reported:
                    reported.add(number)
                    self.reject(reader.failure)
            if batch:
                yield batch
            elif all(r.ended for r in self._readers):
                return

    def _next_batch(self) -> tuple[Frame, ...]:
        """Return the newest frames; wait for the first one, then briefly for the other connected streams."""
        with self._updated:
            self._updated.wait_for(self._something, 1.0)
            self._updated.wait_for(self._everything, BATCH_PATIENCE_S)
            taken = [(n, r.take()) for n, r in enumerate(self._readers)]
        return tuple(
            Frame(item[0], Path(self._names[n]), self._readers[n].shown, "live", n + 1, len(taken), item[1], 0,
                  self._readers[n].fps)
            for n, item in taken
            if item is not None
        )  # fmt: skip

    def _something(self) -> bool:
        return self._closed or any(r.has_frame for r in self._readers) or all(r.ended for r in self._readers)

    def _everything(self) -> bool:
        return self._closed or all(r.has_frame or not r.connected for r in self._readers)

    def close(self) -> None:
        self._closed = True
        for reader in self._readers:
            reader.stop()
        with self._updated:
            self._updated.notify_all()
        for reader in self._readers:  # daemon threads: one that hangs in a driver does not block the exit
            if reader is not threading.current_thread():
                reader.join(timeout=2.0)


class ScreenSource(Source):
    """Images of the screen, captured on request.

    Args:
        text: `screen`, `screen N` (monitor number; 0 = all of them together), `screen left top width height`, or
            `screen N left top width height` in pixels.
        vid_stride: use every n-th image.

    Raises:
        DataError: other words, no `mss` package, no such monitor, or no screen.
    """

    live = True

    def __init__(self, text: str, vid_stride: int = 1) -> None:
        super().__init__()
        self._number, self._part = parse_screen(text)
        self._text = text
        self._stride = vid_stride
        self._closed = False
        self._check()

    def _check(self) -> None:
        try:
            import mss
            import mss.exception
        except ImportError as error:
            raise DataError(f"--source {self._text}: needs the package mss; pip install mss") from error
        try:
            with mss.mss() as grabber:
                count = len(grabber.monitors)
        except mss.exception.ScreenShotError as error:
            raise DataError(f"--source {self._text}: there is no screen to read ({error})") from error
        if self._number >= count:
            raise DataError(f"--source {self._text}: no monitor {self._number}; there are 0 (all) to {count - 1}")

    def __iter__(self) -> Iterator[tuple[Frame, ...]]:
        import mss

        with mss.mss() as grabber:
            monitor = grabber.monitors[self._number]
            region = dict(monitor)
            if self._part:
                left, top, width, height = self._part
                region = {"left": monitor["left"] + left, "top": monitor["top"] + top, "width": width, "height": height}
            count = 0
            while not self._closed:
                image = np.ascontiguousarray(np.asarray(grabber.grab(region))[:, :, :3])
                count += 1
                if (count - 1) % self._stride == 0:
                    yield (Frame(image, Path(f"screen{self._number}"), self._text, "live", frame=count),)

    def close(self) -> None:
        self._closed = True


def parse_screen(text: str) -> tuple[int, tuple[int, int, int, int] | None]:
    """Return monitor number and (left, top, width, height) of `screen [N] [left top width height]`.

    Raises:
        DataError: other words than that.
    """
    words = text.split()[1:]
    try:
        numbers = [int(w) for w in words]
    except ValueError:
        numbers = [0, 0]  # refused below
    if len(numbers) not in (0, 1, 4, 5) or any(n < 0 for n in numbers[:1]):
        raise DataError(f"--source {text}: allowed are 'screen', 'screen N' and 'screen [N] left top width height'")
    number = numbers[0] if len(numbers) in (1, 5) else 0
    if len(numbers) < 4:
        return number, None
    left, top, width, height = numbers[-4:]
    if width < 1 or height < 1:
        raise DataError(f"--source {text}: width and height are {width} x {height}; at least 1 pixel is needed")
    return number, (left, top, width, height)


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the names with _2, _3 ... appended to repeated ones."""
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return out
