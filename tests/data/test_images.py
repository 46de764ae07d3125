"""Reading images: formats, orientation, channels, and what is refused."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, features

from data.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES, probe, read
from utils.errors import DataError

HEIGHT, WIDTH = 48, 64


def scene() -> np.ndarray:
    """Smooth RGB image whose four quarters differ, so that a flip or a swapped channel shows."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    image = np.stack([x * 255 // (WIDTH - 1), y * 255 // (HEIGHT - 1), np.full_like(x, 40)], -1)
    image[: HEIGHT // 2, : WIDTH // 2, 2] = 220
    return image.astype(np.uint8)


def encode(mode: str, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(scene()).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("mode", "kind", "tolerance"),
    [
        ("RGB", "PNG", 0),
        ("RGBA", "PNG", 0),
        ("RGB", "BMP", 0),
        ("RGB", "TIFF", 0),
        ("RGB", "JPEG", 5),
        ("RGB", "WEBP", 10),
        ("CMYK", "JPEG", 8),
        ("P", "GIF", 25),
        ("P", "PNG", 25),
    ],
)
def test_color_formats_give_bgr(tmp_path: Path, mode: str, kind: str, tolerance: int) -> None:
    path = put(tmp_path, "x.jpg", encode(mode, kind))  # the suffix does not decide
    image = read(path)
    assert image.shape == (HEIGHT, WIDTH, 3) and image.dtype == np.uint8 and image.flags.c_contiguous
    assert np.abs(image.astype(int) - scene()[..., ::-1]).mean() <= tolerance  # channels swapped: 90
    assert probe(path) == (HEIGHT, WIDTH)


@pytest.mark.parametrize(("mode", "kind"), [("L", "PNG"), ("LA", "PNG"), ("1", "PNG"), ("L", "JPEG"), ("L", "TIFF")])
def test_gray_is_repeated_over_three_channels(tmp_path: Path, mode: str, kind: str) -> None:
    image = read(put(tmp_path, "x.png", encode(mode, kind)))
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert (image == image[..., :1]).all() and image.std() > 20


def exif_segment(order: str, kind: int, value: int, count: int = 1, cut: int = 0) -> bytes:
    """An APP1 segment with one orientation entry: byte order, type (1 BYTE, 3 SHORT, 4 LONG), value."""
    entry = struct.pack(f"{order}HHI", 0x0112, kind, count)
    entry += struct.pack(f"{order}{ {1: 'Bxxx', 3: 'Hxx', 4: 'I'}[kind] }", value)
    tiff = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, 1) + entry + bytes(4)
    body = b"Exif\0\0" + tiff[: len(tiff) - cut]
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [1, 3, 4])
@pytest.mark.parametrize(
    ("value", "more"), [(1, {}), (6, {}), (0, {}), (9, {}), (6, {"count": 0}), (6, {"cut": 6}), (6, {"cut": 14})]
)
def test_size_is_that_of_the_pixels_for_any_exif(
    tmp_path: Path, order: str, kind: int, value: int, more: dict[str, int]
) -> None:
    """Decoders differ on unusual entries: then the pixels decide."""
    data = encode("RGB", "JPEG")
    (tmp_path / "x.jpg").write_bytes(data[:2] + exif_segment(order, kind, value, **more) + data[2:])
    assert probe(tmp_path / "x.jpg") == read(tmp_path / "x.jpg").shape[:2]


@pytest.mark.parametrize("with_exif", [False, True])
def test_orientation_of_xmp_counts_neither_for_the_size_nor_for_the_pixels(tmp_path: Path, with_exif: bool) -> None:
    """As in OpenCV. Pillow takes it where EXIF has none: the size of the header was then not that of the pixels."""
    exif = Image.Exif()
    if with_exif:
        exif[0x010F] = "maker"
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    Image.fromarray(scene()).save(tmp_path / "x.jpg", exif=exif, xmp=xmp)
    assert probe(tmp_path / "x.jpg") == read(tmp_path / "x.jpg").shape[:2] == scene().shape[:2]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, kind: str) -> None:
    stored = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](scene())
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    path = tmp_path / f"x.{kind.lower()}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, kind, exif=exif, **options)
    image = read(path)
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(image.astype(int) - scene()[..., ::-1]).mean() < 6
    assert probe(path) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_16_bits_keep_the_whole_range(tmp_path: Path, suffix: str) -> None:
    ramp = np.linspace(0, 65535, 256 * 3).reshape(16, 16, 3).astype(np.uint16)
    cv2.imwrite(str(tmp_path / f"color{suffix}"), ramp)
    cv2.imwrite(str(tmp_path / f"gray{suffix}"), ramp[..., 0])
    np.testing.assert_allclose(read(tmp_path / f"color{suffix}"), ramp / 257.0, atol=1)
    np.testing.assert_allclose(read(tmp_path / f"gray{suffix}"), np.repeat(ramp[..., :1], 3, 2) / 257.0, atol=1)


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "PNG"), ("RGBA", "PNG"), ("L", "PNG"), ("1", "PNG"), ("I;16", "PNG"), ("P", "GIF")]
)
def test_pillow_agrees_where_opencv_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, kind: str
) -> None:
    if mode == "I;16":
        ramp = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
        cv2.imwrite(str(tmp_path / "x.png"), ramp)
    else:
        put(tmp_path, "x.png", encode(mode, kind))
    expected = read(tmp_path / "x.png")
    monkeypatch.setattr(cv2, "imdecode", lambda *_: None)
    image = read(tmp_path / "x.png")
    assert image.flags.c_contiguous and image.dtype == np.uint8
    np.testing.assert_allclose(image.astype(int), expected.astype(int), atol=1)


def test_32_bits_are_read_as_16_but_not_as_8(tmp_path: Path) -> None:
    gray = np.arange(600, dtype=np.int32).reshape(20, 30)
    Image.fromarray(gray * 100).save(tmp_path / "x.tif")
    assert np.array_equal(read(tmp_path / "x.tif")[..., 0], gray * 100 >> 8)
    Image.fromarray(gray % 256).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=r"x\.tif: 32-bit pixels of at most 255; save it with 8 or 16 bits per channel"):
        read(tmp_path / "x.tif")


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_avif_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(scene()).save(tmp_path / "x.avif", exif=exif)
    assert read(tmp_path / "x.avif").shape == (WIDTH, HEIGHT, 3)


def test_alpha_is_dropped_not_blended(tmp_path: Path) -> None:
    rgba = np.dstack([scene(), np.zeros((HEIGHT, WIDTH), np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read(tmp_path / "x.png"), scene()[..., ::-1])


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 30), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert read(tmp_path / "x.gif")[0, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("name", ["größe_фото_図像.png", "name with  spaces.png", "percent%20.png", "UPPER.PNG"])
def test_any_file_name(tmp_path: Path, name: str) -> None:
    np.testing.assert_array_equal(read(put(tmp_path, name, encode("RGB", "PNG"))), scene()[..., ::-1])


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (2000, 4)])
def test_odd_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (1, 2, 3)).save(tmp_path / "x.png")
    assert read(tmp_path / "x.png").shape == (size[1], size[0], 3)


def with_preview(jpeg: bytes) -> bytes:
    """The JPEG with another, whole one inside an application segment."""
    preview = encode("RGB", "JPEG", quality=10)
    return jpeg[:2] + b"\xff\xe5" + (len(preview) + 2).to_bytes(2, "big") + preview + jpeg[2:]


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_bytes_after_the_end_of_a_jpeg_do_no_harm(tmp_path: Path, options: dict) -> None:
    data = encode("RGB", "JPEG", **options)
    path = put(tmp_path, "x.jpg", data + b"\0" * 20 + b"trailing")
    np.testing.assert_array_equal(read(path), read(put(tmp_path, "y.jpg", data)))
    assert probe(path) == (HEIGHT, WIDTH)


def broken_png() -> bytes:
    data = bytearray(encode("RGB", "PNG"))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


def long_chunk(length: int) -> bytes:
    """A PNG whose image data claims `length` bytes."""
    data = encode("L", "PNG")
    place = data.index(b"IDAT") - 4
    return data[:place] + length.to_bytes(4, "big") + data[place + 4 :]


BROKEN = {
    "empty file": b"",
    "no known image format": b"just a line of text\n",
    "truncated": encode("RGB", "JPEG")[:-200],
    "truncated: the JPEG data ends": with_preview(encode("RGB", "JPEG"))[:-200],
    "the JPEG data ends before": encode("RGB", "JPEG")[:100],
    "cannot be decoded": encode("RGB", "PNG")[:-100],
    "cannot be decoded: ": encode("RGB", "WEBP")[:200],
    "floating-point": b"PF\n2 2\n-1.0\n" + np.zeros((2, 2, 3), np.float32).tobytes(),
}


@pytest.mark.parametrize("reason", BROKEN)
@pytest.mark.parametrize("function", [read, probe])
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, reason: str, function) -> None:
    path = put(tmp_path, "x.jpg", BROKEN[reason])
    with pytest.raises(DataError, match=reason) as caught:
        function(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [2**31, 2**20])
def test_opencv_allocates_no_chunk_larger_than_the_file(tmp_path: Path, monkeypatch, length: int) -> None:
    monkeypatch.setattr("cv2.imdecode", lambda *_: pytest.fail("decoded by OpenCV"))
    assert read(put(tmp_path, "x.png", long_chunk(length))).shape == (HEIGHT, WIDTH, 3)


def test_probe_decodes_no_jpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.images.decode", lambda *_: pytest.fail("decoded"))
    assert probe(put(tmp_path, "JPEG", encode("RGB", "JPEG"))) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "PPM"])
@pytest.mark.parametrize("function", [read, probe])
def test_headers_of_huge_images_are_refused_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, function: Any
) -> None:
    path = put(tmp_path, kind, encode("RGB", kind))
    assert function(path)[:1] if function is probe else function(path).shape[:1]
    monkeypatch.setattr("data.images.MAX_PIXELS", WIDTH * HEIGHT - 1)
    with pytest.raises(DataError, match="too large: .*MAX_IMAGE_PIXELS"):
        function(path)


@pytest.mark.parametrize("function", [read, probe])
@pytest.mark.parametrize("target", ["/dev/zero", "/proc/self/mem", "/etc"])
def test_special_files_are_not_opened(tmp_path: Path, function: Any, target: str) -> None:
    (tmp_path / "x.png").symlink_to(target)
    with pytest.raises(DataError, match="is a|cannot be read|cannot be decoded|empty"):
        function(tmp_path / "x.png")


def test_probe_checks_png_checksums(tmp_path: Path) -> None:
    data = broken_png()
    assert zlib.crc32(data) != zlib.crc32(encode("RGB", "PNG"))
    with pytest.raises(DataError):
        probe(put(tmp_path, "x.png", data))


@pytest.mark.parametrize("name", ["missing.jpg", "."])
def test_missing_file_and_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / name)


def test_suffixes_are_lower_case_and_apart() -> None:
    assert {".gif"} == IMAGE_SUFFIXES & VIDEO_SUFFIXES  # an image in a dataset, a video for detect
    assert all(suffix == suffix.lower() and suffix[0] == "." for suffix in IMAGE_SUFFIXES | VIDEO_SUFFIXES)


def test_png_with_a_chunk_of_gigabytes_is_not_given_to_opencv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(encode("P", "PNG"))
    data[33:37] = b"\x80\x00\x00\x00"  # length of the chunk behind the header
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded by OpenCV"))
    with pytest.raises(DataError, match="cannot be decoded"):
        read(put(tmp_path, "PNG", bytes(data)))
