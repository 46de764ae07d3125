"""Files of detection, number by number."""

import csv
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
    ("corners", "scores", "expected"),
    [
        # (0, 0, 33, 50) and (10, 20, 50, 80) in an image of 200 x 100
        (False, False, "0 0.0825 0.25 0.165 0.5\n2 0.15 0.5 0.2 0.6\n"),
        (False, True, "0 0.0825 0.25 0.165 0.5 0.25\n2 0.15 0.5 0.2 0.6 0.876543\n"),
        (True, False, "0 0 0 0.165 0.5\n2 0.05 0.2 0.25 0.8\n"),
    ],
)
def test_label_text(tmp_path, corners, scores, expected):
    writer = LabelWriter(tmp_path, FileNames(), corners, scores)
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
    assert [row[:2] for row in rows] == [["x/a.jpg", "'=cmd|' /C calc'!A0"], ["x/a.jpg", "'@x"], ["'-a.jpg_3", "'@x"]]


@pytest.mark.parametrize(
    ("fps", "expected"),
    [(30, 30), (29.97, 29.97), (100.0123, 100.01), (1e6, 65535), (0, 30), (float("nan"), 30), (0.1, 0.1)],
)
def test_writable_rate(fps, expected):
    assert writable_rate(fps) == pytest.approx(expected, abs=0.011)


def test_a_video_that_cannot_be_opened_ends_that_output_only(tmp_path, monkeypatch):
    monkeypatch.setattr(cv2.VideoWriter, "isOpened", lambda self: False)
    writer = ImageWriter(tmp_path, DrawStyle({0: "a", 2: "b"}), FileNames())
    for frame in (1, 2):
        writer.write(detections(BOXES, "v.mp4", "video", frame=frame), None)
    writer.write(detections(BOXES, "a.jpg", number=2), None)
    writer.close()
    assert (tmp_path / "a.jpg").is_file() and len(writer.failures) == 1


@pytest.mark.parametrize(("name", "folder"), [("a/b", "a_b"), ("..", "_"), ("", "_"), ("größe", "größe"), ("x.", "x")])
def test_crop_folders_stay_inside(tmp_path, name, folder):
    CropWriter(tmp_path, {2: name, 0: "other"}, FileNames()).write(detections(BOXES), None)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([folder, "other"])


def test_a_video_appears_when_it_is_finished(tmp_path):
    video = VideoFile(tmp_path / "v.mp4", 10.0, (64, 48))
    for size in ((48, 64), (96, 128)):  # the second one is scaled
        video.write(np.zeros((*size, 3), np.uint8))
    assert not (tmp_path / "v.mp4").exists()
    video.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]
    assert cv2.VideoCapture(str(tmp_path / "v.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 2


def test_a_video_that_lost_frames_is_an_error(tmp_path):
    video = VideoFile(tmp_path / "v.mp4", 10.0, (64, 48))
    video.write(np.zeros((48, 64, 3), np.uint8))
    video.frames += 5
    with pytest.raises(DataError, match="1 of 6 frames"):
        video.finish()
    assert not list(tmp_path.iterdir())


def test_a_video_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(DataError, match="cannot be written"):
        VideoFile(tmp_path / "gone/v.mp4", 10.0, (64, 48))


@pytest.mark.parametrize(
    ("classes", "expected"),
    [([], "no detections"), ([0], "1 cat"), ([1, 0, 0], "2 cats, 1 bus"), ([1, 1], "2 bus"), ([7, 7], "2 7s")],
)
def test_counts(classes, expected):
    assert counts_text(np.array(classes, int), {0: "cat", 1: "bus"}) == expected


def test_writer_that_fails_on_close_does_not_keep_the_others_open(tmp_path):
    first, second = (CsvWriter(tmp_path / folder / "predictions.csv", {0: "a"}) for folder in _folders(tmp_path))
    (tmp_path / "one/.predictions.csv.part").unlink()
    with pytest.raises(DataError, match=r"predictions\.csv.*cannot be written: No such file"):
        Outputs([first, second]).close()
    assert (tmp_path / "two/predictions.csv").is_file()


def _folders(place):
    for name in ("one", "two"):
        (place / name).mkdir()
    return "one", "two"
