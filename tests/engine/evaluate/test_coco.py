"""COCO result files: image and category ids, boxes, and the metrics of known answers."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from data.formats.coco import annotation_file
from data.formats.detect_format import recognize
from data.labels.labels import ImageRecord, load_annotations
from engine.evaluate import coco as coco_eval
from engine.evaluate.accumulator import ImageOutcome
from engine.evaluate.coco import COCO_CATEGORIES, image_numbers, result_rows, score
from engine.evaluate.outputs import CocoSink
from utils.errors import ConfigError, DataError

NUMBERS = [
    # paths, ids, what it is
    (["a/000000000139.jpg", "a/000000000285.jpg"], [139, 285], "COCO's names are the ids"),
    (["a/1.jpg", "b/01.jpg"], [1, 2], "the same number twice: counted"),
    (["cat.jpg", "2.jpg"], [1, 2], "not all are numbers: counted"),
    (["²3.jpg", "5.jpg"], [1, 2], "superscripts are not digits"),
]


@pytest.mark.parametrize(("paths", "ids", "text"), NUMBERS)
def test_image_numbers(paths, ids, text):
    assert list(image_numbers(paths).values()) == ids


def test_categories_of_coco():
    assert len(COCO_CATEGORIES) == 80
    # person, stop sign, cat, backpack, dining table, toothbrush
    assert [COCO_CATEGORIES[k] for k in (0, 11, 15, 24, 60, 79)] == [1, 13, 17, 27, 67, 90]


def test_rows_hold_the_upper_left_corner():
    (row,) = result_rows(torch.tensor([[10.0, 20, 40, 80, 0.123456, 2]]), 7, (5, 6, 8))
    assert row == {"image_id": 7, "category_id": 8, "bbox": [10, 20, 30, 60], "score": 0.12346}


LABELS = np.array([[0, 0.25, 0.25, 0.2, 0.3], [1, 0.7, 0.6, 0.4, 0.5]], np.float32)
IMAGES = [
    (1, "a.jpg", ImageRecord(Path("a.jpg"), 100, 200, LABELS)),
    (2, "b.jpg", ImageRecord(Path("b.jpg"), 80, 50, LABELS[:1])),
]
NAMES = {0: "disc", 1: "bar"}


def perfect():
    rows = []
    for number, _, image in IMAGES:
        for label, cx, cy, w, h in image.labels.tolist():
            x, y = (cx - w / 2) * image.width, (cy - h / 2) * image.height
            corner = [x, y, x + w * image.width, y + h * image.height]
            rows += result_rows(torch.tensor([[*corner, 0.9, label]]), number, (0, 1))
    return rows


SCORES = [
    # results, mAP50-95
    (perfect(), 1.0),
    ([row for row in perfect() if row["category_id"] == 0], 0.5),
    ([{**row, "category_id": 1 - row["category_id"]} for row in perfect()], 0.0),
    ([], 0.0),
]


@pytest.mark.parametrize(("results", "expected"), SCORES)
def test_score_of_known_answers(results, expected, capsys):
    figures = score(annotation_file(IMAGES, (0, 1), NAMES, polygons=False), results, [1, 2])
    assert len(figures) == 12 and figures[0] == pytest.approx(expected, abs=0.01)
    assert capsys.readouterr().out == ""


def test_score_is_equal_without_faster_coco_eval(monkeypatch, caplog):
    generator = np.random.default_rng(0)
    results = [
        {**row, "bbox": [float(v) + generator.uniform(0, 6) for v in row["bbox"]], "score": generator.uniform(0.1, 1)}
        for row in perfect() * 3
    ]
    truth = annotation_file(IMAGES, (0, 1), NAMES, polygons=False)
    pytest.importorskip("faster_coco_eval")
    tables = []
    with caplog.at_level("INFO"):
        fast = score(truth, results, [1, 2])
        tables.append(caplog.messages[-1])
        assert len(caplog.messages) == 1, "the package's own messages are not shown"
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
        plain = score(truth, results, [1, 2])
        tables.append(caplog.messages[-1])
    assert "by pycocotools" in caplog.text
    assert tables[0] == tables[1] and tables[0].count("Average") == 12
    assert 0 < plain[0] < 1
    assert fast == pytest.approx(plain, abs=1e-12)


def test_score_from_a_file_and_its_errors(tmp_path):
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(annotation_file(IMAGES, (0, 1), NAMES, polygons=False)))
    assert score(path, perfect(), [1, 2])[0] == pytest.approx(1, abs=0.01)
    with pytest.raises(DataError, match=r"truth\.json: lacks 1 of the images, such as id 3"):
        score(path, perfect(), [1, 3])
    for text in ("{", "[]", '{"images": []}'):
        path.write_text(text)
        with pytest.raises(DataError, match=r"truth\.json"):
            score(path, perfect(), [1, 2])


@pytest.mark.parametrize("installed", ["faster_coco_eval", "pycocotools"])
def test_check_accepts_either_package(monkeypatch, installed):
    monkeypatch.setattr(coco_eval.importlib.util, "find_spec", lambda name: object() if name == installed else None)
    CocoSink.check()


def test_check_refuses_without_any_package(monkeypatch):
    monkeypatch.setattr(coco_eval.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install faster-coco-eval"):
        CocoSink.check()


def coco_like(tmp_path, file, boxes=2):
    records = [ImageRecord(tmp_path / "images/val2017/000000000139.jpg", 100, 200, LABELS)]
    data = SimpleNamespace(file=Path(file), root=tmp_path)
    return data, SimpleNamespace(records=records, report=SimpleNamespace(boxes=boxes))


def test_coco_itself_uses_its_own_annotations(tmp_path):
    names = {k: str(k) for k in range(80)}
    data, annotations = coco_like(tmp_path, "data/coco.yaml")
    sink = CocoSink.for_data(data, annotations, names)
    assert sink.categories == COCO_CATEGORIES and isinstance(sink.truth, dict)
    (tmp_path / "annotations").mkdir()
    official = tmp_path / coco_eval.OFFICIAL_ANNOTATIONS
    for content in ({}, {"images": [{"id": 1}], "annotations": [], "categories": []}):  # before the evaluation
        official.write_text(json.dumps(content))
        with pytest.raises(DataError, match=r"instances_val2017\.json: (not a COCO|lacks 1 of the images)"):
            CocoSink.for_data(data, annotations, names)
    official.write_text('{"images": [{"id": 139}], "annotations": [], "categories": []}')
    assert CocoSink.for_data(data, annotations, names).truth == tmp_path / coco_eval.OFFICIAL_ANNOTATIONS
    found = torch.tensor([[0, 0, 9, 9, 0.5, 79.0]])
    sink(ImageOutcome(str(annotations.records[0].path), (100, 200), found, None, None))
    assert sink.rows[0]["image_id"] == 139 and sink.rows[0]["category_id"] == 90


def test_other_sets_are_scored_against_their_labels(tmp_path, caplog):
    data, annotations = coco_like(tmp_path, "my.yaml")
    sink = CocoSink.for_data(data, annotations, NAMES)
    found = torch.tensor([[30, 10, 70, 40, 0.9, 0], [100, 35, 180, 85, 0.8, 1.0]])
    sink(ImageOutcome(str(annotations.records[0].path), (100, 200), found, None, None))
    assert sink.write(tmp_path / "p.json")[0] == pytest.approx(1, abs=0.01)
    assert {p.name for p in tmp_path.iterdir()} == {"p.json", "ground_truth.json"}
    bare = replace(CocoSink.for_data(*coco_like(tmp_path, "my.yaml", boxes=0), NAMES), rows=sink.rows)
    assert bare.write(tmp_path / "q.json") is None and "no labels" in caplog.text


@pytest.mark.parametrize("integers", [True, False])
def test_ids_of_an_annotation_file_are_kept(tmp_path, integers):
    """Results of a dataset in COCO's format can be scored against its own file; string ids are numbered instead."""
    ids = [2, 1] if integers else ["y", "x"]  # not in the order of the names
    listed = [{"id": key, "file_name": f"{name}.png", "width": 200, "height": 100} for key, name in zip(ids, "ab")]
    boxes = [{"id": k, "image_id": ids[k], "category_id": 7, "bbox": [30, 10, 40, 30], "area": 1} for k in (0, 1)]
    content = {"images": listed, "annotations": boxes, "categories": [{"id": 7, "name": "cat"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    for name in "ab":
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.zeros((100, 200, 3), np.uint8))
    source = recognize(tmp_path / "a.json", ["dog", "cat"])
    annotations = load_annotations([source], 2, progress=False)
    data = SimpleNamespace(file=tmp_path / "my.yaml", root=tmp_path)
    sink = CocoSink.for_data(data, annotations, NAMES, [source])
    for record in annotations.records:
        found = torch.tensor([[30, 10, 70, 40, 0.9, 1.0], [0, 0, 9, 9, 0.1, 0.0]])
        sink(ImageOutcome(str(record.path), (100, 200), found, None, None))
    assert sink.write(tmp_path / "p.json")[0] == pytest.approx(1, abs=0.01)
    rows = [(row["image_id"], row["category_id"]) for row in json.loads((tmp_path / "p.json").read_text())]
    assert rows == ([(2, 7), (2, 8), (1, 7), (1, 8)] if integers else [(1, 1), (1, 0), (2, 1), (2, 0)])
    plain = CocoSink.for_data(data, annotations, NAMES)
    assert sorted(plain.ids.values()) == [1, 2] and plain.categories == (0, 1)
