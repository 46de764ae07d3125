"""Runtimes of exported files: metadata, inputs, refusals."""

from __future__ import annotations

import json
import os

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from engine.cli.config import DetectConfig
from engine.predict.predictor import class_names, detect, input_size
from engine.runtimes.base import RawRuntime, Runtime
from engine.runtimes.exported import rows_from_boxes
from engine.runtimes.metadata import Metadata
from engine.runtimes.onnxruntime import choose_providers
from engine.runtimes.opencv_dnn import OpenCvRuntime
from engine.runtimes.registry import OPENERS, open_runtime, split_device
from engine.runtimes.torchscript import CONFIG
from utils.errors import CheckpointError, ConfigError, UserError
from utils.nms import non_max_suppression

CPU = torch.device("cpu")
NAMES = {0: "disc"}
SIDE = 64
ROWS = 3 * SIDE * SIDE // 6


def onnx_file(path, batch=1, side=SIDE, kind=TensorProto.FLOAT, texts=None, rows=(ROWS, 6)):
    """Write a "detector" that returns its pixels, times 2, as rows of 6 values."""
    sizes = [size if isinstance(size, int) else -1 for size in (batch, *rows)]
    if sizes.count(-1) > 1:
        sizes[0] = 0  # that of the input
    shape = numpy_helper.from_array(np.array(sizes, np.int64), "shape")
    two = numpy_helper.from_array(np.array(2, helper.tensor_dtype_to_np_dtype(kind)), "two")
    nodes = [
        helper.make_node("Mul", ["images", "two"], ["twice"]),
        helper.make_node("Reshape", ["twice", "shape"], ["output0"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", kind, [batch, 3, side, side])],
        [helper.make_tensor_value_info("output0", kind, [batch, *rows])],
        [shape, two],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    for key, value in (texts if texts is not None else {"stride": "32", "names": str(NAMES)}).items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, str(path))
    return str(path)


class Pixels(torch.nn.Module):
    def forward(self, images):
        return ((images * 2).reshape(images.shape[0], -1, 6),)


def torchscript_file(path, config=None):
    config = {"shape": [2, 3, SIDE, SIDE], "stride": 32, "names": NAMES} if config is None else config
    module = torch.jit.trace(Pixels(), torch.rand(2, 3, SIDE, SIDE))
    torch.jit.save(module, str(path), _extra_files={CONFIG: json.dumps(config)} if config else {})
    return str(path)


def openvino_folder(folder, texts=("stride: 32", "names: {0: disc}")):
    openvino = pytest.importorskip("openvino")
    folder.mkdir()
    model = openvino.convert_model(onnx_file(folder.parent / "for_openvino.onnx", batch=2))
    openvino.save_model(model, str(folder / "x.xml"), compress_to_fp16=False)
    (folder / "metadata.yaml").write_text("\n".join(texts) + "\n")
    return str(folder)


def make(kind, tmp_path, dnn=False):
    if kind == "onnx":
        return open_runtime([onnx_file(tmp_path / "x.onnx", batch=2)], CPU)
    if kind == "dnn":
        return open_runtime([onnx_file(tmp_path / "x.onnx", batch=2)], CPU, dnn=True)
    if kind == "torchscript":
        return open_runtime([torchscript_file(tmp_path / "x.torchscript")], CPU)
    return open_runtime([openvino_folder(tmp_path / "x_openvino_model")], CPU)


@pytest.mark.parametrize("kind", ["onnx", "dnn", "torchscript", "openvino"])
def test_runtime_reads_shape_and_converts_pixels(tmp_path, kind):
    runtime = make(kind, tmp_path)
    assert isinstance(runtime, Runtime) and not isinstance(runtime, RawRuntime)
    assert (runtime.names, runtime.stride, runtime.imgsz, runtime.fixed_batch) == (NAMES, 32, (SIDE, SIDE), 2)
    images = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8)
    expected = (images.float() / 255 * 2).reshape(2, -1, 6)
    # As from the predictor: channels_last memory layout.
    turned = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for given in (images, images.float() / 255, turned):
        torch.testing.assert_close(runtime(given), expected, rtol=0, atol=1e-6)
    first = runtime(images).clone()
    runtime(255 - images)
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-6)  # outputs do not share memory


@pytest.mark.parametrize("kind", ["onnx", "dnn", "torchscript", "openvino"])
def test_runtime_pads_smaller_batches_and_refuses_other_sizes(tmp_path, kind):
    runtime = make(kind, tmp_path)
    images = torch.rand(1, 3, SIDE, SIDE)
    torch.testing.assert_close(runtime(images), (images * 2).reshape(1, -1, 6), rtol=0, atol=1e-6)
    runtime.warmup((4, 3, 640, 640))
    with pytest.raises(ConfigError, match="takes 64 x 64 pixels, not 64 x 96"):
        runtime(torch.rand(1, 3, SIDE, 96))
    with pytest.raises(ConfigError, match="takes batches of 2, not 3"):
        runtime(torch.rand(3, 3, SIDE, SIDE))


@pytest.mark.parametrize(("names", "side"), [(1, 80), (2, 64)])  # sides whose pixels are a multiple of 4 + names
def test_layout_v8_of_other_exporters_is_recognized_by_its_shape(tmp_path, names, side):
    texts = {"stride": "32", "names": str(dict.fromkeys(range(names), "x"))}
    rows = (4 + names, 3 * side * side // (4 + names))
    images = torch.rand(1, 3, side, side)
    found = open_runtime([onnx_file(tmp_path / "x.onnx", texts=texts, rows=rows, side=side)], CPU)(images)
    free = [onnx_file(tmp_path / "free.onnx", texts=texts, rows=(rows[0], "anchors"), side="side", batch="batch")]
    assert open_runtime(free, CPU)(images).equal(found)
    for file in ({"rows": rows, "side": side}, {"rows": (rows[0], "anchors"), "side": "side", "batch": "batch"}):
        bare = open_runtime([onnx_file(tmp_path / "bare.onnx", texts={}, **file)], CPU)
        assert len(bare.names) == names and bare(images).equal(found)
    columns = (images * 2).reshape(1, *rows).transpose(1, 2)
    assert found.shape == (1, rows[1], 5 + names) and (found[..., 4] == 1).all()
    torch.testing.assert_close(found[..., [0, 1, 2, 3, *range(5, 5 + names)]], columns, rtol=0, atol=1e-6)


def test_float16_input_of_foreign_files(tmp_path):
    runtime = open_runtime([onnx_file(tmp_path / "x.onnx", kind=TensorProto.FLOAT16)], CPU)
    images = torch.rand(1, 3, SIDE, SIDE)
    found = runtime(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (images * 2).reshape(1, -1, 6), rtol=1e-3, atol=1e-3)


def test_free_sizes(tmp_path):
    runtime = open_runtime([onnx_file(tmp_path / "x.onnx", batch="batch", side="side")], CPU)
    assert (runtime.imgsz, runtime.fixed_batch) == (None, None)


def test_class_names_come_from_dataset_without_metadata(tmp_path):
    (tmp_path / "d.yaml").write_text("path: .\ntrain: .\nval: .\nnames: [cell]\n")
    runtime = open_runtime([onnx_file(tmp_path / "x.onnx", texts={})], CPU)
    assert (runtime.names, runtime.stride) == ({0: "0"}, 32)
    assert class_names(runtime, str(tmp_path / "d.yaml")) == {0: "cell"}


def test_fixed_size_is_logged(tmp_path, caplog):
    runtime = open_runtime([onnx_file(tmp_path / "x.onnx")], CPU)
    with caplog.at_level("INFO"):
        assert input_size([640], runtime) == (SIDE, SIDE)
    assert "fixed input" in caplog.text


# ---- metadata -------------------------------------------------------------------------------------------------------

FULL = Metadata({0: "a 'b'", 1: "ü"}, 64, (96, 128), 2, True, True, {"date": "2026-01-01", "spec": "{}"})


def test_metadata_round_trip():
    assert Metadata.from_texts(FULL.to_texts(), "x") == FULL
    plain = Metadata(FULL.names, 64, (96, 128), 2, True, False, {"date": "2026-01-01"})
    assert Metadata.from_json(plain.to_json((2, 3, 96, 128)), "x") == plain


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"names": "{0: 'a'"}, "metadata 'names'"),
        ({"names": "__import__('os')"}, "metadata 'names'"),
        ({"stride": "wide"}, "metadata 'stride'"),
        ({"names": "3"}, "cannot be read"),
        ({"imgsz": "[]"}, "cannot be read"),
        ({"stride": "0"}, "stride 0"),
        ({"stride": "-32"}, "stride -32"),
        ({"batch": "0"}, "batch 0"),
        ({"imgsz": "[0, 64]"}, "imgsz"),
        ({"names": "{1: 'a'}"}, "classes 0, 1, 2, ... are needed"),
    ],
)
def test_broken_metadata(texts, words):
    with pytest.raises(CheckpointError, match=words):
        Metadata.from_texts(texts, "x.onnx")


def test_metadata_names_as_list():
    assert Metadata.from_texts({"names": "['a', 'b']"}, "x").names == {0: "a", 1: "b"}


# ---- choice ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "device", "provider"),
    [("", "", ""), ("cpu", "cpu", ""), ("cuda:1", "cuda:1", ""), ("tensorrt", "0", "tensorrt"),
     ("TensorRT:1", "1", "tensorrt"), ("openvino", "cpu", "openvino")],
)  # fmt: skip
def test_device_names_a_provider(text, device, provider):
    assert split_device(text) == (device, provider)


ALL = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "OpenVINOExecutionProvider", "CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("device", "provider", "names"),
    [
        ("cpu", "", ["CPU"]),
        ("cuda:1", "", ["CUDA", "CPU"]),
        ("cuda:0", "tensorrt", ["Tensorrt", "CUDA", "CPU"]),
        ("cpu", "openvino", ["OpenVINO", "CPU"]),
    ],
)
def test_providers(tmp_path, device, provider, names):
    chosen = choose_providers(ALL, torch.device(device), provider, tmp_path / "best.onnx")
    flat = [entry if isinstance(entry, str) else entry[0] for entry in chosen]
    assert [name.removesuffix("ExecutionProvider") for name in flat] == names
    options = {entry[0]: entry[1] for entry in chosen if not isinstance(entry, str)}
    assert all(o["device_id"] == int(device[-1]) for o in options.values())
    if provider == "tensorrt":
        assert options["TensorrtExecutionProvider"]["trt_engine_cache_path"] == str(tmp_path / "best_tensorrt")


@pytest.mark.parametrize(("device", "provider"), [("cuda:0", ""), ("cuda:0", "tensorrt"), ("cpu", "openvino")])
def test_missing_provider_is_refused(tmp_path, device, provider):
    with pytest.raises(ConfigError, match="pip install onnxruntime-"):
        choose_providers(["CPUExecutionProvider"], torch.device(device), provider, tmp_path / "x.onnx")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_provider_that_cannot_be_started_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ALL)  # this build has no OpenVINO provider
    with pytest.raises(ConfigError, match="cannot start its OpenVINO provider"):
        open_runtime([onnx_file(tmp_path / "x.onnx")], CPU, provider="openvino")


def refused(tmp_path, case):
    good = onnx_file(tmp_path / "good.onnx")
    for name in ("bad.onnx", "bad.torchscript", "bad.xyz"):
        (tmp_path / name).write_bytes(b"nothing of use")
    (tmp_path / "empty").mkdir()
    flat = helper.make_graph(
        [helper.make_node("Identity", ["a"], ["b"])],
        "g",
        [helper.make_tensor_value_info("a", 1, [2])],
        [helper.make_tensor_value_info("b", 1, [2])],
    )
    onnx.save(
        helper.make_model(flat, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(tmp_path / "flat.onnx")
    )
    script = torchscript_file(tmp_path / "plain.torchscript", {})
    nms = onnx_file(tmp_path / "nms.onnx", texts={"nms": "True"})
    os.mkfifo(fifo := str(tmp_path / "fifo.onnx"))
    path = {name: str(tmp_path / name) for name in ("bad.onnx", "bad.torchscript", "bad.xyz", "empty", "goood.onnx")}
    return {
        "corrupt onnx": (lambda: open_runtime([path["bad.onnx"]], CPU), "ONNX Runtime cannot open it"),
        "corrupt torchscript": (lambda: open_runtime([path["bad.torchscript"]], CPU), "opened as TorchScript"),
        "no config": (lambda: open_runtime([script], CPU), "has no config.txt"),
        "no detector": (lambda: open_runtime([str(tmp_path / "flat.onnx")], CPU), "not a detector"),
        "empty folder": (lambda: open_runtime([path["empty"]], CPU), r"a folder without weights/best\.pt"),
        "unknown kind": (lambda: open_runtime([path["bad.xyz"]], CPU), "cannot be run; allowed: .pt, .pth, .onnx"),
        "missing": (lambda: open_runtime([path["goood.onnx"]], CPU), "no such file; did you mean 'good.onnx'"),
        "FIFO": (lambda: open_runtime([fifo], CPU), r"fifo\.onnx: cannot be read: is a FIFO"),
        "ensemble": (lambda: open_runtime([good, good], CPU), "is run alone"),
        "augment": (lambda: open_runtime([good], CPU, augment=True), "--augment: needs a .pt file"),
        "dnn without onnx": (lambda: open_runtime(["x.pt"], CPU, dnn=True), "--dnn: OpenCV runs one ONNX file"),
        "provider without onnx": (lambda: open_runtime(["x.pt"], CPU, provider="openvino"), "for one ONNX file only"),
        "dnn with NMS": (lambda: open_runtime([nms], CPU, dnn=True), "with --nms, on which OpenCV crashes"),
        "dnn elsewhere": (lambda: OpenCvRuntime(good, torch.device("cuda")), "--dnn: OpenCV runs on the CPU"),
    }[case]  # fmt: skip


@pytest.mark.parametrize(
    "case",
    ["corrupt onnx", "corrupt torchscript", "no config", "no detector", "empty folder", "unknown kind", "missing",
     "ensemble", "augment", "dnn without onnx", "provider without onnx", "dnn with NMS", "dnn elsewhere"],
)  # fmt: skip
def test_refused_in_one_line(tmp_path, case):
    call, words = refused(tmp_path, case)
    with pytest.raises(UserError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def test_openers_accept_another_runtime(tmp_path, monkeypatch):
    """A new file type only needs a row in `OPENERS`."""
    (tmp_path / "x.mine").write_bytes(b"")
    marker = open_runtime([onnx_file(tmp_path / "x.onnx")], CPU)
    monkeypatch.setitem(OPENERS, ".mine", lambda path, device, provider: marker)
    assert open_runtime([str(tmp_path / "x.mine")], CPU) is marker


# ---- files with NMS -------------------------------------------------------------------------------------------------


def test_rows_from_boxes_keeps_boxes_after_nms():
    boxes = torch.zeros(1, 5, 6)
    boxes[0, 0] = torch.tensor([10, 10, 30, 30, 0.9, 2.0])
    boxes[0, 1] = torch.tensor([14, 10, 34, 30, 0.8, 1.0])  # another class may overlap
    boxes[0, 2] = torch.tensor([50, 50, 60, 70, 0.3, 0.0])
    kept = non_max_suppression(rows_from_boxes(boxes, 3), 0.25, 0.45)[0]
    torch.testing.assert_close(kept, boxes[0, :3])


def test_detect_runs_a_file(tmp_path):
    path = onnx_file(tmp_path / "x.onnx")
    report = detect(
        DetectConfig(weights=[path], source="data/images", project=str(tmp_path), nosave=True, save_txt=True)
    )
    assert report.frames == 4 and not report.failures


def test_metadata_of_another_model_is_refused(tmp_path):
    path = onnx_file(tmp_path / "x.onnx", texts={"names": "{0: 'a', 1: 'b', 2: 'c'}"})
    with pytest.raises(CheckpointError, match="its output has 6 columns, rows of 3 classes have 8"):
        open_runtime([path], CPU)
