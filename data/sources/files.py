"""Image sources of `detect.py`: files, folders, globs, lists, videos, cameras, network streams, the screen.

`open_source` looks at the text that the user gave and returns a `Source`, which is iterated once and then closed. What
cannot be read is logged when it is met and kept in `Source.failures`; the rest is processed.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path

import cv2

from data.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES, read
from data.lists import read_list
from data.sources.frames import DEFAULT_FPS, Frame, Source
from data.sources.streams import ScreenSource, StreamSource
from utils.errors import DataError, did_you_mean, hide_passwords
from utils.files import check_regular, download, expand_user, folder_names, read_text, url_file_name

LOGGER = logging.getLogger(__name__)

_URL = re.compile(r"^(https?|rtsps?|rtmps?|rtp|udp|tcp|mms|srt)://", re.IGNORECASE)
_YOUTUBE = re.compile(r"^(https?://)?((www|m)\.)?(youtube\.com|youtu\.be)(/|$)", re.IGNORECASE)
_INDEXED_VIDEOS = frozenset({".mp4", ".mov", ".m4v", ".avi"})
"""Formats whose header counts the frames exactly."""
_TIMED_VIDEOS = frozenset({".mkv", ".webm"})
"""Formats whose header has the duration, from which the number of frames is estimated."""


def open_source(text: str, vid_stride: int = 1) -> Source:
    """Open what `--source` names.

    Args:
        text: image or video file, folder (not its subfolders), glob (`**` reaches into subfolders), `.txt` list of
            files, `.streams` list of addresses, camera number, URL (of an image or video file, which is fetched first,
            or of a stream), or `screen [N] [left top width height]`.
        vid_stride: use every n-th frame of videos and streams.

    Raises:
        DataError: nothing there, nothing usable in it, or no stream that opens.
    """
    text = str(text).strip()
    if not text:
        raise DataError("--source: empty; allowed are a file, folder, glob, list, camera number, URL or 'screen'")
    if _YOUTUBE.match(text):
        raise DataError(
            f"{text}: a YouTube page is not a stream; get the stream's address with the tool yt-dlp "
            "(pip install yt-dlp; yt-dlp -g -f b PAGE) and give that as --source"
        )
    if text.isascii() and text.isdigit():
        return StreamSource([text], vid_stride)
    if text.split()[0].lower() == "screen" and not os.path.exists(text):
        return ScreenSource(text, vid_stride)
    if _URL.match(text):
        suffix = Path(url_file_name(text)).suffix.lower()
        if text.lower().startswith("http") and suffix in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
            return DownloadedSource(text, vid_stride)
        return StreamSource([text], vid_stride)
    path = expand_user(text, DataError)
    if path.suffix.lower() == ".streams" and os.path.isfile(path):
        return StreamSource(_addresses(path), vid_stride)
    return FileSource(find_files(path), vid_stride)


@dataclass
class FoundFiles:
    """Result of looking for images and videos.

    Attributes:
        files: in the order in which they are processed; each file once.
        problems: one line per entry of a list that names nothing usable.
    """

    files: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def find_files(path: Path) -> FoundFiles:
    """Return the images and videos that a file, folder, glob or `.txt` list names; folders and globs sorted.

    Raises:
        DataError: nothing there, or nothing usable in it.
    """
    if os.path.isdir(path):
        return FoundFiles(_of_folder(path))
    if os.path.exists(path):
        check_regular(path)
        if path.suffix.lower() == ".txt":
            return _of_list(path)
        if not _usable(path):
            raise DataError(f"{path}: neither image nor video by its suffix; {_allowed()}")
        return FoundFiles([path])
    if glob.has_magic(str(path)):
        return FoundFiles(_of_glob(str(path)))
    near = [name for name in folder_names(path.parent) if _usable(Path(name)) or os.path.isdir(path.parent / name)]
    raise DataError(f"{path}: no such file or folder{did_you_mean(path.name, near)}")


def _usable(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES


def _allowed() -> str:
    return f"allowed are {' '.join(sorted(IMAGE_SUFFIXES))} and {' '.join(sorted(VIDEO_SUFFIXES))}"


def _sift(files: Sequence[Path], where: str) -> list[Path]:
    """Return the images and videos among the files and log what was left out."""
    good = [f for f in files if _usable(f)]
    other = [f.name for f in files if not _usable(f)]
    if other and good:
        names = ", ".join(other[:5]) + (", ..." if len(other) > 5 else "")
        LOGGER.info("%s: %d file(s) skipped that are neither images nor videos: %s", where, len(other), names)
    return good


def _of_folder(folder: Path) -> list[Path]:
    entries = [folder / name for name in folder_names(folder) if not name.startswith(".")]
    good = _sift([p for p in entries if not os.path.isdir(p)], str(folder))
    if not good:
        deeper = any(map(os.path.isdir, entries))
        hint = f"; for its subfolders give '{folder}/**/*.jpg' in quotes" if deeper else f"; {_allowed()}"
        raise DataError(f"{folder}: no images or videos in this folder{hint}")
    return good


def _of_glob(pattern: str) -> list[Path]:
    matches = [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]
    good = _sift([p for p in matches if not os.path.isdir(p)], pattern)
    if not good:
        folder_names(Path(*takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts)))  # if it can be read
        raise DataError(f"{pattern}: no image or video matches this pattern" + (f"; {_allowed()}" if matches else ""))
    return good


def _of_list(path: Path) -> FoundFiles:
    """Return the files of a list (see `read_list`); each entry may be a file, a folder or a glob."""
    found = FoundFiles()
    seen: set[Path] = set()
    for _, entry in read_list(path):
        try:
            there = find_files(entry)
        except DataError as error:
            found.problems.append(f"{path}: {error}")
            continue
        found.files += [f for f in there.files if f not in seen]
        seen.update(there.files)
    if not found.files:
        first = f"no usable file in this list; first problem: {found.problems[0]}" if found.problems else ""
        raise DataError(f"{path}: {first or 'empty list; one file per line is needed'}")
    return found


def _addresses(path: Path) -> list[str]:
    """Return the lines of a list of streams without empty lines and comments."""
    lines = [line.strip() for line in read_text(path).splitlines()]
    if not (addresses := [line for line in lines if line and not line.startswith("#")]):
        raise DataError(f"{path}: empty list; one address per line is needed")
    return addresses


def _missing_below(path: Path, promised: int) -> float:
    """Return the number of frames below which a video that promises so many counts as truncated."""
    suffix = path.suffix.lower()
    return 0.98 * promised - 2 if suffix in _INDEXED_VIDEOS else 0.9 * promised - 5 if suffix in _TIMED_VIDEOS else 0


class FileSource(Source):
    """Images and videos from files, each frame once and in order.

    Args:
        found: what to read; its problems are reported as failures.
        vid_stride: use every n-th frame of a video, beginning with the first.
    """

    def __init__(self, found: FoundFiles, vid_stride: int = 1) -> None:
        super().__init__()
        self.files = tuple(found.files)
        self._stride = vid_stride
        for problem in found.problems:
            self.reject(problem)

    def __iter__(self) -> Iterator[tuple[Frame, ...]]:
        for number, path in enumerate(self.files, 1):
            try:
                if path.suffix.lower() in VIDEO_SUFFIXES:
                    yield from self._video(path, number)
                else:
                    yield (Frame(read(path), path, str(path), "image", number, len(self.files)),)
            except DataError as error:
                self.reject(str(error))

    def _video(self, path: Path, number: int) -> Iterator[tuple[Frame, ...]]:
        if any("\ud800" <= c <= "\udfff" for c in str(path)):  # OpenCV crashes on these
            self.reject(f"{path!r}: the name is not UTF-8, so OpenCV cannot open this video; rename it")
            return
        check_regular(path)
        capture = cv2.VideoCapture(str(path))
        try:
            promised = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
            rate = capture.get(cv2.CAP_PROP_FPS)
            fps = (rate if 0 < rate <= 1000 else DEFAULT_FPS) / self._stride
            position = 0
            while capture.grab():
                position += 1
                if (position - 1) % self._stride:
                    continue
                good, image = capture.retrieve()
                if good:
                    yield (Frame(image, path, str(path), "video", number, len(self.files), position, promised, fps),)  # type: ignore[arg-type]
            if position == 0:
                self.reject(f"{path}: no frame of this video can be decoded")
            elif position < _missing_below(path, promised):
                self.reject(f"{path}: truncated: {position} of {promised} frames can be decoded")
        finally:
            capture.release()


class DownloadedSource(FileSource):
    """An image or video behind an http address, downloaded into a temporary folder that is removed with the source.

    Frames are named by the address, since the file is gone when the output is read.
    """

    def __init__(self, url: str, vid_stride: int = 1) -> None:
        self._origin = hide_passwords(url)
        self._folder = tempfile.TemporaryDirectory(prefix="detect-")
        try:
            file = download(
                url, Path(self._folder.name) / url_file_name(url), hint="fetch it by hand and name the file"
            )
        except DataError:
            self._folder.cleanup()
            raise
        super().__init__(FoundFiles([file]), vid_stride)

    def __iter__(self) -> Iterator[tuple[Frame, ...]]:
        for (frame,) in super().__iter__():
            yield (replace(frame, path=Path(frame.path.name), origin=self._origin),)

    def reject(self, message: str) -> None:
        super().reject(message.replace(str(self.files[0]), self._origin))

    def close(self) -> None:
        self._folder.cleanup()
