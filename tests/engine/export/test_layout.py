"""`--layout v8`: (B, 4 + nc, N) without objectness, and names of free dimensions in both layouts."""

from __future__ import annotations

import importlib.util

import onnx
import pytest
import torch
from onnx import helper

import export
from engine.cli.parser import run_main
from engine.export.config import FORMATS, ExportConfig
from engine.export.formats.onnx import _name_dimensions
from engine.export.wrapper import ExportGraph, reparameterized_copy
from engine.runtimes.registry import open_runtime
from models.loading import load_detector
from tests.helpers.detectors import build, build_anchor_free, save

CPU = torch.device("cpu")
INSTALLED = [name for name in FORMATS if name != "openvino" or importlib.util.find_spec("openvino") is not None]
SIZE = [64, 96]


def check_layout_v8(weights, report):
    """Compare raw output (B, 4 + nc, N), and the rows that the runtimes return, with the eager model."""
    assert not report.failures
    images = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        rows = ExportGraph(reparameterized_copy(load_detector(weights))).eval()(images)
    confidences = rows[..., 4:5] * rows[..., 5:]
    expected = torch.cat((rows[..., :4], confidences), 2).transpose(1, 2)
    for file in report.exported_files:
        for dnn in (False, True) if file.format == "onnx" else (False,):
            runtime = open_runtime([str(file.path)], CPU, dnn=dnn)
            assert runtime.metadata.about["layout"] == "v8"
            torch.testing.assert_close(runtime._infer(images), expected, rtol=1e-4, atol=2e-3)
            found = runtime(images)
            assert found.shape == rows.shape and (found[..., 4] == 1).all()
            torch.testing.assert_close(found[..., 5:], confidences, rtol=1e-4, atol=2e-3)


def test_layout_v8_of_every_format(tmp_path):  # several seconds: every format is traced
    weights = save(build("yolov5"), tmp_path / "m.pt")
    report = export.run(weights=[str(weights)], imgsz=SIZE, include=INSTALLED, layout="v8")
    check_layout_v8(weights, report)


def test_layout_v8_of_anchor_free_head(tmp_path):
    weights = save(build_anchor_free(), tmp_path / "m.pt")
    check_layout_v8(weights, export.run(weights=[str(weights)], imgsz=SIZE, include=["onnx"], layout="v8"))


def test_layout_v8_is_refused_with_nms(tmp_path, capsys):
    words = ["--weights", str(tmp_path / "m.pt"), "--include", "onnx", "--nms", "--layout", "v8"]
    assert run_main(ExportConfig, "export.py", "", export.work, words) == 2
    assert "--layout v8: not with --nms" in capsys.readouterr().err


@pytest.mark.parametrize("fixed", [1, 2])
def test_free_dimensions_are_named_in_either_layout(fixed):
    def described(name, shape):
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    output = ["s0", "s1 * 3", "s1 * 3"]
    output[fixed] = 7
    nodes = [helper.make_node("Identity", ["images"], ["output0"])]
    given, answer = described("images", ["s0", 3, "s1", "s2"]), described("output0", output)
    model = helper.make_model(helper.make_graph(nodes, "g", [given], [answer]))
    _name_dimensions(model)
    names = [d.dim_param or d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim]
    assert names == (["batch", 7, "anchors"] if fixed == 1 else ["batch", "anchors", 7])
