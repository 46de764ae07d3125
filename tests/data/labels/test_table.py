"""Columns of entries: selection, concatenation, and records made from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.formats.yolo import ImageRecord, LabelFile
from data.labels.table import Entry, ImageRecords, ImageTable, join, pack

ROWS = np.arange(60, dtype=np.float32).reshape(-1, 5) / 60


def polygon(k: int) -> np.ndarray:
    return np.linspace(0, 1, 2 * k, dtype=np.float32).reshape(k, 2)


FILES = [
    LabelFile(ROWS[:2]),
    LabelFile(ROWS[:0], notes=("odd", "very")),
    LabelFile(ROWS[2:5], (polygon(3), polygon(5), polygon(4)), duplicates=2),
    LabelFile(ROWS[:0]),
    LabelFile(ROWS[5:6], (polygon(7),), notes=("x",), crowd=1, difficult=3),
]
ENTRIES = [Entry((i, 1, 2, 3), 10 + i, 20, "labeled" if i % 2 == 0 else "corrupt", f) for i, f in enumerate(FILES)]


def equal(first: ImageTable, second: ImageTable) -> bool:
    for name in ("stamps", "numbers", "labels", "lengths", "points"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), name)
        assert getattr(first, name).dtype == getattr(second, name).dtype
    return dict(first.notes) == dict(second.notes)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [4, 0, 2], [], [2, 2, 1], [3]])
def test_take_is_what_packing_those_entries_gives(rows: list[int]) -> None:
    assert equal(pack(ENTRIES).take(np.array(rows, np.int64)), pack([ENTRIES[i] for i in rows]))


def test_join_is_what_packing_all_gives() -> None:
    assert equal(join([pack(()), pack(ENTRIES[:2]), pack(ENTRIES[2:])]), pack(ENTRIES))


def test_records() -> None:
    paths = [Path(f"/a/{'ü' * i}.jpg") for i in range(len(FILES))]
    expected = [ImageRecord(p, 10 + i, 20, f.labels, f.segments) for i, (p, f) in enumerate(zip(paths, FILES))]
    for records in (ImageRecords(paths, pack(ENTRIES)), ImageRecords.of(expected)):
        assert len(records) == len(FILES) and records[-1].path == paths[-1]
        for i, (found, wanted) in enumerate(zip(records, expected, strict=True)):
            assert (found.path, found.height, found.width) == (wanted.path, wanted.height, wanted.width)
            np.testing.assert_array_equal(found.labels, wanted.labels)
            np.testing.assert_array_equal(records.labels_of(i), wanted.labels)
            assert len(found.segments) == len(wanted.segments)
            for a, b in zip(found.segments, wanted.segments):
                np.testing.assert_array_equal(a, b)
        assert [record.path for record in records[1:4:2]] == paths[1:4:2]
        with pytest.raises(IndexError):
            records[len(FILES)]
    single = ImageRecords(paths, pack(ENTRIES), single_cls=True)[2].labels
    assert not single[:, 0].any() and (single[:, 1:] == FILES[2].labels[:, 1:]).all()
