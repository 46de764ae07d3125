"""YOLO label files: valid and invalid rows."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from data.formats import yolo
from data.labels.labels import label_path, read_labels
from tests.helpers.label_files import GOOD, load, make_set


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("/a/images/train/x.jpg", "/a/labels/train/x.txt"),
        ("/images/b/images/c.d/x.y.png", "/images/b/labels/c.d/x.y.txt"),  # the last one counts
        ("/a/photos/x.jpg", "/a/photos/x.txt"),
        ("/a/my_images/x.jpg", "/a/my_images/x.txt"),
    ],
)
def test_label_path(image: str, label: str) -> None:
    assert label_path(image) == Path(label)


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("0 0.5 0.5 0.2 1.2\n", 1, "above 1"),
        (GOOD + "0 0.5 -0.5 0.2 0.2\n", 3, "negative"),
        (GOOD + "\n\n-1 0.5 0.5 0.2 0.2\n", 5, "integer"),
        ("0.5 0.5 0.5 0.2 0.2\n", 1, "integer"),
        ("0 0.5 nan 0.2 0.2\n", 1, "is not a number"),
        ("0 0.5 inf 0.2 0.2\n", 1, "is not a number"),
        (GOOD + "cat 0.5 0.5 0.2 0.2\n", 3, "'cat' is not a number"),
        ("0 0.5 0.5 0.2\n", 1, "4 columns"),
        ("0 0.5 0.5 0.2 0.2 0.9\n", 1, "a confidence at the end"),
        ("0 0.1 0.1 0.5 0.1 0.5 0.5 0.3\n", 1, "8 columns"),
        ("0,0.5,0.5,0.2,0.2\n", 1, "is not a number"),
    ],
)
def test_wrong_row_leaves_the_image_out(tmp_path: Path, text: str, line: int, problem: str) -> None:
    source = make_set(tmp_path, {"good": GOOD, "wrong": text})
    result = load(source)
    assert [record.path.name for record in result.records] == ["good.jpg"]
    assert result.report.corrupt == 1 and result.report.boxes == 2
    (message,) = result.report.messages
    assert f"{tmp_path}/labels/train/wrong.txt:{line}: " in message and problem in message
    assert message in result.report.summary()


def test_duplicate_rows_are_removed_and_the_rest_sorted(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("2 0.5 0.5 0.2 0.2\n0 0.9 0.5 0.1 0.1\n2 0.5 0.5 0.2 0.2\n0 0.1 0.5 0.1 0.1\n")
    file = read_labels(path)
    expected = [[0, 0.1, 0.5, 0.1, 0.1], [0, 0.9, 0.5, 0.1, 0.1], [2, 0.5, 0.5, 0.2, 0.2]]
    np.testing.assert_array_equal(file.labels, np.array(expected, np.float32))
    assert file.duplicates == 1 and file.segments == ()
    source = make_set(tmp_path / "set", {"x": path.read_text()})
    report = load(source).report
    assert report.duplicate_rows == 1 and report.boxes == 3 and "x.txt:3: 1 duplicate rows" in report.messages[0]


def test_box_without_area_is_kept_and_named(tmp_path: Path) -> None:
    report = load(make_set(tmp_path, {"x": GOOD + "2 0.5 0.5 0 0.1\n"})).report
    assert report.boxes == 3 and report.corrupt == 0
    assert f"{tmp_path}/labels/train/x.txt:3: 1 boxes without area" in report.messages[0]


def test_polygons_become_boxes(tmp_path: Path) -> None:
    polygon = "1 0.1 0.2 0.5 0.2 0.5 0.8 0.2 0.6"
    path = tmp_path / "x.txt"
    path.write_text(f"{polygon}\n0 0.5 0.5 0.2 0.4\n{polygon}\n")
    file = read_labels(path)
    rows, segments = file.labels, file.segments
    expected = [[0, 0.5, 0.5, 0.2, 0.4], [1, 0.3, 0.5, 0.4, 0.6]]
    np.testing.assert_allclose(rows, expected, atol=1e-6)
    assert file.duplicates == 1 and len(segments) == 2
    np.testing.assert_allclose(segments[0], [[0.4, 0.3], [0.6, 0.3], [0.6, 0.7], [0.4, 0.7]], atol=1e-6)
    np.testing.assert_allclose(segments[1], [[0.1, 0.2], [0.5, 0.2], [0.5, 0.8], [0.2, 0.6]], atol=1e-6)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("0.99999999 0.5 0.5 0.2 0.2", "not an integer"),
        ("4.0000000001 0.5 0.5 0.2 0.2", "not an integer"),
        ("16777217 0.5 0.5 0.2 0.2", "class above"),
        ("0_1 0.5 0.5 0.2 0.2", "'0_1' is not a number"),
        ("１ 0.5 0.5 0.2 0.2", "is not a number"),
        ("0 0.5 1e400 0.2 0.2", "not finite"),
        ("0 0.1 0.1 0.5 0.1 0.5 1.2", "polygon point 0.5 1.2 is not between 0 and 1"),
        ("0 0.1 0.1 0.5 -0.1 0.5 0.2", "polygon point"),
        ("0 0.5 0.5 0.2 1.0251", "above 1"),  # more than one of 40 pixels
        ("0 1.0001 0.5 0.2 0.2", "above 1"),
        ("0 0.5 0.5 0.2 " + "3" * 5000, "not finite|above 1"),
    ],
)
def test_values_are_checked_as_written(tmp_path: Path, row: str, problem: str) -> None:
    report = load(make_set(tmp_path, {"good": GOOD, "wrong": f"{row}\n"})).report
    assert report.corrupt == 1 and len(report.messages[0]) < 500
    assert re.search(rf"wrong\.txt:1: .*({problem})", report.messages[0])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("0 0.5 0.5 1.000001 0.3", (0, 0.5, 0.5, 1, 0.3)),
        ("0 0.5 0.498748 0.4 1.002503", (0, 0.5, 0.498748, 0.4, 1)),  # 0.1 of 40 pixels
        ("0 0.5 0.5 1.0166 0.4", (0, 0.5, 0.5, 1, 0.4)),  # just below one of 60 pixels
        ("0 -0.000001 0.5 0.1 0.1", (0, 0, 0.5, 0.1, 0.1)),
        ("0 0 0 1.000001 0 0.5 0.5", (0, 0.5, 0.25, 1, 0.5)),
    ],
)
def test_values_over_the_border_by_rounding_are_clipped(tmp_path: Path, row: str, expected: tuple[float, ...]) -> None:
    found = load(make_set(tmp_path, {"a": f"{row}\n"}))
    np.testing.assert_array_equal(found.records[0].labels, np.array([expected], np.float32))
    assert len(row.split()) > 5 or "by rounding, the first one here; clipped" in found.report.messages[0]


def test_negative_zero_becomes_zero(tmp_path: Path) -> None:
    (record,) = load(make_set(tmp_path, {"a": "0 0.5 0.5 0.2 -0.0\n"})).records
    assert not np.signbit(record.labels).any()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8"])
def test_byte_order_marks_are_skipped(tmp_path: Path, encoding: str) -> None:
    source = make_set(tmp_path, {"a": None})
    label_path(source / "a.jpg").write_text(GOOD, encoding=encoding)
    (tmp_path / "list.txt").write_text("images/train/a.jpg\r\n", encoding=encoding)
    assert load(tmp_path / "list.txt").report.boxes == 2


KEY_POINTS = "0.45 0.40 0.55 0.40 0.45 0.60 0.55 0.60"


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        (f"1 0.5 0.5 0.2 0.4 {KEY_POINTS}\n", [(1, 0.5, 0.5, 0.2, 0.4)]),
        (
            f"1 0.5 0.5 0.2 0.4 {KEY_POINTS}\n1 0.5 0.5 0.6 0.6 {KEY_POINTS}\n",
            [(1, 0.5, 0.5, 0.2, 0.4), (1, 0.5, 0.5, 0.6, 0.6)],
        ),
        ("0 0.5 0.5 0.9 0.9 0.3 0.3 2 0.4 0.4 1 0 0 0 0.6 0.6 2\n", [(0, 0.5, 0.5, 0.9, 0.9)]),  # with visibility
    ],
)
def test_pose_rows_keep_their_box(tmp_path: Path, text: str, boxes: list[tuple[float, ...]]) -> None:
    found = load(make_set(tmp_path, {"a": text}))
    np.testing.assert_array_equal(found.records[0].labels, np.array(boxes, np.float32))
    assert not found.records[0].segments and "key points are ignored" in found.report.messages[0]


def test_polygons_are_not_taken_for_pose_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(300):
        count = int(rng.integers(5, 30))
        angles = np.sort(rng.uniform(0, 2 * np.pi, count))
        radius = rng.uniform(0.005, 0.2, 2)
        points = rng.uniform(0.2, 0.8, 2) + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
        row = " ".join(f"{value:.6f}" for value in np.roll(points, int(rng.integers(count)), 0).reshape(-1))
        (tmp_path / "a.txt").write_text(f"0 {row}\n")
        assert len(read_labels(tmp_path / "a.txt").segments) == 1, (i, row)


PLAIN = [
    "0 0.5 0.5 0.2 0.4\n",
    "1 0.5 0.5 0.2 0.4\n0 0.25 0.75 0.1 0.1",
    "3 .5 0.5 1 1.0\r\n12 0.1 0.1 0.1 0.123456789\r\n",
    " 7\t0.5  0.5 0.2 1. \n9999999 0 0 1 1\n",
]
LEFT_TO_CHECKS = [
    "", "\n", "0 0.5 0.5 0.2 0.2\n\n", "0 0.5 0.5 0.2 0\n", "0 0.5 0.5 0.2 0.00000\n", "0 0.5 0.5 0.2 1e-1\n",
    "0 -0.0 0.5 0.2 0.2\n", "0 0.5 0.5 0.2 1.000001\n", "0 0.5 0.5 0.2\n", "0 0.5 0.5 0.2 0.2 0.9\n",
    "0.0 0.5 0.5 0.2 0.2\n",
    "0 0.1 0.1 0.1 0.1\n0 0.1 0.1 0.1 0.10\n", "0 0.1 0.1 0.1 0.1\n0 0.1 0.1 0.1 0.10000000001\n", "0 0.5 0.5 0.2 .\n",
    "0 0.5 0.5 0.2 0.2\n0 0.1 0.1 0.3 0.1 0.3 0.4\n", "20000000 0.5 0.5 0.2 0.2\n",
    "0 0.5 0.5 0.2 0.0" + "0" * 60 + "1\n",
    "\u0660 0.5 0.5 0.2 0.2\n", "0 0.5 0.5 0.2 0_1\n", "0 0.5 0.5 0.2 nan\n", "0 0.5 0.5 0.2 0.2\x0c\n",
    "0 0.1 0.1\n0.1 0.1\n",
]  # fmt: skip


@pytest.mark.parametrize("text", PLAIN)
def test_plain_files_skip_the_checks_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode())
    monkeypatch.setattr(yolo, "checked", lambda *_, **__: pytest.fail("checked"))
    found = yolo.read_labels(tmp_path / "a.txt")
    monkeypatch.undo()
    monkeypatch.setattr(yolo, "_plain_labels", lambda _: None)
    exact = yolo.read_labels(tmp_path / "a.txt")
    np.testing.assert_array_equal(found.labels, exact.labels)
    assert found.labels.dtype == exact.labels.dtype
    assert (found.segments, found.duplicates, found.notes) == (exact.segments, exact.duplicates, exact.notes)


@pytest.mark.parametrize("text", LEFT_TO_CHECKS)
def test_anything_else_is_left_to_the_checks(text: str) -> None:
    assert yolo._plain_labels(text) is None
