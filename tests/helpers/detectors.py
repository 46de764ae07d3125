"""Small detectors of every family, with nothing left at its initial zero or one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.checkpoint.io import write_checkpoint
from models.yolo import DetectionModel

ANCHORS = [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]]
# A neck on slots 0 to 4 = P1 to P5 of a backbone row.
NECK: list[list[Any]] = [
    [-1, 1, "SPPF", [32, 5]],  # 5
    [-1, 1, "nn.Upsample", [None, 2, "nearest"]],  # 6
    [[-1, "P4"], 1, "Concat", [1]],  # 7
    [-1, 1, "C3", [32, False]],  # 8
    [-1, 1, "nn.Upsample", [None, 2, "nearest"]],  # 9
    [[-1, "P3"], 1, "Concat", [1]],  # 10
    [-1, 1, "C3", [16, False]],  # 11
    [[11, 8, 5], 1, "Detect", ["nc", "anchors"]],  # 12
]
PLAIN: list[list[Any]] = [
    [-1, 1, "Conv", [8, 6, 2, 2]],  # 0: P1
    [-1, 1, "Conv", [16, 3, 2]],  # 1: P2
    [-1, 1, "Conv", [16, 3, 2]],  # 2: P3
    [-1, 1, "C3", [16]],  # 3
    [-1, 1, "Conv", [24, 3, 2]],  # 4: P4
    [-1, 1, "Conv", [32, 3, 2]],  # 5: P5
    [-1, 1, "SPPF", [32, 5]],  # 6
    [-1, 1, "nn.Upsample", [None, 2, "nearest"]],  # 7
    [[-1, 4], 1, "Concat", [1]],  # 8
    [-1, 1, "C3", [32, False]],  # 9
]
PLAIN_HEAD = [[[3, 9, 6], 1, "Detect", ["nc", "anchors"]]]
_NEXTVIT = {
    "depths": [1, 1, 2, 1],
    "conv_channels": [32, 32, 64, 64],
    "out_channels": [32, 64, 64, 96],
    "transformer_every": [0, 1, 2, 1],
    "stem_channels": [16, 8, 16],
}
_REPMLP = {"channels": [16, 32, 64, 64], "depths": [1, 1, 1, 1], "share_sets": [1, 4, 4, 8], "nominal": 64}
_REVVIT = {"embed_dims": 32, "num_layers": 2, "num_heads": 2, "feedforward_channels": 64}
BACKBONES: dict[str, list[Any]] = {
    "riformer": ["RIFormer", {"arch": {"layers": [1, 1, 1, 1], "embed_dims": [16, 24, 32, 48]}}],
    "repmlp": ["RepMLPNet", {"arch": _REPMLP, "tile_order": "spatial"}],
    "repmlp-published": ["RepMLPNet", {"arch": _REPMLP, "tile_order": "published"}],
    "revvit": ["RevViT", {"arch": _REVVIT, "img_size": 64, "strides": [8, 16, 32], "widths": [16, 24, 32]}],
    "nextvit": ["NextViT", {"arch": _NEXTVIT}],
    "nextvit-xca": ["NextViT", {"arch": _NEXTVIT, "mixer": "xca"}],
    "timm": ["timm/convnext_atto", {}],
    "timm-repvgg": ["timm/repvgg_a0", {}],
}


def build(family: str, seed: int = 0) -> DetectionModel:
    """A detector with 3 classes in evaluation mode; 'yolov5' or a key of `BACKBONES`."""
    torch.manual_seed(seed)
    spec: dict[str, Any] = {"nc": 3, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": ANCHORS}
    if family == "yolov5":
        model = DetectionModel({**spec, "backbone": PLAIN[:7], "head": PLAIN[7:] + PLAIN_HEAD})
    else:
        model = DetectionModel({**spec, "backbone": [[-1, 1, *BACKBONES[family]]], "head": NECK})
    randomise(model)
    model.names = {0: "disc", 1: "bar", 2: "dot"}
    return model.eval()


@torch.no_grad()
def build_anchor_free(bias: float = -2, seed: int = 0) -> DetectionModel:
    """The detector `build("yolov5")` with new weights, an anchor-free head, and a bias of the classes."""
    torch.manual_seed(seed)
    model = DetectionModel(build("yolov5").yaml, head="free").eval()
    for branch in model.head.cls:
        branch[-1].weight.normal_(0, 0.5)
        branch[-1].bias.fill_(bias)
    return model


@torch.no_grad()
def randomise(model: DetectionModel) -> None:
    """Scales, shifts and layer scales as after training, statistics of noise, and about one object per 50 rows."""
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
            module.weight.uniform_(0.6, 1.4)
            module.bias.normal_(0, 0.2)
    for name, value in model.named_parameters():
        if "layer_scale" in name or name.endswith("gamma"):
            value.uniform_(0.2, 0.8)
        if ".affine." in name:
            value.add_(torch.randn_like(value) * 0.3)
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    images = torch.rand(4, 3, 128, 128)
    model.train()(images)
    for norm, momentum in zip(norms, usual):
        assert norm.running_mean is not None and norm.running_var is not None
        norm.momentum = momentum
        norm.running_mean += 0.1 * torch.randn_like(norm.running_mean)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.8, 1.25)
    _, raw = model.eval()(images)
    for conv, level in zip(model.head.m, raw):
        assert isinstance(conv, nn.Conv2d) and conv.bias is not None
        factor = 1.5 / level.std().item()
        conv.weight *= factor
        bias = conv.bias.view(3, -1)
        bias.copy_((bias - level.mean((0, 2, 3))) * factor + torch.randn_like(bias) * 0.3)
        bias[:, 4] -= 2.5


def save(model: DetectionModel, path: Path) -> Path:
    """Write it as a checkpoint."""
    content = {"spec": model.yaml, "names": model.names, "stride": model.stride.tolist(), "state": model.state_dict()}
    return write_checkpoint(path, content)
