"""Detection from source to files, with a runtime that finds rectangles by color, and with a checkpoint."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import detect as script
from engine.cli.config import DetectConfig
from engine.predict import predictor
from engine.predict.inference import prepare
from engine.predict.predictor import Predictor, detect, input_size, warn_without_effect
from engine.runtimes.pytorch import PyTorchRuntime
from models.yolo import DetectionModel
from tests.helpers.color_runtime import COLORS, ColorRuntime, rectangles
from tests.helpers.videos import write_video
from utils.errors import CheckpointError, ConfigError, DataError
from utils.files import ROOT

CHECKPOINT = ROOT / "tests/parity/data/official_checkpoint/yolov5n_bccd.pt"


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)
    return path


@pytest.fixture
def runtime(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    made = ColorRuntime()
    monkeypatch.setattr(predictor, "open_runtime", lambda *_, **__: made)
    return made


def run(source, **options):
    return detect(DetectConfig.from_keywords(weights=["x.pt"], source=str(source), imgsz=[320], **options))


def label_rows(path):
    return [[float(v) for v in line.split(" ")] for line in path.read_text().splitlines()]


ONE = rectangles((240, 480), (0, 48, 24, 240, 120), (2, 300, 120, 420, 216))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[2, 0.75, 0.7, 0.25, 0.4], [0, 0.3, 0.3, 0.4, 0.4]]),  # lowest confidence first
        ({"save_conf": True}, [[2, 0.75, 0.7, 0.25, 0.4, 0.3], [0, 0.3, 0.3, 0.4, 0.4, 0.9]]),
        ({"save_format": 1}, [[2, 0.625, 0.5, 0.875, 0.9], [0, 0.1, 0.1, 0.5, 0.5]]),
        ({"classes": [0, 1]}, [[0, 0.3, 0.3, 0.4, 0.4]]),
        ({"conf_thres": 0.5}, [[0, 0.3, 0.3, 0.4, 0.4]]),
        ({"max_det": 1}, [[0, 0.3, 0.3, 0.4, 0.4]]),
    ],
)
def test_label_files(runtime, tmp_path, options, expected):
    save(tmp_path / "a.png", ONE)
    report = run(tmp_path / "a.png", save_txt=True, **options)
    rows = label_rows(report.folder / "labels/a.txt")
    # The input is 2/3 of the image: linear interpolation moves an edge by at most 1.5 pixels.
    assert [r[0] for r in rows] == [e[0] for e in expected]
    np.testing.assert_allclose([r[1:] for r in rows], [e[1:] for e in expected], atol=1.6 / 240)
    assert report.frames == 1 and report.detections == len(expected)
    xyxyn = np.array([r[1:5] for r in rows]) if options.get("save_format") else None
    if xyxyn is not None:  # integer pixels
        pixels = xyxyn * (480, 240, 480, 240)
        np.testing.assert_allclose(pixels, pixels.round(), atol=2e-3)


def test_agnostic_nms(runtime, tmp_path):
    image = rectangles((320, 320), (0, 50, 50, 250, 250))
    image[60:64, 60:240] = COLORS[1]  # green lines inside the red box, with almost the same bounding box
    image[236:240, 60:240] = COLORS[1]
    save(tmp_path / "a.png", image)
    assert run(tmp_path / "a.png").detections == 2
    assert run(tmp_path / "a.png", agnostic_nms=True).detections == 1


def test_images_keep_their_names_and_show_boxes(runtime, tmp_path):
    save(tmp_path / "in/größe фото.png", ONE)
    save(tmp_path / "in/b.BMP", ONE)
    save(tmp_path / "in/c.jpg", rectangles((64, 64)))
    report = run(tmp_path / "in")
    assert report.folder == Path("runs/detect/exp")
    assert sorted(p.name for p in report.folder.iterdir()) == ["b.BMP", "c.jpg", "größe фото.png"]
    drawn = cv2.imdecode(np.fromfile(report.folder / "größe фото.png", np.uint8), cv2.IMREAD_COLOR)
    assert drawn.shape == ONE.shape and not np.array_equal(drawn, ONE)
    assert (drawn[5, 5] == 90).all()
    assert run(tmp_path / "in").folder == Path("runs/detect/exp2")


def test_exist_ok_reports_stale_files(runtime, tmp_path, caplog):
    save(tmp_path / "a.png", ONE)
    run(tmp_path / "a.png", save_txt=True)
    assert "--exist-ok" not in caplog.text
    assert run(tmp_path / "a.png", exist_ok=True).folder == Path("runs/detect/exp")
    assert "runs/detect/exp: 2 file(s) of earlier runs stay unless overwritten" in caplog.text


def test_hidden_labels_and_line_thickness(runtime, tmp_path):
    save(tmp_path / "a.png", ONE)
    looks = {}
    for name, options in {
        "all": {},
        "no conf": {"hide_conf": True},
        "no text": {"hide_labels": True},
        "thin": {"hide_labels": True, "line_thickness": 1},
    }.items():
        looks[name] = cv2.imread(str(run(tmp_path / "a.png", name=name, **options).folder / "a.png"))
    changed = {name: int((image != ONE).any(2).sum()) for name, image in looks.items()}
    assert changed["all"] > changed["no conf"] > changed["no text"] > changed["thin"] > 0


def test_equal_names_from_two_folders_do_not_overwrite(runtime, tmp_path, caplog):
    save(tmp_path / "one/a.png", ONE)
    save(tmp_path / "two/a.png", rectangles((64, 64), (0, 10, 10, 40, 40)))
    save(tmp_path / "two/a.jpg", rectangles((64, 64), (0, 10, 10, 40, 40)))
    with caplog.at_level("INFO"):
        report = run(tmp_path / "*/a.*", save_txt=True, save_crop=True, save_csv=True)
    assert sorted(p.name for p in report.folder.glob("a*")) == ["a.png", "a_2.jpg", "a_3.png"]
    assert cv2.imread(str(report.folder / "a.png")).shape == ONE.shape
    assert sorted(p.name for p in (report.folder / "labels").iterdir()) == ["a.txt", "a_2.txt", "a_3.txt"]
    assert sorted(p.name for p in (report.folder / "crops/red").iterdir()) == ["a.jpg", "a_2.jpg", "a_3.jpg"]
    assert "another input has the name a; a_2 is used" in caplog.text
    rows = (report.folder / "predictions.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["one/a.png", "one/a.png", "two/a.jpg", "two/a.png"]


BOX_A, BOX_B = [48, 24, 240, 120], [300, 120, 420, 216]


def test_csv_json_and_crops(runtime, tmp_path):
    save(tmp_path / "in/a.png", rectangles((240, 480), (0, 48, 24, 240, 120), (1, 300, 120, 420, 216)))
    save(tmp_path / "in/b.png", rectangles((64, 64)))
    report = run(tmp_path / "in", save_csv=True, save_json=True, save_crop=True, nosave=True)
    assert not list(report.folder.glob("*.png"))
    with open(report.folder / "predictions.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))
    assert rows == [
        ["Image Name", "Prediction", "Confidence", "xmin", "ymin", "xmax", "ymax"],
        ["in/a.png", "red", "0.9000", *rows[1][3:]],
        ["in/a.png", "green/../x", "0.6000", *rows[2][3:]],
    ]
    np.testing.assert_allclose([[float(v) for v in row[3:]] for row in rows[1:]], [BOX_A, BOX_B], atol=1.6)
    a, b = json.loads((report.folder / "predictions.json").read_text(encoding="utf-8"))
    assert (a["height"], a["width"], a["frame"]) == (240, 480, None) and b["detections"] == []
    assert [d["name"] for d in a["detections"]] == ["red", "green/../x"]  # most confident first
    np.testing.assert_allclose(a["detections"][0]["box_xyxy"], [48, 24, 240, 120], atol=1.6)
    folders = sorted(p.name for p in (report.folder / "crops").iterdir())
    assert folders == ["green_.._x", "red"]  # a class name cannot leave the folder
    crop = cv2.imread(str(report.folder / "crops/red/a.jpg"))
    # 192 x 96 grown by 2 % and 10 pixels
    assert abs(crop.shape[1] - 206) <= 3 and abs(crop.shape[0] - 108) <= 3
    assert abs(crop[50, 100].astype(int) - (0, 0, 255)).max() < 30  # no box is drawn


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"save_conf": True, "save_format": 1}, ["save-conf", "save-format"]),
        ({"save_conf": True, "save_txt": True, "hide_conf": True, "line_thickness": 2}, []),
        ({"nosave": True, "line_thickness": 2, "hide_labels": True}, ["line-thickness", "hide-labels"]),
        ({"nosave": True, "view_img": True, "line_thickness": 2}, []),
        ({"hide_labels": True, "hide_conf": True}, ["hide-conf"]),
    ],
)
def test_options_without_effect_are_named(caplog, options, named):
    warn_without_effect(DetectConfig(**options))
    assert [message.split(" has no effect: ")[0] for message in caplog.messages] == [f"--{name}" for name in named]


def test_nosave_creates_no_folder(runtime, tmp_path):
    save(tmp_path / "a.png", ONE)
    assert run(tmp_path / "a.png", nosave=True).folder is None
    assert not (tmp_path / "runs").exists()


def make_video(path, frames=12, size=(160, 96), fps=12.5):
    """A red square that moves 8 pixels per frame."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
    for i in range(frames):
        writer.write(rectangles((size[1], size[0]), (0, 8 * i, 32, 8 * i + 32, 64)))
    writer.release()
    return path


def test_videos_keep_size_fps_and_order(runtime, tmp_path):
    report = run(make_video(tmp_path / "v.mp4"), save_txt=True, save_csv=True)
    assert report.frames == 12
    capture = cv2.VideoCapture(str(report.folder / "v.mp4"))
    shape = [capture.get(p) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FPS)]
    assert shape == [160, 96, 12.5]
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 12
    centers = [label_rows(report.folder / f"labels/v_{i}.txt")[0][1] * 160 for i in range(1, 13)]
    np.testing.assert_allclose(centers, [8 * i + 16 for i in range(12)], atol=2)
    lines = (report.folder / "predictions.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == [f"v.mp4_{i}" for i in range(1, 13)]
    assert not list(report.folder.glob(".*"))  # no temporary file is left


def test_frames_of_videos_and_images_share_no_name(runtime, tmp_path, caplog):
    """Two videos of one name, and an image that is named like a frame of the first."""
    caplog.set_level("INFO")
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        make_video(tmp_path / folder / "clip.avi", frames=2)
    save(tmp_path / "x/clip_1.jpg", rectangles((64, 64), (0, 10, 10, 40, 40)))
    report = run(tmp_path / "*/*", save_txt=True, save_csv=True, save_crop=True)
    assert report.frames == 5
    stems = ["clip-2_1", "clip-2_2", "clip_1", "clip_1_2", "clip_2"]
    assert sorted(path.stem for path in (report.folder / "labels").iterdir()) == stems
    assert sorted(path.stem for path in (report.folder / "crops/red").iterdir()) == stems
    assert sorted(path.name for path in report.folder.glob("clip*")) == ["clip-2.mp4", "clip.mp4", "clip_1_2.jpg"]
    rows = (report.folder / "predictions.csv").read_text(encoding="utf-8").splitlines()[1:]
    images = {"x/clip.avi_1", "x/clip.avi_2", "x/clip_1.jpg", "y/clip.avi_1", "y/clip.avi_2"}
    assert {row.split(",")[0] for row in rows} == images
    assert f"5 label file(s) in {report.folder}" in caplog.text


def test_video_stride_keeps_the_true_speed(runtime, tmp_path):
    report = run(make_video(tmp_path / "v.mp4"), vid_stride=5, save_txt=True)
    assert sorted(p.name for p in (report.folder / "labels").iterdir()) == ["v_1.txt", "v_11.txt", "v_6.txt"]
    capture = cv2.VideoCapture(str(report.folder / "v.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 3 and capture.get(cv2.CAP_PROP_FPS) == pytest.approx(2.5)


def test_mixed_folder_with_broken_files(runtime, tmp_path, caplog):
    folder = tmp_path / "in"
    save(folder / "a.png", ONE)
    make_video(folder / "v.mp4", frames=3)
    make_video(folder / "w.mp4", frames=2)
    (folder / "bad.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "notes.md").write_text("x")
    with caplog.at_level("INFO"):
        report = run(folder)
    assert report.frames == 6 and len(report.failures) == 1 and "bad.jpg" in report.failures[0]
    assert sorted(p.name for p in report.folder.iterdir()) == ["a.png", "v.mp4", "w.mp4"]
    assert f"image 1/4 {folder / 'a.png'}: 160x320 1 red, 1 größe," in caplog.text
    assert "video 3/4" in caplog.text and "3 frames" in caplog.text and "notes.md" in caplog.text


def test_ctrl_c_completes_files(runtime, tmp_path):
    runtime.error_at = 8
    with pytest.raises(KeyboardInterrupt):
        run(make_video(tmp_path / "v.mp4"), save_csv=True, save_json=True)
    folder = tmp_path / "runs/detect/exp"
    assert sorted(p.name for p in folder.iterdir()) == ["predictions.csv", "predictions.json", "v.mp4"]
    assert cv2.VideoCapture(str(folder / "v.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 7
    assert len(json.loads((folder / "predictions.json").read_text())) == 7


def test_failing_writer_ends_that_output_only(runtime, tmp_path, monkeypatch):
    def full(*_):
        raise DataError("disk full")

    monkeypatch.setattr("engine.predict.writers.write_image", full)
    for i in range(12):
        save(tmp_path / f"in/{i}.png", ONE)
    report = run(tmp_path / "in", save_txt=True)
    assert report.failures == ("disk full",) * 9 + ("disk full; ImageWriter writes no more",)
    assert len(list((report.folder / "labels").iterdir())) == 12


def test_streams_are_one_batch(runtime, tmp_path):
    one = write_video(tmp_path / "one.avi", frames=4, fps=50)
    two = write_video(tmp_path / "two.avi", frames=4, fps=50, size=(64, 64))
    (tmp_path / "list.streams").write_text(f"{one}\n{two}\n")
    report = run(tmp_path / "list.streams")
    assert runtime.shapes[0] == (2, 3, 320, 320)  # different shapes share the whole square
    assert len(list(report.folder.glob("*.mp4"))) == 2


def test_fixed_runtimes_get_their_size_and_batch(runtime, tmp_path):
    runtime.imgsz, runtime.fixed_batch = (256, 192), 1
    one = write_video(tmp_path / "one.avi", frames=2, fps=50)
    (tmp_path / "list.streams").write_text(f"{one}\n{one}\n")
    run(tmp_path / "list.streams")
    assert set(runtime.shapes) == {(1, 3, 256, 192)}


@pytest.mark.parametrize(
    ("asked", "expected", "says"),
    [
        ([640], (640, 640), ""),
        ([320, 640], (320, 640), ""),
        ([300], (320, 320), "multiples of the stride 32"),
        ([33, 64], (64, 64), "multiples"),
    ],
)
def test_input_size(asked, expected, says, caplog):
    assert input_size(asked, ColorRuntime()) == expected
    assert says in caplog.text and bool(says) == bool(caplog.text)


def test_prepare_makes_the_smallest_rectangle():
    frame = predictor.Frame(rectangles((240, 480), (0, 0, 0, 480, 240)), Path("a"), "a", "image")
    images = prepare((frame,), (320, 320), 32, auto=True).images
    assert images.shape == (1, 3, 160, 320)
    assert images[0, :, 80, 160].tolist() == [255, 0, 0]  # RGB
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert prepare((frame,), (320, 320), 32, auto=False).images.shape == (1, 3, 320, 320)


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        ({"classes": [0, 3]}, ConfigError, ["--classes 3", "0 to 2"]),
        ({"view_img": True}, ConfigError, ["--view-img", "display"]),
        ({"visualize": True}, ConfigError, ["--visualize", ".pt"]),
        ({"device": "7"}, ConfigError, ["--device 7"]),
        ({"imgsz": [1, 2, 3]}, ConfigError, ["--imgsz"]),
        ({"conf_thres": 1.5}, ConfigError, ["--conf-thres", "1.5"]),
        ({"source": "gone.jpg"}, DataError, ["gone.jpg", "no such file"]),
        ({"data": "gone.yaml"}, ConfigError, []),
    ],
)
def test_user_errors_leave_nothing_behind(runtime, tmp_path, monkeypatch, options, error, parts):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    if "data" in options:
        runtime.names, error = {0: "0", 1: "1", 2: "2"}, (ConfigError, DataError)
    save(tmp_path / "a.png", ONE)
    with pytest.raises(error) as caught:
        detect(DetectConfig.from_keywords(**{"weights": ["x.pt"], "source": str(tmp_path / "a.png"), **options}))
    assert all(p in str(caught.value) for p in parts) and "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_class_names_from_dataset_yaml(runtime, tmp_path):
    runtime.names = {0: "0", 1: "1", 2: "2"}
    (tmp_path / "d.yaml").write_text("path: .\ntrain: .\nval: .\nnames: [rot, gruen, blau]\n")
    save(tmp_path / "in/a.png", ONE)
    report = run(tmp_path / "in", data="d.yaml", save_json=True)
    (a,) = json.loads((report.folder / "predictions.json").read_text())
    assert [d["name"] for d in a["detections"]] == ["rot", "blau"]


def test_detect_without_weights_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="--weights"):
        detect(DetectConfig())


def test_default_source_is_shipped_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert predictor.resolve_source("data/images") == str(ROOT / "data/images")
    (tmp_path / "data/images").mkdir(parents=True)
    assert predictor.resolve_source("data/images") == "data/images"
    assert predictor.resolve_source("x.jpg") == "x.jpg"


@pytest.fixture(scope="module")
def tiny():
    """A random network; its boxes are only compared with each other."""
    torch.manual_seed(0)
    spec = {
        "nc": 2, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": [[10, 13, 16, 30, 33, 23]],
        "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [16, 3, 2]]],
        "head": [[[2], 1, "Detect", ["nc", "anchors"]]],
    }  # fmt: skip
    return DetectionModel(spec).eval()


def test_feature_maps_of_every_slot(runtime, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(
        predictor, "open_runtime", lambda *_, **__: PyTorchRuntime.from_model(tiny, torch.device("cpu"))
    )
    save(tmp_path / "in/a.png", ONE)
    make_video(tmp_path / "in/v.mp4", frames=3)
    report = run(tmp_path / "in", visualize=True, nosave=True)
    for stem in ("a", "v"):
        names = sorted(p.name for p in (report.folder / "features" / stem).iterdir())
        assert names == ["00_Conv_P1.png", "01_Conv_P2.png", "02_Conv_P3.png", "eigencam.png"]
    assert cv2.imread(str(report.folder / "features/a/02_Conv_P3.png")).shape[1] > 300


def test_predictor_returns_rows_of_the_model(tiny):
    """Boxes are the network's rows scaled to the frame: 64 x 32 input pixels are 200 x 100 of the frame."""
    image = np.random.default_rng(0).integers(0, 256, (100, 200, 3), dtype=np.uint8)
    runtime = PyTorchRuntime.from_model(tiny, torch.device("cpu"))
    frame = predictor.Frame(image, Path("a"), "a", "image")
    prepared = prepare((frame,), (64, 64), 32, True)
    (found,) = Predictor(runtime, DetectConfig(conf_thres=0, max_det=5), tiny.names, (64, 64)).predict(prepared)
    assert found.input_shape == (32, 64) and len(found.boxes) == 5
    assert (np.diff(found.boxes[:, 4]) <= 0).all()
    rows = runtime(prepared.images)[0].numpy()
    half = rows[:, 2:4] / 2
    expected = np.clip(np.concatenate((rows[:, :2] - half, rows[:, :2] + half), 1) * 200 / 64, 0, (200, 100, 200, 100))
    for box in found.boxes:
        row = np.abs(expected - box[:4]).max(1).argmin()
        np.testing.assert_allclose(box[:4], expected[row], atol=1e-3)
        np.testing.assert_allclose(box[4], rows[row, 4] * rows[row, 5:].max(), rtol=1e-5)
        assert box[5] == rows[row, 5:].argmax()


def test_detect_command_on_real_weights(tmp_path):
    """The command line: exit status, output, files."""
    save(tmp_path / "in/a.png", ONE)
    (tmp_path / "in/bad.jpg").write_bytes(b"")
    command = [sys.executable, str(ROOT / "detect.py"), "--weights", str(CHECKPOINT), "--device", "cpu", "--img", "96"]
    env = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    done = subprocess.run([*command, "--source", "in"], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 1, done.stderr
    assert "bad.jpg" in done.stderr and "64x96" in done.stderr and "runs/detect/exp" in done.stderr
    assert [p.name for p in (tmp_path / "runs/detect/exp").iterdir()] == ["a.png"]
    done = subprocess.run([*command, "--source", "gone"], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("detect.py: error: gone")
    assert "Traceback" not in done.stderr


def test_update_strips_the_weights(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pt").write_bytes(CHECKPOINT.read_bytes())
    save(tmp_path / "a.png", ONE)
    report = script.run(weights=["w.pt"], source="a.png", imgsz=[64], update=True, nosave=True)
    assert report.failures == ()
    loaded = torch.load(tmp_path / "w.pt", weights_only=True)
    assert "train" not in loaded and set(loaded["names"].values()) == {"RBC", "WBC", "Platelets"}
    assert "w.pt: is rewritten in the format of this project" in caplog.text  # the file is an official one
