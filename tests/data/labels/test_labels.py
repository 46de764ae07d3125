"""Listing images, verifying and loading their labels."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from data.labels.labels import label_path, list_images
from tests.helpers.label_files import GOOD, image, load, make_set
from utils.errors import DataError


def test_load_annotations_of_a_valid_dataset(tmp_path: Path) -> None:
    source = make_set(tmp_path, {"b": GOOD, "a": "2 0.5 0.5 1 1\n", "c": None, "d": "\n"})
    result = load(source)
    assert [record.path.name for record in result.records] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    expected = np.array([[1, 0.5, 0.5, 0.2, 0.4], [0, 0.25, 0.75, 0.1, 0.1]], np.float32)
    np.testing.assert_array_equal(result.records[1].labels, expected)  # the file's order stays
    assert result.records[1].labels.dtype == np.float32 and result.records[2].labels.shape == (0, 5)
    assert (result.records[0].height, result.records[0].width) == (40, 60)
    report = result.report
    assert (report.images, report.labeled, report.boxes) == (4, 2, 3)
    assert (report.missing, report.empty, report.corrupt) == (1, 1, 0)
    assert "4 images: 2 with labels (3 boxes), 2 backgrounds" in report.summary()


def test_unusable_images_are_left_out_and_named(tmp_path: Path) -> None:
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


def test_load_annotations_without_labels(tmp_path: Path) -> None:
    source = make_set(tmp_path, {"a": None, "b": ""})
    with pytest.raises(DataError, match=rf"no labels in 2 images; looked .* {tmp_path}/labels/train"):
        load(source)
    assert load(source, require_labels=False).report.boxes == 0
    source = make_set(tmp_path / "empty", {"a": "", "b": ""})
    with pytest.raises(DataError, match=r"no labels in 2 images: their label files are empty$"):
        load(source)


def test_load_annotations_without_usable_images(tmp_path: Path) -> None:
    source = make_set(tmp_path, {"a": "x"})
    (source / "x.heic").touch()  # a note about the folder is not the reason
    with pytest.raises(DataError, match=r"none of 1 images can be used: [^ ]*a\.txt:1"):
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


def test_records_are_sorted_by_path(tmp_path: Path) -> None:
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


def test_images_that_share_a_label_file_are_named(tmp_path: Path) -> None:
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


def test_classes_counted_from_one_are_explained(tmp_path: Path) -> None:
    source = make_set(tmp_path, {"a": "1 0.5 0.5 0.2 0.2\n", "b": "3 0.5 0.5 0.2 0.2\n"})
    with pytest.raises(DataError, match=r"b\.txt:1: class 3, .*no label has class 0: if they count from 1, .*unused"):
        load(source)
    (tmp_path / "labels/train/a.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    with pytest.raises(DataError) as caught:
        load(source)
    assert "count from 1" not in str(caught.value)


def test_labels_of_another_split_are_not_named(tmp_path: Path) -> None:
    source = make_set(tmp_path, {"a": None})
    for folder in ("labels/val", "images/val"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "labels/val/a.txt").write_text(GOOD)
    with pytest.raises(DataError, match=r"looked for \.txt files in [^ ;]*labels/train$"):
        load(source)


@pytest.mark.parametrize(
    ("place", "advice"),
    [
        ("annots/a.txt", r"annots/a\.txt is there: rename .*annots to .*labels/train"),
        ("images/train/a.txt", "they are beside the images: move them there, or rename the folder 'images'"),
        ("xmls/a.xml", r"xmls/a\.xml is there: write 'train: .*/xmls'"),
        ("annotations/x.json", r"a COCO file is there: write 'train: .*annotations/x\.json'"),
    ],
)
def test_labels_elsewhere_are_named(tmp_path: Path, place: str, advice: str) -> None:
    source = make_set(tmp_path, {"a": None})
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text('{"images": [], "annotations": []}' if place.endswith("json") else GOOD)
    with pytest.raises(DataError, match=advice):
        load(source)
