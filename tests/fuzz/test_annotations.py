"""COCO JSON and Pascal VOC XML, changed in structure, values and text."""

from __future__ import annotations

import copy
import json
import random
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from data.config import load_data_config
from data.labels.labels import load_annotations
from tests.helpers.fuzz import Case, WrongResult, faults, seeds
from tests.helpers.mutations import mutate_tree

pytestmark = pytest.mark.fuzz
COCO = {
    "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog", "supercategory": "x"}],
    "images": [{"id": i, "file_name": f"{name}.png", "width": 40, "height": 32} for i, name in ((1, "a"), (2, "b"))],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [2, 3, 10, 12], "segmentation": [[2, 3, 12, 3, 12, 15]]},
        {
            "id": 2,
            "image_id": 2,
            "category_id": 7,
            "bbox": [0, 0, 40, 32],
            "iscrowd": 1,
            "segmentation": {"counts": [1]},
        },
        {"id": 3, "image_id": 2, "category_id": 7, "bbox": [1.5, 2.5, 7.25, 8]},
    ],
}
VALUES = [0, -1, 1e400, 10**400, float("nan"), "", "x", None, True, [], {}, [[]], [1, 2],
"../../../etc/passwd", "a\x00b",
          "x" * 300, 2**70, [[1, 2, 3]], [[10**400] * 6], [["a"] * 6], [1e39, 1, 1, 1], [-5, -5, 100, 100],
          [0, 0, 0, 0],
          [[0, 0, 1e308, 1e308, 5, 5]]]  # fmt: skip
VOC = (
    "<annotation><filename>a.png</filename><size><width>40</width><height>32</height></size><object><name>cat</name>"
    "<difficult>0</difficult><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>12</xmax><ymax>15</ymax></bndbox><polygon>"
    "<x1>2</x1><y1>3</y1><x2>12</x2><y2>3</y2><x3>5</x3><y3>9</y3></polygon></object></annotation>"
)
XML_VALUES = [
    "",
    "nan",
    "inf",
    "1e400",
    "-1",
    "x",
    "1_0",
    "９",
    "1e30",
    "bird",
    "<b/>",
    "&amp;",
    "9" * 5000,
    "&#0;",
    "1,5",
]
ENTITIES = "".join(f'<!ENTITY a{k} "{f"&a{k - 1};" * 10}">' for k in range(1, 9))


def write_images(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name in "ab":
        cv2.imwrite(str(folder / f"{name}.png"), np.full((32, 40, 3), 90, np.uint8))


def coco_case(rng: random.Random, folder: Path) -> Case:
    tree = copy.deepcopy(COCO)
    kind = rng.choice(["tree", "tree", "value", "text", "many points"])
    if kind == "tree":
        kind += " " + mutate_tree(tree, rng, VALUES)
    elif kind == "value":
        item = rng.choice(tree[rng.choice(["images", "annotations", "categories"])])  # type: ignore[arg-type]
        item[rng.choice([*item, "bbox", "segmentation"])] = rng.choice(VALUES)  # type: ignore[index]
    elif kind == "many points":
        count = rng.choice([100, 3000, 20_000])
        tree["annotations"][0]["segmentation"] = [[k * 7 % 400 / 10 for k in range(2 * count)]] * 2  # type: ignore[index]
    text = json.dumps(tree)
    if kind == "text":
        j = rng.randrange(len(text))
        text = rng.choice([text[:j], text[:j] + rng.choice('[]{},:"\\x') + text[j + 1 :], f"\ufeff{text}",
        f"[{text}]",
                           '{"images": ' + "[" * 100_000, text.replace("40", "9" * 5000)])  # fmt: skip
    (folder / "a.json").write_text(text, encoding="utf-8")
    write_images(folder)
    return case(rng, folder, "a.json", f"coco {kind}", text)


def voc_case(rng: random.Random, folder: Path) -> Case:
    text = VOC
    kind = rng.choice(["value", "value", "drop", "cut", "flip", "encoding", "root", "entities", "file", "deep", "many"])
    spot = rng.choice(list(re.finditer(r"<(\w+)>([^<>]*)</\1>", text)))
    j = rng.randrange(len(text))
    if kind == "value":
        text = text[: spot.start(2)] + rng.choice(XML_VALUES) + text[spot.end(2) :]
    elif kind == "drop":
        text = text[: spot.start()] + text[spot.end() :]
    elif kind == "cut":
        text = text[:j]
    elif kind == "flip":
        text = text[:j] + rng.choice("<>&\"'/;\x00\x01") + text[j + 1 :]
    elif kind == "encoding":
        text = (
            f'<?xml version="1.0" encoding="{rng.choice(["utf-16", "nosuch", "utf-7", "idna", "zlib", ""])}"?>' + text
        )
    elif kind == "root":
        text = rng.choice(["<a/>", "<annotation/>", "", "<annotation><object/></annotation>", "x"])
    elif kind == "entities":
        text = f'<!DOCTYPE a [<!ENTITY a0 "cat">{ENTITIES}]>' + text.replace("cat", "&a8;")
    elif kind == "file":
        text = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + text.replace("cat", "&x;")
    elif kind == "deep":
        text = "<annotation>" + "<object>" * 50_000 + "</object>" * 50_000 + "</annotation>"
    elif kind == "many":
        text = (
            text.replace("</annotation>", text[text.index("<object>") :].replace("</annotation>", "") * 3000)
            + text[-13:]
        )
    (folder / "Annotations").mkdir()
    write_images(folder / "JPEGImages")
    (folder / "Annotations/a.xml").write_text(text, encoding="utf-8")
    (folder / "Annotations/b.xml").write_text(VOC)
    return case(rng, folder, ".", f"voc {kind}", text)


def case(rng: random.Random, folder: Path, source: str, kind: str, text: str) -> Case:
    names = rng.choice(["", "names: [cat, dog]\n", "names: [dog, cat]\n"])
    (folder / "d.yaml").write_text(f"train: {source}\nval: {source}\n{names}")

    def run() -> None:
        config = load_data_config(folder / "d.yaml")
        sources = config.split("train")
        first, again = (load_annotations(sources, config.num_classes, progress=False) for _ in range(2))
        for one, two in zip(first.records, again.records, strict=True):
            if not np.array_equal(one.labels, two.labels) or len(one.segments) != len(two.segments):
                raise WrongResult("the cache gives other labels")
            values = np.concatenate([one.labels[:, 1:].reshape(-1), *(points.reshape(-1) for points in one.segments)])
            if not ((values >= 0) & (values <= 1)).all():
                raise WrongResult(f"values out of range: {one.labels.tolist()}")

    return Case(run, kind, text)


def make(rng: random.Random, folder: Path) -> Case:
    return coco_case(rng, folder) if rng.random() < 0.6 else voc_case(rng, folder)


def test_annotations(tmp_path: Path) -> None:
    assert faults(make, seeds(), tmp_path) == []
