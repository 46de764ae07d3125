"""A small detector with random weights, and the content of a checkpoint of it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch

from models.yolo import DetectionModel

SPEC = {
    "nc": 2,
    "depth_multiple": 1.0,
    "width_multiple": 1.0,
    "anchors": [[10, 13, 16, 30], [30, 61, 62, 45]],
    "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [8, 3, 2]], [-1, 1, "C3", [16]]],
    "head": [[-1, 1, "Conv", [16, 3, 2]], [[2, 3], 1, "Detect", ["nc", "anchors"]]],
}


def detector(seed: int = 0, spec: dict[str, Any] = SPEC) -> DetectionModel:
    """Return a small detector with no value at its initialization."""
    torch.manual_seed(seed)
    model = DetectionModel(deepcopy(spec)).eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point() and not key.endswith("anchors"):
                value.copy_(torch.rand_like(value) + 0.2 if key.endswith("var") else torch.randn_like(value) * 0.3)
    return model


NEXTVIT = {"depths": [1, 1, 1, 1], "conv_channels": [32, 32, 64, 64], "out_channels": [32, 64, 96, 128]}
XCA_SPEC = {
    "nc": 2,
    "depth_multiple": 1.0,
    "width_multiple": 1.0,
    "anchors": [[10, 13, 16, 30], [30, 61, 62, 45]],
    "backbone": [[-1, 1, "NextViT", {"arch": NEXTVIT, "mixer": "xca"}]],
    "head": [["P4", 1, "Conv", [16]], ["P5", 1, "Conv", [16]], [[-2, -1], 1, "Detect", ["nc", "anchors"]]],
}


def separate_queries_and_keys(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict as older versions wrote it, with q and k (C, ...) for each qk (2 C, ...)."""
    old = {}
    for key, value in state.items():
        if ".e_mhsa.qk." in key:
            first, second = value.clone().chunk(2)
            old |= {key.replace(".qk.", ".q."): first, key.replace(".qk.", ".k."): second}
        else:
            old[key] = value
    return old


def content(model: DetectionModel, **more: Any) -> dict[str, Any]:
    """Return what `write_checkpoint` needs, plus `more`."""
    return {
        "spec": model.yaml,
        "names": {0: "cat", 1: "dog"},
        "stride": model.stride.tolist(),
        "state": model.state_dict(),
        **more,
    }
