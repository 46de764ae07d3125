"""Under bfloat16 autocast norms and softmax are computed in float32 for any input dtype, and maps stay close.

Autocast's lists differ between devices: CUDA runs LayerNorm, GroupNorm and softmax in float32, a CPU leaves them in the
type of their input and relies on kernels that compute in float32 inside and round once. The tests require that:
the same values as in float32 from the same input, rounded once to the dtype of the result.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.backbones import create_backbone
from models.backbones.base import Backbone
from tests.helpers.detectors import build

FAMILIES = ("riformer", "revvit", "repmlp", "nextvit", "nextvit-xca", "timm")
ATTENTION = ("revvit", "nextvit", "nextvit-xca", "timm/vit_tiny_patch16_224")
ONE_ROUNDING = 2.0**-8  # of bfloat16, relative
aten = torch.ops.aten


def backbone_of(family: str) -> Backbone:
    if "/" in family:
        torch.manual_seed(0)
        return create_backbone(family).eval()
    row = build(family).model[0]
    assert isinstance(row, Backbone)
    return row


def sample_image() -> Tensor:
    return torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def assert_rounded_once(found: Tensor, wanted: Tensor, what: str, scale: Tensor | float | None = None) -> None:
    """Assert that `found` equals `wanted` (float32) up to one rounding of its elements or of values like `scale`."""
    assert wanted.dtype == torch.float32
    size = wanted.abs() if scale is None else scale
    error = (found.float() - wanted).abs()
    unit = 1e-5 if found.dtype == torch.float32 else ONE_ROUNDING
    worst = float((error - unit * size).max())
    assert worst <= 1e-5, f"{what}: {worst:g} beyond one rounding"


@pytest.mark.parametrize("family", [*FAMILIES, "timm/vit_tiny_patch16_224"])
def test_norms_are_computed_in_float32(family: str) -> None:
    backbone = backbone_of(family)
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def record(name: str) -> Any:
        return lambda module, given, result: calls.append((name, module, given[0], result))

    norms = [(n, m) for n, m in backbone.named_modules() if "Norm" in type(m).__name__]
    handles = [module.register_forward_hook(record(name)) for name, module in norms]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        backbone(sample_image())
    for handle in handles:
        handle.remove()
    assert len(calls) >= len(norms) > 0
    for name, module, given, result in calls:
        with torch.no_grad():
            assert_rounded_once(result, module(given.float()), name)


class Softmaxes(TorchDispatchMode):
    """Checks every softmax and fused attention that it sees against float32."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is aten._softmax.default:
            wanted = args[0].float().softmax(args[1])
            assert_rounded_once(result, wanted, "softmax")
            self.seen += 1
        elif "scaled_dot_product" in str(func):
            q, k, v = (t.float() for t in args[:3])
            wanted = (q @ k.transpose(-2, -1) * kwargs.get("scale", q.shape[-1] ** -0.5)).softmax(-1) @ v
            # The weights (which sum to 1) are rounded before the product with v, and the sum is rounded once more.
            assert_rounded_once(result[0], wanted, "attention", 2 * v.abs().amax())
            self.seen += 1
        return result


@pytest.mark.parametrize("family", ATTENTION)
def test_softmax_is_computed_in_float32(family: str) -> None:
    backbone, mode = backbone_of(family), Softmaxes()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), mode:
        backbone(sample_image())
    assert mode.seen > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_stay_close_to_float32(family: str) -> None:
    """bfloat16 has 8 bits; errors of the layers add up to a few hundredths of the spread of a map."""
    backbone, image = backbone_of(family), sample_image()
    with torch.no_grad():
        wanted = backbone(image)
        with torch.autocast("cpu", torch.bfloat16):
            found = backbone(image)
    for a, b in zip(found, wanted, strict=True):
        assert float((a.float() - b).std()) < 0.05 * float(b.std())
