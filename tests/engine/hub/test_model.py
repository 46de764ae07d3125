"""Models from torch.hub: inputs, results, and agreement with detect.py."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import detect as detect_script
from engine.hub.model import HubModel
from engine.hub.results import Results
from models.yolo import DetectionModel
from tests.helpers import detectors
from utils.errors import CheckpointError, ConfigError, DataError, UserError
from utils.files import ROOT

CONF, BEST = 0.05, 20  # few enough boxes that none depends on rounding
SIZES = ((60, 80), (97, 64), (80, 60), (33, 133), (60, 80))  # height, width


def open_model(path, **options) -> HubModel:
    return torch.hub.load(str(ROOT), "custom", path=path, source="local", device="cpu", **options)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return detectors.save(detectors.build("yolov5"), tmp_path_factory.mktemp("hub") / "best.pt")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """Lossless images of several shapes; one name is used twice."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    names = ("a.png", "b.png", "c.d.png", "größe.png", "more/a.png")
    (folder / "more").mkdir()
    out = []
    for name, (height, width) in zip(names, SIZES):
        coarse = rng.integers(0, 255, (6, 8, 3), np.uint8)
        cv2.imencode(".png", cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))[1].tofile(
            folder / name
        )
        out.append(folder / name)
    return out


@pytest.fixture
def model(weights) -> HubModel:
    model = open_model(str(weights))
    model.conf, model.max_det = CONF, BEST
    return model


def rgb(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def close(results: Results, expected: Results) -> None:
    assert len(results) == len(expected)
    for a, b in zip(results.pred, expected.pred):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
        assert len(a) == BEST, "nothing to compare"


def test_detections_are_those_of_detect_py(model, weights, files, tmp_path):
    (tmp_path / "list.txt").write_text("\n".join(map(str, files)))
    options = {"save_json": True, "conf_thres": CONF, "max_det": BEST, "imgsz": [160], "project": str(tmp_path)}
    report = detect_script.run(weights=[str(weights)], source=str(tmp_path / "list.txt"), device="cpu", **options)
    entries = json.loads((report.folder / "predictions.json").read_text())
    results = model(files, size=160)
    assert [e["image"] for e in entries] == [str(f) for f in files]
    for entry, rows in zip(entries, results.pred):
        expected = [[*d["box_xyxy"], d["score"], d["class"]] for d in entry["detections"]]
        torch.testing.assert_close(rows, torch.tensor(expected), rtol=0, atol=0.0051)  # the file has two digits
        assert len(rows) > 5
    drawn = cv2.imdecode(np.fromfile(report.folder / "b.png", np.uint8), cv2.IMREAD_COLOR)
    assert (results.render()[1][..., ::-1] == drawn).mean() > 0.99


@pytest.mark.parametrize(
    "convert",
    [
        pytest.param(str, id="text"),
        pytest.param(rgb, id="array"),
        pytest.param(lambda p: rgb(p).transpose(2, 0, 1), id="channels first"),
        pytest.param(lambda p: np.dstack((rgb(p), rgb(p)[..., 0])), id="alpha"),
        pytest.param(Image.open, id="pil"),
        pytest.param(lambda p: torch.from_numpy(rgb(p).copy()).permute(2, 0, 1) / 255, id="tensor"),
    ],
)
def test_hub_accepts_kinds_of_images(model, files, convert):
    expected = model(files, size=160)
    close(model([convert(f) for f in files], size=160), expected)
    close(model(convert(files[1]), size=160), Results(expected._found[1:2], model.names, (0, 0, 0), (1,) * 4, "cpu"))


def test_hub_repeats_gray_channel(model):
    gray = cv2.resize(np.random.default_rng(1).integers(0, 255, (8, 8), np.uint8), (96, 64))
    close(model([gray, gray[..., None]], size=96), model([np.dstack([gray] * 3)] * 2, size=96))


def test_hub_applies_exif_of_pil_image(model, files, tmp_path):
    turned = Image.open(files[1]).transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # displayed rotated by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    expected = model(files[1], size=160)
    close(model(Image.open(tmp_path / "turned.png"), size=160), expected)
    close(model(tmp_path / "turned.png", size=160), expected)


def test_hub_reads_url(model, files):
    expected = model(files[0], size=160)
    import functools
    import http.server
    import threading

    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(files[0].parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        results = model(f"http://127.0.0.1:{server.server_port}/a.png?x=1", size=160)
        server.shutdown()
    close(results, expected)
    assert results.files == ["a.jpg"]


def test_batch_tensor_is_not_resized(model):
    images = [cv2.resize(np.random.default_rng(i).integers(0, 255, (6, 8, 3), np.uint8), (96, 64)) for i in (1, 2)]
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    expected = model(images, size=96)
    assert expected.s == (2, 3, 64, 96)
    close(model(batch), expected)
    results = model(batch.float() / 255)
    close(results, expected)
    assert results.files == ["image0.jpg", "image1.jpg"]
    np.testing.assert_array_equal(results.ims[1], images[1])
    cut = model(batch[..., :50, :90].float() / 255)  # padded at right and bottom; boxes stay within the image
    assert cut.s == (2, 3, 64, 96) and all(p[:, :4].max() <= 90 and p[:, 3].max() <= 50 for p in cut.pred)


def test_hub_detections_do_not_depend_on_other_images(model, files):
    together = model(files, size=160)
    for number, file in enumerate(files):
        alone = model(file, size=160)
        torch.testing.assert_close(alone.pred[0], together.pred[number], rtol=1e-4, atol=1e-3)


def test_hub_defaults_equal_yolov5(weights):
    model = open_model(weights)
    assert (model.conf, model.iou, model.max_det, model.classes) == (0.25, 0.45, 1000, None)
    assert (model.agnostic, model.multi_label, model.amp) == (False, False, False)
    assert model.names == {0: "disc", 1: "bar", 2: "dot"} and model.stride == 32
    assert isinstance(model.model, DetectionModel) and not model.training


def test_hub_attributes_have_effect(model, files):
    plain = model(files[0], size=160).pred[0]
    model.conf = float(plain[3:5, 4].mean())
    assert len(model(files[0], size=160).pred[0]) == 4
    model.conf, model.classes = CONF, [1]
    assert set(model(files[0], size=160).pred[0][:, 5].tolist()) == {1.0}
    for classes in (1, np.array([1]), torch.tensor([1.0])):
        model.classes = classes
        assert set(model(files[0], size=160).pred[0][:, 5].tolist()) == {1.0}
    model.classes, model.max_det = None, 2
    torch.testing.assert_close(model(files[0], size=160).pred[0], plain[:2])
    model.max_det = 1000
    plain = model(files[0], size=160).pred[0]
    model.iou = 0.05
    fewer = len(model(files[0], size=160).pred[0])
    assert fewer < len(plain)
    model.agnostic = True
    assert len(model(files[0], size=160).pred[0]) < fewer
    model.agnostic, model.iou, model.multi_label = False, 0.45, True
    assert len(model(files[0], size=160).pred[0]) > len(plain)
    model.multi_label = False
    assert len(model(files[0], size=160, augment=True).pred[0]) != len(plain)
    torch.testing.assert_close(model(files[0], size=160).pred[0], plain)  # all settings are reset


def test_size_is_the_longer_side(model, files):
    assert model(files[0], size=160).s == (1, 3, 128, 160)
    assert model(files[0], size=(64, 200)).s == (1, 3, 64, 96)
    assert model(files[0]).s == (1, 3, 480, 640)
    assert model(files[0], size=np.int64(160)).s == model(files[0], size=np.array([160])).s == (1, 3, 128, 160)


@pytest.mark.parametrize("size", [-160, 0, 160.0, "160", [], [160, 0], [1, 2, 3], [[160], [1, 2]], 10**6])
def test_sizes_that_are_refused(model, files, size):
    with pytest.raises(
        ConfigError, match=r"size=.*: one integer or two \(height, width\), from 1 to 16384, are needed"
    ):
        model(files[0], size=size)


def test_results_formats_agree(model, files):
    results = model(files, size=160)
    assert results.n == len(results) == 5 and results.names == model.names
    assert results.files == ["a.jpg", "b.jpg", "c.d.jpg", "größe.jpg", "a.jpg"]
    assert [im.shape for im in results.ims] == [(h, w, 3) for h, w in SIZES]
    np.testing.assert_array_equal(results.ims[1], rgb(files[1]))
    assert len(results.t) == 3 and all(t > 0 for t in results.t)
    for (height, width), *forms in zip(SIZES, results.xyxy, results.xywh, results.xyxyn, results.xywhn, results.pred):
        xyxy, xywh, xyxyn, xywhn, pred = (f[0].tolist() for f in forms)
        left, top, right, bottom, *rest = xyxy
        assert xyxy == pred and rest == xywh[4:] == xyxyn[4:]
        assert xywh[:4] == pytest.approx([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
        sides = [width, height, width, height]
        assert xyxyn[:4] == pytest.approx([v / s for v, s in zip(xyxy, sides)])
        assert xywhn[:4] == pytest.approx([v / s for v, s in zip(xywh, sides)])
    singles = results.tolist()
    assert [s.files[0] for s in singles] == results.files and all(len(s) == 1 for s in singles)
    torch.testing.assert_close(singles[3].xywhn[0], results.xywhn[3])


def test_text(model, files, capsys):
    model.conf, model.classes = CONF, [1]
    results = model(files[:2], size=160)
    model.conf = 1.0
    nothing = model(files[0], size=160)
    results.print()
    first, second, speed = capsys.readouterr().out.splitlines()
    assert first == f"image 1/2: 60x80 {len(results.pred[0])} bars"
    assert second.startswith("image 2/2: 97x64 ")
    assert speed.startswith("Speed: ") and speed.endswith("NMS per image at shape (1, 3, 160, 128)")
    assert str(results).splitlines()[0] == first
    assert str(nothing).splitlines()[0] == "image 1/1: 60x80 no detections"
    assert repr(results) == f"Results of 2 image(s)\n{results}"
    many = repr(model([files[0]] * 99, size=160)).splitlines()  # a notebook shows it: one screen
    assert len(many) == 19 and many[-2:] == ["... and 83 more images", many[-1]] and many[-1].startswith("Speed: ")
    assert nothing.pred[0].shape == (0, 6) and nothing.crop(save=False) == []


def test_pandas(model, files):
    pytest.importorskip("pandas", reason="pandas is not installed")
    results = model(files[:2], size=160)
    tables = results.pandas()
    for key, head in (("xyxy", ["xmin", "ymin", "xmax", "ymax"]), ("xywhn", ["xcenter", "ycenter", "width", "height"])):
        table = getattr(tables, key)[1]
        assert list(table.columns) == [*head, "confidence", "class", "name"]
        rows = getattr(results, key)[1]
        np.testing.assert_allclose(table.iloc[:, :6].to_numpy(np.float64), rows.numpy(), rtol=1e-6)
        assert list(table["name"]) == [model.names[int(c)] for c in rows[:, 5]]
        assert table["class"].dtype == np.int64
    assert json.loads(tables.xyxy[0].to_json(orient="records"))[0]["name"] in model.names.values()
    assert isinstance(results.xyxy[0], torch.Tensor), "the tensors stay"
    model.conf = 1.0
    assert list(model(files[0], size=160).pandas().xyxy[0].columns)[-1] == "name"


def test_pandas_missing(model, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match="pip install pandas"):
        model(files[0], size=160).pandas()


@pytest.mark.parametrize("head", ["anchor", "free"])
def test_supervision(model, files, head, tmp_path):
    sv = pytest.importorskip("supervision", reason="supervision is not installed")
    if head == "free":
        model = open_model(str(detectors.save(detectors.build_anchor_free(bias=-1), tmp_path / "free.pt")))
        model.conf = CONF
    results = model(files[0], size=160)
    assert len(results.pred[0])
    found = sv.Detections.from_yolov5(results)
    np.testing.assert_array_equal(found.xyxy, results.pred[0][:, :4].numpy())
    np.testing.assert_array_equal(found.confidence, results.pred[0][:, 4].numpy())
    assert found.class_id.tolist() == results.pred[0][:, 5].int().tolist()


def test_sahi_adapter_accepts_model(model, files, monkeypatch):
    """SAHI's adapter recognizes the class by its module; the AGPL package that it asks for is not needed."""
    adapter = pytest.importorskip("sahi.models.yolov5", reason="sahi is not installed")
    monkeypatch.setattr(adapter.Yolov5DetectionModel, "check_dependencies", lambda *_: None)
    monkeypatch.setattr(adapter, "check_package_minimum_version", lambda *_: True)
    detector = adapter.Yolov5DetectionModel(model=model, confidence_threshold=CONF, device="cpu", image_size=160)
    assert detector.category_mapping == {str(number): name for number, name in model.names.items()}
    detector.perform_inference(rgb(files[0]))
    detector.convert_original_predictions(full_shape=list(SIZES[0]))
    rows = model(files[0], size=160).pred[0].numpy()
    assert len(rows) == BEST and len(detector.object_prediction_list) == BEST
    for found, row in zip(detector.object_prediction_list, rows):
        np.testing.assert_allclose(found.bbox.to_xyxy(), row[:4], atol=1e-3)
        assert found.category.name == model.names[int(row[5])]


def test_hub_model_survives_pickling(model, files):
    again = pickle.loads(pickle.dumps(model))
    close(again(files[0], size=160), model(files[0], size=160))


def test_render_does_not_change_inputs(model, files):
    array = rgb(files[0]).copy()
    before = array.copy()
    results = model(array, size=160)
    drawn = results.render()
    np.testing.assert_array_equal(array, before)
    assert results.ims is drawn and not np.array_equal(drawn[0], before)
    again = results.render()[0].copy()
    np.testing.assert_array_equal(again, drawn[0])
    assert not np.array_equal(results.render(labels=False)[0], again)


def test_show(model, files, monkeypatch):
    shown = []
    monkeypatch.setattr(Image.Image, "show", lambda self, title=None: shown.append((title, self.size, self.mode)))
    model(files[:2], size=160).show()
    assert shown == [("a.jpg", (80, 60), "RGB"), ("b.jpg", (64, 97), "RGB")]


def test_save_and_crop(model, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = model(files, size=160)
    assert results.save() == Path("runs/detect/exp") and results.save() == Path("runs/detect/exp2")
    names = sorted(p.name for p in Path("runs/detect/exp").iterdir())
    assert names == ["a.jpg", "a_2.jpg", "b.jpg", "c.d.jpg", "größe.jpg"], "no image overwrites another"
    assert results.save(save_dir="here") == results.save(save_dir="here", exist_ok=True) == Path("here")
    crops = results.crop(save_dir="cut")
    assert len(crops) == sum(len(p) for p in results.pred) and not list(Path("runs/detect").glob("*/crops"))
    assert len(list(Path("cut/crops").rglob("*.jpg"))) == sum(c["im"].size > 0 for c in crops)
    first = crops[0]
    assert [float(v) for v in first["box"]] == results.xyxy[0][0, :4].tolist()
    name, score = model.names[int(first["cls"])], float(first["conf"])
    assert first["label"] == f"{name} {score:.2f}"
    assert first["im"].dtype == np.uint8 and first["im"].shape[2] == 3
    Path("runs").rename("moved")
    results.crop(save=False)
    assert not Path("runs").exists()


MISTAKES = [
    ([], ConfigError, "no images given"),
    (3.5, ConfigError, "image 0: a float; allowed are a path"),
    ("nowhere.jpg", DataError, "nowhere.jpg: cannot be read"),
    (np.zeros((8, 8, 3)), ConfigError, "array of float64; uint8 in 0..255 is needed"),
    (np.zeros((8, 8, 2), np.uint8), ConfigError, r"shape \(8, 8, 2\)"),
    (np.zeros((0, 8, 3), np.uint8), ConfigError, r"shape \(0, 8, 3\)"),
    (torch.zeros(1, 1, 64, 64), ConfigError, r"\(B, 3, H, W\) is needed"),
    (torch.full((1, 3, 64, 64), 255.0), ConfigError, "values 255 to 255; 0 to 1 is needed"),
    (torch.full((1, 3, 64, 64), float("nan")), ConfigError, "0 to 1 is needed"),
    (torch.zeros(1, 3, 64, 64, dtype=torch.int32), ConfigError, "torch.int32"),
    ([torch.zeros(64, 64)], ConfigError, r"in a list \(3, H, W\)"),
    (Image.new("F", (8, 8)), ConfigError, "mode F"),
]


@pytest.mark.parametrize(("images", "error", "message"), MISTAKES, ids=lambda v: str(v)[:20].replace("\n", " "))
def test_hub_refuses_inputs_that_are_not_images(model, images, error, message):
    with pytest.raises(error, match=message) as caught:
        model(images)
    assert isinstance(caught.value, UserError)


def test_hub_refuses_bad_arguments(model, weights, files):
    model.classes = [7]
    with pytest.raises(ConfigError, match="no such class; the model has 0 to 2"):
        model(files[0])
    model.classes, model.conf = None, 3
    with pytest.raises(ConfigError, match="3 is not a threshold"):
        model(files[0], size=160)
    with pytest.raises(ConfigError, match="autoshape=False"):
        model.train()
    with pytest.raises(CheckpointError, match="no such file"):
        open_model("nowhere.pt")
    with pytest.raises(ConfigError, match="autoshape=False: needs one checkpoint"):
        open_model([weights, weights], autoshape=False)
    with pytest.raises(ConfigError, match="not available"):
        torch.hub.load(str(ROOT), "custom", path=weights, source="local", device=7)


def test_hub_ensemble_and_network(weights, files):
    both = open_model([weights, weights])
    both.conf, both.max_det = CONF, 5
    assert len(both.models) == 2 and len(both(files[0], size=160).pred[0]) == 5
    bare = open_model(weights, autoshape=False)
    assert isinstance(bare, DetectionModel) and not isinstance(bare, HubModel)
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in bare.modules()), "folded: it could not be trained"
    assert len(bare.train()(torch.zeros(1, 3, 64, 64))) == 3


def test_hub_model_moves_and_converts(model, files):
    expected = model(files[0], size=160)
    assert model.to("cpu") is model
    close(model.double()(files[0], size=160), expected)
    assert model.runtime.dtype == torch.float64
    close(model.float().eval()(files[0], size=160), expected)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in model.model.parameters()) > 0


@pytest.mark.slow
def test_hub_exported_file(weights, files):
    onnx = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    import export as export_script

    report = export_script.run(weights=[str(weights)], include=["onnx"], imgsz=[160], dynamic=True)
    assert onnx and not report.failures
    exported, model = open_model(weights.with_suffix(".onnx")), open_model(weights)
    exported.conf = model.conf = CONF
    exported.max_det = model.max_det = BEST
    close(exported(files, size=160), model(files, size=160))
    assert exported.names == model.names
    for call, message in (
        (lambda: exported.to("cpu"), "stays where it was opened"),
        (lambda: exported.model, "no PyTorch network"),
        (lambda: exported(files[0], augment=True), "needs a .pt file"),
        (lambda: open_model(weights.with_suffix(".onnx"), autoshape=False), "needs one checkpoint"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()


def test_anchor_free_checkpoint(files, tmp_path):
    """The hub model of the anchor-free head gives the detections of detect.py."""
    weights = detectors.save(detectors.build_anchor_free(bias=-1), tmp_path / "free.pt")
    model = open_model(str(weights))
    model.conf, model.max_det = CONF, BEST
    results = model(files[0], size=160)
    options = {"save_json": True, "conf_thres": CONF, "max_det": BEST, "imgsz": [160], "project": str(tmp_path)}
    report = detect_script.run(weights=[str(weights)], source=str(files[0]), device="cpu", **options)
    (entry,) = json.loads((report.folder / "predictions.json").read_text())
    expected = torch.tensor([[*d["box_xyxy"], d["score"], d["class"]] for d in entry["detections"]])
    torch.testing.assert_close(results.pred[0], expected, rtol=0, atol=0.0051)
    assert len(expected) == BEST
