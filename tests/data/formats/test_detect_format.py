"""Which format a source has, and where its images are."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from data.config import load_data_config
from data.formats.detect_format import AnnotatedSource, recognize
from data.labels import scan
from tests.helpers.annotation_files import (
    CATEGORIES,
    box,
    coco_set,
    dump,
    image,
    image_file,
    load,
    voc_file,
    voc_object,
    voc_set,
    yaml,
)
from utils.errors import DataError


def test_missing_annotations_name_the_nearest_file(tmp_path: Path) -> None:
    coco_set(tmp_path, [])
    config = load_data_config(yaml(tmp_path, "train: trian.json\nnames: [a]\n"))
    with pytest.raises(DataError, match=r"d\.yaml:1: split 'train': .* no 'trian\.json'; did you mean 'train\.json'"):
        config.split("train")


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("annotations/{}", ""),  # beside the JSON
        ("annotations/images/{}", ""),
        ("{}", ""),  # in `path`
        ("images/{}", ""),
        ("images/val2017/{}", ""),  # as COCO has it
        ("val2017/{}", ""),
        ("images/train/{}", ""),  # named like the split
        ("elsewhere/deep/{}", "images: elsewhere/deep\n"),
        ("elsewhere/deep/{}", "images: {train: elsewhere/deep}\n"),
    ],
)
def test_where_images_are_found(tmp_path: Path, place: str, text: str) -> None:
    for name in ("a.jpg", "b.jpg"):
        image_file(tmp_path / place.format(name))
    content = {"images": [image(1, "a.jpg"), image(2, "b.jpg")], "annotations": [box(1, 7, 6, 4, 12, 8)]}
    dump(tmp_path / "annotations" / "instances_val2017.json", {**content, "categories": CATEGORIES})
    config = load_data_config(yaml(tmp_path, f"path: .\ntrain: annotations/instances_val2017.json\n{text}"))
    result = load(*config.split("train"))
    assert [r.path for r in result.records] == [tmp_path / place.format(n) for n in ("a.jpg", "b.jpg")]


def test_missing_image_and_other_size_are_named(tmp_path: Path) -> None:
    file = coco_set(tmp_path, [box(1, 7, 6, 4, 12, 8)])
    (tmp_path / "b.jpg").unlink()
    report = load(file).report
    assert report.corrupt == 1 and f"(listed in {file}: image 2)" in report.messages[0]
    image_file(tmp_path / "b.jpg", (60, 40))
    assert "60x40 pixels there, 40x60 in the file" in load(file).report.messages[0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("images: {trian: x}", r"d\.yaml:2: images: unknown split 'trian'; did you mean 'train'"),
        ("images: [7]", r"d\.yaml:2: images is \[7\]; a folder, or a mapping"),
        ("images: gone", r"d\.yaml:2: images: no such folder: .*gone"),
    ],
)
def test_images_key_mistakes(tmp_path: Path, text: str, problem: str) -> None:
    coco_set(tmp_path, [])
    with pytest.raises(DataError, match=problem):
        load_data_config(yaml(tmp_path, f"train: train.json\n{text}\n"))


def test_cache_follows_annotations_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = coco_set(tmp_path, [box(1, 7, 6, 4, 12, 8)])
    load(file)
    verified: list[Path] = []
    original = scan.verify
    monkeypatch.setattr(scan, "verify", lambda *args: (verified.append(args[0]), original(*args))[1])
    load(file)
    assert not verified
    renamed = recognize(file, ["cat", "dog", "ant"])
    assert load(renamed).records[0].labels[0, 0] == 0 and len(verified) == 2  # another numbering, another cache
    verified.clear()
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][0] = 7
    dump(file, content)
    assert load(file).records[0].labels[0, 1] == pytest.approx(13 / 60) and len(verified) == 2


def test_voc_folder_list_and_xml_folder(tmp_path: Path) -> None:
    root = voc_set(tmp_path, a=[voc_object("dog", 6, 4, 18, 12)], b=[voc_object("cat", 0, 0, 60, 40)], c=[])
    image_file(root / "JPEGImages" / "d.jpg")  # no XML: background
    result = load(root)
    assert [r.path.stem for r in result.records] == ["a", "b", "c", "d"]
    np.testing.assert_allclose(result.records[0].labels, [[1, 0.2, 0.2, 0.2, 0.2]], atol=1e-7)
    np.testing.assert_allclose(result.records[1].labels, [[0, 0.5, 0.5, 1, 1]], atol=1e-7)
    assert (result.report.empty, result.report.missing) == (1, 1)
    listing = root / "ImageSets" / "Main" / "train.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("b\na 1\ngone\n")
    assert [r.path.stem for r in load(listing).records] == ["a", "b"]
    assert f"(listed in {listing}:3)" in load(listing).report.messages[0]
    assert [r.path.stem for r in load(root / "Annotations").records] == ["a", "b", "c"]
    config = load_data_config(yaml(tmp_path, "train: ImageSets/Main/train.txt\nval: Annotations\n"))
    assert config.names == {0: "cat", 1: "dog"}


def test_xml_beside_images_is_read_but_not_where_label_files_are(tmp_path: Path) -> None:
    image_file(tmp_path / "images/train/a.jpg")
    voc_file(tmp_path / "images/train/a.xml", voc_object("dog", 6, 4, 18, 12))
    image_file(tmp_path / "images/train/b.jpg")
    source = recognize(tmp_path / "images/train")
    assert isinstance(source, AnnotatedSource) and source.kind == "voc"
    result = load(source)
    assert [len(r.labels) for r in result.records] == [1, 0]
    (tmp_path / "labels/train").mkdir(parents=True)
    (tmp_path / "labels/train/a.txt").write_text("2 0.5 0.5 0.1 0.1\n")
    assert recognize(tmp_path / "images/train") == tmp_path / "images/train"
    assert load(tmp_path / "images/train").records[0].labels[0, 0] == 2


def test_lists_and_annotations_can_be_mixed(tmp_path: Path) -> None:
    file = coco_set(tmp_path / "coco", [box(1, 7, 6, 4, 12, 8)])
    image_file(tmp_path / "images/x.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/x.txt").write_text("2 0.5 0.5 0.1 0.1\n")
    config = load_data_config(yaml(tmp_path, f"train: [images, {file}]\nnames: [ant, cat, dog]\n"))
    assert [r.labels[:, 0].tolist() for r in load(*config.split("train")).records] == [[1], [], [2]]


@pytest.mark.parametrize("layout", ["flat", "voc"])
def test_image_that_the_xml_names_wins_over_a_mask_of_its_stem(tmp_path: Path, layout: str) -> None:
    images, xmls = (tmp_path / "JPEGImages", tmp_path / "Annotations") if layout == "voc" else (tmp_path, tmp_path)
    for name in ("x.bmp", "x.jpg", "x.png"):
        image_file(images / name)
    voc_file(xmls / "x.xml", voc_object("ant", 1, 1, 9, 9))  # names x.jpg
    found = load(recognize(tmp_path, ["ant"]))
    assert [(record.path.name, len(record.labels)) for record in found.records] == [("x.jpg", 1)]


def test_special_file_among_annotations_is_named(tmp_path: Path) -> None:
    root = voc_set(tmp_path, a=[voc_object("ant", 1, 1, 9, 9)])
    os.mkfifo(root / "Annotations" / "b.xml")
    with pytest.raises(DataError, match=r"b\.xml: cannot be read: is a FIFO"):
        load(root)


@pytest.mark.parametrize(
    ("images", "xmls", "source", "boxes"),
    [
        ("images", "annotations", ".", [1, 0]),  # lower case
        ("jpegimages", "annotations", ".", [1, 0]),
        ("photos/all", "Annotations", ".", [1, 0]),  # found by the name of the first image
        ("photos", "xmls", "xmls", [1]),  # the images of a folder of XML files are those that it names
        ("images/train", "labels/train", "images/train", [1, 0]),  # XML where YOLO labels are expected
    ],
)
def test_layouts_of_voc(tmp_path: Path, images: str, xmls: str, source: str, boxes: list[int]) -> None:
    for name in ("a", "b"):
        image_file(tmp_path / images / f"{name}.jpg")
    voc_file(tmp_path / xmls / "a.xml", voc_object("dog", 6, 4, 18, 12)).write_text(
        (tmp_path / xmls / "a.xml").read_text().replace("x.jpg", "a.jpg")
    )
    config = load_data_config(yaml(tmp_path, f"path: .\ntrain: {source}\n"))
    result = load(*config.split("train"))
    assert config.names == {0: "dog"} and [len(record.labels) for record in result.records] == boxes


@pytest.mark.parametrize("listing", ["ImageSets/Main/train.txt", "ImageSets/train.txt", "imagesets/main/train.txt"])
@pytest.mark.parametrize("entry", ["a", "a.jpg", "JPEGImages/a.jpg", "JPEGImages\\a.jpg", "a -1"])
def test_entries_of_imagesets_lists(tmp_path: Path, listing: str, entry: str) -> None:
    root = voc_set(tmp_path, a=[voc_object("dog", 6, 4, 18, 12)], b=[])
    (root / listing).parent.mkdir(parents=True)
    (root / listing).write_text(f"{entry}\n")
    assert [record.path.name for record in load(root / listing).records] == ["a.jpg"]


def test_imagesets_list_without_annotations_is_explained(tmp_path: Path) -> None:
    image_file(tmp_path / "JPEGImages/a.jpg")
    (tmp_path / "ImageSets").mkdir()
    (tmp_path / "ImageSets/train.txt").write_text("a\n")
    with pytest.raises(DataError, match="a VOC list needs a folder 'Annotations'"):
        load(tmp_path / "ImageSets/train.txt")


def test_coco_images_are_searched_only_where_no_folder_has_them(tmp_path: Path) -> None:
    file = coco_set(tmp_path / "set", [box(1, 7, 6, 4, 12, 8)])
    image_file(tmp_path / "set/other/a.jpg")
    image_file(tmp_path / "set/other/b.jpg")
    (tmp_path / "set/b.jpg").unlink()
    report = load(recognize(file)).report  # one image is missing: the other folder is not used instead
    assert (report.images, report.corrupt) == (2, 1)
    (tmp_path / "set/a.jpg").unlink()
    assert {record.path.parent.name for record in load(recognize(file)).records} == {"other"}
    explicit = recognize(file, None, [tmp_path / "set"])
    with pytest.raises(DataError, match="none of 2 images can be used"):
        load(explicit)


@pytest.mark.parametrize("prefix", ["data/images/", "/nowhere/else/", "C:\\\\labels\\\\", "../../media/"])
@pytest.mark.parametrize("text", ["", "images: pics\n"])
def test_coco_file_names_with_folders_of_another_machine(tmp_path: Path, prefix: str, text: str) -> None:
    images = [image(1, f"{prefix}a.jpg"), image(2, f"{prefix}b.jpg")]
    coco_set(tmp_path, [box(1, 7, 6, 4, 12, 8)], images=images).rename(tmp_path / "x.json")
    (tmp_path / "pics").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).rename(tmp_path / "pics" / name)
    result = load(*load_data_config(yaml(tmp_path, f"train: x.json\n{text}")).split("train"))
    assert [record.path for record in result.records] == [tmp_path / "pics/a.jpg", tmp_path / "pics/b.jpg"]


def test_coco_file_names_with_folders_stay_apart(tmp_path: Path) -> None:
    images = [image(1, "x/a.jpg"), image(2, "y/a.jpg")]
    file = coco_set(tmp_path, [box(1, 7, 6, 4, 12, 8)], images=images)
    with pytest.raises(DataError, match="none of 2 images can be used"):
        load(recognize(file))  # a.jpg could be either
