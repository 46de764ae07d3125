"""What detection leaves behind: images, videos, label files, tables, cut-outs.

Files are written atomically: under a temporary name, then renamed. No two inputs share a file:
when a name is taken, the later input gets `name_2`, which is logged.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from data.sources.frames import DEFAULT_FPS, Frame
from engine.predict.detections import Detections, DrawStyle, annotated
from utils.boxes import xyxy2xywh
from utils.draw import class_name
from utils.errors import DataError
from utils.files import make_folder

LOGGER = logging.getLogger(__name__)
IMAGE_FORMATS = frozenset({".bmp", ".jpg", ".jpeg", ".jpe", ".png", ".tif", ".tiff", ".webp"})
"""Suffixes that annotated images keep; others become .jpg."""
LARGEST_TIMEBASE = 65535
CROP_GAIN, CROP_PAD = 1.02, 10
"""Cut-outs are boxes of this many times the size, and this many pixels more, on each axis."""


class Writer(Protocol):
    """Something that keeps detections."""

    def write(self, found: Detections, drawn: NDArray[np.uint8] | None) -> None:
        """Write the detections of one frame; `drawn` (H, W, 3) is the annotated image if it exists already."""

    def close(self) -> None:
        """Bring the files into their final state. Called once, also after an error or Ctrl-C."""


class FileNames:
    """Gives every input of a run a stem of its own, which its image, labels and crops share."""

    def __init__(self) -> None:
        self._taken: dict[str, str] = {}
        self._videos: set[str] = set()
        self._given: dict[int, str] = {}

    def stem_for(self, frame: Frame) -> str:
        """Return the stem of the frame's input, with `_2` ... where another input has it; always the same.

        Upper and lower case count as equal, as they do for many file systems. Frames of a video `clip` are called
        `clip_<frame>`: no other input gets a name of that form.
        """
        if frame.number not in self._given:
            wanted = frame.path.stem if frame.kind != "live" else frame.path.name
            stem, count = wanted, 1
            while self._collides(stem, frame.kind != "image"):
                count += 1
                stem = f"{wanted}_{count}"
            if count > 1:
                LOGGER.info("%s: another input has the name %s; %s is used", frame.origin, wanted, stem)
            self._taken[stem.lower()] = frame.origin
            if frame.kind != "image":
                self._videos.add(stem.lower())
            self._given[frame.number] = stem
        return self._given[frame.number]

    def _collides(self, stem: str, video: bool) -> bool:
        stem = stem.lower()
        head, _, number = stem.rpartition("_")
        frame_of_video = number.isdecimal() and head in self._videos
        frames = re.compile(re.escape(stem) + r"_\d+")
        return stem in self._taken or frame_of_video or (video and any(map(frames.fullmatch, self._taken)))


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it.

    Raises:
        DataError: the disk is full, or the folder cannot be written to.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_image(path: Path, image: NDArray[np.uint8]) -> None:
    """Write (H, W, 3) uint8 BGR in the format of the suffix atomically; the name may contain any character.

    Raises:
        DataError: cannot be encoded or written.
    """
    try:
        good, data = cv2.imencode(path.suffix, image)
    except cv2.error as error:
        raise DataError(f"{path}: an image of {image.shape[1]} x {image.shape[0]} cannot be encoded") from error
    if not good:
        raise DataError(f"{path}: an image of {image.shape[1]} x {image.shape[0]} cannot be encoded")
    write_whole(path, data.tobytes())


def writable_rate(fps: float) -> float:
    """Return the nearest frame rate that MPEG-4 can store: a fraction whose numerator is at most 65535."""
    if not 0 < fps < math.inf:
        return DEFAULT_FPS
    base = 1
    while base < 1000 and abs(round(fps * base) / base - fps) > 0.001 and fps * base * 10 <= LARGEST_TIMEBASE:
        base *= 10
    return min(max(round(fps * base), 1), LARGEST_TIMEBASE) / base


class VideoFile:
    """An mp4 (MPEG-4 part 2) that appears under its name when it is finished.

    The format has even sides only: an odd last row or column is left out by the encoder.

    Args:
        path: final name.
        fps: frames per second.
        size: (width, height) in pixels; frames of another size are scaled to it.

    Raises:
        DataError: cannot be opened for writing.
    """

    def __init__(self, path: Path, fps: float, size: tuple[int, int]) -> None:
        self.path = path
        self.frames = 0
        self._size = size
        self._part = path.with_name(f".{path.stem}.part.mp4")
        fourcc = cv2.VideoWriter.fourcc(*"mp4v")
        self._writer = cv2.VideoWriter(str(self._part), fourcc, writable_rate(fps), size)
        if not self._writer.isOpened():
            raise DataError(f"{path}: a video of {size[0]} x {size[1]} at {fps:g} frames/s cannot be written")

    def write(self, image: NDArray[np.uint8]) -> None:
        """Append a frame (H, W, 3)."""
        if image.shape[1::-1] != self._size:
            image = cv2.resize(image, self._size).astype(np.uint8)
        self._writer.write(image)
        self.frames += 1

    def finish(self) -> None:
        """Close and rename.

        Raises:
            DataError: fewer frames arrived in the file than were written (a full disk, for one).
        """
        self._writer.release()
        check = cv2.VideoCapture(str(self._part))
        there = int(check.get(cv2.CAP_PROP_FRAME_COUNT))
        check.release()
        if there < self.frames:
            self._part.unlink(missing_ok=True)
            raise DataError(f"{self.path}: only {max(there, 0)} of {self.frames} frames could be written; disk full?")
        os.replace(self._part, self.path)


class ImageWriter:
    """Annotated images under the names of their files; videos and streams as mp4 with rate and size of the source."""

    def __init__(self, folder: Path, style: DrawStyle, names: FileNames) -> None:
        self._folder = folder
        self._style = style
        self._names = names
        self._videos: dict[int, VideoFile | None] = {}
        self.failures: list[str] = []

    def write(self, found: Detections, drawn: NDArray[np.uint8] | None) -> None:
        frame = found.frame
        image = drawn if drawn is not None else annotated(found, self._style)
        if frame.kind != "live":
            self._finish(n for n in list(self._videos) if n != frame.number)
        if frame.kind == "image":
            suffix = frame.path.suffix if frame.path.suffix.lower() in IMAGE_FORMATS else ".jpg"
            write_image(self._folder / f"{self._names.stem_for(frame)}{suffix}", image)
            return
        if frame.number not in self._videos:
            path = self._folder / f"{self._names.stem_for(frame)}.mp4"
            try:
                self._videos[frame.number] = VideoFile(path, frame.fps, (image.shape[1], image.shape[0]))
            except DataError as error:  # this output is missing; the others continue
                self._videos[frame.number] = None
                self.failures.append(str(error))
                LOGGER.error("%s", error)
        video = self._videos[frame.number]
        if video is not None:
            video.write(image)

    def _finish(self, numbers: Any) -> None:
        for number in numbers:
            video = self._videos.pop(number)
            if video is not None:
                video.finish()

    def close(self) -> None:
        self._finish(list(self._videos))


class LabelWriter:
    """One text file per frame with detections, lowest score first: class, four numbers, and the score if wanted.

    Boxes are rounded to whole pixels before they are written as parts of the image's sides, as in YOLOv5.

    Args:
        folder: where `<stem>.txt` (frames of videos: `<stem>_<frame>.txt`) go.
        corners: left, top, right, bottom instead of center x, center y, width, height.
        scores: append the score.
    """

    def __init__(self, folder: Path, names: FileNames, corners: bool = False, scores: bool = False) -> None:
        self._folder = make_folder(folder)
        self._corners = corners
        self._scores = scores
        self._names = names
        self.files = 0

    def write(self, found: Detections, drawn: NDArray[np.uint8] | None) -> None:  # noqa: ARG002
        if not len(found.boxes):
            return
        frame = found.frame
        stem = self._names.stem_for(frame)
        name = stem if frame.kind == "image" else f"{stem}_{frame.frame}"
        write_whole(self._folder / f"{name}.txt", self._text(found).encode())
        self.files += 1

    def _text(self, found: Detections) -> str:
        height, width = found.frame.image.shape[:2]
        rows = found.boxes[::-1]
        boxes = np.round(rows[:, :4])
        values = (boxes if self._corners else xyxy2xywh(boxes)) / np.array([width, height] * 2, np.float32)
        columns = [rows[:, 5:6], values] + ([rows[:, 4:5]] if self._scores else [])
        return "".join(" ".join(f"{v:g}" for v in line) + "\n" for line in np.concatenate(columns, 1).tolist())

    def close(self) -> None:
        """Nothing is open."""


class CsvWriter:
    """predictions.csv: image, class, score, one line per box, lowest score of an image first.

    The image is named by its path, relative to the working directory where it is below it; a frame of a video as
    `<path>_<frame>`. Cells that a spreadsheet would take for a formula get a leading apostrophe.
    """

    def __init__(self, path: Path, names: Any) -> None:
        self._path = path
        self._names = names
        self._part = path.with_name(f".{path.name}.part")
        self._stream: IO[str] = open(self._part, "w", encoding="utf-8", errors="backslashreplace", newline="")  # noqa: SIM115
        self._writer = csv.writer(self._stream)
        self._writer.writerow(["Image Name", "Prediction", "Confidence"])

    def write(self, found: Detections, drawn: NDArray[np.uint8] | None) -> None:  # noqa: ARG002
        frame = found.frame
        image = _relative(frame) if frame.kind == "image" else f"{_relative(frame)}_{frame.frame}"
        for row in found.boxes[::-1]:
            name = class_name(self._names, int(row[5]))
            self._writer.writerow([_cell(image), _cell(name), f"{row[4]:.4f}"])

    def close(self) -> None:
        self._stream.close()
        os.replace(self._part, self._path)


class JsonWriter:
    """predictions.json: a list with one entry per frame; detections by falling score, boxes in pixels of the frame."""

    def __init__(self, path: Path, names: Any) -> None:
        self._path = path
        self._names = names
        self._part = path.with_name(f".{path.name}.part")
        self._stream: IO[str] = open(self._part, "w", encoding="utf-8")  # noqa: SIM115 (open until `close`)
        self._stream.write("[")
        self._first = True

    def write(self, found: Detections, drawn: NDArray[np.uint8] | None) -> None:  # noqa: ARG002
        frame = found.frame
        height, width = frame.image.shape[:2]
        entry = {
            "image": frame.origin,
            "frame": frame.frame if frame.kind != "image" else None,
            "height": height,
            "width": width,
            "detections": [
                {
                    "class": int(row[5]),
                    "name": class_name(self._names, int(row[5])),
                    "score": round(float(row[4]), 5),
                    "box_xyxy": [round(float(v), 2) for v in row[:4]],
                }
                for row in found.boxes
            ],
        }
        self._stream.write(("\n" if self._first else ",\n") + json.dumps(entry))
        self._first = False

    def close(self) -> None:
        self._stream.write("\n]\n")
        self._stream.close()
        os.replace(self._part, self._path)


def cut_out(image: NDArray[np.uint8], box_xyxy: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Return the crop of an image (H, W, 3) around a box with YOLOv5's margin, as a view (may be empty).

    Args:
        box_xyxy: (4,) corners in pixels.
    """
    center = (box_xyxy[:2] + box_xyxy[2:]) / 2
    size = (box_xyxy[2:] - box_xyxy[:2]) * CROP_GAIN + CROP_PAD
    height, width = image.shape[:2]
    left, top = np.clip(center - size / 2, 0, (width, height)).astype(int)
    right, bottom = np.clip(center + size / 2, 0, (width, height)).astype(int)
    return image[top:bottom, left:right]


class CropWriter:
    """Cut-outs of the unmarked image: crops/<class>/<stem>.jpg, then `<stem>2.jpg` ... where a name is taken."""

    def __init__(self, folder: Path, names: Any, file_names: FileNames) -> None:
        self._folder = folder
        self._names = names
        self._file_names = file_names
        self._next: dict[Path, int] = {}
        self.files = 0

    def write(self, found: Detections, drawn: NDArray[np.uint8] | None) -> None:  # noqa: ARG002
        for row in found.boxes[::-1]:
            image = cut_out(found.frame.image, row[:4])
            if image.size:
                folder = make_folder(self._folder / _folder_name(class_name(self._names, int(row[5]))))
                write_image(self._free(folder / self._file_names.stem_for(found.frame)), image)
                self.files += 1

    def _free(self, base: Path) -> Path:
        number = self._next.get(base, 1)
        while (path := base.with_name(f"{base.name}{number if number > 1 else ''}.jpg")).exists():
            number += 1
        self._next[base] = number + 1
        return path

    def close(self) -> None:
        """Nothing is open."""


def _relative(frame: Frame) -> str:
    if frame.kind == "live":
        return frame.path.name
    path = os.path.relpath(frame.path)
    return str(frame.path.absolute()) if path.startswith("..") else path


def _cell(text: str) -> str:
    """Return a cell of a table as text that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def _folder_name(name: str) -> str:
    """Return a class name as a folder name: no separators, no dots at the ends, never empty."""
    return re.sub(r'[\\/:*?"<>|\x00-\x1f]', "_", name.encode("utf-8", "replace").decode()).strip(" .") or "_"


@dataclass
class Outputs:
    """All writers of a run.

    Attributes:
        writers: each is given every frame.
    """

    writers: Sequence[Writer] = field(default_factory=list)

    def write(self, item: tuple[Detections, NDArray[np.uint8] | None]) -> None:
        """Pass a frame, and its annotated image (H, W, 3) if it exists already, to every writer."""
        for writer in self.writers:
            writer.write(*item)

    def close(self) -> None:
        """Close every writer, then raise the first error that one of them met."""
        errors: list[DataError] = []
        for writer in self.writers:
            try:
                writer.close()
            except OSError as error:
                errors.append(
                    DataError(f"{error.filename or type(writer).__name__}: cannot be written: {error.strerror}")
                )
            except DataError as error:
                errors.append(error)
        if errors:
            raise errors[0]
