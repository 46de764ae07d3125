"""Re-parameterized models compute what the training forms do."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from models import common
from models.backbones.base import Backbone, FeatureLevel
from models.fuse import fuse_conv_bn, max_output_difference, reparameterize
from models.yolo import DetectionModel
from tests.parity import rules


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics, scales and shifts away from 0 and 1, so that a missing factor is detected."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None:
                norm.running_mean.normal_(0, 1, generator=generator)
                norm.running_var.uniform_(0.2, 3, generator=generator)
                if norm.affine:
                    norm.weight.uniform_(0.5, 2, generator=generator)
                    norm.bias.normal_(0, 1, generator=generator)
    return module.eval()


class Custom(nn.Module):
    """act(bn(conv(x))) around any convolution and batch norm."""

    def __init__(self, conv: nn.Module, bn: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn, self.act = conv, bn, nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.bn(self.conv(x)))


BLOCKS = {
    "Conv": lambda: common.Conv(8, 16, 3, 2),
    "grouped": lambda: common.Conv(8, 16, 3, g=4),
    "asymmetric": lambda: common.Conv(8, 16, (1, 3), d=2),
    "DWConv": lambda: common.DWConv(8, 16, 3),
    "no activation": lambda: common.Conv(8, 8, act=False),
    "C3": lambda: common.C3(8, 8, 2),
    "C3x": lambda: common.C3x(8, 8, 1),
    "C3Ghost": lambda: common.C3Ghost(8, 8, 1),
    "C3TR": lambda: common.C3TR(8, 16, 1),
    "BottleneckCSP": lambda: common.BottleneckCSP(8, 8, 1),
    "SPPF": lambda: common.SPPF(8, 8),
    "Focus": lambda: common.Focus(8, 8, 3),
    "GhostBottleneck": lambda: common.GhostBottleneck(8, 8, 3, 2),
    "with bias": lambda: Custom(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6, eps=1e-3)),
    "without affine": lambda: Custom(nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6, affine=False)),
    "transposed": lambda: Custom(nn.ConvTranspose2d(8, 6, 2, 2, bias=False), nn.BatchNorm2d(6)),
    "transposed, grouped": lambda: Custom(nn.ConvTranspose2d(8, 12, 3, 2, groups=4), nn.BatchNorm2d(12)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_outputs_stay(name):
    torch.manual_seed(0)
    block = randomized(BLOCKS[name]()).double()
    fused = fuse_conv_bn(deepcopy(block))
    x = torch.randn(2, 8, 16, 16, dtype=torch.float64)
    assert max_output_difference(block, fused, x) < 1e-10
    assert len(fused.state_dict()) < len(block.state_dict())


def test_keys_of_the_fused_form():
    fused = fuse_conv_bn(common.Conv(4, 8, 3))
    assert list(fused.state_dict()) == ["conv.weight", "conv.bias"]


def test_a_second_call_changes_nothing():
    block = fuse_conv_bn(randomized(common.C3(8, 8, 1)))
    before = {key: value.clone() for key, value in block.state_dict().items()}
    after = fuse_conv_bn(block).state_dict()
    assert list(before) == list(after)
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_keeps_the_type(dtype):
    fused = fuse_conv_bn(randomized(common.Conv(4, 8, 3)).to(dtype))
    assert {value.dtype for value in fused.state_dict().values()} == {dtype}


def test_sums_are_made_in_float64():
    """A float32 weight is rounded once: it equals the float64 result cast to float32."""
    block = randomized(common.Conv(16, 32, 3))
    exact = fuse_conv_bn(deepcopy(block).double())
    torch.testing.assert_close(fuse_conv_bn(block).conv.weight, exact.conv.weight.float(), rtol=0, atol=0)


def test_channels_last():
    block = randomized(common.C3(8, 8, 1)).to(memory_format=torch.channels_last)
    fused = fuse_conv_bn(deepcopy(block))
    x = torch.randn(2, 8, 16, 16).to(memory_format=torch.channels_last)
    assert max_output_difference(block, fused, x) < 1e-5
    assert fused.m[0].cv2.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_batch_statistics_are_not_folded():
    block = Custom(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    fused = fuse_conv_bn(deepcopy(block))
    assert list(fused.state_dict()) == list(block.state_dict())
    assert max_output_difference(block, fused, torch.randn(2, 3, 8, 8)) == 0


class Counting(Backbone):
    """A backbone that counts its calls, with an inner part that has a re-parameterized model of its own."""

    levels = (FeatureLevel(4, 1),)

    def __init__(self) -> None:
        super().__init__(normalize=False)
        self.block = common.Conv(3, 4)
        self.inner = Part()
        self.asked = 0

    def forward_features(self, image):
        return (self.inner(self.block(image)),)

    def reparameterize(self) -> None:
        self.asked += 1


class Part(nn.Module):
    asked = 0

    def forward(self, x):
        return x

    def reparameterize(self) -> None:
        self.asked += 1


def test_backbones_are_left_to_themselves():
    model = nn.Sequential(Counting(), nn.Sequential(Part()))
    fuse_conv_bn(model)
    assert "0.block.bn.weight" in model.state_dict()
    assert reparameterize(model) is model
    assert (model[0].asked, model[0].inner.asked, model[1][0].asked) == (1, 0, 1)


def test_a_part_that_is_there_twice_is_asked_once():
    part = Part()
    reparameterize(nn.Sequential(nn.Sequential(part), part))
    assert part.asked == 1


def test_a_backbone_alone_is_asked():
    backbone = Counting()
    reparameterize(backbone)
    assert backbone.asked == 1


@pytest.mark.parametrize("name", ["yolov5n"])
def test_counts_of_the_reference(name):
    expected = rules.yolov5(f"model_{name}")
    model = DetectionModel(f"{name}.yaml")
    assert sum(p.numel() for p in model.parameters()) == expected["params"]
    model.fuse()
    assert sum(p.numel() for p in model.parameters()) == expected["fused_params"]
    assert len(model.state_dict()) == expected["fused_keys"]


class Fixed(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


ONE = torch.ones(2)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (ONE, ONE + 0.5, 0.5),
        ((ONE, [ONE]), (ONE, [ONE - 2]), 2.0),
        ({"x": ONE, "y": ONE}, {"y": ONE + 3, "x": ONE}, 3.0),
        (ONE, (ONE, ONE), math.inf),
        (ONE, torch.ones(3), math.inf),
        (ONE, ONE * math.nan, math.inf),
        (ONE.half(), ONE, 0.0),
        ((), (), 0.0),
    ],
)
def test_max_output_difference(a, b, expected):
    assert max_output_difference(Fixed(a), Fixed(b), torch.zeros(1)) == expected


def test_max_output_difference_leaves_modes_and_statistics():
    model = common.Conv(3, 4).train()
    model.bn.eval()
    before = deepcopy(model.state_dict())
    max_output_difference(model, model, [torch.randn(1, 3, 8, 8), torch.randn(1, 3, 4, 4)])
    assert model.training and not model.bn.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
