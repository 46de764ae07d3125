"""export.py from checkpoint to file: output, verification, refusals, and no leftover files."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

import engine.export.exporter as job
import export
from engine.cli.config import DetectConfig
from engine.cli.parser import run_main
from engine.export.benchmark import formats, time_in_turns
from engine.export.config import FORMATS, ExportConfig
from engine.export.formats.onnx_graph import lower_to_17, opset_of, reorder_gelu
from engine.export.formats.onnx_nms import NmsOptions, embed_nms
from engine.export.verification import NmsRule
from engine.export.wrapper import ExportGraph, reparameterized_copy
from engine.predict.predictor import detect
from engine.runtimes.registry import open_runtime
from models.loading import load_detector
from models.yolo import DetectionModel
from tests.helpers.detectors import BACKBONES, build, build_anchor_free, save
from utils.errors import ExportError
from utils.files import ROOT

CPU = torch.device("cpu")
HAS_OPENVINO = importlib.util.find_spec("openvino") is not None
needs_openvino = pytest.mark.skipif(not HAS_OPENVINO, reason="openvino is not installed")
INSTALLED = [name for name in FORMATS if name != "openvino" or HAS_OPENVINO]
SIZE = [64, 96]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save(build("yolov5"), tmp_path_factory.mktemp("weights") / "tiny.pt")


@pytest.fixture(scope="module")
def exported(weights):
    """Export one checkpoint to every installed format; return the report and the original checkpoint bytes."""
    before = hashlib.sha256(weights.read_bytes()).hexdigest()
    report = export.run(weights=[str(weights)], imgsz=SIZE, include=INSTALLED)
    return report, before


def cli(argv, capsys):
    """Return exit status and stderr."""
    status = run_main(ExportConfig, "export.py", "", export.work, [str(a) for a in argv])
    return status, capsys.readouterr().err


def eager(weights, images):
    with torch.no_grad():
        return ExportGraph(reparameterized_copy(load_detector(weights))).eval()(images)


# ---- what is written ------------------------------------------------------------------------------------------------


def test_every_format_equals_eager(weights, exported):
    report, _ = exported
    assert [a.format for a in report.exported_files] == INSTALLED and not report.failures
    images = torch.rand(1, 3, *SIZE)
    for exported_file in report.exported_files:
        runtime = open_runtime([str(exported_file.path)], CPU)
        assert (runtime.imgsz, runtime.fixed_batch, runtime.stride) == ((64, 96), 1, 32)
        assert runtime.names == {0: "disc", 1: "bar", 2: "dot"}
        torch.testing.assert_close(runtime(images), eager(weights, images), rtol=1e-4, atol=2e-3)


def test_anchor_free_head_exports_to_every_format(tmp_path):
    # Several seconds: OpenVINO fused an earlier form of the decoder into an invalid graph, and ONNX Runtime's sigmoid
    # has an absolute error that was visible in the class columns.
    weights = save(build_anchor_free(), tmp_path / "free.pt")
    report = export.run(weights=[str(weights)], imgsz=SIZE, include=INSTALLED)
    images = torch.rand(1, 3, *SIZE)
    for exported_file in report.exported_files:
        decoded = open_runtime([str(exported_file.path)], CPU)(images)
        assert decoded.shape == (1, 8 * 12 + 4 * 6 + 2 * 3, 8)
        torch.testing.assert_close(decoded, eager(weights, images), rtol=1e-4, atol=2e-3)


def test_export_writes_only_its_files(weights, exported):
    report, before = exported
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == before
    names = {a.path.name for a in report.exported_files}
    verifications = {f"{name}.proof.json" for name in names}
    assert {p.name for p in weights.parent.iterdir()} == {"tiny.pt", *names, *verifications}


def test_verification_is_written_beside_the_file(exported):
    for exported_file in exported[0].exported_files:
        verification = json.loads(exported_file.verification.read_text())
        assert [stage["problems"] for stage in verification["stages"]] == [[], []]
        assert all(stage["matched"] == stage["reference"] > 20 for stage in verification["stages"])
        assert verification["tolerance"]["file"]["row_px"] == 0.05 and verification["precision"] == "float32"
        assert verification["inputs"]["shapes"][0][2:] == SIZE and "torch" in verification["versions"]


def test_onnx_interface(exported):
    path = next(a.path for a in exported[0].exported_files if a.format == "onnx")
    model = onnx.load(str(path))
    texts = {p.key: p.value for p in model.metadata_props}
    assert opset_of(model) == 17
    assert texts["stride"] == "32" and texts["names"] == "{0: 'disc', 1: 'bar', 2: 'dot'}"
    assert texts["imgsz"] == "[64, 96]" and {"backbone", "date", "spec"} <= set(texts)
    assert set(json.loads(texts["versions"])) == {"torch", "onnx", "onnxscript", "onnxruntime"}
    session = onnxruntime.InferenceSession(str(path))
    (given,), (answer,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(float)", [1, 3, 64, 96])
    assert (answer.name, answer.type, answer.shape) == ("output0", "tensor(float)", [1, 378, 8])


def test_exported_files_have_no_local_path(exported):
    for exported_file in exported[0].exported_files:
        files = [exported_file.path] if exported_file.path.is_file() else list(exported_file.path.iterdir())
        for file in (*files, exported_file.verification):
            if exported_file.format != "torchscript":  # its archive keeps source file names for its own error messages
                assert str(ROOT).encode() not in file.read_bytes(), file


def test_torchscript_has_yolov5_interface(exported):
    path = next(a.path for a in exported[0].exported_files if a.format == "torchscript")
    extra = {"config.txt": ""}
    module = torch.jit.load(str(path), _extra_files=extra)
    config = json.loads(extra["config.txt"])
    assert config["shape"] == [1, 3, 64, 96] and config["stride"] == 32 and config["names"]["1"] == "bar"
    out = module(torch.rand(1, 3, *SIZE))
    assert isinstance(out, tuple) and out[0].shape == (1, 378, 8)


def test_opencv_equals_eager(weights, exported):
    path = next(a.path for a in exported[0].exported_files if a.format == "onnx")
    images = torch.rand(1, 3, *SIZE)
    found = open_runtime([str(path)], CPU, dnn=True)(images)
    torch.testing.assert_close(found, eager(weights, images), rtol=1e-4, atol=2e-3)


def test_detect_gives_the_same_boxes_for_every_format(weights, exported, tmp_path):
    """Files of one fixed size get the same letterboxed images."""
    found = {}
    for exported_file in exported[0].exported_files:
        folder = tmp_path / exported_file.format
        detect(DetectConfig(weights=[str(exported_file.path)], source="data/images", project=str(folder), nosave=True,
                            save_txt=True, save_conf=True, conf_thres=0.1))  # fmt: skip
        files = sorted((folder / "exp/labels").glob("*.txt"))
        found[exported_file.format] = [np.loadtxt(file, ndmin=2) for file in files]
    first, *others = found.values()
    assert sum(len(f) for f in first) > 10
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
def test_free_sizes(tmp_path):
    """Batches 1 to 8 and sizes square and not, for a model that the verification has not seen at these sizes."""
    weights = save(build("riformer"), tmp_path / "r.pt")
    report = export.run(weights=[str(weights)], imgsz=[96, 128], include=["onnx"], dynamic=True)
    runtime = open_runtime([str(report.exported_files[0].path)], CPU)
    assert (runtime.imgsz, runtime.fixed_batch) == (None, None)
    for shape in [(1, 3, 32, 32), (8, 3, 64, 64), (1, 3, 256, 96), (3, 3, 96, 160)]:
        images = torch.rand(shape)
        torch.testing.assert_close(runtime(images), eager(weights, images), rtol=1e-4, atol=5e-3)


# Batches 1 to 8, sides 256 to 640, square and not. An odd number of cells (288, 352) makes RepMLPNet pad its
# partitions; every size but 64 resizes RevViT's positions.
FREE_SHAPES = [(1, 3, 256, 256), (8, 3, 256, 288), (2, 3, 640, 640), (1, 3, 320, 640), (3, 3, 416, 352)]
FAMILIES = ["yolov5", *(name for name in BACKBONES if name != "repmlp-published")]


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path, family, dynamic):
    weights = save(build(family), tmp_path / "m.pt")
    report = export.run(weights=[str(weights)], imgsz=[128, 160], include=INSTALLED, dynamic=dynamic, batch_size=2)
    assert not report.failures
    for exported_file in report.exported_files:
        runtime = open_runtime([str(exported_file.path)], CPU)
        for shape in FREE_SHAPES if dynamic else [(2, 3, 128, 160)]:
            images = torch.rand(shape)
            torch.testing.assert_close(runtime(images), eager(weights, images), rtol=1e-3, atol=2e-2)


@pytest.mark.slow
def test_model_without_free_sizes_is_refused(tmp_path, capsys):
    """RepMLPNet's published tile order is another function at multiples of its nominal size."""
    weights = save(build("repmlp-published"), tmp_path / "m.pt")
    status, text = cli(["--weights", weights, "--imgsz", 128, "160", "--include", "onnx", "--dynamic"], capsys)
    assert status == 1 and "leave --dynamic out" in text and "tile_order published" in text
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]
    assert cli(["--weights", weights, "--imgsz", 128, "--include", "torchscript"], capsys)[0] == 0


# ---- NMS in the graph ---------------------------------------------------------------------------------------


def with_nms(count, columns, options):
    """Return a session over a graph with NMS only: `images` are the rows."""
    rows = helper.make_tensor_value_info("images", 1, ["batch", count, columns])
    answer = helper.make_tensor_value_info("output0", 1, ["batch", count, columns])
    graph = helper.make_graph([helper.make_node("Identity", ["images"], ["output0"])], "g", [rows], [answer])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    embed_nms(model, options)
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString())


def random_rows(batch, count, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(batch, count, columns, generator=generator)
    rows[..., :2] *= 100
    rows[..., 2:4] = rows[..., 2:4] * 40 + 5
    return rows


@pytest.mark.parametrize(
    "options",
    [
        NmsOptions(0.25, 0.45, 100, 100, agnostic=False),
        NmsOptions(0.1, 0.7, 100, 100, agnostic=True),
        NmsOptions(0.1, 0.6, 3, 100, agnostic=False),
        NmsOptions(0.1, 0.6, 100, 7, agnostic=False),
        NmsOptions(0.25, 0.45, 400, 400, agnostic=False),  # more than the number of rows
        NmsOptions(0.999, 0.45, 100, 100, agnostic=False),  # nothing is left
    ],
)
def test_embedded_nms_equals_non_max_suppression(options):
    rows = random_rows(3, 200, 9)
    found = with_nms(200, 9, options).run(None, {"images": rows.numpy()})[0]
    assert found.shape == (3, options.per_image, 6)
    same = NmsRule(options.conf_thres, options.iou_thres, options.agnostic, options.per_class, options.per_image)
    for boxes, expected in zip(found, same.apply(rows)):
        torch.testing.assert_close(torch.from_numpy(boxes[boxes[:, 4] > 0]), expected, rtol=1e-5, atol=1e-3)
        assert not boxes[len(expected) :].any()  # zeros after the last box


def test_embedded_nms_thresholds_can_be_overridden():
    rows = random_rows(1, 200, 9)
    session = with_nms(200, 9, NmsOptions(0.25, 0.45, 100, 100, agnostic=False))
    feed = {"images": rows.numpy(), "conf_thres": np.array([0.6], np.float32), "iou_thres": np.array([0.2], np.float32)}
    found = session.run(None, feed)[0][0]
    torch.testing.assert_close(torch.from_numpy(found[found[:, 4] > 0]), NmsRule(0.6, 0.2).apply(rows)[0])


def test_export_with_nms(weights, tmp_path, caplog):
    copy = tmp_path / "n.pt"
    copy.write_bytes(weights.read_bytes())
    report = export.run(weights=[str(copy)], imgsz=SIZE, include=["onnx"], nms=True, topk_all=50, conf_thres=0.3)
    path = report.exported_files[0].path
    assert report.exported_files[0].comparison.matched > 20
    session = onnxruntime.InferenceSession(str(path))
    assert session.get_outputs()[0].shape == [1, 50, 6]
    assert "NMS is part of the file" not in caplog.text  # would name a temporary file
    runtime = open_runtime([str(path)], CPU)
    assert "NMS is part of the file (confidence 0.3, IoU 0.45, 50 boxes per image" in caplog.text
    images = torch.rand(1, 3, *SIZE)
    assert runtime(images).shape == (1, 50, 8)


# ---- passes over the graph ------------------------------------------------------------------------------------------


def test_lower_to_17_converts_reductions_and_splits():
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["m"], keepdims=1),
        helper.make_node("Sub", ["x", "m"], ["d"]),
        helper.make_node("Split", ["d"], ["a", "b"], axis=1, num_outputs=2),
        helper.make_node("Concat", ["b", "a"], ["y"], axis=1),
    ]
    value = [helper.make_tensor_value_info(name, 1, [2, 4, 3]) for name in ("x", "y")]
    axes = numpy_helper.from_array(np.array([2], np.int64), "axes")
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], [axes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    x = np.random.default_rng(0).random((2, 4, 3), np.float32)
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    lower_to_17(model)
    onnx.checker.check_model(model, full_check=True)
    assert opset_of(model) == 17
    np.testing.assert_array_equal(
        onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0], expected
    )


def test_lower_to_17_names_unsupported_operator():
    node = helper.make_node("Mish", ["x"], ["y"])
    value = [helper.make_tensor_value_info(name, 1, [2]) for name in ("x", "y")]
    model = helper.make_model(helper.make_graph([node], "g", value[:1], value[1:]))
    with pytest.raises(ExportError, match="needs Mish as of set 18; use --opset 18"):
        lower_to_17(model)


def test_reorder_gelu():
    nodes = [
        helper.make_node("Div", ["x", "root"], ["a"]),
        helper.make_node("Erf", ["a"], ["b"]),
        helper.make_node("Add", ["b", "one"], ["c"]),
        helper.make_node("Mul", ["half", "c"], ["d"]),
        helper.make_node("Mul", ["x", "d"], ["y"]),
    ]
    constants = {"root": 2**0.5, "one": 1.0, "half": 0.5}
    initializers = [numpy_helper.from_array(np.array(v, np.float32), name) for name, v in constants.items()]
    value = [helper.make_tensor_value_info(name, 1, [7]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    reorder_gelu(model)
    assert list(model.graph.node[3].input) == ["x", "c"] and list(model.graph.node[4].input) == ["d", "half"]
    x = torch.linspace(-4, 4, 7)
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), torch.nn.functional.gelu(x), rtol=1e-5, atol=1e-6)


# ---- failures -------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_weights(weights, tmp_path):
    copy = tmp_path / "run" / "best.pt"
    copy.parent.mkdir()
    copy.write_bytes(weights.read_bytes())
    return copy


def test_export_with_different_output_leaves_no_file(own_weights, monkeypatch, capsys):
    right = job.save_torchscript

    def wrong(graph, *rest):
        broken = ExportGraph(job.deepcopy(graph.model)).eval()
        broken.model.head.m[0].bias.data += 0.01
        right(broken, *rest)

    monkeypatch.setattr(job, "save_torchscript", wrong)
    status, text = cli(["--weights", own_weights, "--imgsz", *SIZE], capsys)
    assert status == 1
    assert "torchscript: verification failed at stage 2, re-parameterized model -> exported file" in text
    assert os.listdir(own_weights.parent) == ["best.pt"]


def test_export_continues_after_failed_format(own_weights, monkeypatch, capsys):
    def fails(*_):
        raise ExportError("onnx: this went wrong")

    monkeypatch.setattr(job, "onnx_model", fails)
    status, text = cli(["--weights", own_weights, "--imgsz", *SIZE, "--include", "onnx", "torchscript"], capsys)
    assert status == 1 and "onnx: this went wrong" in text
    left = sorted(os.listdir(own_weights.parent))
    assert left == ["best.pt", "best.torchscript", "best.torchscript.proof.json"]


def test_export_continues_after_a_file_that_cannot_be_run(own_weights, monkeypatch, capsys):
    monkeypatch.setattr(job, "save_onnx", lambda _graph, path, *_: path.write_bytes(b"no graph"))
    status, text = cli(["--weights", own_weights, "--imgsz", *SIZE, "--include", "onnx", "torchscript"], capsys)
    assert status == 1 and f"{own_weights}: onnx: ONNX Runtime cannot open it" in text
    left = sorted(os.listdir(own_weights.parent))
    assert left == ["best.pt", "best.torchscript", "best.torchscript.proof.json"]


def test_export_with_faulty_fold_writes_nothing(own_weights, monkeypatch, capsys):
    import models.fuse as fuse

    right = fuse.fused_weights
    monkeypatch.setattr(fuse, "fused_weights", lambda conv, norm: (right(conv, norm)[0], -right(conv, norm)[1]))
    status, text = cli(["--weights", own_weights, "--imgsz", *SIZE], capsys)
    assert status == 1 and text.count("\n") == 1 and "stage 1, training model -> re-parameterized model" in text
    assert os.listdir(own_weights.parent) == ["best.pt"]


BAD = [
    (["--include", "onix"], "unknown format; allowed: torchscript, onnx, openvino; did you mean 'onnx'?"),
    (["--include", "engine"], "--include engine: engine files are not written; export onnx"),
    (["--include", "tflite"], "TensorFlow formats are not written"),
    (["--half"], "--half: torchscript in float16 needs a GPU"),
    (["--half", "--int8", "--include", "onnx"], "--half and --int8 exclude each other"),
    (["--int8"], "--int8: not for torchscript"),
    (["--nms"], "--nms: not for torchscript"),
    (["--imgsz", "64", "64", "64"], "--imgsz: 3 numbers"),
    (["--imgsz", "0"], "--imgsz: 0 is out of range"),
    (["--opset", "16", "--include", "onnx"], "--opset: 16 is out of range; allowed: 17 to 22"),
    (["--keras"], "--keras: not available: belongs to TensorFlow"),
    (["--workspace", "8"], "--workspace: not available: belongs to TensorRT"),
    (["--optimize"], "--optimize: not available"),
    (["--batch-size", "0"], "--batch-size: 0 is out of range"),
]


@pytest.mark.parametrize(("argv", "words"), BAD, ids=[" ".join(b[0]) for b in BAD])
def test_refused_in_one_line(own_weights, capsys, argv, words):
    status, text = cli(["--weights", own_weights, *argv], capsys)
    assert status == 2 and text.count("\n") == 1 and words in text, text
    assert os.listdir(own_weights.parent) == ["best.pt"]


@pytest.mark.parametrize(
    ("argv", "missing", "command"),
    [
        (["--include", "openvino"], "openvino", "pip install openvino"),
        (["--include", "onnx"], "onnxscript", "pip install onnxscript"),
        (["--include", "onnx", "--simplify"], "onnxslim", "pip install onnxslim"),
    ],
)
def test_missing_package_is_named_with_pip_command(own_weights, monkeypatch, capsys, argv, missing, command):
    right = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == missing else right(name, *rest)
    )
    status, text = cli(["--weights", own_weights, *argv], capsys)
    assert status == 2 and text.count("\n") == 1 and command in text
    assert os.listdir(own_weights.parent) == ["best.pt"]


def test_export_refuses_bad_weights(own_weights, capsys, tmp_path):
    cases = {
        "cut.pt": (own_weights.read_bytes()[:5000], "damaged"),
        "best.onnx": (b"x", "is exported already; give a checkpoint"),
        "gone.pt": (None, "no such file"),
    }
    for name, (content, words) in cases.items():
        path = tmp_path / "bad" / name
        path.parent.mkdir(exist_ok=True)
        if content is not None:
            path.write_bytes(content)
        status, text = cli(["--weights", path], capsys)
        assert status == 2 and text.count("\n") == 1 and words in text, text
    assert {p.name for p in (tmp_path / "bad").iterdir()} == {"cut.pt", "best.onnx"}


def test_export_of_one_channel_is_refused(tmp_path, capsys):
    gray = DetectionModel({**build("yolov5").yaml, "ch": 1})
    status, text = cli(["--weights", save(gray, tmp_path / "gray.pt")], capsys)
    assert status == 2 and text.count("\n") == 1 and "ch is 1; images are read with 3 channels" in text


def test_export_to_read_only_folder_is_refused(own_weights, monkeypatch, capsys):
    folder = own_weights.parent
    right = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and right(path, mode))
    status, text = cli(["--weights", own_weights], capsys)
    assert status == 2 and text.count("\n") == 1 and "this folder is not writable" in text


def test_export_size_is_rounded_to_stride(own_weights, caplog):
    report = export.run(weights=[str(own_weights)], imgsz=[60, 70])
    assert "--imgsz 60 70: rounded up to 64 96, multiples of the stride 32" in caplog.text
    assert open_runtime([str(report.exported_files[0].path)], CPU).imgsz == (64, 96)


def test_time_in_turns_alternates_formats():
    class Clock:
        device, fixed_batch = CPU, None

        def __init__(self):
            self.calls = 0

        def __call__(self, images):
            assert images.shape == (2, 3, 32, 32)
            self.calls += 1

    runtimes = {"a": Clock(), "b": Clock()}
    taken = time_in_turns(runtimes, 32, batch=2, rounds=3)  # also where a runtime takes any batch
    assert set(taken) == {"a", "b"} and all(0 <= t < 1000 for t in taken.values())
    assert [r.calls for r in runtimes.values()] == [5, 5]


@pytest.mark.parametrize(
    ("given", "missing", "expected"),
    [
        ({}, "", ["torchscript", "onnx", "openvino"]),
        ({}, "openvino", ["torchscript", "onnx"]),
        ({"include": ["torchscript"]}, "", ["torchscript"]),
        ({"int8": True, "include": ["onnx"]}, "", ["onnx"]),
    ],
)
def test_formats_of_a_benchmark(monkeypatch, caplog, given, missing, expected):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == missing else object())
    assert formats(ExportConfig.from_keywords(**given)) == expected
    assert ("pip install openvino" in caplog.text) == bool(missing)
