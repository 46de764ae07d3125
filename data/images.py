"""Reading images: any common file becomes an (H, W, 3) uint8 BGR array, or a DataError that says why not.

OpenCV decodes, as in YOLOv5, so that pixels agree; Pillow steps in for what OpenCV does not know. Decisions:
- EXIF orientation is applied: the array is upright.
- An alpha channel is dropped, not blended; a palette is resolved; gray is repeated over three channels.
- 16 bits become 8 by dropping the low byte (decoders differ by at most 1), so the whole range 0..65535 maps to 0..255.
  Floating-point pixels have no agreed range and are refused.
- Of an animation the first frame counts.
- A JPEG that breaks off is refused: some OpenCV versions fill the rest with gray, which would be trained on unseen.
  Bytes *after* the end of a JPEG (phones append previews) do no harm and are accepted.
"""

from __future__ import annotations

import io
import mmap
import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.errors import DataError

IMAGE_SUFFIXES = frozenset({".bmp", ".dng", ".jpe", ".jpeg", ".jpg", ".mpo", ".pfm", ".png", ".tif", ".tiff", ".webp"})
"""Lower-case endings of the files that a dataset folder is searched for."""

VIDEO_SUFFIXES = frozenset(
    {".asf", ".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
)
"""Lower-case endings of what is read as a sequence of frames; GIF is one of them, as in YOLOv5."""

_PNG_START = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112  # EXIF tag
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_FLOATS = "floating-point pixels have no agreed range; save it with 8 or 16 bits per channel"
_CUT = "the JPEG data breaks off before the end of the image"
_START_OF_SCAN = 0xDA
_MARKERS_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})


def read(path: str | Path) -> NDArray[np.uint8]:
    """Read one image.

    Args:
        path: file of any format that OpenCV or Pillow decodes; the name may hold any character.

    Returns:
        (H, W, 3) uint8 BGR, C-contiguous, upright (EXIF orientation applied).

    Raises:
        DataError: no such file, not readable, empty, not an image, interrupted, or with floating-point pixels.
    """
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return decode(data, str(path))


def decode(data: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    """Decode the bytes of one image file.

    Args:
        data: (n,) uint8, the whole file.
        name: what to call it in an error.

    Returns:
        (H, W, 3) uint8 BGR, C-contiguous, upright.

    Raises:
        DataError: see `read`.
    """
    if data.size == 0:
        raise DataError(f"{name}: empty file (0 bytes); an image is needed")
    head = data[:16].tobytes()
    if head.startswith(_JPEG_START) and not _jpeg_is_whole(data.data):
        raise DataError(f"{name}: {_CUT}")
    if head[:2] in (b"PF", b"Pf"):
        raise DataError(f"{name}: {_FLOATS}")
    image = None
    if head[4:8] != b"ftyp":  # AVIF and HEIF: OpenCV ignores their orientation
        try:
            image = cv2.imdecode(data, cv2.IMREAD_COLOR)
        except cv2.error:
            image = None
    return np.asarray(image, np.uint8) if image is not None else _decode_with_pillow(data, name)


def probe(path: str | Path) -> tuple[int, int]:
    """Size of an image as `read` gives it, without decoding JPEG and PNG files.

    Checks what can be checked cheaply: JPEG header and end, PNG checksums. Other formats are decoded in full.

    Returns:
        (height, width) in pixels, upright.

    Raises:
        DataError: see `read`.
    """
    size = None
    try:
        with open(path, "rb") as stream:
            head = stream.read(8)
            if head == _PNG_START:
                size = _png_size(stream)
            elif head.startswith(_JPEG_START):
                size = _jpeg_size(stream)
                if size is not None and not _jpeg_file_is_whole(stream):
                    raise DataError(f"{path}: {_CUT}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return size or read(path).shape[:2]


def _decode_with_pillow(data: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data.tobytes())) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode == "F":
                raise DataError(f"{name}: {_FLOATS}")
            if upright.mode.startswith("I"):  # I;16 and its kin, or 16-bit values held in 32
                gray = np.asarray(upright).astype(np.int64)
                if gray.min() < 0 or gray.max() > 0xFFFF:
                    raise DataError(f"{name}: pixels of more than 16 bits; save it with 8 or 16 bits per channel")
                return np.repeat((gray >> 8).astype(np.uint8)[..., None], 3, axis=2)
            return np.ascontiguousarray(np.asarray(upright.convert("RGB"))[..., ::-1])
    except DataError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ... on broken files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "cannot identify" in reason:
            reason = "no known image format"
        raise DataError(f"{name}: cannot be decoded: {reason}") from error


def _png_size(stream: io.BufferedReader) -> tuple[int, int] | None:
    """(height, width) of a PNG whose checksums are all right; None where only a full decode can tell.

    Args:
        stream: behind the signature.
    """
    size = None
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        body = stream.read(length)
        if stream.read(4) != struct.pack(">I", zlib.crc32(kind + body)) or kind == b"eXIf":
            return None
        if kind == b"IHDR" and length == 13:
            size = struct.unpack(">II", body[:8])[::-1]
        elif kind == b"IEND":
            return size
    return None


def _jpeg_size(stream: io.BufferedReader) -> tuple[int, int] | None:
    """(height, width) of a JPEG, upright; None where the header is broken."""
    from PIL import Image

    stream.seek(0)
    try:
        with Image.open(stream, formats=("JPEG", "MPO")) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            stream.seek(0)
            return (width, height) if turned else (height, width)
    except Exception:  # noqa: BLE001 -- Pillow raises anything on broken headers; a full decode has the last word
        return None


def _jpeg_file_is_whole(stream: io.BufferedReader) -> bool:
    stream.seek(-2, os.SEEK_END)
    if stream.read(2) == _JPEG_END:
        return True
    with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _jpeg_is_whole(data)


def _jpeg_is_whole(data: memoryview | mmap.mmap) -> bool:
    """Whether an end marker follows the start of the image's scan (one in an embedded preview does not count)."""
    size = len(data)
    if bytes(data[size - 2 : size]) == _JPEG_END:
        return True
    at = 2
    while at + 4 <= size and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _MARKERS_WITHOUT_LENGTH:
            at += 2
        elif marker == _START_OF_SCAN:
            return bytes(data[at:size]).find(_JPEG_END) >= 0
        else:
            at += 2 + (data[at + 2] << 8 | data[at + 3])
    return False
