"""Listing, verifying, loading and caching labels."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest

from data.labels import cache as label_cache
from data.labels import labels
from data.labels.labels import label_path, list_images, load_annotations, read_labels
from utils.errors import DataError


def image(path: Path, size: tuple[int, int] = (40, 60)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((*size, 3), 90, np.uint8))
    return path


def make_set(root: Path, rows: dict[str, str | None]) -> Path:
    """`images/train/<name>.jpg` with the label text given (None: no label file); returns the folder of images."""
    for name, text in rows.items():
        label = label_path(image(root / "images" / "train" / f"{name}.jpg"))
        label.parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            label.write_text(text, encoding="utf-8")
    return root / "images" / "train"


def load(source: Path, num_classes: int = 3, **options: object) -> labels.Annotations:
    return load_annotations([source], num_classes, progress=False, **options)  # type: ignore[arg-type]


GOOD = "1 0.5 0.5 0.2 0.4\n0 0.25 0.75 0.1 0.1\n"


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


def test_good_set(tmp_path: Path) -> None:
    source = make_set(tmp_path, {"b": GOOD, "a": "2 0.5 0.5 1 1\n", "c": None, "d": "\n"})
    result = load(source)
    assert [record.path.name for record in result.records] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    expected = np.array([[1, 0.5, 0.5, 0.2, 0.4], [0, 0.25, 0.75, 0.1, 0.1]], np.float32)
    np.testing.assert_array_equal(result.records[1].labels, expected)  # the file's order stays
    assert result.records[1].labels.dtype == np.float32 and result.records[2].labels.shape == (0, 5)
    assert (result.records[0].height, result.records[0].width) == (40, 60)
    report = result.report
    assert (report.images, report.labelled, report.boxes) == (4, 2, 3)
    assert (report.missing, report.empty, report.corrupt) == (1, 1, 0)
    assert "4 images: 2 with labels (3 boxes), 2 backgrounds" in report.summary()


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
        ("0 0.5 0.5 0.2 0.2 0.9\n", 1, "6 columns"),
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


def test_broken_images_are_left_out_by_name(tmp_path: Path) -> None:
    source = make_set(tmp_path, dict.fromkeys(["good", "empty", "text", "cut", "small", "tall"], GOOD))
    (source / "empty.jpg").write_bytes(b"")
    (source / "text.jpg").write_text("no image")
    (source / "cut.jpg").write_bytes((source / "good.jpg").read_bytes()[:-30])
    image(source / "small.jpg", (9, 40))
    image(source / "tall.jpg", (40, 10))
    result = load(source)
    assert [record.path.stem for record in result.records] == ["good", "tall"]
    assert result.report.corrupt == 4
    text = "\n".join(result.report.messages)
    for name, reason in (("empty", "0 bytes"), ("text", "no known"), ("cut", "truncated"), ("small", "at least 10")):
        assert any(f"{name}.jpg" in line and reason in line for line in text.splitlines()), name


@pytest.mark.parametrize("number", [3, 7])
def test_class_number_too_high_is_an_error_for_the_set(tmp_path: Path, number: int) -> None:
    source = make_set(tmp_path, {"a": GOOD, "b": GOOD + f"{number} 0.5 0.5 0.1 0.1\n"})
    with pytest.raises(DataError, match=rf"labels/train/b\.txt:3: class {number}.*3 classes.*0-2"):
        load(source)
    assert (load(source, single_cls=True, num_classes=1).records[1].labels[:, 0] == 0).all()
    assert load(source, num_classes=8).records[1].labels[2, 0] == number  # the cache keeps the file's numbers


def test_set_without_labels(tmp_path: Path) -> None:
    source = make_set(tmp_path, {"a": None, "b": ""})
    with pytest.raises(DataError, match=rf"no labels in 2 images; looked .* {tmp_path}/labels/train"):
        load(source)
    assert load(source, require_labels=False).report.boxes == 0


def test_nothing_usable(tmp_path: Path) -> None:
    source = make_set(tmp_path, {"a": "x"})
    with pytest.raises(DataError, match=r"none of 1 images can be used: .*a\.txt:1"):
        load(source)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="no images found"):
        load(tmp_path / "nothing")
    with pytest.raises(DataError, match="no such folder"):
        load(tmp_path / "gone")
    (tmp_path / "x.csv").write_text("1")
    with pytest.raises(DataError, match="neither a folder"):
        load(tmp_path / "x.csv")


def test_folders_lists_and_repetitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/2.png", "b/1.PNG", "b/deep/3.bmp", "c/4.jpg", ".hidden/5.jpg", "b/.6.jpg"):
        image(tmp_path / "images" / name)
    (tmp_path / "images/b/notes.txt").write_text("x")
    absolute = tmp_path / "images" / "c" / "4.jpg"
    lines = ["./images/b/2.png", "", f"  {absolute}  ", "images/b/1.PNG", "readme.md", "./images/b/2.png"]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    found, repeated = list_images([tmp_path / "images" / "b"])
    assert {path.name for path in found} == {"1.PNG", "2.png", "3.bmp"} and repeated == 0
    found, repeated = list_images([tmp_path / "train.txt"])
    names = [path.relative_to(tmp_path).as_posix() for path in found]
    assert names == ["images/b/2.png", "images/c/4.jpg", "images/b/1.PNG"]
    assert repeated == 1 and found[absolute] == f"{tmp_path}/train.txt:3"
    found, repeated = list_images([tmp_path / "images", tmp_path / "train.txt", absolute])
    assert len(found) == 4 and repeated == 5
    monkeypatch.chdir(tmp_path / "images")
    image(tmp_path / "images" / "images/b/1.PNG")
    found, _ = list_images([tmp_path / "train.txt"])  # the list's folder comes first
    assert tmp_path / "images/b/1.PNG" in found


def test_order_is_that_of_the_texts(tmp_path: Path) -> None:
    for name in ("a/9.jpg", "a-b/1.jpg", "B/1.jpg", "a/10.jpg"):
        image(tmp_path / name)
    records = load(tmp_path, require_labels=False).records
    assert [str(r.path.relative_to(tmp_path)) for r in records] == ["B/1.jpg", "a-b/1.jpg", "a/10.jpg", "a/9.jpg"]


def test_linked_folders_are_searched(tmp_path: Path) -> None:
    image(tmp_path / "elsewhere" / "x.jpg")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert list(list_images([tmp_path / "images"])[0]) == [tmp_path / "images" / "link" / "x.jpg"]


def test_listed_image_that_is_missing_is_named(tmp_path: Path) -> None:
    source = make_set(tmp_path, {"a": GOOD})
    (tmp_path / "train.txt").write_text("./images/train/a.jpg\n./images/train/gone.jpg\n")
    report = load(tmp_path / "train.txt").report
    assert report.corrupt == 1 and f"(listed in {tmp_path}/train.txt:2)" in report.messages[0]
    assert (tmp_path / "train.cache.npz").is_file() and source.is_dir()


def same(first: labels.Annotations, second: labels.Annotations) -> bool:
    assert first.report == second.report
    assert len(first.records) == len(second.records)
    for a, b in zip(first.records, second.records):
        assert (a.path, a.height, a.width) == (b.path, b.height, b.width)
        np.testing.assert_array_equal(a.labels, b.labels)
        assert a.labels.dtype == b.labels.dtype and len(a.segments) == len(b.segments)
        for p, q in zip(a.segments, b.segments):
            np.testing.assert_array_equal(p, q)
    return True


MIXED = {
    "a": GOOD,
    "b": "2 0.1 0.2 0.5 0.2 0.5 0.8\n0 0.5 0.5 0.5 0.5\n",
    "c": None,
    "d": "0 2 2 2 2\n",
    "e": "",
    "f": "1 0.1 0.1 0.1 0.1\n" * 2,
    "g": "0 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2\n",
}


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that are verified while the test runs."""
    names: list[str] = []
    original = labels.verify

    def verify(image: Path, *rest: object) -> label_cache.Entry:
        names.append(image.stem)
        return original(image, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(labels, "verify", verify)
    return names


def test_cache_gives_the_same_without_verifying(tmp_path: Path, verified: list[str]) -> None:
    source = make_set(tmp_path, MIXED)
    first = load(source)
    assert sorted(verified) == sorted(MIXED)
    verified.clear()
    assert same(first, load(source)) and verified == []
    cache = tmp_path / "labels" / "train.cache.npz"
    with np.load(cache, allow_pickle=False) as archive:  # fails if anything in it were pickled
        assert all(archive[name].dtype != object for name in archive.files)
        assert json.loads(archive["header"].tobytes())["version"] == label_cache.VERSION


def change_label(root: Path) -> set[str]:
    (root / "labels/train/a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    return {"a"}


def same_size_other_time(root: Path) -> set[str]:
    path = root / "labels/train/a.txt"
    before = path.stat()
    path.write_text(path.read_text().replace("0.25", "0.26"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    return {"a"}


def change_image(root: Path) -> set[str]:
    image(root / "images/train/b.jpg", (50, 70))
    return {"b"}


def add_image(root: Path) -> set[str]:
    image(root / "images/train/new.jpg")
    return {"new"}


def add_label(root: Path) -> set[str]:
    (root / "labels/train/c.txt").write_text(GOOD)
    return {"c"}


def remove_label(root: Path) -> set[str]:
    (root / "labels/train/a.txt").unlink()
    return {"a"}


def remove_image(root: Path) -> set[str]:
    (root / "images/train/a.jpg").unlink()
    return set()


@pytest.mark.parametrize(
    "change",
    [change_label, same_size_other_time, change_image, add_image, add_label, remove_label, remove_image],
)
def test_cache_notices_changes(tmp_path: Path, verified: list[str], change) -> None:
    source = make_set(tmp_path, MIXED)
    load(source)
    verified.clear()
    expected = change(tmp_path)
    after = load(source)
    assert set(verified) == expected
    (tmp_path / "labels" / "train.cache.npz").unlink()
    assert same(after, load(source))  # as a fresh verification sees it
    verified.clear()
    assert same(after, load(source)) and verified == []


def test_cache_forgets_what_is_gone(tmp_path: Path) -> None:
    source = make_set(tmp_path, MIXED)
    load(source)
    remove_image(tmp_path)
    load(source)
    cache = tmp_path / "labels" / "train.cache.npz"
    assert {Path(name).stem for name in label_cache.read(cache)} == set(MIXED) - {"a"}


@pytest.mark.parametrize("damage", ["garbage", "cut", "version", "empty", "pickle"])
def test_unusable_cache_is_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verified: list[str], damage: str
) -> None:
    source = make_set(tmp_path, MIXED)
    first = load(source)
    cache = tmp_path / "labels" / "train.cache.npz"
    data = cache.read_bytes()
    verified.clear()
    if damage == "version":
        monkeypatch.setattr(label_cache, "VERSION", label_cache.VERSION + 1)
    elif damage == "pickle":
        np.savez(cache, header=np.array([{}], object))
    else:
        cache.write_bytes({"garbage": b"x" * 99, "cut": data[: len(data) // 2], "empty": b""}[damage])
    assert same(first, load(source)) and sorted(verified) == sorted(MIXED)
    verified.clear()
    assert same(first, load(source)) and verified == []


def test_cache_that_cannot_be_written_is_only_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = make_set(tmp_path, MIXED)
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level("INFO"):
        assert load(source, cache_folder=tmp_path / "file").report.images == len(MIXED)
    assert "labels are not cached" in caplog.text


def test_folder_marked_as_read_only_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = make_set(tmp_path, MIXED)
    (tmp_path / "labels").chmod(0o555)
    with caplog.at_level("INFO"):
        assert load(source).report.images == len(MIXED)  # for root too
    (tmp_path / "labels").chmod(0o755)
    assert "read-only" in caplog.text and not list((tmp_path / "labels").glob("*.npz"))


def test_several_writers_leave_a_whole_cache(tmp_path: Path, verified: list[str]) -> None:
    source = make_set(tmp_path, MIXED)
    threads = [threading.Thread(target=load, args=(source,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    verified.clear()
    load(source)
    assert verified == []
    assert [path.name for path in (tmp_path / "labels").iterdir()] != [] and not list((tmp_path / "labels").glob(".*"))


def test_sets_that_share_their_first_folder_have_their_own_cache(tmp_path: Path, verified: list[str]) -> None:
    first = make_set(tmp_path, MIXED)
    second = image(tmp_path / "images" / "z" / "x.jpg").parent
    load(first)
    load_annotations([first, second], 3, progress=False)
    verified.clear()
    load(first)
    load_annotations([first, second], 3, progress=False)
    assert verified == [] and len(list((tmp_path / "labels").glob("*.npz"))) == 2


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


def test_two_images_of_one_stem_are_named(tmp_path: Path) -> None:
    source = make_set(tmp_path, {"a": GOOD, "b": GOOD})
    image(source / "a.png")
    (message,) = load(source).report.messages
    assert "used for 2 images" in message and "a.jpg" in message and "a.png" in message


def test_files_of_other_formats_are_counted_and_named(tmp_path: Path) -> None:
    source = make_set(tmp_path, {"a": GOOD})
    for name in ("x.heic", "y.HEIC", "z.psd", "notes.txt", ".hidden.heic"):
        (source / name).write_text("")
    (message,) = load(source).report.messages
    assert "3 files left out whose format is not read (2 .heic, 1 .psd), first" in message
    (tmp_path / "list.txt").write_text("images/train/a.jpg\nimages/train/x.heic\n")
    (message,) = load(tmp_path / "list.txt").report.messages
    assert "1 files left out" in message and "x.heic" in message


@pytest.mark.parametrize("suffix", [".avif", ".jp2", ".gif", ".jfif", ".ppm"])
def test_formats_that_are_read(tmp_path: Path, suffix: str) -> None:
    source = make_set(tmp_path, {"a": GOOD})
    (source / "b").with_suffix(suffix).write_bytes(b"no image")
    report = load(source).report
    assert report.corrupt == 1 and f"b{suffix}: " in report.messages[0]


@pytest.mark.parametrize("kind", ["folder", "loop", "dangling link", "fifo"])
def test_label_file_that_cannot_be_read_is_an_error_not_background(tmp_path: Path, kind: str) -> None:
    source = make_set(tmp_path, {"a": GOOD, "b": None})
    label = label_path(source / "b.jpg")
    if kind == "folder":
        label.mkdir()
    elif kind == "fifo":
        os.mkfifo(label)
    else:
        label.symlink_to(label.name if kind == "loop" else "nowhere")
    report = load(source).report
    assert (report.corrupt, report.missing) == (1, 0) and f"{label}: cannot be read" in report.messages[0]


def test_unreadable_folder_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_set(tmp_path, {"a": GOOD, "deep/b": GOOD})
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="deep: cannot be read: Permission denied"):
        load(source)


def test_folder_that_links_to_itself_is_listed_once(tmp_path: Path) -> None:
    source = make_set(tmp_path, {"a": GOOD})
    (source / "loop").symlink_to(source)
    assert load(source).report.images == 1


def test_linked_images_have_their_labels_beside_the_link(tmp_path: Path) -> None:
    source = make_set(tmp_path, {"a": GOOD})
    source.rename(tmp_path / "pool")
    source.symlink_to(tmp_path / "pool")
    assert load(source).report.boxes == 2


def test_list_entries_written_on_windows(tmp_path: Path) -> None:
    make_set(tmp_path, {"a": GOOD})
    (tmp_path / "list.txt").write_bytes(b"images\\train\\a.jpg\r\n.\\images\\train\\a.jpg\r\n")
    report = load(tmp_path / "list.txt").report
    assert (report.boxes, report.duplicate_images) == (2, 1)


def test_every_damaged_byte_of_the_cache_is_noticed(tmp_path: Path) -> None:
    source = make_set(tmp_path, {"a": GOOD, "b": "0 0.1 0.1 0.3 0.1 0.3 0.4\n"})
    load(source)
    (cache,) = tmp_path.rglob("*.cache.npz")
    data = cache.read_bytes()
    for at in range(0, len(data), 37):
        cache.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
        assert not label_cache.read(cache)
    cache.write_bytes(data)
    assert len(label_cache.read(cache)) == 2
