"""Size of a JPEG from its markers, without decoding, where the markers show that a decoder accepts the file."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

START, END = b"\xff\xd8", b"\xff\xd9"
_START_OF_SCAN = 0xDA
_MARKERS_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
_APPLICATION = frozenset(range(0xE0, 0xF0))
_EXIF, _COMMENT, _QUANTIZATION, _HUFFMAN, _RESTART_INTERVAL = 0xE1, 0xFE, 0xDB, 0xC4, 0xDD
_SEQUENTIAL = (0xC0, 0xC1)  # baseline and extended sequential frames, Huffman coding
_SAMPLING = frozenset({0x11, 0x12, 0x21, 0x22})  # of the first of three components; the others have 0x11
_MARKER, _MARKER_BUT_RESTART = re.compile(rb"\xff[^\x00]"), re.compile(rb"\xff[^\x00\xd0-\xd7]")
_MAX_SIDE = 65500  # of libjpeg
_ORIENTATION = 0x0112  # EXIF tag
_BYTE_ORDERS: dict[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}


def plain_size(data: bytes) -> tuple[int, int, bool] | None:
    """Read the size of a JPEG file of the most common form: one sequential scan of one or three components.

    Tables, frame, scan header, and each marker in the coded data are checked as libjpeg checks them; wrong coefficients
    are no error there, so nothing is left that could make it refuse the file.

    Args:
        data: the whole file.

    Returns:
        Height, width, before any EXIF orientation, and whether there may be one; None where a decoder has to decide.
    """
    if not data.startswith(START) or not data.endswith(END):
        return None
    at, end = 2, len(data) - 2
    tables: set[tuple[str, int]] = set()
    frame, exif, restarts = b"", False, False
    while at + 4 <= end and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        body = data[at + 4 : at + 2 + length]
        at += 2 + length
        if length < 2 or at > end:
            return None
        if marker in (_QUANTIZATION, _HUFFMAN):
            found = _quantization_tables(body) if marker == _QUANTIZATION else _huffman_tables(body)
            if found is None:
                return None
            tables |= found
        elif marker in _SEQUENTIAL and not frame:
            frame = body
        elif marker == _RESTART_INTERVAL and len(body) == 2:
            restarts = body != b"\0\0"
        elif marker == _START_OF_SCAN:
            size = _frame_size(frame, body, tables)
            marker_in_data = (_MARKER_BUT_RESTART if restarts else _MARKER).search(data, at)
            one_scan = marker_in_data is not None and marker_in_data.start() == end > at
            return (*size, exif) if size is not None and one_scan else None
        elif marker in _APPLICATION:
            exif |= marker == _EXIF
        elif marker != _COMMENT:
            return None
    return None


def _quantization_tables(body: bytes) -> frozenset[tuple[str, int]] | None:
    found, at = [], 0
    while at < len(body):
        precision, number = body[at] >> 4, body[at] & 15
        if precision > 1 or number > 3:
            return None
        found.append(("quantization", number))
        at += 1 + 64 * (precision + 1)
    return frozenset(found) if at == len(body) else None


@lru_cache(maxsize=64)  # most files have the tables of the standard
def _huffman_tables(body: bytes) -> frozenset[tuple[str, int]] | None:
    found, at = [], 0
    while at < len(body):
        kind, number, counts = body[at] >> 4, body[at] & 15, body[at + 1 : at + 17]
        values = body[at + 17 : at + 17 + sum(counts)]
        at += 17 + sum(counts)
        code = 0
        for bits, count in enumerate(counts, 1):
            code = 2 * code + count
            if code >= 1 << bits:  # libjpeg refuses a code of ones only
                return None
        if kind > 1 or number > 3 or at > len(body) or sum(counts) > 256 or (kind == 0 and max(values, default=0) > 15):
            return None
        found.append(("AC" if kind else "DC", number))
    return frozenset(found)


def _frame_size(frame: bytes, scan: bytes, tables: set[tuple[str, int]]) -> tuple[int, int] | None:
    """Return (height, width) of a frame if all components are in the scan and have their tables, else None."""
    count = frame[5] if len(frame) > 5 else 0
    if count not in (1, 3) or len(frame) != 6 + 3 * count or len(scan) != 4 + 2 * count:
        return None
    if frame[0] != 8 or scan[0] != count or scan[-3:] != b"\x00\x3f\x00" or len(set(frame[6::3])) != count:
        return None
    if count == 3 and (frame[7] not in _SAMPLING or frame[10] != 0x11 or frame[13] != 0x11):
        return None
    if count == 1 and frame[7] != 0x11:
        return None
    needed = {("quantization", number) for number in frame[8::3]}
    for place in range(count):
        if scan[1 + 2 * place] != frame[6 + 3 * place]:
            return None
        needed |= {("DC", scan[2 + 2 * place] >> 4), ("AC", scan[2 + 2 * place] & 15)}
    height, width = frame[1] << 8 | frame[2], frame[3] << 8 | frame[4]
    return (height, width) if needed <= tables and 0 < height <= _MAX_SIDE and 0 < width <= _MAX_SIDE else None


def orientation(exif: bytes) -> int | None:
    """Read the orientation of EXIF data as OpenCV applies it, which ignores that of XMP.

    Args:
        exif: content of the segment, from `Exif` on; empty without one.

    Returns:
        1 to 8 (1: upright) or a number without a meaning; None for anything unusual, where a decoder has to decide.
    """
    tiff = exif[6:]
    order = _BYTE_ORDERS.get(tiff[:4])
    if not exif or order is None:
        return None if exif else 1
    start = int.from_bytes(tiff[4:8], order) + 2
    end = start + 12 * int.from_bytes(tiff[start - 2 : start], order)
    entries = [tiff[at : at + 12] for at in range(start, min(end, len(tiff)), 12)]
    found = [entry for entry in entries if int.from_bytes(entry[:2], order) == _ORIENTATION]
    one_short = (3).to_bytes(2, order) + (1).to_bytes(4, order)  # type and count of a usual entry
    if end > len(tiff) or len(found) > 1 or (found and found[0][2:8] != one_short):
        return None
    return int.from_bytes(found[0][8:10], order) if found else 1


def is_whole(data: bytes) -> bool:
    """Return whether an end marker follows the start of the image's scan (not one in an embedded preview)."""
    if data.endswith(END):
        return True
    size = len(data)
    at = 2
    while at + 4 <= size and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _MARKERS_WITHOUT_LENGTH:
            at += 2
        elif marker == _START_OF_SCAN:
            return data.find(END, at) >= 0
        else:
            at += 2 + (data[at + 2] << 8 | data[at + 3])
    return False
