"""Statistics of a dataset: counts, findings, near-duplicates."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from data.anchors import anchor_fit
from data.check import near_duplicates
from data.check.check import main, read_anchors, report, table
from data.check.near_duplicates import find_pairs, thumbnails
from data.check.statistics import below, doubled, gather, level_shares, outside
from data.images import decoding_problem, read
from data.labels.labels import Annotations, ImageRecord, LabelReport
from utils.errors import ConfigError

ANCHORS = np.array([[[10, 13], [16, 30]], [[30, 61], [62, 45]]], np.float64)


def record(name: str, rows: list[list[float]], size: tuple[int, int] = (100, 200)) -> ImageRecord:
    return ImageRecord(Path(name), *size, np.array(rows, np.float32).reshape(-1, 5))


def annotations(*records: ImageRecord) -> Annotations:
    boxes = sum(len(r.labels) for r in records)
    return Annotations(records, LabelReport(len(records), len(records), 0, 0, 0, 0, 0, boxes))


def scene(seed: int, size: tuple[int, int] = (120, 160)) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)


# ---- counts


def test_counts_and_sizes_at_the_input_size() -> None:
    first = record("a", [[0, 0.5, 0.5, 0.1, 0.1], [0, 0.2, 0.2, 0.5, 0.5], [2, 0.1, 0.1, 0.02, 0.2]])
    found = gather("train", annotations(first, record("b", []), record("c", [[0, 0.5, 0.5, 1, 1]])), 4, 400)
    assert found.boxes.tolist() == [3, 0, 1, 0] and found.images.tolist() == [2, 0, 1, 0]
    assert found.owners.tolist() == [0, 0, 0, 2] and found.classes.tolist() == [0, 0, 2, 0]
    np.testing.assert_allclose(found.sizes, [[40, 20], [200, 100], [8, 40], [400, 200]], rtol=1e-6)
    assert below(found, 21).tolist() == [2, 0] and below(found, 7.9).tolist() == []


def test_outside_and_doubled_find_boxes() -> None:
    over = record("a", [[0, 0.95, 0.5, 0.2, 0.2], [0, 0.5, 0.5, 1, 1.0]])  # 10 of 200 pixels to the right
    assert outside([record("x", []), over]) == [(1, 0, pytest.approx(10, abs=1e-4))]
    twice = record("b", [[1, 0.5, 0.5, 0.2, 0.2], [1, 0.5, 0.5, 0.2, 0.21], [0, 0.5, 0.5, 0.2, 0.2]])
    assert doubled([over, twice]) == [(1, 0, 1, pytest.approx(20 / 21, abs=1e-4))]


def test_levels_share_the_boxes() -> None:
    sizes = np.array([[10, 13], [39, 51], [41, 60], [200, 200], [1, 1]], np.float64)
    shares = level_shares(sizes, ANCHORS, 4.0)
    assert shares.tolist() == [3 / 5, 2 / 5]
    some = np.array([level_shares(size[None], ANCHORS, 4.0).any() for size in sizes]).mean()
    assert anchor_fit(sizes, ANCHORS, 4.0).best_possible_recall == some
    assert level_shares(np.zeros((0, 2)), ANCHORS, 4.0).tolist() == [0, 0]


# ---- near-duplicates


def changed(image: np.ndarray, how: str) -> np.ndarray:
    if how == "jpeg":
        return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 30])[1], cv2.IMREAD_COLOR)
    if how == "smaller":
        return cv2.resize(image, (97, 73), interpolation=cv2.INTER_AREA)
    if how == "brighter":
        return cv2.convertScaleAbs(image, alpha=1.2, beta=10)
    if how == "mirrored":
        return image[:, ::-1].copy()
    if how == "cropped":
        return image[3:-3, 4:-4].copy()
    return image


@pytest.mark.parametrize("how", ["same", "jpeg", "smaller", "brighter", "mirrored", "cropped"])
def test_changed_copies_are_found_and_nothing_else(tmp_path: Path, how: str) -> None:
    splits: dict[str, list[ImageRecord]] = {"train": [], "val": [], "test": []}
    for i in range(30):
        image = changed(scene(3), how) if i == 25 else scene(i)
        path = tmp_path / f"{i}.png"
        cv2.imwrite(str(path), image)
        splits["train" if i < 20 else "val" if i < 28 else "test"].append(record(str(path), [], image.shape[:2]))
    splits["test"].append(splits["train"][0])  # the same file is not a pair
    (pair,) = find_pairs(splits, {name: thumbnails(part, False) for name, part in splits.items()})
    assert (pair.first.stem, pair.second.stem, pair.splits) == ("3", "25", ("train", "val"))
    assert pair.mirrored == (how == "mirrored") and pair.correlation > 0.9


def test_large_images_and_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "_CHUNK", 2)
    part: dict[str, list[ImageRecord]] = {"train": [], "val": []}
    for i, split in enumerate(("val", "val", "val", "train")):
        image = scene(2 if i == 3 else i, (600, 800))
        path = tmp_path / f"{i}.jpg"
        cv2.imwrite(str(path), image)
        part[split].append(record(str(path), [], (600, 800)))
    (pair,) = find_pairs(part, {name: thumbnails(records, False) for name, records in part.items()})
    assert (pair.first.stem, pair.second.stem) == ("3", "2") and pair.correlation > 0.99


def test_each_image_is_named_once_with_its_nearest(tmp_path: Path) -> None:
    """A fixed camera: all images of the training split are near, a copy is nearest."""
    splits: dict[str, list[ImageRecord]] = {"train": [], "val": []}
    for i in range(9):
        image = scene(0)
        image[10 * (i % 8) : 10 * (i % 8) + 10, 20:60] ^= 0x1F
        cv2.imwrite(str(tmp_path / f"{i}.png"), image)
        splits["train" if i < 8 else "val"].append(record(str(tmp_path / f"{i}.png"), [], image.shape[:2]))
    (pair,) = find_pairs(splits, {name: thumbnails(part, False) for name, part in splits.items()})
    assert (pair.first.stem, pair.second.stem) == ("0", "8") and pair.correlation == pytest.approx(1)


def test_groups_of_near_duplicates_hold_mirrored_copies(tmp_path: Path) -> None:
    images = [scene(0), scene(1), changed(scene(0), "mirrored"), scene(2), changed(scene(1), "jpeg"), scene(3)]
    for i, image in enumerate(images):
        cv2.imwrite(str(tmp_path / f"{i}.png"), image)
    thumbs = thumbnails([record(str(tmp_path / f"{i}.png"), [], (120, 160)) for i in range(6)], False)
    groups = near_duplicates.group_near_duplicates(thumbs).tolist()
    assert groups[0] == groups[2] and groups[1] == groups[4] and len(set(groups)) == 4


def test_images_without_pattern_are_compared_by_brightness(tmp_path: Path) -> None:
    part = {}
    for name, gray in (("train", 50), ("val", 51), ("test", 90)):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((40, 40, 3), gray, np.uint8))
        part[name] = [record(str(tmp_path / f"{name}.png"), [], (40, 40))]
    (pair,) = find_pairs(part, {name: thumbnails(records, False) for name, records in part.items()})
    assert pair.splits == ("train", "val")


# ---- the command


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    rows = {
        "train/a": "0 0.5 0.5 0.5 0.5\n0 0.2 0.2 0.01 0.3\n",
        "train/b": "1 0.5 0.5 0.3 0.3\n",
        "train/c": "9 9\n",
        "val/d": "0 0.5 0.5 0.2 0.2\n",
    }
    for i, (name, text) in enumerate(rows.items()):
        path = tmp_path / "images" / f"{name}.png"
        label = tmp_path / "labels" / f"{name}.txt"
        for file in (path, label):
            file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), scene(0 if name == "val/d" else i))
        label.write_text(text)
    (tmp_path / "d.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: [fish, shark, whale]\n")
    return tmp_path / "d.yaml"


@pytest.mark.skipif(sys.platform != "linux", reason="file names of other systems are Unicode")
def test_name_of_the_output_folder_need_not_be_utf8(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(dataset), "--imgsz", "320", "--out", str(dataset.parent / "a\udcff")]) == 0
    assert "a\\udcff/check.txt" in capsys.readouterr().out


def test_command_reports_counts_and_findings(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = dataset.parent / "out"
    assert main([str(dataset), "--imgsz", "320", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    whole = (out / "check.txt").read_text()
    for line in (
        "train: no object of class 2 'whale'",
        "val: no object of class 1 'shark'",
        "images/train/a.png (train): 'fish' is 3.2 x 72.0 pixels",
        "labels/train/c.txt:1: 2 columns",
        "images/train/a.png (train) and ",
        "images/val/d.png (val): 1.000",
    ):
        assert line in text and line in whole, line
    table = {line.split()[0]: line.split() for line in text.partition("\n\n")[0].splitlines()[1:]}
    assert [table[row][-2] for row in ("split", "images", "with", "background", "left", "boxes")] == [
        "train", "3", "2", "0", "1", "3",
    ]  # fmt: skip
    image = cv2.imread(str(out / "check.png"))
    assert image is not None and image.shape[1] > 1000 and image.std() > 10


def test_control_characters_of_names_are_escaped(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, suffix in (("images", "png"), ("labels", "txt")):
        (dataset.parent / f"{folder}/train/a.{suffix}").rename(dataset.parent / f"{folder}/train/a\x1b[2J.{suffix}")
    assert main([str(dataset), "--out", str(dataset.parent / "out")]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text and "a\\x1b[2J.png (train): 'fish' is" in text


def test_long_lists_are_cut_on_the_terminal_only(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (dataset.parent / "labels/train/a.txt").write_text("".join(f"0 0.5 0.{i} 0.01 0.01\n" for i in range(100, 125)))
    out = dataset.parent / "out"
    assert main([str(dataset), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.count("'fish' is 6.4 x 4.8 pixels") == 10 and "... and 15 more" in text
    assert (out / "check.txt").read_text().count("'fish' is 6.4 x 4.8 pixels") == 25


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["gone.yaml"], "gone.yaml: no such file"),
        (["{}", "--imgsz", "8"], "--imgsz: 8 is out of range"),
        (["{}", "--cfg", "yolov5nn"], "did you mean"),
        (["{}", "--uot", "x"], "did you mean '--out'"),
    ],
)
def test_unusable_is_status_2_and_one_line(
    dataset: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    try:
        status = main([text.format(dataset) for text in arguments])
    except SystemExit as end:
        status = int(str(end.code))
    text = capsys.readouterr().err
    assert status == 2 and problem in text and text.count("\n") == 1


def test_missing_split_is_status_2(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset.write_text(dataset.read_text().replace("images/val", "images/vla"))
    assert main([str(dataset)]) == 2 and "split 'val': no such folder" in capsys.readouterr().err


def test_boxes_without_area_do_not_count_for_the_anchors() -> None:
    boxes = [[0, 0.5, 0.5, 0.1, 0.3]] * 9 + [[0, 0.5, 0.5, 0.1, 0]]
    for rows, expected in ((boxes, "1.0000"), (boxes[-1:], None)):
        split = gather("train", annotations(record("a", rows)), 1, 200)
        text = next(s.text() for s in report([split], {0: "x"}, [], ANCHORS, 200) if s.title.startswith("Anchors"))
        assert "poor" not in text and (expected in text.split() if expected else "train" not in text)


def test_anchors_of_a_model_file(tmp_path: Path) -> None:
    anchors = read_anchors("yolov5n")
    assert anchors is not None and anchors.shape == (3, 3, 2) and anchors[0, 0].tolist() == [10, 13]
    (tmp_path / "m.yaml").write_text("anchors: 3\n")
    assert read_anchors(tmp_path / "m.yaml") is None
    (tmp_path / "m.yaml").write_text("nc: 1\nanchors: [[1, 2], [3, x]]\n")
    with pytest.raises(ConfigError, match=r"m\.yaml:2: anchors is .*lists of widths"):
        read_anchors(tmp_path / "m.yaml")


def test_table_is_aligned() -> None:
    assert table([("a", "bb", 1), ("long", 2, 333)]) == ("  a     bb    1", "  long   2  333")


def test_strict_refuses_what_is_wrong(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [str(dataset), "--out", str(dataset.parent / "out")]
    assert main(options) == 0
    assert main([*options, "--strict"]) == 2
    assert "findings; " in capsys.readouterr().err


def test_strict_finds_damaged_jpegs_with_an_end_marker(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    cv2.imwrite(str(path), scene(1, (200, 300)))
    assert decoding_problem(path) == ""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + data[-2:])
    assert read(path).shape == (200, 300, 3)
    assert "JPEG data" in decoding_problem(path)


@pytest.mark.parametrize(
    "anchors", ["[[192, 0]]", "[[-1, 2]]", "[[.nan, 2]]", "[[1.0e30, 2]]", "[]", "[[1" + "0" * 400 + ", 2]]"]
)
def test_anchors_that_are_no_sizes(tmp_path: Path, anchors: str) -> None:
    (tmp_path / "m.yaml").write_text(f"anchors: {anchors}\n")
    with pytest.raises(ConfigError, match=r"m\.yaml:1: anchors is"):
        read_anchors(tmp_path / "m.yaml")


@pytest.mark.parametrize("imgsz", ["0", "16", "1000000"])
def test_input_size_is_bounded(dataset: Path, imgsz: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(dataset), "--imgsz", imgsz]) == 2
    assert "out of range" in capsys.readouterr().err
