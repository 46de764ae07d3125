"""Image files: damaged, wrong headers, swapped formats, special files; `probe` and `read` agree or say why not."""

from __future__ import annotations

import contextlib
import io
import os
import random
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest

from data.images import probe, read
from data.labels.labels import load_annotations
from data.loading.dataset import DetectionDataset
from data.sources.files import open_source
from tests.helpers.fuzz import Case, WrongResult, faults, seeds
from utils.errors import UserError

pytestmark = pytest.mark.fuzz
SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "BMP": ".bmp", "TIFF": ".tif", "WEBP": ".webp", "GIF": ".gif", "PPM": ".ppm"}
SIDES = [0, 1, 9, 10, 11, 17000, 30000, 60000, 65535, 2**31 - 1, 2**32 - 1]
SPECIAL = ["/dev/zero", "/dev/null", "/proc/self/mem", "/nowhere", "/proc/self/maps", "/etc"]


def encode(rng: random.Random, kind: str) -> bytes:
    height, width = rng.choice([(32, 40), (64, 48), (20, 21), (200, 10)])
    pixels = np.random.default_rng(rng.randrange(10**6)).integers(0, 255, (height, width, 3), np.uint8)
    image, out = PIL.Image.fromarray(pixels), io.BytesIO()
    mode = rng.choice(["RGB", "RGB", "L", "P", "CMYK", "RGBA", "1"])
    exif = PIL.Image.Exif()
    exif[0x0112] = rng.choice([1, 3, 6, 8, 5, 0, 9, 99])
    try:
        image.convert(mode).save(out, kind, **({"exif": exif} if rng.random() < 0.3 else {}))
    except (OSError, ValueError):  # a mode that the format does not have
        out = io.BytesIO()
        image.save(out, kind)
    return out.getvalue()


def with_size(kind: str, data: bytes, width: int, height: int) -> bytes:
    """Write another size into the header."""
    changed = bytearray(data)
    if kind == "PNG":
        struct.pack_into(">II", changed, 16, width, height)
        struct.pack_into(">I", changed, 29, zlib.crc32(changed[12:29]))
    elif kind == "JPEG":
        at = max(changed.find(b"\xff\xc0"), changed.find(b"\xff\xc2"))
        struct.pack_into(">HH", changed, at + 5, height & 0xFFFF, width & 0xFFFF)
    elif kind == "BMP":
        struct.pack_into("<II", changed, 18, width, height)
    elif kind == "GIF":
        struct.pack_into("<HH", changed, 6, width & 0xFFFF, height & 0xFFFF)
    elif kind == "PPM":
        return b"P6\n%d %d\n255\n" % (width, height) + data[15:]
    return bytes(changed)


def png_bomb(side: int) -> bytes:
    """Return a valid PNG of side x side black pixels: a small file, a huge image."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    body = zlib.compress(bytes((side // 8 + 1) * side), 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def damaged(rng: random.Random, kind: str, data: bytes, change: str) -> bytes:
    changed = bytearray(data)
    if change == "bytes":
        for _ in range(rng.choice([1, 3, 30])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    elif change == "cut":
        del changed[rng.randrange(len(changed)) :]
    elif change == "size":
        return with_size(kind, data, rng.choice(SIDES), rng.choice(SIDES))
    elif change == "bomb":
        return png_bomb(rng.choice([15000, 20000]))
    elif change == "append":
        changed += rng.randbytes(rng.choice([1, 100, 5000]))
    elif change == "zeros":
        changed[20:] = bytes(max(len(changed) - 20, 0))
    elif change == "short":
        return rng.choice([b"", b"\xff", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\x00", b"RIFF",
        b"GIF89a", b"PF\n",
                           b"P5 99999 99999 255\n", b"\x00\x00\x00\x20ftypavif", b"\xff\xd8\xff\xd9"])  # fmt: skip
    return bytes(changed)


def make(rng: random.Random, folder: Path) -> Case:
    kind = rng.choice(sorted(SUFFIXES))
    change = rng.choice(["none", "bytes", "cut", "size", "size", "bomb", "append", "zeros", "short",
    "suffix", "special",
                         "folder", "loop", "fifo", "name"])  # fmt: skip
    data = damaged(rng, kind, encode(rng, kind), change)
    suffix = rng.choice(sorted(SUFFIXES.values())) if change == "suffix" else SUFFIXES[kind]
    stem = rng.choice(["a\x1b[31m", "ü\u202e", "a" * 200, "-rf", "%s", "*", "$(x)", "..a"]) if change == "name" else "a"
    for name in ("images", "labels"):
        (folder / name).mkdir()
    path = folder / "images" / f"{stem}{suffix}"
    if change == "folder":
        path.mkdir()
    elif change == "loop":
        path.symlink_to(path.name)
    elif change == "fifo":
        os.mkfifo(path)
    elif change == "special":
        path.symlink_to(rng.choice(SPECIAL))
    else:
        path.write_bytes(data)
    cv2.imwrite(str(folder / "images/ok.png"), np.full((32, 40, 3), 9, np.uint8))
    (folder / "labels/ok.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    return Case(lambda: check(folder / "images", path), f"{kind} {change}", f"{path.name!r} {data[:60]!r}")


def check(folder: Path, path: Path) -> None:
    found = load_annotations([str(folder)], 2, progress=False)
    usable = [record for record in found.records if record.path.name != "ok.png"]
    size = shape = None
    with contextlib.suppress(UserError):
        size = probe(path)
    try:
        image = read(path)
        shape = image.shape[:2]
        if image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.flags.c_contiguous:
            raise WrongResult(f"{image.shape} {image.dtype}")
    except UserError as error:
        if "\n" in str(error):
            raise WrongResult(f"message of several lines: {error}") from error
    if size != shape:
        raise WrongResult(f"probe gives {size}, read {shape}")
    if usable and shape is None:
        raise WrongResult("verified as usable, but cannot be read in training")
    DetectionDataset(found.records, 64)[0]
    with open_source(str(folder)) as source:
        for _ in source:
            pass


def test_images(tmp_path: Path) -> None:
    assert faults(make, seeds(), tmp_path) == []
