"""Output files of detection."""

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from data.sources.frames import Frame
from engine.predict.detections import Detections, DrawStyle, counts_text
from engine.predict.writers import (
    CropWriter,
    CsvWriter,
    FileNames,
    ImageWriter,
    JsonWriter,
    LabelWriter,
    Outputs,
    VideoFile,
    writable_rate,
)
from utils.errors import DataError


def detections(boxes, path="a.jpg", kind="image", frame=0, number=1, size=(100, 200)):
    image = np.zeros((*size, 3), np.uint8)
    rows = np.array(boxes, np.float32).reshape(-1, 6)
    return Detections(Frame(image, Path(path), path, kind, number, frame=frame), rows, (64, 128))


BOXES = [[10.4, 19.6, 50.4, 79.6, 0.87654321, 2], [0.4, 0.0, 33.3, 50.0, 0.25, 0]]


@pytest.mark.parametrize(
    ("xyxy", "confidence", "expected"),
    [
        # (0, 0, 33, 50) and (10, 20, 50, 80) in an image of 200 x 100
        (False, False, "0 0.0825 0.25 0.165 0.5\n2 0.15 0.5 0.2 0.6\n"),
        (False, True, "0 0.0825 0.25 0.165 0.5 0.25\n2 0.15 0.5 0.2 0.6 0.876543\n"),
        (True, False, "0 0 0 0.165 0.5\n2 0.05 0.2 0.25 0.8\n"),
    ],
)
def test_label_text(tmp_path, xyxy, confidence, expected):
    writer = LabelWriter(tmp_path, FileNames(), xyxy, confidence)
    writer.write(detections(BOXES), None)
    writer.write(detections([], "empty.jpg", number=2), None)
    writer.write(detections(BOXES, "v.mp4", "video", frame=12, number=3), None)
    assert (tmp_path / "a.txt").read_text() == expected == (tmp_path / "v_12.txt").read_text()
    assert len(list(tmp_path.iterdir())) == writer.files == 2  # none for the image without boxes


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (["x/a.jpg", "y/A.jpg", "z/a.png"], ["a", "A_2", "a_3"]),
        (["in/clip.avi", "in/clip_1.jpg", "in/clip_x.jpg"], ["clip", "clip_1_2", "clip_x"]),  # frames are clip_<frame>
        (["in/clip_1.jpg", "in/clip.avi"], ["clip_1", "clip_2"]),
        (["a.jpg", "b/a.jpg", "a_2.jpg"], ["a", "a_2", "a_2_2"]),
        (["x/clip.avi", "y/clip.avi", "clip.jpg"], ["clip", "clip-2", "clip-3"]),
        (["clip_1.jpg", "clip.avi", "clip_2.jpg"], ["clip_1", "clip_2", "clip_2-2"]),
    ],
)
def test_file_names_are_unique_within_a_run(inputs, expected):
    names = FileNames()
    kinds = ["video" if path.endswith(".avi") else "image" for path in inputs]
    frames = [detections([], path, kind, number=n).frame for n, (path, kind) in enumerate(zip(inputs, kinds), 1)]
    assert [names.stem_for(f) for f in frames] == expected
    assert [names.stem_for(f) for f in frames] == expected  # the same inputs again


def test_csv_names_the_path_and_holds_no_formula(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = CsvWriter(tmp_path / "p.csv", {0: "=cmd|' /C calc'!A0", 2: "@x"})
    writer.write(detections(BOXES, "x/a.jpg"), None)
    writer.write(detections(BOXES[:1], tmp_path / "-a.jpg", "video", frame=3, number=2), None)
    writer.close()
    with open("p.csv", newline="") as stream:
        rows = list(csv.reader(stream))[1:]
    assert [row[:2] for row in rows] == [["x/a.jpg", "'@x"], ["x/a.jpg", "'=cmd|' /C calc'!A0"], ["'-a.jpg_3", "'@x"]]


@pytest.mark.parametrize(
    ("fps", "expected"),
    [(30, 30), (29.97, 29.97), (100.0123, 100.01), (1e6, 65535), (0, 30), (float("nan"), 30), (0.1, 0.1)],
)
def test_writable_rate(fps, expected):
    assert writable_rate(fps) == pytest.approx(expected, abs=0.011)


def test_outputs_continue_after_video_that_cannot_be_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(cv2.VideoWriter, "isOpened", lambda self: False)
    outputs = Outputs([ImageWriter(tmp_path, DrawStyle({0: "a", 2: "b"}), FileNames())])
    for frame in (1, 2):
        outputs.write((detections(BOXES, "v.mp4", "video", frame=frame), None))
    outputs.write((detections(BOXES, "a.jpg", number=2), None))
    outputs.close()
    assert (tmp_path / "a.jpg").is_file() and len(outputs.failures) == 1


def test_outputs_record_video_that_fails_on_closing(tmp_path):
    """The first video lacks a frame; the second one and the table are complete."""
    names = {0: "a", 2: "b"}
    images = ImageWriter(tmp_path, DrawStyle(names), FileNames())
    outputs = Outputs([images, CsvWriter(tmp_path / "p.csv", names)])
    for number, name in enumerate(("v.mp4", "w.mp4"), 1):
        outputs.write((detections(BOXES, name, "live", frame=1, number=number), None))
    images._videos[1].frames += 1
    outputs.close()
    (failure,) = outputs.failures
    assert failure.startswith(f"{tmp_path}/v.mp4.mp4: only 1 of 2 frames")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.csv", "w.mp4.mp4"]


@pytest.mark.parametrize("writer", [CsvWriter, JsonWriter])
def test_failing_table_is_removed(tmp_path, monkeypatch, writer):
    outputs = Outputs([writer(tmp_path / "p", {0: "a", 2: "b"})])
    outputs.write((detections(BOXES), None))
    monkeypatch.setattr("engine.predict.writers.class_name", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    outputs.write((detections(BOXES), None))
    outputs.close()
    assert outputs.failures == [f"cannot be written: no space; {writer.__name__} writes no more"] and not list(
        tmp_path.iterdir()
    )


@pytest.mark.parametrize("frames", [0, 1, 2])
def test_json_is_valid_for_any_number_of_frames(tmp_path, frames):
    writer = JsonWriter(tmp_path / "p.json", {})
    for number in range(frames):
        writer.write(detections(BOXES, f"{number}.jpg", number=number), None)
    writer.close()
    assert [e["image"] for e in json.loads((tmp_path / "p.json").read_text())] == [f"{n}.jpg" for n in range(frames)]


def test_crops_are_numbered_best_first(tmp_path):
    """The best crop has the image's name; no crop of one image overwrites that of another."""
    rows = [[10, 10, 90, 60, 0.9, 0], [10, 10, 30, 20, 0.8, 0]]
    writer = CropWriter(tmp_path, {0: "a"}, FileNames())
    writer.write(detections(rows, "IMG_2470.jpg"), None)
    writer.write(detections(rows[:1], "IMG_2470_2.jpg", number=2), None)
    writer.write(detections(rows[:1], "v.mp4", "video", frame=7, number=3), None)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["IMG_2470.jpg", "IMG_2470_2.jpg", "IMG_2470_2_2.jpg", "v_7.jpg"]
    assert (
        cv2.imread(str(tmp_path / "a/IMG_2470.jpg")).shape[1]
        > 80
        > cv2.imread(str(tmp_path / "a/IMG_2470_2.jpg")).shape[1]
    )


@pytest.mark.parametrize(("name", "folder"), [("a/b", "a_b"), ("..", "_"), ("", "_"), ("größe", "größe"), ("x.", "x")])
def test_crop_folders_stay_inside(tmp_path, name, folder):
    CropWriter(tmp_path, {2: name, 0: "other"}, FileNames()).write(detections(BOXES), None)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([folder, "other"])


def test_video_is_renamed_when_finished(tmp_path):
    video = VideoFile(tmp_path / "v.mp4", 10.0, (64, 48))
    for size in ((48, 64), (96, 128)):  # the second one is scaled
        video.write(np.zeros((*size, 3), np.uint8))
    assert not (tmp_path / "v.mp4").exists()
    video.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]
    assert cv2.VideoCapture(str(tmp_path / "v.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 2


def test_video_that_lost_frames_is_an_error(tmp_path):
    video = VideoFile(tmp_path / "v.mp4", 10.0, (64, 48))
    video.write(np.zeros((48, 64, 3), np.uint8))
    video.frames += 5
    with pytest.raises(DataError, match="1 of 6 frames were"):
        video.finish()
    assert not list(tmp_path.iterdir())


def test_video_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(DataError, match="cannot be written"):
        VideoFile(tmp_path / "gone/v.mp4", 10.0, (64, 48))


@pytest.mark.parametrize(
    ("classes", "expected"),
    [([], "no detections"), ([0], "1 cat"), ([1, 0, 0], "2 cats, 1 bus"), ([1, 1], "2 bus"), ([7, 7], "2 7s")],
)
def test_counts_text(classes, expected):
    assert counts_text(np.array(classes, int), {0: "cat", 1: "bus"}) == expected


def test_outputs_close_all_writers_if_one_fails(tmp_path):
    first, second = (CsvWriter(tmp_path / folder / "predictions.csv", {0: "a"}) for folder in _folders(tmp_path))
    (tmp_path / "one/.predictions.csv.part").unlink()
    outputs = Outputs([first, second])
    outputs.close()
    assert outputs.failures == [
        f"{tmp_path}/one/predictions.csv: cannot be written: No such file or directory; CsvWriter writes no more"
    ]
    assert (tmp_path / "two/predictions.csv").is_file()


def _folders(place):
    for name in ("one", "two"):
        (place / name).mkdir()
    return "one", "two"
