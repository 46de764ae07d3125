"""Tests of EigenCAM on maps whose first component is known, and on detectors of both heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.eigencam import eigen_cam, heat_maps
from models.yolo import DetectionModel


def blob(channels: int = 6, height: int = 5, width: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations (1, C, H, W) that are a pattern (H, W) in [0, 1] in one direction of channels, and the pattern."""
    pattern = torch.zeros(height, width)
    pattern[1:4, 2:5] = torch.tensor([[0.2, 0.6, 0.2], [0.6, 1.0, 0.6], [0.2, 0.6, 0.2]])
    direction = torch.linspace(-1, 2, channels).view(1, -1, 1, 1)
    return direction * pattern, pattern


def test_the_first_component_is_the_pattern_above_its_mean():
    features, pattern = blob()
    expected = (pattern - pattern.mean()).clamp(min=0)
    torch.testing.assert_close(eigen_cam(features)[0], expected / expected.max(), rtol=0, atol=1e-5)


def test_equals_the_first_right_singular_vector():
    """The definition, by singular value decomposition in float64."""
    torch.manual_seed(0)
    features = torch.randn(2, 8, 6, 9) + 3 * blob(8, 6, 9)[0]
    for one, heat in zip(features, eigen_cam(features)):
        cells = one.flatten(1).T.double()
        centered = cells - cells.mean(0)
        projection = centered @ torch.linalg.svd(centered, full_matrices=False).Vh[0]
        if (projection * cells.abs().mean(1)).sum() < 0:
            projection = -projection
        expected = projection.clamp(min=0).view(6, 9)
        torch.testing.assert_close(heat, (expected / expected.max()).float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("factor", [1.0, -1.0, 1e-20, 1e20])
def test_heat_is_where_activations_are_large_whatever_their_sign_and_scale(factor):
    features, pattern = blob()
    heat = eigen_cam(factor * features)[0]
    assert heat.argmax() == pattern.argmax() and heat.max() == 1
    assert (heat[pattern == 0] == 0).all()


@pytest.mark.parametrize("value", [0.0, 0.1, -3e4, float("nan"), float("inf")])
@pytest.mark.parametrize("size", [(1, 1), (4, 5)])
def test_a_constant_map_has_no_heat(value, size):
    offsets = torch.tensor([1.0, 0.3, -0.7]).view(1, 3, 1, 1)
    assert torch.equal(eigen_cam(value * offsets.expand(1, 3, *size)), torch.zeros(1, *size))


def test_values_that_are_not_finite_count_as_zero():
    features, _ = blob()
    features[0, :, 0, 0] = float("nan")  # 0 in the pattern
    torch.testing.assert_close(eigen_cam(features), eigen_cam(blob()[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_type_gives_float32(dtype):
    features = blob()[0].to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    heat = eigen_cam(features)
    assert heat.dtype == torch.float32 and not heat.requires_grad
    torch.testing.assert_close(heat, eigen_cam(blob()[0]), rtol=0, atol=2e-2)


@pytest.mark.gpu
def test_float16_on_cuda_gives_the_heat_of_the_cpu():
    features, _ = blob()
    heat = eigen_cam(features.cuda().half())
    assert heat.is_cuda and heat.dtype == torch.float32
    torch.testing.assert_close(heat.cpu(), eigen_cam(features), rtol=0, atol=2e-2)


@pytest.mark.parametrize("head", ["anchor", "free"])
@pytest.mark.parametrize("cfg", ["yolov5n.yaml", "yolov5-riformer.yaml", "yolov5-timm-vit.yaml"])
def test_heat_maps_have_the_size_of_the_images(cfg, head):
    """The backbone of timm-vit pads its input to tiles: its maps cover more than the image."""
    torch.manual_seed(0)
    model = DetectionModel(cfg, head=head).eval()
    images = torch.rand(2, 3, 64, 96)
    maps = heat_maps(model, images)
    assert list(maps) == ["P3", "P4", "P5"]
    for heat in maps.values():
        assert heat.shape == (2, 64, 96) and heat.dtype == torch.float32
        assert heat.min() >= 0 and heat.max() <= 1
    assert not model.head._forward_pre_hooks
    assert all(torch.equal(heat, again) for heat, again in zip(maps.values(), heat_maps(model, images).values()))


def test_heat_follows_what_the_head_reads():
    """A head with a single map that is brighter in the right half of the image."""
    spec = {
        "nc": 1, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": [[10, 13]],
        "backbone": [[-1, 1, "nn.AvgPool2d", [8, 8]]], "head": [[[0], 1, "Detect", ["nc", "anchors"]]],
    }  # fmt: skip
    model = DetectionModel(spec).eval()
    image = torch.full((1, 3, 64, 64), 0.1)
    image[..., 32:] = 0.9
    (heat,) = heat_maps(model, image).values()
    assert (heat[..., :24] == 0).all() and (heat[..., 40:] == 1).all()
    assert np.isclose(heat.mean(), 0.5, atol=0.01)
