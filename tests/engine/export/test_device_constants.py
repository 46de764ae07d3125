"""Traced graphs contain no device, so that an exported file runs on any device, not only on that of the export."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from engine.export.wrapper import ExportGraph, TupleGraph, reparameterized_copy
from models.yolo import DetectionModel
from tests.helpers.detectors import BACKBONES, build
from utils.files import ROOT

OTHER_LAYERS = ["yolov5s-transformer", "yolov5s-ghost", "yolov5-bifpn", "yolov5-fpn", "yolov3-tiny"]
GPU = torch.device("cuda", 0)


def trace(model: DetectionModel, device: torch.device) -> Any:
    """Trace what `export.py` traces."""
    graph = TupleGraph(ExportGraph(model.to(device)))
    return torch.jit.trace(graph, torch.rand(2, 3, 96, 160).to(device), strict=False, check_trace=False)


def with_head(model: DetectionModel, head: str) -> DetectionModel:
    """Return the same backbone and neck with new weights and the other head, or the model itself."""
    return model if head == "anchor" else DetectionModel(model.yaml, head=head).eval()


def nodes(block: Any) -> Iterator[Any]:
    """Yield all nodes of a graph, including those of nested blocks."""
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from nodes(inner)


def device_constants(traced: Any) -> list[str]:
    """Return the devices in a graph with the operators that use them."""
    return [
        f"{node.output().toIValue()} in {use.user.kind()}"
        for node in nodes(traced.inlined_graph)
        if node.kind() == "prim::Constant" and node.output().type().kind() == "DeviceObjType"
        for use in node.output().uses()
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["training form", "deploy mode"])
@pytest.mark.parametrize("head", ["anchor", "free"])
@pytest.mark.parametrize("family", ["yolov5", *BACKBONES])
def test_graph_contains_no_device(family, head, form) -> None:
    model = with_head(build(family), head)
    model = reparameterized_copy(model) if form == "deploy mode" else model
    assert device_constants(trace(model, torch.device("cpu"))) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_graph_of_other_layers_contains_no_device(name) -> None:
    model = DetectionModel(ROOT / f"models/hub/{name}.yaml", nc=3).eval()
    assert device_constants(trace(model, torch.device("cpu"))) == []


def test_device_constants_are_found() -> None:
    graph = torch.jit.trace(lambda x: x + torch.arange(3, device=x.device), torch.rand(3))
    assert device_constants(graph) == ["cpu in aten::arange"]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "head"), [(family, "anchor") for family in ("yolov5", *BACKBONES)] + [("yolov5", "free")]
)
def test_trace_of_another_device_runs(family, head, gpu_block) -> None:
    """The graph of a CPU trace runs on a GPU; a GPU trace has no device in its graph either."""
    model = reparameterized_copy(with_head(build(family), head))
    images = torch.rand(2, 3, 64, 96)
    expected = model(images)[0]
    traced = trace(model, torch.device("cpu"))
    graph, parameters = torch._C._jit_pass_lower_graph(traced.graph, traced._c)
    function = torch._C._create_function_from_graph("forward", graph)
    with gpu_block(), torch.jit.optimized_execution(False):  # the fake device cannot be optimized for
        (found,) = function(images.to(GPU), *(value.to(GPU) for value in parameters))
        assert found.device == GPU
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-2)
        assert device_constants(trace(model, GPU)) == []
