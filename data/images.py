"""Reading images: any common file becomes an (H, W, 3) uint8 BGR array, or a DataError with the reason.

OpenCV decodes, as in YOLOv5, so that pixels agree; Pillow steps in for what OpenCV does not know. Decisions:
- EXIF orientation is applied: the array is upright.
- An alpha channel is dropped, not blended; a palette is resolved; gray is repeated over three channels.
- 16 bits become 8 by dropping the low byte (decoders differ by at most 1), so the whole range 0..65535 maps to 0..255.
  Floating-point pixels have no agreed range and are refused.
- Of an animation the first frame is used.
- A truncated JPEG is refused: some OpenCV versions fill the rest with gray, which would be trained on unseen.
  Bytes *after* the end of a JPEG (phones append previews) do no harm and are accepted.
- The header's size is checked before anything is decoded: at most `MAX_PIXELS` pixels.
"""

from __future__ import annotations

import io
import os
import tempfile
import warnings
from pathlib import Path
from typing import IO

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray

from data import jpeg
from utils.errors import DataError
from utils.files import check_regular

IMAGE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".dng", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pfm", ".pgm",
     ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
)  # fmt: skip
"""Lower-case endings of the files that a dataset folder is searched for."""

VIDEO_SUFFIXES = frozenset(
    {".asf", ".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
)
"""Lower-case endings of what is read as a sequence of frames; GIF is one of them, as in YOLOv5."""

CACHE_SUFFIX = ".image-cache"
"""Ending of the files that `--cache disk` writes."""

MAX_PIXELS = int(os.environ.get("MAX_IMAGE_PIXELS") or 178_956_970)
"""Most pixels of an image (Pillow's limit); the environment variable MAX_IMAGE_PIXELS changes it."""

_PNG = b"\x89PNG\r\n\x1a\n"
_FLOATS = "floating-point pixels have no agreed range; save it with 8 or 16 bits per channel"
_CUT = "truncated: the JPEG data ends before the image does"


def read(path: str | Path) -> NDArray[np.uint8]:
    """Read one image.

    Args:
        path: file of any format that OpenCV or Pillow decodes; the name may hold any character.

    Returns:
        (H, W, 3) uint8 BGR, C-contiguous, upright (EXIF orientation applied).

    Raises:
        DataError: no such file, not a file, not readable, empty, not an image, too large, truncated, or with
            floating-point pixels.
    """
    return decode(_bytes(path), str(path))


def decode(data: bytes, name: str) -> NDArray[np.uint8]:
    """Decode the bytes of one image file.

    Args:
        data: the whole file.
        name: its name in errors.

    Returns:
        (H, W, 3) uint8 BGR, C-contiguous, upright.

    Raises:
        DataError: see `read`.
    """
    if not data:
        raise DataError(f"{name}: empty file (0 bytes); an image is needed")
    if data.startswith(jpeg.START) and not jpeg.is_whole(data):
        raise DataError(f"{name}: {_CUT}")
    if data[:2] in (b"PF", b"Pf"):
        raise DataError(f"{name}: {_FLOATS}")
    damaged_png = False
    if not _is_plain_jpeg(data):
        header = _check_pixels(io.BytesIO(data), name)
        damaged_png = data.startswith(_PNG) and (header is None or not _png_chunks_fit(data))
    image = None
    if not damaged_png and data[4:8] != b"ftyp":  # AVIF and HEIF: OpenCV ignores their orientation
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        except cv2.error:
            image = None
    return np.asarray(image, np.uint8) if image is not None else _decode_with_pillow(data, name)


def _png_chunks_fit(data: bytes) -> bool:
    """Return whether no PNG chunk claims more bytes than the file has; OpenCV would allocate them, even gigabytes."""
    place = len(_PNG)
    while place + 8 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        if length > len(data):
            return False
        place += 12 + length
    return True


def probe(path: str | Path) -> tuple[int, int]:
    """Return the size of an image as `read` returns it.

    The markers of a common JPEG are enough; another JPEG is decoded at an eighth of its size, other formats in full.

    Returns:
        (height, width) in pixels, upright.

    Raises:
        DataError: see `read`.
    """
    data = _bytes(path)
    size = _jpeg_size(data, str(path)) if data.startswith(jpeg.START) else None
    return size or decode(data, str(path)).shape[:2]


def _bytes(path: str | Path) -> bytes:
    check_regular(path)
    try:
        with open(path, "rb", buffering=0) as stream:
            return stream.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def decoding_problem(path: Path) -> str:
    """Decode an image and return what the JPEG decoder reports about damaged data; '' if nothing.

    libjpeg reports on the standard error of the process, so only one thread may call this at a time.
    """
    with tempfile.TemporaryFile() as log:
        stderr = os.dup(2)
        try:
            os.dup2(log.fileno(), 2)
            read(path)
        except DataError as error:
            return str(error)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        log.seek(0)
        lines = log.read().decode("utf-8", "replace").splitlines()
    return next((line.strip() for line in lines if "JPEG" in line), "")


def _check_pixels(stream: IO[bytes], name: str) -> PIL.Image.Image | None:
    """Return the opened header, where Pillow knows the format; DataError where it has more pixels than allowed."""
    PIL.Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # an error from twice as many on; below, a warning
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            image = PIL.Image.open(stream)
    except PIL.Image.DecompressionBombError as error:
        raise DataError(f"{name}: too large: {str(error).split(' (')[-1].split(')')[0]}; {_RAISE}") from error
    except Exception:  # noqa: BLE001 -- Pillow raises anything on damaged headers; a full decode decides
        return None
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"{name}: too large: {image.width}x{image.height} pixels; {_RAISE}")
    return image


_RAISE = f"at most {MAX_PIXELS} pixels are read (environment variable MAX_IMAGE_PIXELS)"


def _decode_with_pillow(data: bytes, name: str) -> NDArray[np.uint8]:
    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            upright = PIL.ImageOps.exif_transpose(image)
            if upright.mode == "F":
                raise DataError(f"{name}: {_FLOATS}")
            if upright.mode.startswith("I"):  # I;16 and variants, or 16-bit values held in 32
                gray = np.asarray(upright).astype(np.int64)
                if gray.min() < 0 or gray.max() > 0xFFFF:
                    raise DataError(f"{name}: pixels of more than 16 bits; save it with 8 or 16 bits per channel")
                if upright.mode == "I" and 0 < gray.max() <= 0xFF:  # without the low byte it would be black
                    raise DataError(
                        f"{name}: 32-bit pixels of at most {gray.max()}; save it with 8 or 16 bits per channel"
                    )
                return np.repeat((gray >> 8).astype(np.uint8)[..., None], 3, axis=2)
            return np.ascontiguousarray(np.asarray(upright.convert("RGB"))[..., ::-1])
    except DataError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ... on damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "cannot identify" in reason:
            reason = "no known image format"
        raise DataError(f"{name}: cannot be decoded: {reason}") from error


def _is_plain_jpeg(data: bytes) -> bool:
    """Return whether a file is a JPEG of the most common form, of no more pixels than allowed."""
    size = jpeg.plain_size(data)
    return size is not None and size[0] * size[1] <= MAX_PIXELS


def _jpeg_size(data: bytes, name: str) -> tuple[int, int] | None:
    """Return (height, width) of a JPEG, upright; None where only a full decode can tell."""
    plain = jpeg.plain_size(data)
    if plain is not None and not plain[2] and plain[0] * plain[1] <= MAX_PIXELS:
        return plain[:2]
    image = _check_pixels(io.BytesIO(data), name)
    if image is None or image.format not in ("JPEG", "MPO") or not jpeg.is_whole(data):
        return None
    try:
        orientation = jpeg.orientation(image.info.get("exif", b""))  # `image.getexif()` takes that of XMP, too
        if orientation is None:
            return None
        if plain is None and cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_8) is None:
            return None
    except Exception:  # noqa: BLE001 -- Pillow raises anything on damaged metadata; a full decode decides
        return None
    turned = orientation in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)
