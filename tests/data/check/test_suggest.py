"""Dataset YAMLs suggested for folders and annotation files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from data.check.check import main
from data.check.suggest import suggest, suggested_config
from data.labels.labels import load_annotations
from utils.errors import DataError

COCO = {
    "images": [{"id": 1, "file_name": "1.jpg"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 2, 9, 9]}],
    "categories": [{"id": 7, "name": "cat"}],
}
XML = (
    "<annotation><filename>1.jpg</filename><object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin>"
    "<xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"
)


def write(root: Path, *files: str) -> Path:
    """Write files below the root: images, COCO and VOC annotations, YOLO labels and lists by their suffixes."""
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jpg":
            cv2.imwrite(str(path), np.full((40, 60, 3), 90, np.uint8))
        else:
            lists = {"train.txt": "1\n", "list.txt": "data/x/1.jpg\n", "obj.names": "a\nb\n"}
            text = {".json": json.dumps(COCO), ".xml": XML}.get(path.suffix, "1 0.5 0.5 0.2 0.2\n")
            path.write_text(lists.get(path.name, text))
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            ["images/train/1.jpg", "labels/train/1.txt", "images/val/2.jpg", "labels/val/2.txt"],
            {"train": "images/train", "val": "images/val", "names": ["class0", "class1"]},
        ),
        (
            ["train/images/1.jpg", "train/labels/1.txt", "valid/images/2.jpg", "valid/labels/2.txt", "test/3.jpg"],
            {"train": "train/images", "val": "valid/images", "test": "test", "names": ["class0", "class1"]},
        ),
        (["a/1.jpg", "a/1.txt", "obj.names"], {"train": ".", "names": ["a", "b"]}),
        (
            ["pics/1.jpg", "annotations/instances_train2017.json", "annotations/instances_val2017.json"],
            {"train": "annotations/instances_train2017.json", "val": "annotations/instances_val2017.json"},
        ),
        (
            ["train/1.jpg", "train/_annotations.coco.json", "valid/1.jpg", "valid/_annotations.coco.json"],
            {"train": "train/_annotations.coco.json", "val": "valid/_annotations.coco.json"},
        ),
        (["JPEGImages/1.jpg", "Annotations/1.xml"], {"train": "."}),
        (
            ["VOC/JPEGImages/1.jpg", "VOC/Annotations/1.xml", "VOC/ImageSets/Main/train.txt"],
            {"train": "VOC/ImageSets/Main/train.txt"},
        ),
        (["train/1.jpg", "train/1.xml", "valid/1.jpg", "valid/1.xml"], {"train": "train", "val": "valid"}),
    ],
)
def test_suggest_finds_splits_and_names(tmp_path: Path, files: list[str], expected: dict[str, Any]) -> None:
    write(tmp_path, *files)
    assert suggest(tmp_path) == {"path": str(tmp_path), **expected}
    config = suggested_config(tmp_path, tmp_path / "new" / "data.yaml")
    assert load_annotations(config.split("train"), config.num_classes, progress=False).report.boxes == 1


def test_suggested_config_is_the_yaml_of_the_folder_where_there_is_one(tmp_path: Path) -> None:
    write(tmp_path, "images/1.jpg", "labels/1.txt")
    (tmp_path / "a.yaml").write_text("model: x\n")
    (tmp_path / "my.yaml").write_text("train: images\nnames: [cat, dog]\n")
    config = suggested_config(tmp_path, tmp_path / "new.yaml")
    assert config.file == tmp_path / "my.yaml" and not (tmp_path / "new.yaml").exists()


def test_suggest_leaves_out_what_is_no_list_or_annotation(tmp_path: Path) -> None:
    write(tmp_path, "images/1.jpg", "labels/1.txt")
    for name in ("train.txt", "train.json"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00")
    os.mkfifo(tmp_path / "instances_train.json")
    assert suggest(tmp_path)["train"] == "."


def test_suggest_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images found"):
        suggest(tmp_path)


@pytest.mark.parametrize("source", [".", "annotations/instances_train.json"])
def test_check_accepts_folders_and_coco_files(tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "set", "pics/1.jpg", "annotations/instances_train.json")
    assert main([str(tmp_path / "set" / source), "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "Suggested dataset YAML" in text and "train: annotations/instances_train.json" in text and "cat" in text
    assert (tmp_path / "out/data.yaml").is_file()
