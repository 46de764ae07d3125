"""Operation counts: the formulas, and exact values that every PyTorch version must give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.backbones import create_backbone
from models.summary import count_flops
from models.yolo import DetectionModel


class FunctionalNorms(nn.Module):
    """Norms that a model calls without a module of `torch.nn`."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.layer_norm(x, x.shape[-1:])
        x = functional.group_norm(input=x, num_groups=2)
        return torch.layer_norm(x, x.shape[-1:])


class SelfAttention(nn.Module):
    """`scaled_dot_product_attention`, or `nn.MultiheadAttention` with or without weights, of tokens (B, L, C)."""

    def __init__(self, need_weights: bool | None) -> None:
        super().__init__()
        self.need_weights = need_weights
        if need_weights is not None:
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.need_weights is not None:
            return self.attention(x, x, x, need_weights=self.need_weights)[0]
        heads = x.unflatten(2, (2, 8)).transpose(1, 2)
        return functional.scaled_dot_product_attention(heads, heads, heads)


# 6 tokens of 16 channels: q k^T and the weighted sum of v; the four 16 x 16 projections; an MLP of 32 hidden channels.
ATTENTION = 2 * (2 * 6 * 6 * 16)
PROJECTIONS = 4 * (2 * 6 * 16 * 16)
MLP = 2 * (2 * 6 * 16 * 32)
LAYERS = [
    # module, input shape, expected: a multiply-add is two operations, a norm is four per element
    ("convolution", nn.Conv2d(4, 8, 3, 2, 1), (1, 4, 8, 8), 2 * 16 * 8 * 4 * 9),
    ("grouped convolution", nn.Conv2d(4, 8, 3, 2, 1, groups=2), (1, 4, 8, 8), 2 * 16 * 8 * 2 * 9),
    ("transposed convolution", nn.ConvTranspose2d(4, 8, 2, 2), (1, 4, 8, 8), 2 * 64 * 4 * 8 * 4),
    ("linear", nn.Linear(16, 8), (1, 6, 16), 2 * 6 * 16 * 8),
    ("BatchNorm1d", nn.BatchNorm1d(4), (2, 4, 8), 4 * 64),
    ("BatchNorm2d", nn.BatchNorm2d(4), (1, 4, 8, 8), 4 * 256),
    ("BatchNorm2d, two images", nn.BatchNorm2d(4), (2, 4, 8, 8), 4 * 512),
    ("BatchNorm2d of the batch", nn.BatchNorm2d(4, track_running_stats=False), (1, 4, 8, 8), 4 * 256),
    ("BatchNorm2d without weights", nn.BatchNorm2d(4, affine=False), (1, 4, 8, 8), 4 * 256),
    ("SyncBatchNorm", nn.SyncBatchNorm(4), (1, 4, 8, 8), 4 * 256),
    ("InstanceNorm2d", nn.InstanceNorm2d(4), (1, 4, 8, 8), 4 * 256),
    ("LayerNorm", nn.LayerNorm(8), (1, 4, 8, 8), 4 * 256),
    ("GroupNorm", nn.GroupNorm(2, 4), (1, 4, 8, 8), 4 * 256),
    ("functions", FunctionalNorms(), (1, 4, 8, 8), 3 * 4 * 256),
    ("SDPA", SelfAttention(need_weights=None), (1, 6, 16), ATTENTION),
    ("MultiheadAttention", SelfAttention(need_weights=False), (1, 6, 16), PROJECTIONS + ATTENTION),
    ("MultiheadAttention with weights", SelfAttention(need_weights=True), (1, 6, 16), PROJECTIONS + ATTENTION),
    (
        "TransformerEncoderLayer",
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
        (1, 6, 16),
        PROJECTIONS + ATTENTION + MLP + 2 * 4 * 6 * 16,
    ),
]
BACKBONE_FLOPS = [
    # name, operations for an image of 64 x 64 pixels, rounded up to the backbone's `size_divisor`
    ("riformer_s12", 296_595_456),  # GroupNorm
    ("revvit_small", 905_379_840),  # LayerNorm, SDPA
    ("nextvit_small", 943_488_000),  # BatchNorm, SDPA
]
DETECTOR_FLOPS = [
    # YAML, operations of backbone, neck and head for an image of 64 x 64 pixels
    ("yolov5n.yaml", 28_006_400, 13_492_224, 3_655_680),  # BatchNorm
    ("yolov5s-transformer.yaml", 104_255_488, 53_723_136, 7_311_360),  # MultiheadAttention
    ("yolov5-revvit.yaml", 755_415_040, 13_492_224, 3_655_680),  # LayerNorm, SDPA
]


@pytest.mark.parametrize(("module", "shape", "expected"), [row[1:] for row in LAYERS], ids=[row[0] for row in LAYERS])
def test_layers_count_what_the_equations_say(module: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    assert count_flops(module, shape) == expected
    assert count_flops(nn.Sequential(module, nn.Identity()), shape) == expected


def test_each_call_of_a_shared_norm_counts() -> None:
    norm = nn.BatchNorm2d(4)
    assert count_flops(nn.Sequential(norm, norm), (1, 4, 8, 8)) == 2 * 4 * 256


@pytest.mark.parametrize(("name", "expected"), BACKBONE_FLOPS)
def test_backbones_count_the_same_in_every_pytorch_version(name: str, expected: int) -> None:
    with torch.device("meta"):
        backbone = create_backbone(name)
    side = -(-64 // backbone.size_divisor) * backbone.size_divisor
    assert count_flops(backbone, (1, 3, side, side)) == expected


@pytest.mark.parametrize(("yaml", "backbone", "neck", "head"), DETECTOR_FLOPS)
def test_detectors_count_the_same_in_every_pytorch_version(yaml: str, backbone: int, neck: int, head: int) -> None:
    model = DetectionModel(yaml)
    assert [round(part.gflops * 1e9) for part in model.info(64).parts] == [backbone, neck, head]
    assert count_flops(model, (1, 3, 64, 64)) == backbone + neck + head
