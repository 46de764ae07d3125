"""RepMLPNet: any size, folding in every precision, wrong arguments."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from models.backbones.repmlp import ARCHITECTURES, RepMLPNet
from utils.errors import SpecError

TINY = {"channels": [8, 16, 16, 32], "depths": [1, 1, 2, 1], "share_sets": [1, 2, 4, 8], "nominal": 64}


def make(seed: int = 0, **arguments) -> RepMLPNet:
    """A small network with statistics and scales away from zero and one."""
    torch.manual_seed(seed)
    model = RepMLPNet(**{"arch": TINY, "tile_order": "spatial", **arguments})
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.2)
            nn.init.normal_(m.running_mean, std=0.2)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("size", [(64, 64), (32, 32), (96, 160), (128, 64), (224, 96)])
def test_any_size_gives_the_declared_levels(size):
    maps = make()(torch.rand(2, 3, *size))
    for level, found in zip(make().levels, maps, strict=True):
        assert found.shape == (2, level.channels, size[0] // level.stride, size[1] // level.stride)


def test_a_tile_depends_on_its_own_cells_alone_when_spatial():
    """Padding adds nothing: an image of one and a half tiles equals the same image padded to two by hand."""
    block = make().stages[0][0].repmlp_block
    x = torch.randn(1, 8, 16, 24)
    padded = nn.functional.pad(x, (0, 8))
    factor = block.gp(x) / block.gp(padded)
    torch.testing.assert_close(block(x), (block(padded) * factor)[:, :, :, :24], rtol=1e-5, atol=1e-6)


def test_published_order_mixes_tiles_and_spatial_does_not():
    x = torch.zeros(1, 3, 64, 128)
    changed = x.clone()
    changed[:, :, :, 64:] = torch.rand(1, 3, 64, 64)

    def left_half_moves(order: str) -> float:
        block = make(tile_order=order).stages[0][0].repmlp_block
        a, b = (torch.randn(1, 8, 16, 32, generator=torch.Generator().manual_seed(1)) for _ in range(2))
        b[..., 16:] += 1
        difference = block(a) / block.gp(a) - block(b) / block.gp(b)
        return difference[..., :16].abs().max().item()

    assert left_half_moves("spatial") < 1e-5
    assert left_half_moves("published") > 0.1


def test_orders_agree_on_the_nominal_size():
    x = torch.rand(2, 3, 64, 64)
    for a, b in zip(make(tile_order="spatial")(x), make(tile_order="published")(x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("nominal", [64, (64, 96), (32, 64)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.01)],
)
def test_reparameterize(nominal, dtype, tolerance):
    model = make(arch={**TINY, "nominal": nominal}).to(dtype)
    deployed = copy.deepcopy(model)
    deployed.reparameterize()
    assert not any("repconv" in k or "fc3_bn" in k for k in deployed.state_dict())
    assert all(v.dtype == dtype for v in deployed.state_dict().values() if v.is_floating_point())
    # half precision on a CPU rounds between layers: the folded weights are compared through a float64 run
    x = torch.rand(2, 3, 96, 128, dtype=torch.float64)
    for a, b in zip(model.double()(x), deployed.double()(x), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=tolerance * a.std().item() * 10)


def test_twice_is_harmless():
    model = make()
    model.reparameterize()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.reparameterize()
    assert before.keys() == model.state_dict().keys()
    for k, v in model.state_dict().items():
        torch.testing.assert_close(v, before[k], rtol=0, atol=0)


def test_every_parameter_has_a_gradient():
    model = make().train()
    sum((m.square().mean() for m in model(torch.rand(2, 3, 96, 96))), Tensor([0.0])).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "T22"}, "did you mean 'T224'"),
        ({"arch": {**TINY, "share_sets": [3, 2, 4, 8]}}, "cannot be divided"),
        ({"arch": {**TINY, "nominal": 100}}, "multiples of 32"),
        ({"arch": {**TINY, "kernels": [2]}}, "odd numbers"),
        ({"arch": {**TINY, "depths": [1, 1]}}, "4 integers"),
        ({"tile_order": "spatal"}, "allowed: published, spatial"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(SpecError, match=message):
        make(**arguments)


@pytest.mark.parametrize(
    ("name", "published"),
    [("T224", 38.3), ("B224", 68.2), ("T256", 58.7), ("B256", 96.5), ("D256", 86.9), ("L256", 117.7)],
)
def test_parameter_counts_are_the_published_ones(name, published):
    """In millions, with the classifier's norm and layer, as published."""
    with torch.device("meta"):
        model = RepMLPNet(name)
    c = ARCHITECTURES[name].channels[-1]
    total = sum(p.numel() for p in model.parameters()) + 2 * c + 1000 * (c + 1)
    assert round(total / 1e6, 1) == pytest.approx(published, abs=0.11)


def test_depth_rises_through_the_network():
    model = make()
    depths = [model.param_depth(n) for n, _ in model.named_parameters()]
    assert depths[0] == 0 and max(depths) == 5
    stage = [model.param_depth(n) for n, _ in model.named_parameters() if n.startswith("stages")]
    assert stage == sorted(stage)
    with_norm = make(final_norm=True, frozen_stages=4)
    assert with_norm.param_depth("head_norm.weight") == 6 and with_norm.head_norm.weight.requires_grad
