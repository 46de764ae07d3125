"""Size of a JPEG from its markers: every accepted file is accepted by the decoder at that size."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from data.jpeg import plain_size

HEIGHT, WIDTH = 24, 40


def encode(mode: str = "RGB", **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, "JPEG", **options)
    return stream.getvalue()


def with_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(exif=exif)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encode(), (HEIGHT, WIDTH, False)),
        (encode("L"), (HEIGHT, WIDTH, False)),
        (encode(subsampling=0, optimize=True), (HEIGHT, WIDTH, False)),
        (encode(restart_marker_blocks=1), (HEIGHT, WIDTH, False)),
        (with_exif(), (HEIGHT, WIDTH, True)),
        (encode(progressive=True), None),  # several scans
        (encode("CMYK"), None),
        (encode()[:-1], None),
        (encode() + b"\0", None),
        (b"", None),
        (b"\xff\xd8\xff\xd9", None),
    ],
)
def test_plain_size(data: bytes, expected: tuple[int, int, bool] | None) -> None:
    assert plain_size(data) == expected


@pytest.mark.parametrize("options", [{}, {"optimize": True, "subsampling": 1}, {"restart_marker_blocks": 2}])
def test_what_is_accepted_can_be_decoded(options: dict) -> None:
    """Each byte changed in turn to values that matter to a decoder."""
    whole = encode(**options)
    start_of_coded_data = whole.index(b"\xff\xda") + 14
    accepted = 0
    for at in range(2, len(whole) - 2, 1):
        for value in (0x00, 0x11, 0xC4, 0xDA, 0xFF, whole[at] ^ 1, whole[at] ^ 16):
            data = whole[:at] + bytes([value]) + whole[at + 1 :]
            size = plain_size(data)
            if size is not None and (at < start_of_coded_data or at % 13 == 0):
                image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
                assert image is not None and image.shape[:2] == size[:2], (at, value)
                accepted += 1
    assert accepted > 100


@pytest.mark.parametrize("marker", [0xC4, 0xD9, 0xDA, 0xE1, 0xD0])
def test_marker_in_the_coded_data_is_left_to_the_decoder(marker: int) -> None:
    data = encode()
    at = data.index(b"\xff\xda") + 40
    assert plain_size(data[:at] + b"\xff\x00" + data[at + 2 :]) is not None
    assert plain_size(data[:at] + bytes([0xFF, marker]) + data[at + 2 :]) is None
