"""Decoded images, no larger than the network needs them: read on demand, or cached in memory or on disk."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
from numpy.typing import NDArray
from tqdm import tqdm

from data.images import CACHE_SUFFIX, read
from data.labels.labels import ImageRecord
from data.labels.table import ImageRecords
from data.letterbox import Image
from data.sizes import HW, fit_long_side
from utils.errors import ConfigError, DataError
from utils.files import atomic_path, is_writable

LOGGER = logging.getLogger(__name__)

RECENT_BYTES = 256 * 2**20
"""Images of a mosaic window that a process keeps, in bytes."""

SAFETY = 1.1  # a memory cache must fit with this margin
GIB = 2**30


class ImageStore:
    """The images of a dataset by number, with the longer side shrunk to `imgsz` (small ones are not enlarged).

    Args:
        records: the images.
        imgsz: longest side kept, in pixels.
        smooth: shrink by area averaging (validation) instead of linear interpolation.
        mode: None reads an image each time, "ram" keeps all, "disk" keeps files of the decoded originals.
        folder: of these files; None: beside the images, or in the user's cache folder where that is read-only.
        recent_bytes: how much of the images read last is kept, in bytes.

    Raises:
        DataError: an image cannot be read, is not of the size its record says, or a cache file cannot be written.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        imgsz: int,
        *,
        smooth: bool,
        mode: str | None = None,
        folder: Path | None = None,
        recent_bytes: int = 0,
    ) -> None:
        if mode not in (None, "ram", "disk"):
            raise ConfigError(f"cache: {mode!r}; allowed are 'ram', 'disk' and nothing")
        self._records = ImageRecords.of(records)
        self._imgsz = imgsz
        self._shrinking = cv2.INTER_AREA if smooth else cv2.INTER_LINEAR
        self._folder = folder
        self._recent = _Recent(recent_bytes if mode != "ram" else 0)
        self._on_disk = mode == "disk"
        self._kept: list[Image] | None = None
        if self._on_disk:
            _for_all(self._write_file, len(records), "caching images on disk")
        elif mode == "ram" and self._fits_in_memory():
            self._kept = _for_all(self._read, len(records), "caching images in memory")

    def __getitem__(self, index: int) -> Image:
        """Return an image (h, w, 3) uint8 BGR; do not write to it."""
        if self._kept is not None:
            return self._kept[index]
        image = self._recent.get(index)
        if image is None:
            image = self._read(index)
            self._recent.put(index, image)
        return image

    def _size(self, index: int) -> HW:
        height, width = self._records.sizes[index].tolist()
        return height, width

    def _read(self, index: int) -> Image:
        size = self._size(index)
        image = self._from_file(index) if self._on_disk else None
        if image is None:
            image = self._decode(index)
        if max(size) <= self._imgsz:
            return image
        height, width = fit_long_side(*size, self._imgsz)
        return cv2.resize(image, (width, height), interpolation=self._shrinking)

    def _decode(self, index: int) -> Image:
        path, size = self._records[index].path, self._size(index)
        image = read(path)
        if image.shape[:2] != size:
            found, known = (f"{w}x{h}" for h, w in (image.shape[:2], size))
            raise DataError(f"{path}: {found} pixels, but {known} when the labels were read; start again")
        return image

    # ---- memory

    def _fits_in_memory(self) -> bool:
        needed = int(bytes_kept(self._records.sizes, self._imgsz).sum())
        free = available_memory()
        if needed * SAFETY > free:
            LOGGER.warning(
                "images are not cached in memory: %.1f GiB needed, %.1f GiB free; 'disk' may help",
                needed * SAFETY / GIB,
                free / GIB,
            )
            return False
        LOGGER.info("caching %d images in memory: %.1f GiB", len(self._records), needed / GIB)
        return True

    # ---- disk

    def file_of(self, index: int) -> Path:
        """Return the cache file of an image: beside it, or in the cache folder."""
        path, folder = self._records[index].path, self._folder
        if folder is None and is_writable(path.parent):
            return path.with_name(path.name + CACHE_SUFFIX)
        name = hashlib.sha1(os.fsencode(path.absolute()), usedforsecurity=False).hexdigest()[:16]
        return (folder or user_cache_folder()) / f"{path.stem[:100]}-{name}{CACHE_SUFFIX}"

    def _header(self, index: int, checksum: int) -> bytes:
        """Return the identity of the cached pixels: source, its size and modification time, image size, checksum."""
        path = self._records[index].path
        info = path.stat()
        fields = (ascii(str(path.absolute())), info.st_size, info.st_mtime_ns, *self._size(index), checksum)
        return _MAGIC + " ".join(map(str, fields)).encode("ascii") + b"\n"

    def _from_file(self, index: int) -> Image | None:
        """Return the cached image; None where there is none, it is damaged, or its source has changed."""
        shape = (*self._size(index), 3)
        try:
            file = self.file_of(index)
            if not os.path.isfile(file):
                return None
            data = np.fromfile(file, np.uint8)
            pixels = data[-math.prod(shape) :]
            head = self._header(index, zlib.crc32(pixels.data))
        except OSError:
            return None
        fits = len(data) == len(head) + math.prod(shape) and data[: len(head)].tobytes() == head
        return pixels.reshape(shape) if fits else None

    def _write_file(self, index: int) -> None:
        if self._from_file(index) is not None:
            return
        image, target = self._decode(index), self.file_of(index)
        if os.path.lexists(target) and not _is_cache_file(target):
            raise DataError(f"{target}: is not a cache file of ours, so it is not overwritten; move it, or use 'ram'")
        try:
            with atomic_path(target) as part, open(part, "wb") as stream:
                stream.write(self._header(index, zlib.crc32(image.data)))
                stream.write(image.data)
        except (OSError, ConfigError) as error:
            raise DataError(f"{target}: cannot be written: {error}; choose another cache folder or 'ram'") from error


_MAGIC = b"decoded image 1 "


def user_cache_folder() -> Path:
    """Return the folder for caches of datasets that are read-only."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "yolov5-backbones" / "images"


def _is_cache_file(path: Path) -> bool:
    try:
        return os.path.isfile(path) and np.fromfile(path, np.uint8, len(_MAGIC)).tobytes() == _MAGIC
    except OSError:
        return False


def enlarged(image: Image, size: HW) -> Image:
    """Return the image resized linearly to (height, width) `size`, or the same array if it has that size."""
    if image.shape[:2] == size:
        return image
    return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)


def available_memory() -> int:
    """Return the bytes that can still be used, within the machine's and the container's limits."""
    known = [int(psutil.virtual_memory().available), _cgroup_available()]
    return min(value for value in known if value is not None)


def _cgroup_available() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        pages = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    return int(limit) - used + int(pages.get("inactive_file", 0)) if limit.isdigit() else None


def bytes_kept(sizes: NDArray[np.int64], imgsz: int) -> NDArray[np.int64]:
    """Return the bytes (n,) of images of heights and widths (n, 2) with longer sides of at most `imgsz`."""
    longest = sizes.max(1, initial=1, keepdims=True)
    return np.where(longest > imgsz, -(-sizes * imgsz // longest), sizes).prod(1) * 3


def _for_all(work: Callable[[int], Image | None], count: int, title: str) -> list[Any]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(work, i) for i in range(count)]
        try:
            return [f.result() for f in tqdm(futures, desc=title, unit="image", leave=False, disable=None)]
        finally:
            for f in futures:
                f.cancel()


class _Recent:
    """The images used last, up to a number of bytes. Affects speed only."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._images: OrderedDict[int, Image] = OrderedDict()
        self._bytes = 0

    def get(self, index: int) -> Image | None:
        image = self._images.get(index)
        if image is not None:
            self._images.move_to_end(index)
        return image

    def put(self, index: int, image: Image) -> None:
        if image.nbytes > self._limit:
            return
        self._images[index] = image
        self._bytes += image.nbytes
        while self._bytes > self._limit:
            self._bytes -= self._images.popitem(last=False)[1].nbytes

    def __getstate__(self) -> dict[str, object]:
        return {"_limit": self._limit, "_images": OrderedDict(), "_bytes": 0}  # a new process starts empty
