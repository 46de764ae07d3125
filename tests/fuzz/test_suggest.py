"""Dataset YAMLs suggested for random folders of images, labels and annotations, some of them damaged."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import cv2
import numpy as np
import pytest

from data.check.suggest import suggested_config
from data.labels.labels import load_annotations
from tests.helpers.fuzz import Case, faults, seeds

pytestmark = pytest.mark.fuzz

COCO = {
    "images": [{"id": 1, "file_name": "1.jpg"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 2, 9, 9]}],
    "categories": [{"id": 7, "name": "cat"}],
}
XML = (
    b"<annotation><filename>1.jpg</filename><object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin>"
    b"<xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"
)
CONTENTS = {
    ".jpg": cv2.imencode(".jpg", np.full((20, 30, 3), 90, np.uint8))[1].tobytes(),
    ".json": json.dumps(COCO).encode(),
    ".xml": XML,
    ".yaml": b"path: .\ntrain: images\nnames: [a, b]\n",
    ".names": b"a\nb\n",
}
TEXTS = [b"0 .5 .5 .2 .2\n", b"images/1.jpg\n1.jpg\n", b"1\n", b"a\nb\n"]
VOC = "VOCdevkit/VOC2007"
FOLDERS = [
    "", "images", "images/train", "images/val", "train", "valid/images", "labels", "labels/train", "annotations",
    "Annotations", "JPEGImages", "jpegimages", "ImageSets/Main", "imagesets", f"{VOC}/Annotations", f"{VOC}/JPEGImages",
    f"{VOC}/ImageSets/Main", ".hidden",
]  # fmt: skip
FILES = [
    "1.jpg", "2.jpg", "1.txt", "1.xml", "train.txt", "val.txt", "instances_train.json", "_annotations.coco.json",
    "x.json", "data.yaml", "classes.txt", "obj.names", "a.yaml",
]  # fmt: skip


def write_entry(path: Path, rng: random.Random) -> None:
    """Write a file with its usual content, or something damaged or special."""
    data = bytearray(CONTENTS.get(path.suffix) or rng.choice(TEXTS))
    kind = rng.choices(["good", "byte", "cut", "noise", "fifo", "link", "folder"], [80, 8, 4, 2, 2, 2, 2])[0]
    if kind == "byte":
        data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == "cut":
        del data[rng.randrange(len(data)) :]
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(rng.choice([path.name, "/nowhere", "..", "/dev/zero"]))
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(rng.randbytes(50) if kind == "noise" else data)


def make(rng: random.Random, folder: Path) -> Case:
    root = folder / "set"
    root.mkdir()
    for _ in range(rng.randint(1, 14)):
        path = root / rng.choice(FOLDERS) / rng.choice(FILES)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(path):
            write_entry(path, rng)
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*"))

    def run() -> None:
        config = suggested_config(root, folder / "new" / "data.yaml")
        for split in config.splits:
            load_annotations(config.split(split), config.num_classes, progress=False, require_labels=False)

    return Case(run, "folder", ", ".join(names))


def test_suggest(tmp_path: Path) -> None:
    assert faults(make, seeds(), tmp_path) == []
