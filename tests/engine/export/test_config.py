"""Options of export.py one by one: operator sets, simplification, NMS, precision, the limit of one file."""

from __future__ import annotations

import importlib.util
import json
import shutil

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import engine.export.formats.onnx as onnx_export
import export
from engine.cli.parser import run_main
from engine.export.config import ExportConfig
from engine.export.formats.onnx_graph import opset_of
from engine.export.samples import CALIBRATION_SPLITS, find_images
from engine.export.verification import NmsRule
from engine.export.wrapper import ExportGraph, reparameterized_copy
from engine.runtimes.registry import open_runtime
from models.loading import load_detector
from tests.helpers.detectors import build, build_anchor_free, save
from utils.errors import ExportError
from utils.files import ROOT

CPU = torch.device("cpu")
SIZE = [64, 96]
needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
needs_onnxslim = pytest.mark.skipif(importlib.util.find_spec("onnxslim") is None, reason="onnxslim is not installed")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return save(build("yolov5"), tmp_path_factory.mktemp("weights") / "tiny.pt")


@pytest.fixture
def weights(trained, tmp_path):
    copy = tmp_path / "run" / "best.pt"
    copy.parent.mkdir()
    copy.write_bytes(trained.read_bytes())
    return copy


def eager(weights, images):
    with torch.no_grad():
        return ExportGraph(reparameterized_copy(load_detector(weights))).eval()(images)


def one(weights, include="onnx", imgsz=SIZE, **options):
    report = export.run(weights=[str(weights)], imgsz=imgsz, include=[include], **options)
    assert not report.failures, report.failures
    return report.exported_files[0]


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, []),
        ({"agnostic_nms": True, "conf_thres": 0.4}, ["--agnostic-nms", "--conf-thres"]),
        ({"agnostic_nms": True, "conf_thres": 0.4, "nms": True, "include": ["onnx"]}, []),
        ({"opset": 18}, ["--opset"]),
        ({"opset": 18, "include": ["torchscript", "onnx"]}, []),
        ({"opset": 18, "benchmark": True}, []),
    ],
)
def test_options_without_effect_are_named(options, flags):
    assert list(ExportConfig.from_keywords(**options).without_effect()) == flags


# ---- operator sets and simplification -------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [pytest.param(n, marks=pytest.mark.slow) for n in (18, 19, 20, 21)] + [22])
def test_operator_set(weights, opset):
    """17 is the default and covered by the other tests."""
    path = one(weights, opset=opset).path
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    assert opset_of(model) == opset
    images = torch.rand(1, 3, *SIZE)
    torch.testing.assert_close(open_runtime([str(path)], CPU)(images), eager(weights, images), rtol=1e-4, atol=2e-3)


@needs_onnxslim
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_simplify(weights, dynamic, monkeypatch):
    import onnxslim

    nodes = []
    right = onnxslim.slim

    def counted(model):
        nodes.append(len(model.graph.node))
        return right(model)

    monkeypatch.setattr(onnxslim, "slim", counted)
    exported_file = one(weights, simplify=True, dynamic=dynamic)
    model = onnx.load(str(exported_file.path))
    assert len(nodes) == 1 and len(model.graph.node) <= nodes[0]  # torch's own optimizer leaves little to do
    assert "onnxslim" in json.loads(exported_file.verification.read_text())["versions"]
    texts = {p.key: p.value for p in model.metadata_props}
    assert "onnxslim" in json.loads(texts["versions"]) and texts["stride"] == "32"
    images = torch.rand(2 if dynamic else 1, 3, *SIZE)
    found = open_runtime([str(exported_file.path)], CPU)(images)
    torch.testing.assert_close(found, eager(weights, images), rtol=1e-4, atol=2e-3)


@needs_onnxslim
def test_export_fails_if_simplifier_fails(weights, monkeypatch, capsys):
    import onnxslim

    def fails(model):
        raise RuntimeError("a pattern it does not know\nand more")

    monkeypatch.setattr(onnxslim, "slim", fails)
    argv = ["--weights", str(weights), "--imgsz", "64", "--include", "onnx", "--simplify"]
    assert run_main(ExportConfig, "export.py", "", export.work, argv) == 1
    assert "--simplify: onnxslim failed: a pattern it does not know" in capsys.readouterr().err
    assert [p.name for p in weights.parent.iterdir()] == ["best.pt"]


# ---- NMS ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "free"])
def test_runtime_of_file_with_nms(weights, dynamic):
    """(B, K, 6) from ONNX Runtime alone: the boxes of eager rows after our own NMS, then zeros."""
    path = one(weights, nms=True, conf_thres=0.02, iou_thres=0.5, topk_all=60, dynamic=dynamic).path
    session = onnxruntime.InferenceSession(str(path))
    (answer,) = session.get_outputs()
    assert answer.shape == (["batch", 60, 6] if dynamic else [1, 60, 6])
    shapes = [(1, 64, 96), (3, 96, 64), (2, 160, 160)] if dynamic else [(1, 64, 96)]
    seen = 0
    for batch, height, width in shapes:
        images = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(height))
        found = session.run(None, {"images": images.numpy()})[0]
        assert found.shape == (batch, 60, 6)
        expected = NmsRule(0.02, 0.5, per_class=100, per_image=60).apply(eager(weights, images))
        for boxes, same in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(boxes[: len(same)]), same, rtol=1e-4, atol=1e-2)
            assert not boxes[len(same) :].any()
            seen += len(same)
    assert seen > 20


@needs_openvino
@pytest.mark.slow
def test_openvino_with_nms(weights):
    exported_file = one(weights, "openvino", nms=True, conf_thres=0.02, dynamic=True)
    assert exported_file.comparison.matched > 20
    assert open_runtime([str(exported_file.path)], CPU)(torch.rand(2, 3, 96, 96)).shape == (2, 100, 8)


@needs_openvino
@pytest.mark.slow
def test_verification_without_boxes_is_logged(weights, caplog):
    """OpenVINO's threshold cannot be lowered for the verification, as ONNX Runtime's can."""
    exported = one(weights, "openvino", nms=True, conf_thres=0.999, iou_thres=0.6)
    assert exported.comparison.reference == 0
    record = json.loads(exported.verification.read_text())
    assert record["NMS"]["conf"] <= 0.25 and record["NMS"]["iou"] == 0.45  # of the stages before the file
    assert record["NMS of the file"] == {"conf": 0.999, "iou": 0.6}
    assert "no box above --conf-thres 0.999" in caplog.text


# ---- precision ------------------------------------------------------------------------------------------------------


def test_half_on_a_cpu(weights, caplog):
    exported_file = one(weights, half=True)
    lines = [r.getMessage() for r in caplog.records if "--half" in r.getMessage()]
    assert lines == ["--half on a CPU: float16 files are written and verified; they are smaller, not faster, on a CPU"]
    model = onnx.load(str(exported_file.path))
    assert {i.data_type for i in model.graph.initializer if len(i.dims) == 4} == {onnx.TensorProto.FLOAT16}
    assert {v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)} == {onnx.TensorProto.FLOAT}
    assert json.loads(exported_file.verification.read_text())["precision"] == "float16"


@pytest.mark.slow
@pytest.mark.parametrize("include", ["onnx", pytest.param("openvino", marks=needs_openvino)])
def test_half_with_free_sizes(weights, include):
    runtime = open_runtime([str(one(weights, include, half=True, dynamic=True).path)], CPU)
    images = torch.rand(2, 3, 160, 96)
    assert (runtime(images) - eager(weights, images))[..., 4:].abs().max() < 0.05


def dataset(folder, splits):
    """Write a dataset YAML; its first split has two images, each further split one more."""
    images = sorted((ROOT / "data/images").glob("*.jpg"))
    lines = ["path: .", "names: [disc, bar, dot]"]
    for more, split in enumerate(splits):
        (folder / split).mkdir()
        for number in range(2 + more):
            shutil.copy(images[number % len(images)], folder / split / f"{number}.jpg")
        lines.append(f"{split}: {split}")
    (folder / "set.yaml").write_text("\n".join(lines) + "\n")
    return str(folder / "set.yaml")


@pytest.mark.parametrize(
    ("splits", "calibration", "verification"),
    [
        (("train", "val"), "train", "val"),
        (("val", "test"), "val", "val"),
        (("test",), "test", "test"),
        (("train",), "train", "train"),
    ],
)
def test_int8_uses_training_split_and_verification_validation_split(tmp_path, splits, calibration, verification):
    data = dataset(tmp_path, splits)
    for given in ((data, {}), ("", {"data": data})):
        assert find_images(*given, CALIBRATION_SPLITS).origin == f"set.yaml, {calibration}"
        assert find_images(*given).origin == f"set.yaml, {verification}"


def test_find_images_does_not_download(tmp_path):
    data = dataset(tmp_path, ("train", "val"))
    (tmp_path / "val").rename(tmp_path / "gone")
    assert find_images("", {"data": data}).origin == "set.yaml, train"
    (tmp_path / "train").rename(tmp_path / "gone too")
    assert find_images("", {"data": data}).origin == "data/images (shipped)"


def test_int8(weights, tmp_path, caplog, monkeypatch):
    import engine.export.exporter as job

    caplog.set_level("INFO")
    seen = []
    right = job.quantized
    monkeypatch.setattr(job, "quantized", lambda graph, batches: seen.extend(batches) or right(graph, batches))
    exported_file = one(weights, int8=True, data=dataset(tmp_path, ("val", "train")))
    assert "--int8: calibrated on 3 images of set.yaml, train" in caplog.text
    assert json.loads(exported_file.verification.read_text())["inputs"]["images"] == "set.yaml, val"
    assert [batch.shape for batch in seen] == [(1, 3, *SIZE)] * 3  # val has two
    assert exported_file.path.name == "best_int8.onnx"
    model = onnx.load(str(exported_file.path))
    convolutions = sum(node.op_type == "Conv" for node in model.graph.node)
    int8 = [i for i in model.graph.initializer if i.data_type == onnx.TensorProto.INT8 and len(i.dims) == 4]
    assert len(int8) == convolutions > 10
    assert "versions" in {p.key for p in model.metadata_props}


def test_int8_leaves_box_distances_in_float32(tmp_path):
    path = save(build_anchor_free(), tmp_path / "free.pt")
    exported = one(path, int8=True)
    # Quantized expectations of the distance distributions were 0.39 px off with these weights.
    assert 0 < exported.comparison.row_px < 0.05
    graph = onnx.load(str(exported.path)).graph
    quantized = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    assert all(node.input[0] in quantized for node in graph.node if node.op_type == "Conv")


# ---- the limit of one file ------------------------------------------------------------------------------------------


def test_check_size_refuses_two_gigabytes():
    """Meta tensors: 2.1 GB in float32, half of that in float16."""
    layer = nn.Linear(23000, 23000, bias=False, device="meta")
    with pytest.raises(ExportError, match=r"onnx: 2.12 GB; one file holds 2 GB: use --half"):
        onnx_export.check_size(layer)
    onnx_export.check_size(layer.half())


def test_export_above_two_gigabytes_leaves_no_file(weights, monkeypatch, capsys):
    monkeypatch.setattr(onnx_export, "LIMIT", onnx_export.GRAPH_BYTES + 1000)
    argv = ["--weights", str(weights), "--imgsz", "64", "--include", "onnx"]
    assert run_main(ExportConfig, "export.py", "", export.work, argv) == 1
    assert "one file holds 2 GB" in capsys.readouterr().err
    monkeypatch.setattr(onnx_export, "GRAPH_BYTES", 0)
    monkeypatch.setattr(onnx_export, "LIMIT", 10**5)
    monkeypatch.setattr(onnx_export, "check_size", lambda graph: None)  # the graph itself is checked, too
    assert run_main(ExportConfig, "export.py", "", export.work, argv) == 1
    assert "one file holds 2 GB" in capsys.readouterr().err
    assert [p.name for p in weights.parent.iterdir()] == ["best.pt"]
