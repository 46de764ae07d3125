"""Exported ONNX files with changed metadata, shapes or bytes: run, or refused."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from engine.runtimes.registry import open_runtime
from tests.helpers.fuzz import Case, WrongResult, faults, seeds
from tests.helpers.mutations import ODD_VALUES

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.fuzz
TEXTS = [
    *("", "x", "None", "0", "-1", "1e400", "inf", "nan", "[]", "{}", "{0: 'a', 2: 'b'}", "{'a': 'b'}", "[1, 2]", "()"),
    *("(" * 5000, "[" * 3000 + "]" * 3000, "-" * 100_000 + "1", "1" * 5000, "__import__('os').getcwd()", "2.5", "True"),
]


def detector_file(path: Path) -> onnx.ModelProto:
    """Return a file whose rows (1, 4, 7) do not depend on the image (1, 3, 32, 32)."""
    helper, kinds = onnx.helper, onnx.TensorProto
    values = helper.make_tensor("rows", kinds.FLOAT, (1, 4, 7), [16.0] * 28)
    nodes = [
        helper.make_node("Constant", [], ["constant"], value=values),
        helper.make_node("ReduceMax", ["images"], ["largest"], keepdims=0),
        helper.make_node("Mul", ["largest", "nothing"], ["zero"]),
        helper.make_node("Add", ["constant", "zero"], ["output0"]),
    ]
    inputs = [helper.make_tensor_value_info("images", kinds.FLOAT, (1, 3, 32, 32))]
    outputs = [helper.make_tensor_value_info("output0", kinds.FLOAT, (1, 4, 7))]
    zero = helper.make_tensor("nothing", kinds.FLOAT, (), [0.0])
    graph = helper.make_graph(nodes, "g", inputs, outputs, [zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    for key, text in {"stride": "32", "names": "{0: 'a', 1: 'b'}", "imgsz": "[32, 32]", "batch": "1"}.items():
        model.metadata_props.add(key=key, value=text)
    return model


def make(rng: random.Random, folder: Path) -> Case:
    path = folder / "x.onnx"
    model = detector_file(path)
    kind = rng.choice(["metadata", "metadata", "shape", "bytes"])
    if kind == "metadata":
        entry = rng.choice(list(model.metadata_props))
        text = rng.choice([*TEXTS, *(str(v)[:10_000] for v in ODD_VALUES[:3])])
        entry.value = text
        kind += f" {entry.key}"
    elif kind == "shape":
        value = rng.choice([model.graph.input[0], model.graph.output[0]])
        dimension = rng.choice(list(value.type.tensor_type.shape.dim))
        dimension.dim_value = rng.choice([0, 1, 2, 5, 7, 33, 2**40])
    data = model.SerializeToString()
    if kind == "bytes":
        at = rng.randrange(len(data))
        data = data[:at] + rng.choice([b"", bytes([rng.randrange(256)]), data[at : at + 9] * 3]) + data[at + 1 :]
    path.write_bytes(data)

    def run() -> None:
        runtime = open_runtime([str(path)], torch.device("cpu"))
        rows = runtime(torch.zeros((1, 3, 32, 32), dtype=torch.uint8))
        if rows.shape[-1] != 5 + len(runtime.names):
            raise WrongResult(f"rows of {rows.shape[-1]} numbers for {len(runtime.names)} classes")

    return Case(run, kind, str(path))


def test_runtimes(tmp_path: Path) -> None:
    assert faults(make, seeds(), tmp_path) == []
