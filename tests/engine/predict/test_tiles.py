"""Tiled detection: tiles, merging, objects across tile borders, agreement with SAHI."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch

from data.labels.labels import ImageRecord
from engine.cli.config import DetectConfig, ValConfig
from engine.evaluate.evaluator import EvalOptions, evaluate, validate
from engine.evaluate.whole_images import WholeImages
from engine.hub.model import HubModel
from engine.predict import predictor
from engine.predict.inference import NmsSettings
from engine.predict.predictor import detect
from engine.predict.tiles import TiledRuntime, TileSettings, merge
from engine.runtimes.pytorch import PyTorchRuntime
from tests.helpers import detectors
from tests.helpers.color_runtime import NAMES, ColorRuntime, rectangles
from utils.errors import ConfigError

CPU = torch.device("cpu")
# Objects across the borders of tiles of 128 pixels (0-128, 103-231, ...), small enough for the overlap of 0.3 (38).
BORDERS = rectangles((300, 400), (0, 80, 80, 118, 110), (2, 200, 190, 230, 226))


@pytest.mark.parametrize(
    ("side", "overlap", "length", "expected"),
    [
        (100, 0.2, 80, [(0, 80)]),
        (100, 0.2, 100, [(0, 100)]),
        (100, 0.2, 180, [(0, 100), (80, 180)]),
        (100, 0.2, 181, [(0, 100), (80, 180), (81, 181)]),  # moved into the image
        (100, 0.0, 250, [(0, 100), (100, 200), (150, 250)]),
        (33, 0.1, 64, [(0, 33), (30, 63), (31, 64)]),
    ],
)
def test_tiles_cover_the_image(side, overlap, length, expected):
    assert TileSettings(side, overlap).boxes(10, length) == [(left, 0, right, 10) for left, right in expected]


def test_full_image_is_added_once():
    assert TileSettings(64, 0.2, full_image=True).boxes(64, 100)[-1] == (0, 0, 100, 64)
    assert TileSettings(64, 0.2, full_image=True).boxes(50, 40) == [(0, 0, 40, 50)]


@pytest.mark.parametrize(("height", "width"), [(480, 640), (333, 999), (64, 2000), (640, 640), (641, 1281)])
@pytest.mark.parametrize(("side", "overlap"), [(640, 0.2), (256, 0.25), (100, 0.0), (333, 0.5)])
def test_tiles_are_those_of_sahi(height, width, side, overlap):
    slicing = pytest.importorskip("sahi.slicing", reason="sahi is not installed")
    expected = slicing.get_slice_bboxes(height, width, side, side, False, overlap, overlap)
    assert TileSettings(side, overlap).boxes(height, width) == [tuple(box) for box in expected]


@pytest.mark.parametrize(
    ("agnostic", "expected"),
    [(False, [0.9, 0.8, 0.5, 0.4]), (True, [0.9, 0.8, 0.4])],
)
def test_merge_drops_parts_of_a_box(agnostic, expected):
    boxes = torch.tensor(
        [
            [0, 0, 100, 100, 0.9, 0],
            [200, 0, 300, 100, 0.8, 0],
            [60, 0, 100, 100, 0.7, 0],  # cut off by a border: inside the first box, IoU 0.4
            [10, 10, 30, 30, 0.5, 1],  # another class inside the first box
            [60, 60, 160, 160, 0.4, 0],  # overlaps the first box by a fraction of 0.16
        ]
    )
    shuffled = boxes[[3, 0, 4, 2, 1]]
    assert merge(shuffled, agnostic)[:, 4].tolist() == pytest.approx(expected)
    assert merge(torch.zeros(0, 6)).shape == (0, 6)


def test_object_across_tile_borders_gives_one_box(tmp_path, monkeypatch):
    runtime = ColorRuntime()
    monkeypatch.setattr(predictor, "open_runtime", lambda *_, **__: runtime)
    cv2.imwrite(str(tmp_path / "a.png"), BORDERS)
    options = {"tile": 128, "overlap": 0.3, "imgsz": [128], "save_json": True, "project": str(tmp_path / "runs")}
    report = detect(DetectConfig.from_keywords(weights=["x.pt"], source=str(tmp_path / "a.png"), **options))
    (entry,) = json.loads((report.folder / "predictions.json").read_text())
    assert [d["name"] for d in entry["detections"]] == ["red", "größe"]
    boxes = [d["box_xyxy"] for d in entry["detections"]]
    np.testing.assert_allclose(boxes, [[80, 80, 118, 110], [200, 190, 230, 226]], atol=0.01)
    assert {shape[2:] for shape in runtime.shapes} == {(128, 128)}
    assert sum(shape[0] for shape in runtime.shapes) == len(TileSettings(128, 0.3).boxes(300, 400)) == 15


@pytest.mark.parametrize("imgsz", [None, (128, 128)])
def test_tiled_runtime_respects_fixed_batch_and_size(imgsz):
    runtime = ColorRuntime()
    runtime.imgsz, runtime.fixed_batch = imgsz, 2
    tiled = TiledRuntime(runtime, TileSettings(128, 0.3, full_image=True), (128, 128), NmsSettings())
    found = tiled.detect(BORDERS)
    assert found[:, 5].tolist() == [0, 2] and {shape[0] for shape in runtime.shapes} <= {1, 2}
    assert runtime.shapes[-1] == (1, 3, *((96, 128) if imgsz is None else imgsz))  # the whole image


def test_tiled_validation_counts_objects_across_borders(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), BORDERS)
    boxes = np.array([[0, 80, 80, 118, 110], [2, 200, 190, 230, 226]], np.float32)
    centers, sides = (boxes[:, 1:3] + boxes[:, 3:]) / 2, boxes[:, 3:] - boxes[:, 1:3]
    labels = np.concatenate((boxes[:, :1], centers / (400, 300), sides / (400, 300)), 1).astype(np.float32)
    loader = WholeImages([ImageRecord(tmp_path / "a.png", 300, 400, labels)])
    nms = NmsSettings(0.001, 0.6, multi_label=True, max_det=300)
    runtime = TiledRuntime(ColorRuntime(), TileSettings(128, 0.3), (128, 128), nms)
    result = evaluate(runtime, loader, EvalOptions(names=NAMES))
    assert result.map == pytest.approx(0.995, abs=1e-3) and result.images == 1


@pytest.mark.parametrize(("option", "value"), [("full_image", True), ("overlap", 0.2)])
def test_options_without_tile_are_named(tmp_path, monkeypatch, caplog, option, value):
    monkeypatch.setattr(predictor, "open_runtime", lambda *_, **__: ColorRuntime())
    cv2.imwrite(str(tmp_path / "a.png"), BORDERS)
    detect(DetectConfig.from_keywords(source=str(tmp_path / "a.png"), weights=["x.pt"], nosave=True, **{option: value}))
    assert "no effect without --tile" in caplog.text


def test_tile_is_refused_for_speed_task(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="--tile: not with --task speed"):
        validate(ValConfig(tile=64, task="speed"))


def test_detections_are_those_of_sahi(monkeypatch):
    """20 images, a detector with many boxes: SAHI with its NMS and default metric, full-image pass included."""
    predict = pytest.importorskip("sahi.predict", reason="sahi is not installed")
    adapter = pytest.importorskip("sahi.models.yolov5")
    monkeypatch.setattr(adapter.Yolov5DetectionModel, "check_dependencies", lambda *_: None)
    model = detectors.build("yolov5")
    runtime = PyTorchRuntime.from_model(model, CPU)
    hub = HubModel(runtime).eval()
    names = {str(number): name for number, name in model.names.items()}
    sahi_model = adapter.Yolov5DetectionModel(
        model=hub, confidence_threshold=0.15, device="cpu", image_size=128, category_mapping=names
    )
    rng = np.random.default_rng(0)
    total = 0
    for number in range(20):
        coarse = rng.integers(0, 256, (8, 10, 3), np.uint8)
        image = cv2.resize(coarse, (int(rng.integers(100, 400)), int(rng.integers(100, 300))))
        settings = TileSettings(128, 0.2, full_image=bool(number % 2))
        found = TiledRuntime(runtime, settings, (128, 128), NmsSettings(0.15)).detect(image).numpy()
        expected = predict.get_sliced_prediction(
            np.ascontiguousarray(image[..., ::-1]), sahi_model, 128, 128, 0.2, 0.2,
            perform_standard_pred=settings.full_image, postprocess_type="NMS", verbose=0,
        ).object_prediction_list  # fmt: skip
        rows = np.array([[*p.bbox.to_xyxy(), p.score.value, p.category.id] for p in expected]).reshape(-1, 6)
        assert len(found) == len(rows)
        order = np.argsort(-rows[:, 4], kind="stable")
        np.testing.assert_allclose(found[:, 4:], rows[order, 4:], atol=1e-3)
        np.testing.assert_allclose(found[:, :4], rows[order, :4], atol=1)
        total += len(found)
    assert total > 100
