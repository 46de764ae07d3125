"""Tests of conversion between formats: records are kept, targets are written atomically."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from data import convert as module
from data.config import load_data_config
from data.convert import convert, file_names, label_rows, main
from data.labels.labels import ImageRecord, load_annotations, read_labels
from utils.errors import DataError

POLYGONS = "2 0.1 0.2 0.5 0.2 0.5 0.8 0.2 0.6\n0 0.5 0.5 0.2 0.4\n"
FILES = {
    "train": {"a": "1 0.5 0.5 0.2 0.4\n0 0.25 0.75 0.1 0.1\n", "b": "", "c": POLYGONS, "d e": "2 0.95 0.5 0.2 0.3\n"},
    "val": {"a": "0 0.5 0.5 1 1\n", "z": "1 0.123456 0.654321 0.1 0.2\n"},
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A YOLO dataset with backgrounds, polygons, equal names in both splits, and a box beyond the border."""
    root = tmp_path / "source"
    for split, files in FILES.items():
        for i, (name, text) in enumerate(files.items()):
            for folder in ("images", "labels"):
                (root / folder / split).mkdir(parents=True, exist_ok=True)
            pixels = np.full((41 + i, 67, 3), 50 * i + (split == "val"), np.uint8)
            cv2.imwrite(str(root / "images" / split / f"{name}.png"), pixels)
            (root / "labels" / split / f"{name}.txt").write_text(text)
    (root / "d.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: [zebra, ant, 'my dog']\n")
    return root / "d.yaml"


def records(yaml: Path, split: str) -> tuple[ImageRecord, ...]:
    config = load_data_config(yaml)
    assert list(config.names.values()) == ["zebra", "ant", "my dog"]
    return load_annotations(config.split(split), 3).records


def assert_same(first: tuple[ImageRecord, ...], second: tuple[ImageRecord, ...], atol: float) -> None:
    assert len(first) == len(second)
    by_pixels = {cv2.imread(str(r.path)).tobytes(): r for r in second}
    for a in first:
        b = by_pixels[cv2.imread(str(a.path)).tobytes()]
        assert (a.height, a.width) == (b.height, b.width) and len(a.segments) == len(b.segments)
        np.testing.assert_allclose(a.labels, b.labels, atol=atol, rtol=0)
        for p, q in zip(a.segments, b.segments):
            np.testing.assert_allclose(p, q, atol=atol, rtol=0)


@pytest.mark.parametrize("first", ["yolo", "coco", "voc"])
@pytest.mark.parametrize("second", ["", "yolo", "coco", "voc"])
def test_records_stay_within_rounding(tmp_path: Path, source: Path, first: str, second: str) -> None:
    convert(source, tmp_path / "one", first)
    yaml = tmp_path / "one" / "data.yaml"
    if second:
        convert(yaml, tmp_path / "two", second)
        yaml = tmp_path / "two" / "data.yaml"
    tolerance = 1e-7 if {first, second} <= {"yolo", ""} else 1e-4  # 0.001 pixels of 41 are 2e-5
    for split in FILES:
        assert_same(records(source, split), records(yaml, split), tolerance)


def test_boxes_count_where_polygons_do_not_fit_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """YOLO's rows hold a box or a polygon, COCO's annotations both."""
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((100, 200, 3), np.uint8))
    polygon = [20, 30, 60, 30, 60, 50.02]
    boxes = [[20, 30, 40, 20], [10, 30, 50, 20], [20, 30, 40, 20.2], [150, 50, 60, 20]]
    items = [{"image_id": 1, "category_id": k, "bbox": box, "segmentation": [polygon]} for k, box in enumerate(boxes)]
    items[-1]["segmentation"] = []
    listed = [{"id": 1, "file_name": "a.png", "width": 200, "height": 100}]
    content = {"images": listed, "categories": [{"id": k, "name": f"c{k}"} for k in range(4)]}
    (tmp_path / "a.json").write_text(json.dumps(content | {"annotations": items}))
    with caplog.at_level("WARNING"):
        loaded = convert(tmp_path / "a.json", tmp_path / "yolo", "yolo")
    assert "1 polygons differ from their boxes by more than 0.1 pixels" in caplog.text  # the other one on reading
    config = load_data_config(tmp_path / "yolo/data.yaml")
    (record,) = load_annotations(config.split("train"), 4).records
    (given,) = loaded.splits["train"]
    first, second = (sorted(r.labels.tolist()) * np.array([1, 200, 100, 200, 100]) for r in (record, given))
    np.testing.assert_allclose(first, second, atol=0.1, rtol=0)
    assert sorted(map(len, record.segments)) == [3, 4, 4, 4]  # four corners where there is none


def test_single_annotation_file_is_a_source(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "coco", "coco")
    loaded = convert(tmp_path / "coco/annotations/train.json", tmp_path / "voc", "voc")
    assert list(loaded.splits) == ["train"] and loaded.names == ("zebra", "ant", "my dog")
    assert (tmp_path / "voc/JPEGImages/d_e.png").is_file()  # VOC's lists cannot hold a space
    assert convert(tmp_path / "voc", tmp_path / "own", "yolo").names == loaded.names  # by the data.yaml in the folder
    (tmp_path / "voc/data.yaml").unlink()
    loaded = convert(tmp_path / "voc", tmp_path / "yolo", "yolo", link=True)
    assert loaded.names == ("ant", "my dog", "zebra") and (tmp_path / "yolo/images/train/a.png").is_symlink()


def test_coco_output_is_what_pycocotools_reads(tmp_path: Path, source: Path) -> None:
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO

    convert(source, tmp_path / "out", "coco")
    known = COCO(str(tmp_path / "out/annotations/train.json"))
    assert len(known.getImgIds()) == 4 and len(known.getAnnIds()) == 5
    outlined = next(a for a in known.dataset["annotations"] if a["segmentation"] and a["category_id"] == 3)
    assert known.annToMask(outlined).sum() == pytest.approx(outlined["area"], rel=0.1)


def test_target_is_never_overwritten(tmp_path: Path, source: Path) -> None:
    (tmp_path / "there").mkdir()
    convert(source, tmp_path / "there", "yolo")  # empty: nothing to lose
    before = sorted(p.stat().st_mtime_ns for p in (tmp_path / "there").rglob("*"))
    with pytest.raises(DataError, match="there: already exists; give a new folder"):
        convert(source, tmp_path / "there", "coco")
    assert before == sorted(p.stat().st_mtime_ns for p in (tmp_path / "there").rglob("*"))


def test_interrupted_conversion_leaves_nothing(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(module.shutil, "copy2", full)
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="No space left"):
        convert(source, tmp_path / "out" / "new", "coco")
    assert list((tmp_path / "out").iterdir()) == []


def test_label_rows_read_back_exactly(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((50, 5)).astype(np.float32)
    values[:, 0] = np.arange(50)
    values[0, 1:] = 1e-7
    (tmp_path / "x.txt").write_text(label_rows(ImageRecord(tmp_path / "x.jpg", 9, 9, values)))
    np.testing.assert_array_equal(read_labels(tmp_path / "x.txt").labels, values)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/r/a.jpg", "/r/b.jpg"], ["a.jpg", "b.jpg"]),
        (["/r/x/a.jpg", "/r/y/a.jpg"], ["x_a.jpg", "y_a.jpg"]),
        (["/r/a.jpg", "/r/a.png", "/r/A.bmp"], ["a.jpg", "a_2.png", "A_3.bmp"]),
        (["/r/x/a.jpg", "/r/y/a.jpg", "/r/x_a.jpg"], ["x_a.jpg", "y_a.jpg", "x_a_2.jpg"]),
    ],
)
def test_file_names_differ(paths: list[str], names: list[str]) -> None:
    assert list(file_names([Path(p) for p in paths]).values()) == names


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["gone.yaml", "t", "--to", "yolo"], "gone.yaml: no such file"),
        (["{}", "t", "--to", "yolo", "--split", "0.8", "0.3"], "of sum 1 are needed"),
        (["{}", "t", "--to", "yolo", "--split", "1"], "--split 1: two or three numbers"),
        (["{}", "t", "--to", "yolo", "--split", "0.5", "0.5", "--seed", "-1"], "--seed -1: an integer from 0"),
        (["x", "t", "--to", "yaml"], "invalid choice"),
        (["x", "t", "--to", "yolo", "--lnik"], "did you mean '--link'"),
        (["x", "t", "--to", "http://u:secret@h/x"], "'http://***@h/x'"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    try:
        status = main([text.format(source.parent / "images") for text in arguments])
    except SystemExit as end:
        status = int(str(end.code))
    text = capsys.readouterr().err
    assert status == 2 and problem in text and text.count("\n") == 1


def test_command_writes_and_counts(tmp_path: Path, source: Path, caplog: pytest.LogCaptureFixture) -> None:
    (source.parent / "labels/train/a.txt").write_text("9 9 9 9 9\n")
    assert main([str(source), str(tmp_path / "out"), "--to", "coco"]) == 0
    content = json.loads((tmp_path / "out/annotations/train.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["b.png", "c.png", "d e.png"]


@pytest.mark.parametrize(("to", "refused"), [("voc", True), ("coco", True), ("yolo", False)])
def test_duplicate_names_are_refused_where_names_tell_classes_apart(
    tmp_path: Path, source: Path, to: str, refused: bool
) -> None:
    text = source.read_text()
    names = load_data_config(source).names
    source.write_text(text.replace(text[text.index("names:") :].splitlines()[0], f"names: {['cat'] * len(names)}"))
    if not refused:
        convert(source, tmp_path / "new", to)
        return
    with pytest.raises(DataError, match="names are given twice, such as 'cat'"):
        convert(source, tmp_path / "new", to)
    assert not (tmp_path / "new").exists()


def test_split_keeps_near_duplicates_together_and_is_seeded(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for i in range(30):
        coarse = np.random.default_rng(i // 2).integers(0, 256, (6, 8, 3), dtype=np.uint8)  # pairs of one scene
        cv2.imwrite(str(root / f"images/{i}.png"), cv2.resize(coarse, (80 + i % 2, 60), interpolation=cv2.INTER_CUBIC))
        (root / f"labels/{i}.txt").write_text(f"{i % 4 // 2} 0.5 0.5 0.2 0.2\n")
    options = ("--split", "0.6", "0.2", "0.2")
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        arguments = [str(root), str(tmp_path / name), "--to", "yolo", *options, f"--seed={seed}"]
        assert main(arguments) == 0
    found = {
        name: {s: {int(p.stem) for p in (tmp_path / name / "images" / s).iterdir()} for s in ("train", "val", "test")}
        for name in ("one", "again", "other")
    }
    assert found["one"] == found["again"] != found["other"]
    assert [len(part) for part in found["one"].values()] == pytest.approx([18, 6, 6], abs=2)
    assert all(number ^ 1 in part for part in found["one"].values() for number in part)


@pytest.mark.skipif(sys.platform != "linux", reason="file names of other systems are Unicode")
@pytest.mark.parametrize("to", ["yolo", "coco", "voc"])
def test_image_names_need_not_be_utf8(tmp_path: Path, source: Path, to: str) -> None:
    for folder, suffix in (("images", ".png"), ("labels", ".txt")):
        os.rename(source.parent / f"{folder}/train/a{suffix}", source.parent / f"{folder}/train/a\udcff{suffix}")
    convert(source, tmp_path / "out", to)
    assert [len(record.labels) for record in records(tmp_path / "out/data.yaml", "train")] == [2, 0, 2, 1]


def test_converted_set_without_val_says_so(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source.write_text(source.read_text().replace("val: images/val\n", ""))
    assert main([str(source), str(tmp_path / "one"), "--to", "voc"]) == 0
    text = capsys.readouterr().err
    assert "there is no split 'val'" in text and "--split 0.8 0.2" in text
    assert main([str(source), str(tmp_path / "two"), "--to", "voc", "--split", "0.5", "0.5"]) == 0
    assert "no split 'val'" not in capsys.readouterr().err
