"""Pascal VOC XML: the same records as YOLO text, and what is reported about mistakes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from data.config import load_data_config
from data.formats import voc
from data.formats.detect_format import AnnotatedSource, recognize
from tests.helpers.annotation_files import (
    XML,
    image_file,
    load,
    voc_file,
    voc_object,
    voc_set,
    yaml,
)
from utils.errors import DataError


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


def test_voc_polygon_becomes_a_segment(tmp_path: Path) -> None:
    points = "".join(f"<x{i}>{x}</x{i}><y{i}>{y}</y{i}>" for i, (x, y) in enumerate([(6, 4), (18, 4), (6, 12)], 1))
    root = voc_set(tmp_path, a=[voc_object("dog", 6, 4, 18, 12, extra=f"<polygon>{points}</polygon>")])
    np.testing.assert_allclose(load(root).records[0].segments[0], [[0.1, 0.1], [0.3, 0.1], [0.1, 0.3]], atol=1e-7)
    voc_set(tmp_path, a=[voc_object("dog", 6, 4, 38, 12, extra=f"<polygon>{points}</polygon>")])
    found = load(root)
    assert found.records[0].segments == () and "1 polygons differ from the boxes" in found.report.messages[0]


def test_unknown_voc_class_is_an_error_for_the_set(tmp_path: Path) -> None:
    good = voc_object("dog", 6, 4, 18, 12)
    voc_set(tmp_path, a=[good, voc_object("Dgo", 6, 4, 18, 12)], b=[good])
    config = load_data_config(yaml(tmp_path, "train: .\nnames: [cat, dog]\n"))
    with pytest.raises(DataError, match=r"a\.xml: object 2 \(Dgo\): the classes are 'cat', 'dog'; did you mean 'dog'"):
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


@pytest.mark.parametrize("value", ["1_0", "９", "1,5", "nan", "1e400", "x"])
def test_numbers_of_xml_are_ascii_decimals(tmp_path: Path, value: str) -> None:
    image_file(tmp_path / "x.jpg")
    image_file(tmp_path / "y.jpg")
    voc_file(tmp_path / "y.xml", voc_object("ant", 1, 1, 9, 9))
    path = voc_file(tmp_path / "x.xml", voc_object("ant", 1, 1, 9, 9))
    path.write_text(path.read_text().replace("<xmin>1<", f"<xmin>{value}<"))
    assert load(recognize(tmp_path, ["ant"])).report.corrupt == 1


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
