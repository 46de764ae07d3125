"""Output files of detection: images, videos, labels, tables, crops.

Files are written under a temporary name and renamed. No two inputs share a file: when a name is taken, the later input
gets `name_2`, which is logged.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from data.sources.frames import DEFAULT_FPS, Frame
from engine.cli.config import DetectConfig
from engine.predict.detections import Detections, DrawStyle, annotated
from utils.boxes import xyxy2xywh
from utils.draw import class_name
from utils.errors import DataError, UserError
from utils.files import make_folder

LOGGER = logging.getLogger(__name__)
IMAGE_FORMATS = frozenset({".bmp", ".jpg", ".jpeg", ".jpe", ".png", ".tif", ".tiff", ".webp"})
"""Suffixes that annotated images keep; others become .jpg."""
LARGEST_TIMEBASE = 65535
CROP_GAIN, CROP_PAD = 1.02, 10
"""Crops are boxes enlarged by this factor and then by this many pixels, on each axis."""
CSV_COLUMNS = ("Image Name", "Prediction", "Confidence", "xmin", "ymin", "xmax", "ymax")
MAX_FAILURES = 10
"""Failed files after which a writer gets no more frames."""


class Writer(Protocol):
    """Something that writes detections to files."""

    def write(self, found: Detections, drawn: NDArray[np.uint8] | None) -> None:
        """Write the detections of one frame; `drawn` (H, W, 3) is the annotated image if it already exists.

        Raises:
            UserError, OSError: a file could not be written.
        """

    def close(self) -> None:
        """Finish the files. Called once, also after an error or Ctrl-C; raises as `write` does."""


class FileNames:
    """Assigns each input of a run a unique stem, shared by its image, labels and crops."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._videos: set[str] = set()
        self._given: dict[int, str] = {}

    def stem_for(self, frame: Frame) -> str:
        """Return the stem of the frame's input, with `_2` ... appended if another input has it; always the same.

        Upper and lower case count as equal, as in many file systems. Frames of a video `clip` are named
        `clip_<frame>`: no other input gets a name of that form, a second video `clip` becomes `clip-2`.
        """
        if frame.number not in self._given:
            name = frame.path.stem if frame.kind != "live" else frame.path.name
            stem, count = name, 1
            mark = "-" if name.lower() in self._videos else "_"
            while self._collides(stem, frame.kind != "image"):
                count += 1
                stem = f"{name}{mark}{count}"
            if count > 1:
                LOGGER.info("%s: another input has the name %s; %s is used", frame.origin, name, stem)
            self._taken.add(stem.lower())
            if frame.kind != "image":
                self._videos.add(stem.lower())
            self._given[frame.number] = stem
        return self._given[frame.number]

    def of_frame(self, frame: Frame) -> str:
        """Return the stem of an image, `<stem>_<frame>` for a frame of a video or stream."""
        stem = self.stem_for(frame)
        return stem if frame.kind == "image" else f"{stem}_{frame.frame}"

    def _collides(self, stem: str, video: bool) -> bool:
        stem = stem.lower()
        head, _, number = stem.rpartition("_")
        frame_of_video = number.isdecimal() and head in self._videos
        frames = re.compile(re.escape(stem) + r"_\d+")
        return stem in self._taken or frame_of_video or (video and any(map(frames.fullmatch, self._taken)))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically.

    Raises:
        DataError: the disk is full, or the folder cannot be written to.
    """
    part = path.with_name(f".{path.name}.part")  # no fsync, unlike `atomic_path`: there may be thousands of files
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_image(path: Path, image: NDArray[np.uint8]) -> None:
    """Write (H, W, 3) uint8 BGR atomically in the format of the suffix; the name may contain any character.

    Raises:
        DataError: cannot be encoded or written.
    """
    problem = f"{path}: an image of {image.shape[1]} x {image.shape[0]} cannot be encoded"
    try:
        encoded, data = cv2.imencode(path.suffix, image)
    except cv2.error as error:
        raise DataError(problem) from error
    if not encoded:
        raise DataError(problem)
    write_bytes(path, data.tobytes())


def writable_rate(fps: float) -> float:
    """Return the nearest frame rate that MPEG-4 can store: a fraction with a numerator of at most 65535."""
    if not 0 < fps < math.inf:
        return DEFAULT_FPS
    base = 1
    while base < 1000 and abs(round(fps * base) / base - fps) > 0.001 and fps * base * 10 <= LARGEST_TIMEBASE:
        base *= 10
    return min(max(round(fps * base), 1), LARGEST_TIMEBASE) / base


class VideoFile:
    """An mp4 file (MPEG-4 part 2), renamed to its final name when it is complete.

    The format supports even sides only: the encoder drops an odd last row or column.

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
            DataError: the file has fewer frames than were written (a full disk, for example).
        """
        self._writer.release()
        check = cv2.VideoCapture(str(self._part))
        written = int(check.get(cv2.CAP_PROP_FRAME_COUNT))
        check.release()
        if written < self.frames:
            self._part.unlink(missing_ok=True)
            raise DataError(f"{self.path}: only {max(written, 0)} of {self.frames} frames were written; disk full?")
        os.replace(self._part, self.path)


class ImageWriter:
    """Annotated images under the names of their files; videos and streams as mp4 with rate and size of the source."""

    def __init__(self, folder: Path, style: DrawStyle, names: FileNames) -> None:
        self._folder, self._style, self._names = folder, style, names
        self._videos: dict[int, VideoFile | None] = {}  # None: could not be opened

    def write(self, found: Detections, drawn: NDArray[np.uint8] | None) -> None:
        frame = found.frame
        image = drawn if drawn is not None else annotated(found, self._style)
        if frame.kind == "image":
            suffix = frame.path.suffix if frame.path.suffix.lower() in IMAGE_FORMATS else ".jpg"
            write_image(self._folder / f"{self._names.stem_for(frame)}{suffix}", image)
        else:
            self._write_frame(frame, image)
        if frame.kind != "live":
            self._finish([n for n in self._videos if n != frame.number])

    def _write_frame(self, frame: Frame, image: NDArray[np.uint8]) -> None:
        if frame.number not in self._videos:
            self._videos[frame.number] = None
            path = self._folder / f"{self._names.stem_for(frame)}.mp4"
            self._videos[frame.number] = VideoFile(path, frame.fps, (image.shape[1], image.shape[0]))
        video = self._videos[frame.number]
        if video is not None:
            video.write(image)

    def _finish(self, numbers: Iterable[int]) -> None:
        problems = []
        for video in [self._videos.pop(number) for number in numbers]:
            try:
                if video is not None:
                    video.finish()
            except (OSError, DataError) as error:
                problems.append(str(error))
        if problems:
            raise DataError("; ".join(problems))

    def close(self) -> None:
        self._finish(list(self._videos))


class LabelWriter:
    """One text file per frame with detections, lowest confidence first: class, box, and the confidence if asked for.

    Boxes are rounded to integer pixels before normalization, as in YOLOv5.

    Args:
        folder: folder of `<stem>.txt` (frames of videos: `<stem>_<frame>.txt`).
        xyxy: write xyxy instead of cxcywh.
        confidence: append the confidence.
    """

    def __init__(self, folder: Path, names: FileNames, xyxy: bool = False, confidence: bool = False) -> None:
        self._folder, self._names = make_folder(folder), names
        self._xyxy, self._confidence = xyxy, confidence
        self.files = 0

    def write(self, found: Detections, drawn: NDArray[np.uint8] | None) -> None:  # noqa: ARG002
        if len(found.boxes):
            write_bytes(self._folder / f"{self._names.of_frame(found.frame)}.txt", self._text(found).encode())
            self.files += 1

    def _text(self, found: Detections) -> str:
        height, width = found.frame.image.shape[:2]
        rows = found.boxes[::-1]
        boxes = np.round(rows[:, :4])
        values = (boxes if self._xyxy else xyxy2xywh(boxes)) / np.array([width, height] * 2, np.float32)
        columns = [rows[:, 5:6], values] + ([rows[:, 4:5]] if self._confidence else [])
        return "".join(" ".join(f"{v:g}" for v in line) + "\n" for line in np.concatenate(columns, 1).tolist())

    def close(self) -> None:
        LOGGER.info("%d label file(s) in %s", self.files, self._folder)


class TableWriter:
    """Base of writers that append to one file, which gets its name when it is complete."""

    def __init__(self, path: Path, names: Mapping[int, str]) -> None:
        self._names, self._path = names, path
        self._part = path.with_name(f".{path.name}.part")
        self._stream = open(self._part, "w", encoding="utf-8", errors="backslashreplace", newline="")  # noqa: SIM115

    def close(self) -> None:
        try:
            self._stream.close()
            os.replace(self._part, self._path)
        except OSError as error:
            raise DataError(f"{self._path}: cannot be written: {error.strerror or error}") from error

    def discard(self) -> None:
        """Remove the incomplete file."""
        with suppress(OSError):  # from flushing the buffer
            self._stream.close()
        self._part.unlink(missing_ok=True)


class CsvWriter(TableWriter):
    """predictions.csv: image, class, confidence, xyxy in pixels; one line per box, best first within an image.

    The image is named by its path, relative to the working directory where it is below it; a frame of a video as
    `<path>_<frame>`. Cells that a spreadsheet would interpret as a formula get a leading apostrophe.
    """

    def __init__(self, path: Path, names: Mapping[int, str]) -> None:
        super().__init__(path, names)
        self._writer = csv.writer(self._stream)
        self._writer.writerow(CSV_COLUMNS)

    def write(self, found: Detections, drawn: NDArray[np.uint8] | None) -> None:  # noqa: ARG002
        frame = found.frame
        image = _relative(frame) if frame.kind == "image" else f"{_relative(frame)}_{frame.frame}"
        for row in found.boxes:
            name = class_name(self._names, int(row[5]))
            self._writer.writerow([_cell(image), _cell(name), f"{row[4]:.4f}", *(f"{v:.2f}" for v in row[:4])])


class JsonWriter(TableWriter):
    """predictions.json: one entry per frame; boxes in pixels of the frame, sorted by descending confidence."""

    _separator = "["

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
        self._stream.write(f"{self._separator}\n{json.dumps(entry)}")
        self._separator = ","

    def close(self) -> None:
        self._stream.write("[\n]\n" if self._separator == "[" else "\n]\n")
        super().close()


def crop_box(image: NDArray[np.uint8], box_xyxy: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Return the crop of an image (H, W, 3) around a box with YOLOv5's margin, as a view (may be empty).

    Args:
        box_xyxy: (4,) in pixels.
    """
    center = (box_xyxy[:2] + box_xyxy[2:]) / 2
    size = (box_xyxy[2:] - box_xyxy[:2]) * CROP_GAIN + CROP_PAD
    height, width = image.shape[:2]
    left, top = np.clip(center - size / 2, 0, (width, height)).astype(int)
    right, bottom = np.clip(center + size / 2, 0, (width, height)).astype(int)
    return image[top:bottom, left:right]


class CropWriter:
    """Crops of the original image, best first: `crops/<class>/<stem>.jpg`, `<stem>_2.jpg` ..."""

    def __init__(self, folder: Path, names: Mapping[int, str], file_names: FileNames) -> None:
        self._folder, self._names, self._file_names = folder, names, file_names
        self._written: set[str] = set()

    def write(self, found: Detections, drawn: NDArray[np.uint8] | None) -> None:  # noqa: ARG002
        for row in found.boxes:
            image = crop_box(found.frame.image, row[:4])
            if image.size:
                folder = make_folder(self._folder / _folder_name(class_name(self._names, int(row[5]))))
                write_image(self._free(folder, self._file_names.of_frame(found.frame)), image)

    def _free(self, folder: Path, stem: str) -> Path:
        path, count = folder / f"{stem}.jpg", 1
        while str(path).lower() in self._written:
            count += 1
            path = folder / f"{stem}_{count}.jpg"
        self._written.add(str(path).lower())
        return path

    def close(self) -> None:
        """Do nothing: no file is open."""


def _relative(frame: Frame) -> str:
    if frame.kind == "live":
        return frame.path.name
    path = os.path.relpath(frame.path)
    return str(frame.path.absolute()) if path.startswith("..") else path


def _cell(text: str) -> str:
    """Return a table cell that no spreadsheet interprets as a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def _folder_name(name: str) -> str:
    """Return a class name as a folder name: no separators, no dots at the ends, never empty."""
    return re.sub(r'[\\/:*?"<>|\x00-\x1f]', "_", name.encode("utf-8", "replace").decode()).strip(" .") or "_"


class Outputs:
    """All writers of a run. Failures of one are logged and recorded; the others continue.

    Attributes:
        failures: one line per file that could not be written.
    """

    def __init__(self, writers: Sequence[Writer] = ()) -> None:
        self.failures: list[str] = []
        self._writers = list(writers)
        self._counts: Counter[Writer] = Counter()

    def write(self, item: tuple[Detections, NDArray[np.uint8] | None]) -> None:
        """Pass a frame, and its annotated image (H, W, 3) if it already exists, to every writer."""
        for writer in list(self._writers):
            try:
                writer.write(*item)
            except (OSError, UserError) as error:
                self._failed(writer, error)

    def close(self) -> None:
        """Close every writer."""
        for writer in list(self._writers):
            try:
                writer.close()
            except (OSError, UserError) as error:
                self._failed(writer, error)

    def _failed(self, writer: Writer, error: Exception) -> None:
        message = f"cannot be written: {error}" if isinstance(error, OSError) else str(error)
        self._counts[writer] += 1
        if isinstance(writer, TableWriter) or self._counts[writer] == MAX_FAILURES:
            self._writers.remove(writer)
            message += f"; {type(writer).__name__} writes no more"
            if isinstance(writer, TableWriter):
                writer.discard()
        LOGGER.error("%s", message)
        self.failures.append(message)


def open_outputs(config: DetectConfig, folder: Path, style: DrawStyle, names: FileNames) -> Outputs:
    """Return the writers that the options ask for, into a folder that exists."""
    c = config
    writers: list[Writer] = []
    if not c.nosave:
        writers.append(ImageWriter(folder, style, names))
    if c.save_txt:
        writers.append(LabelWriter(folder / "labels", names, xyxy=c.save_format == 1, confidence=c.save_conf))
    if c.save_csv:
        writers.append(CsvWriter(folder / "predictions.csv", style.names))
    if c.save_json:
        writers.append(JsonWriter(folder / "predictions.json", style.names))
    if c.save_crop:
        writers.append(CropWriter(folder / "crops", style.names, names))
    return Outputs(writers)
