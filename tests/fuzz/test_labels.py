"""YOLO label files and label caches, compared with a parser for decimal numbers."""

from __future__ import annotations

import os
import random
import re
from decimal import Decimal
from pathlib import Path

import cv2
import numpy as np
import pytest

from data.labels.labels import Annotations, load_annotations
from tests.helpers.fuzz import Case, WrongResult, faults, seeds
from utils.errors import UserError

pytestmark = pytest.mark.fuzz
NUM_CLASSES = 5
ATOMS = [
    "0", "1", "5", "-1", "0.5", "1.0", "0.99999999", "-0.0", "1e-50", "nan", "inf", "1e39", "1e400", "1_0",
    "１", "٣", "0x1",
    "1e0", "0,5", "True", "None", "+0.5", ".5", "5.", "½", "person", "2.5", "16777217", "4.0000000001", "9" * 400,
    "0." + "3" * 3000, "1" + "0" * 5000, "\x00", "--1", "0.1e", "1j",
]  # fmt: skip
TOLERANCE = Decimal("1e-5")
PIXELS = (Decimal(0), Decimal(0), 1 / Decimal(40), 1 / Decimal(32))  # by which x, y, width, height may be larger


def good_row(rng: random.Random) -> str:
    count = 4 if rng.random() < 0.8 else 2 * rng.randint(3, 9)
    return " ".join([str(rng.randrange(NUM_CLASSES)), *(f"{rng.uniform(0.01, 0.99):.6f}" for _ in range(count))])


def make_text(rng: random.Random) -> tuple[bytes, str]:
    rows = [good_row(rng) for _ in range(rng.choice([1, 1, 2, 8, 40]))]
    kinds = []
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        kind = rng.choice(["atom", "atom", "drop", "add", "repeat", "blank", "separator", "join", "outside", "huge"])
        i = rng.randrange(len(rows))
        cells = rows[i].split(" ")
        j = rng.randrange(len(cells))
        if kind == "atom":
            cells[j] = rng.choice(ATOMS)
        elif kind == "drop":
            del cells[j]
        elif kind == "add":
            cells.insert(j, rng.choice(ATOMS))
        elif kind == "outside":
            cells[j] = rng.choice(["1.5", "-0.2", "640", "1.0001", "-0.0001"])
        rows[i] = " ".join(cells)
        if kind == "repeat":
            rows.insert(i, rows[i])
        elif kind == "blank":
            rows.insert(i, rng.choice(["", "   ", "\t"]))
        elif kind == "separator":
            rows[i] = rows[i].replace(" ", rng.choice(["\t", "  ", ",", ";"]))
        elif kind == "join":
            rows[i] += " " + good_row(rng)
        elif kind == "huge":
            rows[i] = "0 " + " ".join(["0.5"] * 20_001)
        kinds.append(kind)
    data = rng.choice(["\n", "\n", "\r\n", "\n\n"]).join(rows).encode()
    damage = rng.random()
    if damage < 0.05:
        return b"\xef\xbb\xbf" + data, "+".join([*kinds, "mark"])
    if damage < 0.1:
        j = rng.randrange(len(data))
        return data[:j] + bytes([rng.randrange(256)]) + data[j + 1 :], "+".join([*kinds, "byte"])
    return data, "+".join(kinds) or "good"


def expected_rows(data: bytes) -> list[tuple[float, ...]] | None:
    """Rows as decimal numbers; None where the file must be refused."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    rows = []
    for line in text.splitlines():
        cells = line.split()
        if not cells:
            continue
        if not all(re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", cell, re.ASCII) for cell in cells):
            return None
        number, *body = map(Decimal, cells)
        if len(cells) != 5 and (len(cells) < 7 or len(cells) % 2 == 0):
            return None
        if number < 0 or number != number.to_integral_value() or number >= NUM_CLASSES:
            return None
        largest = [1 + TOLERANCE + pixel for pixel in PIXELS] if len(body) == 4 else [1 + TOLERANCE] * len(body)
        if any(value < -TOLERANCE or value > most for value, most in zip(body, largest)):
            return None
        body = [min(max(value, Decimal(0)), Decimal(1)) for value in body]
        if len(cells) > 5:
            (left, right), (top, bottom) = ((min(v), max(v)) for v in (body[::2], body[1::2]))
            body = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
        rows.append((float(number), *map(float, body)))
    return rows


def write_images(folder: Path, names: str) -> None:
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for name in names:
        cv2.imwrite(str(folder / f"images/{name}.png"), np.full((32, 40, 3), 90, np.uint8))
        (folder / f"labels/{name}.txt").write_text("0 0.5 0.5 0.5 0.5\n1 0.1 0.1 0.3 0.1 0.3 0.4\n")


def load(folder: Path) -> Annotations:
    return load_annotations([str(folder / "images")], NUM_CLASSES, progress=False)


def check_equal(first: Annotations, second: Annotations) -> None:
    for one, two in zip(first.records, second.records, strict=True):
        same = one.path == two.path and np.array_equal(one.labels, two.labels)
        if not same or [s.tolist() for s in one.segments] != [s.tolist() for s in two.segments]:
            raise WrongResult("the cache gives other labels")


def label_case(rng: random.Random, folder: Path) -> Case:
    write_images(folder, "ab")
    data, kind = make_text(rng)
    (folder / "labels/a.txt").write_bytes(data)
    rows = expected_rows(data)

    def run() -> None:
        try:
            found = load(folder)
        except UserError:
            if rows is not None:
                raise WrongResult("refused, but every row is correct") from None
            raise
        check_equal(found, load(folder))
        record = next((record for record in found.records if record.path.name == "a.png"), None)
        if rows is None and record is not None:
            raise WrongResult(f"accepted: {record.labels.tolist()}")
        if rows is None and not any("a.txt" in message for message in found.report.messages):
            raise WrongResult("left out without a message")
        if rows is not None and record is None:
            raise WrongResult(f"left out, but correct: {found.report.messages[:1]}")
        if rows is not None and record is not None:
            expected = np.unique(np.array(rows, np.float32).reshape(-1, 5), axis=0)
            got = np.unique(record.labels, axis=0)
            if len(got) == len(expected) and np.abs(got - expected).max(initial=0) > 1e-5:
                raise WrongResult("other numbers")
            if abs(len(got) - len(expected)) > len(rows) - len(set(rows)) + 1:
                raise WrongResult(f"{len(got)} rows, {len(expected)} expected")

    return Case(run, f"label {kind}", repr(data))


def cache_case(rng: random.Random, folder: Path) -> Case:
    """A cache that is damaged in any way gives the same labels as none."""
    write_images(folder, "abc")
    first = load(folder)
    cache = next(folder.glob("*.cache.npz"))
    data = bytearray(cache.read_bytes())
    kind = rng.choice(["byte", "bytes", "cut", "zeros", "empty", "text", "folder", "loop", "fifo"])
    cache.unlink()
    if kind in ("byte", "bytes"):
        for _ in range(1 if kind == "byte" else 20):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "zeros":
        data = bytearray(len(data))
    if kind == "folder":
        cache.mkdir()
    elif kind == "loop":
        cache.symlink_to(cache.name)
    elif kind == "fifo":
        os.mkfifo(cache)
    else:
        cache.write_bytes(b"" if kind == "empty" else b"hello\n" if kind == "text" else data)
    return Case(lambda: check_equal(first, load(folder)), f"cache {kind}", kind)


def make(rng: random.Random, folder: Path) -> Case:
    return cache_case(rng, folder) if rng.random() < 0.2 else label_case(rng, folder)


def test_labels(tmp_path: Path) -> None:
    assert faults(make, seeds(), tmp_path) == []
