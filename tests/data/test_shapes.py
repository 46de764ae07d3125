"""Tests of the generated default dataset: reproducible, labels that fit the pixels, written atomically."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.images import read
from data.labels.labels import load_annotations, read_labels
from data.shapes import _POLYGONS, MANIFEST, ShapesRecipe, _mask, draw_scene, ensure, generate, parse_shapes
from utils.errors import DataError

NAMES = {0: "square", 1: "ring", 2: "triangle", 3: "star", 4: "cross"}
KINDS = tuple(NAMES.values())
SMALL = ShapesRecipe(KINDS, train=6, val=3, test=2, imgsz=96, seed=3)


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_generate_is_deterministic(tmp_path: Path) -> None:
    for name in ("a", "b"):
        generate(tmp_path / name, SMALL)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(list((tmp_path / "a/images/train").glob("*.jpg"))) == 6
    assert len(list((tmp_path / "a/labels/test").glob("*.txt"))) == 2


def test_images_differ_between_splits_seeds_and_numbers(tmp_path: Path) -> None:
    generate(tmp_path / "a", SMALL)
    generate(tmp_path / "b", ShapesRecipe(KINDS, 6, 3, 2, 96, seed=4))
    images = [data for root in ("a", "b") for name, data in contents(tmp_path / root).items() if name.endswith("jpg")]
    assert len(set(images)) == len(images) == 22


def test_more_images_do_not_change_the_first_ones(tmp_path: Path) -> None:
    generate(tmp_path / "a", SMALL)
    generate(tmp_path / "b", ShapesRecipe(KINDS, 8, 3, 2, 96, seed=3))
    more = contents(tmp_path / "b")
    assert all(more[name] == data for name, data in contents(tmp_path / "a").items() if name != MANIFEST)


def test_labels_are_valid_and_varied(tmp_path: Path) -> None:
    generate(tmp_path, ShapesRecipe(KINDS, train=80, val=1, test=0, imgsz=96))
    result = load_annotations([tmp_path / "images" / "train"], len(NAMES), progress=False)
    assert result.report.labeled == 80 and result.report.messages == ()
    counts = [len(record.labels) for record in result.records]
    assert min(counts) == 1 and max(counts) == 6
    labels = np.concatenate([record.labels for record in result.records])
    assert set(labels[:, 0]) == {0, 1, 2, 3, 4} and np.bincount(labels[:, 0].astype(int)).min() > 0.1 * len(labels)
    assert labels[:, 3:].max() <= 0.46 and labels[:, 3:].min() > 0.02
    low, high = labels[:, 1:3] - labels[:, 3:] / 2, labels[:, 1:3] + labels[:, 3:] / 2
    assert low.min() > -1e-5 and high.max() < 1 + 1e-5


def painted(image: np.ndarray, background: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, right, bottom edge of the pixels that differ, in pixels."""
    rows, columns = np.nonzero(np.abs(image - background).max(-1) > 8)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize("kind", sorted(_POLYGONS))
def test_box_encloses_the_pixels_of_each_kind(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = np.full((200, 260, 3), 128, np.float32)
    monkeypatch.setattr("data.shapes._background", lambda *_: plain.copy())

    class Quiet(np.random.Generator):
        """No noise, one shape."""

        def standard_normal(self, *_: object) -> np.ndarray:  # type: ignore[override]
            return np.zeros((200, 260, 1), np.float32)

        def choice(self, *_: object, **__: object) -> int:  # type: ignore[override]
            return 0

    for seed in range(12):
        image, labels = draw_scene(Quiet(np.random.PCG64(seed)), 200, 260, [kind])
        (row,) = labels
        x, y, w, h = row[1:] * (260, 200, 260, 200)
        np.testing.assert_allclose(painted(image, plain), (x - w / 2, y - h / 2, x + w / 2, y + h / 2), atol=1.25)


def test_mask_covers_the_area_of_its_polygon() -> None:
    polygon = np.array([[10.25, 20.5], [30.25, 20.5], [30.25, 50.0], [10.25, 50.0]])
    mask, (top, left), box = _mask(polygon, 100, 100)
    np.testing.assert_allclose(box, (10.25, 20.5, 30.25, 50.0), atol=0.26)
    ys, xs = np.mgrid[0 : mask.shape[0], 0 : mask.shape[1]]
    weight = mask / mask.sum()
    center = ((xs + 0.5 + left) * weight).sum(), ((ys + 0.5 + top) * weight).sum()
    np.testing.assert_allclose(center, (20.25, 35.25), atol=0.15)


def test_ensure_draws_once_and_again_when_the_numbers_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "sets" / "shapes"
    ensure(root, SMALL)
    first = {path: path.stat().st_mtime_ns for path in root.rglob("*.jpg")}
    ensure(root, SMALL)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.jpg")} == first and len(first) == 11
    ensure(root, ShapesRecipe(KINDS, 4, 3, 2, 96))
    assert len(list((root / "images/train").iterdir())) == 4
    monkeypatch.setattr("data.shapes.VERSION", 99)
    ensure(root, ShapesRecipe(KINDS, 4, 3, 2, 96))
    assert json.loads((root / MANIFEST).read_text())["version"] == 99
    assert sorted(path.name for path in root.parent.iterdir()) == ["shapes", "shapes.old", "shapes.old2"]


def test_ensure_keeps_files_of_the_user_in_an_older_set(tmp_path: Path) -> None:
    ensure(tmp_path / "shapes", SMALL)
    (tmp_path / "shapes/images/train/mine.jpg").write_text("mine")
    ensure(tmp_path / "shapes", replace(SMALL, seed=7))
    assert (tmp_path / "shapes.old/images/train/mine.jpg").read_text() == "mine"


def test_ensure_does_not_touch_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="not a generated dataset"):
        ensure(tmp_path, SMALL)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    ensure(tmp_path / "empty", SMALL)
    assert (tmp_path / "empty" / MANIFEST).is_file()


def test_interrupted_generation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(4))

    def failing(*arguments: object) -> tuple[np.ndarray, np.ndarray]:
        next(calls)
        return draw_scene(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("data.shapes.draw_scene", failing)
    with pytest.raises(StopIteration):
        ensure(tmp_path / "shapes", SMALL)
    assert list(tmp_path.iterdir()) == []


def test_ensure_from_several_processes(tmp_path: Path) -> None:
    errors: list[Exception] = []

    def work() -> None:
        try:
            ensure(tmp_path / "shapes", SMALL)
        except (DataError, OSError) as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and [path.name for path in tmp_path.iterdir()] == ["shapes"]
    assert len(list((tmp_path / "shapes/images/train").iterdir())) == 6


def test_shapes_stay_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def flat(_: np.random.Generator, window: np.ndarray, mask: np.ndarray) -> None:
        drawn.append(int((mask > 127).sum()))
        window[mask > 127] = 40 * len(drawn)

    monkeypatch.setattr("data.shapes._paint", flat)
    monkeypatch.setattr("data.shapes._background", lambda _, height, width: np.zeros((height, width, 3), np.float32))
    overlapped = 0
    for seed in range(40):
        drawn.clear()
        image, labels = draw_scene(np.random.default_rng(seed), 160, 160, KINDS)
        assert len(drawn) == len(labels)
        nearest = np.round(image.mean(-1) / 40)  # noise is far below 20
        visible = np.array([(nearest == i + 1).sum() for i in range(len(drawn))]) / np.array(drawn)
        assert visible.min() > 0.6
        overlapped += int((visible < 0.9).any())
    assert overlapped > 3  # shapes do overlap


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("shapes", ShapesRecipe(KINDS)),
        ({"kind": "shapes", "train": 5, "seed": 7}, ShapesRecipe(KINDS, train=5, seed=7)),
        ("circles", "'shapes' or a mapping"),
        (None, "'shapes' or a mapping"),
        ({"kind": "shapes", "trian": 5}, "unknown key 'trian'; did you mean 'train'?"),
        ({"kind": "shapes", "train": 0}, "train is 0; an integer from 1"),
        ({"kind": "shapes", "imgsz": 32}, "imgsz is 32; an integer from 64"),
        ({"kind": "shapes", "val": 2.5}, "val is 2.5"),
        ({"kind": "shapes", "seed": True}, "seed is True"),
    ],
)
def test_recipe(value: object, expected: ShapesRecipe | str) -> None:
    problems: list[str] = []
    recipe = parse_shapes(value, NAMES, "x.yaml:3", problems)
    if isinstance(expected, str):
        assert recipe is None and expected in problems[0] and problems[0].startswith("x.yaml:3: ")
    else:
        assert recipe == expected and problems == []


def test_unknown_shape_is_named() -> None:
    problems: list[str] = []
    assert parse_shapes("shapes", {0: "circle", 1: "blob"}, "x.yaml:3", problems) is None
    assert "no shape is called 'blob'" in problems[0]


def test_files_hold_what_was_drawn(tmp_path: Path) -> None:
    generate(tmp_path, SMALL)
    image, labels = draw_scene(np.random.default_rng((3, 1, 2)), 96, 96, KINDS)
    assert np.abs(read(tmp_path / "images/val/val_00002.jpg").astype(int) - image).mean() < 8
    file = read_labels(tmp_path / "labels/val/val_00002.txt")
    np.testing.assert_allclose(file.labels, labels, atol=1e-6)
