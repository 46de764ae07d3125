"""Small datasets of YOLO text."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from data.labels import labels
from data.labels.labels import label_path, load_annotations


def image(path: Path, size: tuple[int, int] = (40, 60)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((*size, 3), 90, np.uint8))
    return path


def make_set(root: Path, rows: dict[str, str | None]) -> Path:
    """`images/train/<name>.jpg` with the label text given (None: no label file); returns the folder of images."""
    for name, text in rows.items():
        label = label_path(image(root / "images" / "train" / f"{name}.jpg"))
        label.parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            label.write_text(text, encoding="utf-8")
    return root / "images" / "train"


def load(source: Path, num_classes: int = 3, **options: object) -> labels.Annotations:
    return load_annotations([source], num_classes, progress=False, **options)  # type: ignore[arg-type]


GOOD = "1 0.5 0.5 0.2 0.4\n0 0.25 0.75 0.1 0.1\n"


def same(first: labels.Annotations, second: labels.Annotations) -> bool:
    assert first.report == second.report
    assert len(first.records) == len(second.records)
    for a, b in zip(first.records, second.records):
        assert (a.path, a.height, a.width) == (b.path, b.height, b.width)
        np.testing.assert_array_equal(a.labels, b.labels)
        assert a.labels.dtype == b.labels.dtype and len(a.segments) == len(b.segments)
        for p, q in zip(a.segments, b.segments):
            np.testing.assert_array_equal(p, q)
    return True


MIXED = {
    "a": GOOD,
    "b": "2 0.1 0.2 0.5 0.2 0.5 0.8\n0 0.5 0.5 0.5 0.5\n",
    "c": None,
    "d": "0 2 2 2 2\n",
    "e": "",
    "f": "1 0.1 0.1 0.1 0.1\n" * 2,
    "g": "0 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2\n",
}
