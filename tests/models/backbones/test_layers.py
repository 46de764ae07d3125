"""Mlp, DropPath and LayerNorm2d compute what timm's layers of these names compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones.layers import DropPath, LayerNorm2d, Mlp, batch_norm_affine, drop_path_rates

timm_layers = pytest.importorskip("timm.layers")


def assert_same(ours: nn.Module, theirs: nn.Module, dtype: torch.dtype, atol: float) -> None:
    """Compare outputs, input gradients and parameter gradients under the same weights and random numbers."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in ours.parameters():  # away from the ones and zeros of initialization
            value.copy_(torch.randn(value.shape, generator=generator))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(6, 8, 5, 7, generator=generator)
    grad = torch.randn(6, 8, 5, 7, generator=generator).to(dtype)
    results: list[list[Tensor]] = []
    for module in (ours.to(dtype), theirs.to(dtype)):
        inputs = x.to(dtype, copy=True).requires_grad_()
        torch.manual_seed(3)
        y = module(inputs)
        y.backward(grad)
        results.append([y, inputs.grad, *(p.grad for p in module.parameters())])
    assert len(results[0]) == len(results[1]) == 2 + len(list(ours.parameters()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("act_layer", [nn.GELU, nn.ReLU])
def test_mlp_equals_timm(act_layer: type[nn.Module], dtype: torch.dtype, training: bool) -> None:
    ours = Mlp(8, 16, 0.3, act_layer).train(training)
    theirs = timm_layers.Mlp(8, 16, act_layer=act_layer, drop=0.3, use_conv=True).train(training)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same(ours, theirs, dtype, 0.0)


def test_mlp_uses_the_given_submodule_names() -> None:
    mlp = Mlp(8, 16, names=("conv1", "conv2"))
    assert list(mlp.state_dict()) == ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_drop_path_equals_timm(dtype: torch.dtype, rate: float, training: bool) -> None:
    assert_same(DropPath(rate).train(training), timm_layers.DropPath(rate).train(training), dtype, 0.0)


def test_drop_path_mask_drops_whole_samples() -> None:
    torch.manual_seed(0)
    y = DropPath(0.4)(torch.ones(2000, 3, 2, 2))
    assert {round(v, 4) for v in y.unique().tolist()} == {0.0, round(1 / 0.6, 4)}
    assert (y.amax((1, 2, 3)) == y.amin((1, 2, 3))).all()


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_layer_norm_2d_equals_timm(eps: float, dtype: torch.dtype, atol: float) -> None:
    ours, theirs = LayerNorm2d(8, eps), timm_layers.LayerNorm2d(8, eps=eps)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert LayerNorm2d(8).eps == timm_layers.LayerNorm2d(8).eps
    assert_same(ours, theirs, dtype, atol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_layer_norm_2d_takes_statistics_in_float32(dtype: torch.dtype) -> None:
    norm = LayerNorm2d(8).to(dtype)
    x = (1000 + torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(0))).to(dtype)
    y = norm(x)
    assert y.dtype == dtype
    expected = F.layer_norm(x.float().permute(0, 2, 3, 1), (8,), eps=1e-6).permute(0, 3, 1, 2)
    torch.testing.assert_close(y, expected.to(dtype), rtol=0, atol=0)


def test_batch_norm_affine_matches_eval_mode() -> None:
    norm = nn.BatchNorm2d(4, eps=0.01).double().eval()
    for value in norm.state_dict().values():
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 1.5)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    scale, shift = (t.view(-1, 1, 1) for t in batch_norm_affine(norm))
    torch.testing.assert_close(scale * x + shift, norm(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("rate", "depth", "expected"), [(0.4, 5, [0, 0.1, 0.2, 0.3, 0.4]), (0.4, 1, [0.0]), (0.0, 3, [0, 0, 0])]
)
def test_drop_path_rates_increase_linearly(rate: float, depth: int, expected: list[float]) -> None:
    assert drop_path_rates(rate, depth) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_layer_norm_2d_fast_norm_differs_by_rounding_only(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain, fast = LayerNorm2d(32), LayerNorm2d(32, fast_norm=True)
    x = (torch.randn(2, 32, 5, 7) * 3 + 1).to(dtype)
    a, b = plain(x), fast(x)
    assert a.dtype == b.dtype == dtype
    torch.testing.assert_close(b.float(), a.float(), rtol=2**-7, atol=2**-7)
    assert torch.equal(fast(x.float()), plain(x.float()))
