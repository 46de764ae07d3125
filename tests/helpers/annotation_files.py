"""Small datasets with COCO JSON or Pascal VOC XML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data.labels.labels import Annotations, load_annotations

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
