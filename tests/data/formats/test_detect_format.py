"""COCO JSON and Pascal VOC XML read directly: the same records as YOLO text, and what is logged about mistakes."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from data.config import load_data_config
from data.formats import voc
from data.formats.coco import join_polygons
from data.formats.detect_format import AnnotatedSource, recognise
from data.labels import labels
from data.labels.labels import Annotations, load_annotations
from utils.errors import DataError

SIZE = (40, 60)  # height, width of every image here


def image_file(path: Path, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((*size, 3), 90, np.uint8))
    return path


def load(*sources: Any, num_classes: int = 3, **options: Any) -> Annotations:
    return load_annotations(list(sources), num_classes, progress=False, **options)


def dump(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 90, "name": "dog"}, {"id": 3, "name": "ant"}]


def image(number: Any, name: str, **extra: Any) -> dict[str, Any]:
    return {"id": number, "file_name": name, "height": SIZE[0], "width": SIZE[1], **extra}


def box(image_id: Any, category: int, *bbox: float, **extra: Any) -> dict[str, Any]:
    return {"id": 100 + int(bbox[0]), "image_id": image_id, "category_id": category, "bbox": list(bbox), **extra}


def coco_set(root: Path, annotations: list[dict[str, Any]], /, **changes: Any) -> Path:
    for name in ("a.jpg", "b.jpg"):
        image_file(root / name)
    content = {"images": [image(1, "a.jpg"), image(2, "b.jpg")], "annotations": annotations, "categories": CATEGORIES}
    return dump(root / "train.json", {**content, **changes})


def yaml(root: Path, text: str) -> Path:
    path = root / "d.yaml"
    path.write_text(text, encoding="utf-8")
    return path


XML = (
    "<annotation>{source}<filename>x.jpg</filename><size><width>{w}</width><height>{h}</height></size>{objects}"
    "</annotation>"
)


def voc_object(name: str, *corners: float, difficult: int = 0, extra: str = "") -> str:
    inner = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), corners))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{inner}</bndbox>{extra}</object>"


def voc_file(path: Path, *objects: str, size: tuple[int, int] = SIZE, source: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(XML.format(w=size[1], h=size[0], objects="".join(objects), source=source), encoding="utf-8")
    return path


def voc_set(root: Path, **files: list[str]) -> Path:
    for name, objects in files.items():
        image_file(root / "JPEGImages" / f"{name}.jpg")
        voc_file(root / "Annotations" / f"{name}.xml", *objects)
    return root


# ---- COCO


def test_coco_classes_are_numbered_by_rising_id_or_by_the_names_of_the_yaml(tmp_path: Path) -> None:
    file = coco_set(tmp_path, [box(1, 7, 6, 4, 12, 8), box(1, 90, 0, 0, 60, 40), box(2, 3, 30, 20, 3, 2)])
    first, second = load(file).records
    np.testing.assert_allclose(first.labels, [[1, 0.2, 0.2, 0.2, 0.2], [2, 0.5, 0.5, 1, 1]], atol=1e-7)
    np.testing.assert_allclose(second.labels, [[0, 0.525, 0.525, 0.05, 0.05]], atol=1e-7)
    assert load_data_config(yaml(tmp_path, "train: train.json\n")).names == {0: "ant", 1: "cat", 2: "dog"}
    config = load_data_config(yaml(tmp_path, "train: train.json\nnames: [dog, cat, ant, extra]\n"))
    sources = config.split("train")
    assert [r.labels[:, 0].tolist() for r in load(*sources, num_classes=4).records] == [[1, 0], [2]]
    sources = replace(config, names={0: "item"}).split("train")  # as --single-cls does it
    one = load(*sources, num_classes=4, single_cls=True).records
    assert [r.labels[:, 0].tolist() for r in one] == [[0, 0], [0]]


def test_names_that_do_not_fit_are_told_apart(tmp_path: Path) -> None:
    coco_set(tmp_path, [box(1, 7, 6, 4, 12, 8), box(1, 90, 0, 0, 60, 40)])
    config = load_data_config(yaml(tmp_path, "train: train.json\nnames: [ant, cat, dogs]\n"))
    with pytest.raises(DataError, match=r"train\.json: has objects of 'dog', but .* 'ant', 'cat', 'dogs'; .*'dogs'\?"):
        load(*config.split("train"))
    unused = load_data_config(yaml(tmp_path, "train: train.json\nnames: [cat, dog]\n"))  # no object is an ant
    assert load(*unused.split("train"), num_classes=2).report.boxes == 2
    with pytest.raises(DataError, match=r"d\.yaml:2: nc is 2, but .*train\.json has 3 classes: ant, cat, dog"):
        load_data_config(yaml(tmp_path, "train: train.json\nnc: 2\n"))
    assert load_data_config(yaml(tmp_path, "train: train.json\nnc: 3\n")).names[2] == "dog"


def test_missing_annotations_name_the_nearest_file(tmp_path: Path) -> None:
    coco_set(tmp_path, [])
    config = load_data_config(yaml(tmp_path, "train: trian.json\nnames: [a]\n"))
    with pytest.raises(DataError, match=r"d\.yaml:1: split 'train': .*trian\.json; did you mean 'train\.json'"):
        config.split("train")


def test_crowds_repetitions_and_empty_images_are_counted(tmp_path: Path) -> None:
    twice = box(1, 7, 6, 4, 12, 8)
    crowd = box(1, 7, 1, 1, 9, 9, iscrowd=1, segmentation={"counts": [1, 2], "size": [40, 60]})
    file = coco_set(tmp_path, [twice, crowd, twice, box(9, 7, 1, 1, 2, 2)])
    result = load(file)
    assert len(result.records[0].labels) == 1 and not len(result.records[1].labels)
    report = result.report
    assert (report.boxes, report.crowd, report.duplicate_rows, report.empty, report.corrupt) == (1, 1, 1, 1, 0)
    assert "1 groups (iscrowd) left out" in report.summary()
    assert any("annotation 106: 1 duplicate rows" in line for line in report.messages)
    assert any("1 annotations of images that are not listed" in line for line in report.messages)
    assert load(file).report == report  # from the cache


def test_polygons_become_polygons_and_boxes_get_their_corners(tmp_path: Path) -> None:
    triangle = [6, 4, 18, 4, 6, 12]
    file = coco_set(tmp_path, [box(1, 7, 6, 4, 12, 8, segmentation=[triangle]), box(1, 3, 30, 20, 3, 2)])
    first, second = load(file).records
    assert len(first.segments) == 2 and second.segments == ()
    np.testing.assert_allclose(first.segments[0], [[0.1, 0.1], [0.3, 0.1], [0.1, 0.3]], atol=1e-7)
    np.testing.assert_allclose(first.segments[1][2], [33 / 60, 22 / 40], atol=1e-6)
    without = {key: value for key, value in box(1, 7, 6, 4, 1, 1, segmentation=[triangle]).items() if key != "bbox"}
    (row, _) = load(coco_set(tmp_path / "b", [without])).records
    np.testing.assert_allclose(row.labels, [[1, 0.2, 0.2, 0.2, 0.2]], atol=1e-6)


def test_parts_of_an_object_are_joined_without_covering_more() -> None:
    corners = np.array([(0, 0), (10, 0), (10, 10), (0, 10)], np.float64)
    squares = [np.add(corners, (x, 0)) for x in (0, 20, 40)]
    joined = join_polygons([squares[0], squares[2], squares[1]])
    mask = np.zeros((20, 60), np.uint8)
    cv2.fillPoly(mask, [joined.round().astype(np.int32)], 1)
    apart = np.zeros_like(mask)
    cv2.fillPoly(apart, [square.astype(np.int32) for square in squares], 1)
    assert (joined.min(0) == 0).all() and joined.max(0).tolist() == [50, 10]
    assert not (apart & ~mask).any() and (mask & ~apart).sum() <= 40  # bridges of one pixel's width at most


@pytest.mark.parametrize(
    ("annotation", "problem"),
    [
        (box(1, 7, 6, 4, -1, 8), r"annotation 106: box 6 4 5 12 .* negative side"),
        (box(1, 7, 44, 4, 20, 8), None),  # center and size fit: kept, as in a label file
        (box(1, 7, 58, 4, 30, 8), r"annotation 158: .* is not inside the image of 60x40"),
        (box(1, 7, 0, -0.5, 60.7, 41), None),  # rounding
        (box(1, 7, 0, 0, 62, 40), r"is not inside the image"),
        (box(1, 7, 5, 5, 0, 3), None),  # without area: kept, as in a label file
        (box(1, 7, 5, 5, float("nan"), 3), r"is not finite"),
        ({**box(1, 7, 5, 5, 5, 3), "bbox": [1, 2, 3]}, r"annotation 105: bbox is \[1, 2, 3\]; four numbers"),
        ({**box(1, 7, 5, 5, 5, 3), "segmentation": [["a"] * 6]}, r"annotation 105: segmentation: lists of x, y"),
    ],
)
def test_odd_boxes_are_handled_as_in_label_files(
    tmp_path: Path, annotation: dict[str, Any], problem: str | None
) -> None:
    report = load(coco_set(tmp_path, [annotation, box(2, 3, 0, 0, 6, 4)])).report
    if problem is None:
        assert report.corrupt == 0 and report.boxes == 2
    else:
        assert report.corrupt == 1 and report.boxes == 1
        assert re.search(problem, report.messages[0])


def test_box_that_reaches_over_the_border_by_rounding_is_cut(tmp_path: Path) -> None:
    (first, _) = load(coco_set(tmp_path, [box(1, 7, 0, -0.5, 60.7, 41)])).records
    np.testing.assert_allclose(first.labels[0, 1:], [0.5, 0.5, 1, 1], atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"images": {}, "image": []}, r"lists images are missing; did you mean 'image'"),
        ({"annotations": None}, r"lists annotations are missing"),
        ({"images": {}}, r"is no COCO detection file: lists images are missing"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, r"categories: id 1 .* given twice"),
        ({"categories": [{"id": 1, "name": "a"}]}, r"annotation 106: no category has id 7; there are 1 \(a\)"),
        ({"images": [image(1, "a.jpg"), image(1, "b.jpg")]}, r"images: id 1 is given twice"),
        ({"images": [{"id": 1}]}, r"images\[0\] is \{'id': 1\}; a mapping with 'id' and 'file_name'"),
        ({"annotations": [{"bbox": [1, 2, 3, 4]}]}, r"annotations\[0\]: a mapping with image_id"),
    ],
)
def test_broken_coco_file_is_one_line(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    file = coco_set(tmp_path, [box(1, 7, 6, 4, 12, 8)], **changes)
    with pytest.raises(DataError, match=problem) as caught:
        load(file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_list_of_images_without_annotations(tmp_path: Path) -> None:
    """COCO's image_info_test-dev2017.json: enough for detections without a score."""
    content = json.loads(coco_set(tmp_path, []).read_text())
    file = dump(tmp_path / "test.json", {key: value for key, value in content.items() if key != "annotations"})
    assert len(load(file, require_labels=False).records) == 2
    with pytest.raises(DataError, match=r"no labels for 2 images in .*test\.json"):
        load(file)


def test_json_syntax_error_has_its_line(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('{"images": [],\n "annotations": [,\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"x\.json:2: not valid JSON"):
        load(file)


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("annotations/{}", ""),  # beside the JSON
        ("annotations/images/{}", ""),
        ("{}", ""),  # in `path`
        ("images/{}", ""),
        ("images/val2017/{}", ""),  # as COCO has it
        ("val2017/{}", ""),
        ("images/train/{}", ""),  # called as the split
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
    original = labels.verify
    monkeypatch.setattr(labels, "verify", lambda *args: (verified.append(args[0]), original(*args))[1])
    load(file)
    assert not verified
    renamed = recognise(file, ["cat", "dog", "ant"])
    assert load(renamed).records[0].labels[0, 0] == 0 and len(verified) == 2  # another numbering, another cache
    verified.clear()
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][0] = 7
    dump(file, content)
    assert load(file).records[0].labels[0, 1] == pytest.approx(13 / 60) and len(verified) == 2


def test_image_listed_twice_is_one_image_with_all_objects(tmp_path: Path) -> None:
    images = [image(1, "a.jpg"), image(2, "a.jpg")]
    result = load(coco_set(tmp_path, [box(1, 7, 6, 4, 12, 8), box(2, 3, 0, 0, 6, 4)], images=images))
    assert len(result.records) == 1 and len(result.records[0].labels) == 2 and result.report.duplicate_images == 1


# ---- Pascal VOC


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
    source = recognise(tmp_path / "images/train")
    assert isinstance(source, AnnotatedSource) and source.kind == "voc"
    result = load(source)
    assert [len(r.labels) for r in result.records] == [1, 0]
    (tmp_path / "labels/train").mkdir(parents=True)
    (tmp_path / "labels/train/a.txt").write_text("2 0.5 0.5 0.1 0.1\n")
    assert recognise(tmp_path / "images/train") == tmp_path / "images/train"
    assert load(tmp_path / "images/train").records[0].labels[0, 0] == 2


def test_difficult_objects_are_left_out_and_counted(tmp_path: Path) -> None:
    root = voc_set(tmp_path, a=[voc_object("dog", 6, 4, 18, 12), voc_object("dog", 0, 0, 9, 9, difficult=1)])
    report = load(root).report
    assert (report.boxes, report.difficult) == (1, 1) and "1 difficult objects left out" in report.summary()
    assert load(root).report == report  # from the cache


def test_pascals_own_files_count_pixels_from_one(tmp_path: Path) -> None:
    image_file(tmp_path / "JPEGImages/a.jpg")
    own = "<source><database>The VOC2007 Database</database><annotation>PASCAL VOC2007</annotation></source>"
    voc_file(tmp_path / "Annotations/a.xml", voc_object("dog", 7, 5, 19, 13), source=own)
    np.testing.assert_allclose(load(tmp_path).records[0].labels, [[0, 0.2, 0.2, 0.2, 0.2]], atol=1e-7)


def test_voc_polygon_becomes_an_polygon(tmp_path: Path) -> None:
    points = "".join(f"<x{i}>{x}</x{i}><y{i}>{y}</y{i}>" for i, (x, y) in enumerate([(6, 4), (18, 4), (6, 12)], 1))
    root = voc_set(tmp_path, a=[voc_object("dog", 6, 4, 18, 12, extra=f"<polygon>{points}</polygon>")])
    np.testing.assert_allclose(load(root).records[0].segments[0], [[0.1, 0.1], [0.3, 0.1], [0.1, 0.3]], atol=1e-7)


def test_unknown_voc_class_is_an_error_for_the_set(tmp_path: Path) -> None:
    good = voc_object("dog", 6, 4, 18, 12)
    voc_set(tmp_path, a=[good, voc_object("Dgo", 6, 4, 18, 12)], b=[good])
    config = load_data_config(yaml(tmp_path, "train: .\nnames: [cat, dog]\n"))
    with pytest.raises(DataError, match=r"a\.xml: object 2 \(Dgo\): the classes are cat, dog; did you mean 'dog'"):
        load(*config.split("train"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<annotation>\n<object>\n</annotation>", r"x\.xml:3: not valid XML"),
        ("<html/>", r"begins with <html>"),
        (XML.format(w=60, h=41, objects="", source=""), r"60x41 pixels there, 60x40 in the image"),
        (XML.format(w=0, h=0, source="", objects=voc_object("dog", 9, 9, 5, 12)), r"object 1 \(dog\): box .* negative"),
        (XML.format(w=0, h=0, source="", objects=voc_object("dog", 9, 9)), r"object 1 \(dog\): bndbox: numbers xmin"),
        (XML.format(w=60, h=40, source="", objects=voc_object("dog", 9, 9, 99, 12)), r"is not inside the image"),
    ],
)
def test_wrong_xml_leaves_the_image_out(tmp_path: Path, text: str, problem: str) -> None:
    root = voc_set(tmp_path, good=[voc_object("dog", 6, 4, 18, 12)], x=[])
    (root / "Annotations" / "x.xml").write_text(text)
    report = load(AnnotatedSource(root, "voc", ("dog",), (root / "JPEGImages",))).report
    assert report.corrupt == 1
    assert re.search(problem, report.messages[0])


def test_lists_and_annotations_can_be_mixed(tmp_path: Path) -> None:
    file = coco_set(tmp_path / "coco", [box(1, 7, 6, 4, 12, 8)])
    image_file(tmp_path / "images/x.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/x.txt").write_text("2 0.5 0.5 0.1 0.1\n")
    config = load_data_config(yaml(tmp_path, f"train: [images, {file}]\nnames: [ant, cat, dog]\n"))
    assert [r.labels[:, 0].tolist() for r in load(*config.split("train")).records] == [[1], [], [2]]


def roboflow(root: Path, group: str) -> Path:
    categories = [{"id": 0, "name": group, "supercategory": "none"}, {"id": 1, "name": "fish", "supercategory": group}]
    return coco_set(root, [box(1, 1, 6, 4, 12, 8)], categories=categories)


@pytest.mark.parametrize("group", ["cells", "fish"])
@pytest.mark.parametrize("names", ["", "names: [fish]"])
def test_category_that_only_groups_others_is_no_class(tmp_path: Path, group: str, names: str) -> None:
    roboflow(tmp_path, group)
    config = load_data_config(yaml(tmp_path, f"train: train.json\n{names}\n"))
    assert config.names == {0: "fish"}
    found = load(*config.split("train"), num_classes=1)
    assert found.records[0].labels[:, 0].tolist() == [0] and "groups the others" in found.report.messages[0]


def test_group_with_objects_stays_a_class(tmp_path: Path) -> None:
    roboflow(tmp_path, "cells")
    content = json.loads((tmp_path / "train.json").read_text())
    content["annotations"].append(box(2, 0, 7, 4, 12, 8))
    dump(tmp_path / "train.json", content)
    assert load_data_config(yaml(tmp_path, "train: train.json\n")).names == {0: "cells", 1: "fish"}


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("category_id", [1], "a mapping with image_id, category_id"),
        ("image_id", {}, "a mapping with image_id, category_id"),
        ("category_id", float("inf"), "a mapping with image_id, category_id"),
        ("bbox", [10**400, 1, 2, 3], "not finite"),
        ("bbox", [float("inf"), 1, 2, 3], "not finite"),
        ("bbox", "x" * 10**6, "four numbers"),
        ("segmentation", [[10**400] * 6], "lists of x, y"),
        ("segmentation", [[float("nan")] * 6], "not finite"),
        ("id", "x" * 10**6, ""),
    ],
)
def test_odd_values_of_coco_are_short_errors(tmp_path: Path, field: str, value: Any, problem: str) -> None:
    file = coco_set(tmp_path, [{**box(1, 7, 6, 4, 12, 8), field: value}, box(2, 7, 6, 4, 50, 50)])
    try:
        message = load(file).report.messages[0]
    except DataError as error:
        message = str(error)
    assert problem in message and len(message) < 1000


@pytest.mark.parametrize("text", ["[" * 10**5, '{"images": ' + "9" * 5000 + "}", "\ufeff{"])
def test_json_that_python_cannot_hold_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match="not valid JSON"):
        load(tmp_path / "a.json")


def test_polygons_with_many_points_are_joined_in_bounded_memory() -> None:
    angles = np.linspace(0, 2 * np.pi, 20_000, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    joined = join_polygons([circle, circle + np.array((5, 0))])
    assert len(joined) == 40_002
    jumps = np.abs(np.diff(joined, axis=0)).max(1)
    assert (jumps > 0.01).sum() == 2 and jumps.max() < 3.05  # one bridge, there and back, near the nearest points


@pytest.mark.parametrize("layout", ["flat", "voc"])
def test_image_that_the_xml_names_wins_over_a_mask_of_its_stem(tmp_path: Path, layout: str) -> None:
    images, xmls = (tmp_path / "JPEGImages", tmp_path / "Annotations") if layout == "voc" else (tmp_path, tmp_path)
    for name in ("x.bmp", "x.jpg", "x.png"):
        image_file(images / name)
    voc_file(xmls / "x.xml", voc_object("ant", 1, 1, 9, 9))  # names x.jpg
    found = load(recognise(tmp_path, ["ant"]))
    assert [(record.path.name, len(record.labels)) for record in found.records] == [("x.jpg", 1)]


def test_special_file_among_annotations_is_named(tmp_path: Path) -> None:
    root = voc_set(tmp_path, a=[voc_object("ant", 1, 1, 9, 9)])
    os.mkfifo(root / "Annotations" / "b.xml")
    with pytest.raises(DataError, match=r"b\.xml: cannot be read: is a FIFO"):
        load(root)


@pytest.mark.parametrize("value", ["1_0", "９", "1,5", "nan", "1e400", "x"])
def test_numbers_of_xml_are_ascii_decimals(tmp_path: Path, value: str) -> None:
    image_file(tmp_path / "x.jpg")
    image_file(tmp_path / "y.jpg")
    voc_file(tmp_path / "y.xml", voc_object("ant", 1, 1, 9, 9))
    path = voc_file(tmp_path / "x.xml", voc_object("ant", 1, 1, 9, 9))
    path.write_text(path.read_text().replace("<xmin>1<", f"<xmin>{value}<"))
    assert load(recognise(tmp_path, ["ant"])).report.corrupt == 1


ENTITIES = "".join(f'<!ENTITY a{k} "{f"&a{k - 1};" * 10}">' for k in range(1, 9))
BOMB = f'<!DOCTYPE a [<!ENTITY a0 "x">{ENTITIES}]><annotation>&a8;</annotation>'


@pytest.mark.parametrize(
    "text",
    [
        '<?xml version="1.0" encoding="nosuch"?><annotation/>',
        "<annotation>" + "<object>" * 50_000,
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>',
        '<!DOCTYPE a [<!ENTITY a0 "x">'
        + "".join(f'<!ENTITY a{k} "{f"&a{k - 1};" * 10}">' for k in range(1, 9))
        + "]><annotation>&a8;</annotation>",
    ],
)
def test_hostile_xml_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.xml").write_text(text)
    with pytest.raises(DataError, match=r"x\.xml"):
        voc.parse_voc(tmp_path / "x.xml")
