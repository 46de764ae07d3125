"""COCO JSON: the same records as YOLO text, and what is reported about mistakes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from data.augment.config import AugmentConfig
from data.config import load_data_config
from data.formats.coco import join_polygons
from data.loading.dataset import DetectionDataset
from tests.helpers.annotation_files import (
    box,
    coco_set,
    dump,
    image,
    load,
    yaml,
)
from utils.errors import DataError


def test_coco_classes_are_numbered_by_ascending_id_or_by_the_names_of_the_yaml(tmp_path: Path) -> None:
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


def test_names_that_are_no_categories_are_reported(tmp_path: Path) -> None:
    coco_set(tmp_path, [box(1, 7, 6, 4, 12, 8), box(1, 90, 0, 0, 60, 40)])
    config = load_data_config(yaml(tmp_path, "train: train.json\nnames: [ant, cat, dogs]\n"))
    with pytest.raises(DataError, match=r"train\.json: has objects of 'dog', but .* 'ant', 'cat', 'dogs'; .*'dogs'\?"):
        load(*config.split("train"))
    unused = load_data_config(yaml(tmp_path, "train: train.json\nnames: [cat, dog]\n"))  # no object is an ant
    assert load(*unused.split("train"), num_classes=2).report.boxes == 2
    with pytest.raises(DataError, match=r"d\.yaml:2: nc is 2, but .*train\.json has 3 classes: 'ant', 'cat', 'dog'"):
        load_data_config(yaml(tmp_path, "train: train.json\nnc: 2\n"))
    assert load_data_config(yaml(tmp_path, "train: train.json\nnc: 3\n")).names[2] == "dog"


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


def test_polygon_of_another_box_is_left_out(tmp_path: Path) -> None:
    """Training follows polygons where there are any, validation boxes: the targets would differ."""
    triangle = [6, 4, 18, 4, 6, 12]
    fits = [
        box(1, 7, 6, 4, 12, 8.9, segmentation=[triangle]),
        box(1, 7, -0.5, 4, 5, 8, segmentation=[[0, 4, 4.5, 4, 0, 12]]),
    ]
    wide = box(1, 3, 6, 4, 24, 8, segmentation=[triangle])
    found = load(coco_set(tmp_path, [*fits, wide]))
    (record, _) = found.records
    assert [len(segment) for segment in record.segments] == [3, 3, 4]
    assert (
        "annotation 106: 1 polygons differ from the boxes of their objects by more than 1 pixel"
        in found.report.messages[0]
    )
    dataset = DetectionDataset(found.records[:1], 60, augment=AugmentConfig())
    plain = DetectionDataset(found.records[:1], 60)
    np.testing.assert_allclose(dataset[0].labels, plain[0].labels, atol=1.01 / 60)
    (alone, _) = load(coco_set(tmp_path / "b", [wide])).records
    assert alone.segments == ()


def test_parts_of_an_object_are_joined_without_covering_more() -> None:
    corners = np.array([(0, 0), (10, 0), (10, 10), (0, 10)], np.float64)
    squares = [np.add(corners, (x, 0)) for x in (0, 20, 40)]
    joined = join_polygons([squares[0], squares[2], squares[1]])
    mask = np.zeros((20, 60), np.uint8)
    cv2.fillPoly(mask, [joined.round().astype(np.int32)], 1)
    apart = np.zeros_like(mask)
    cv2.fillPoly(apart, [square.astype(np.int32) for square in squares], 1)
    assert (joined.min(0) == 0).all() and joined.max(0).tolist() == [50, 10]
    assert not (apart & ~mask).any() and (mask & ~apart).sum() <= 40  # bridges at most one pixel wide


@pytest.mark.parametrize(
    ("annotation", "problem"),
    [
        (box(1, 7, 6, 4, -1, 8), r"annotation 106: box 6 4 5 12 .* negative side"),
        (box(1, 7, 44, 4, 20, 8), None),  # cxcywh fit: kept, as in a label file
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


def test_box_over_the_border_by_rounding_is_clipped(tmp_path: Path) -> None:
    (first, _) = load(coco_set(tmp_path, [box(1, 7, 0, -0.5, 60.7, 41)])).records
    np.testing.assert_allclose(first.labels[0, 1:], [0.5, 0.5, 1, 1], atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"images": {}, "image": []}, r"lists images are missing; did you mean 'image'"),
        ({"annotations": None}, r"lists annotations are missing"),
        ({"images": {}}, r"is not a COCO detection file: lists images are missing"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, r"categories: id 1 .* given twice"),
        ({"categories": [{"id": 7, "name": "a\ud800"}]}, "not valid JSON: .*surrogates not allowed"),
        ({"categories": [{"id": 1, "name": "a"}]}, r"annotation 106: no category has id 7; there are 1 \('a'\)"),
        ({"images": [image(1, "a.jpg"), image(1, "b.jpg")]}, r"images: id 1 is given twice"),
        ({"images": [{"id": 1}]}, r"images\[0\] is \{'id': 1\}; a mapping with 'id' and 'file_name'"),
        ({"annotations": [{"bbox": [1, 2, 3, 4]}]}, r"annotations\[0\] is .*; a mapping with image_id"),
        ({"annotations": [{"image_id": 1, "category_id": [1]}]}, r"annotations\[0\] is .*'category_id': \[1\]"),
        ({"annotations": [box(1, 7, 6, float("inf"), 12, 8)]}, "no labels for .*; first problem: .*annotation 106"),
    ],
)
def test_damaged_coco_file_is_one_line(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    file = coco_set(tmp_path, [box(1, 7, 6, 4, 12, 8)], **changes)
    with pytest.raises(DataError, match=problem) as caught:
        load(file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_list_of_images_without_annotations(tmp_path: Path) -> None:
    """COCO's image_info_test-dev2017.json: enough for detections without ground truth."""
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


def test_image_listed_twice_is_one_image_with_all_objects(tmp_path: Path) -> None:
    images = [image(1, "a.jpg"), image(2, "a.jpg")]
    result = load(coco_set(tmp_path, [box(1, 7, 6, 4, 12, 8), box(2, 3, 0, 0, 6, 4)], images=images))
    assert len(result.records) == 1 and len(result.records[0].labels) == 2 and result.report.duplicate_images == 1


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
