"""Fuse convolutions with BatchNorm and re-parameterize whole models.

For a convolution with weight W followed by BatchNorm with weight g, bias b, running mean m and running variance v:
`g * (W x - m) / sqrt(v + eps) + b = (s W) x + (b - s m)` with `s = g / sqrt(v + eps)`, one factor per output channel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from models.backbones.base import Backbone
from models.backbones.layers import fused_weights

M = TypeVar("M", bound=nn.Module)


def fuse_conv_bn(model: M) -> M:
    """Fuse each BatchNorm `bn` with the convolution `conv` of the same module, in place.

    Applies to modules that compute act(bn(conv(x))) with these attribute names. Modules inside a `Backbone` are not
    changed; they have their own `reparameterize`. Computed in float64, stored in the dtype of the weight. Outputs in
    eval mode are unchanged up to rounding; the fused model has no batch statistics. Idempotent.

    Returns:
        `model`.
    """
    for module in _outside_backbones(model):
        conv, norm = getattr(module, "conv", None), getattr(module, "bn", None)
        if not isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d)) or not isinstance(norm, nn.BatchNorm2d):
            continue
        if norm.running_mean is None or norm.running_var is None:
            continue  # batch statistics are used in eval mode too, so the scale is not constant
        weight, bias = fused_weights(conv, norm)
        conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
        conv.bias = nn.Parameter(bias, requires_grad=conv.weight.requires_grad)
        module.bn = nn.Identity()
        if hasattr(module, "act") and hasattr(module.act, "inplace"):
            module.act.inplace = True  # in training autograd would copy the input of some activations
    return model


def _outside_backbones(model: nn.Module) -> list[nn.Module]:
    """Return `model` and its submodules except backbones and their submodules."""
    if isinstance(model, Backbone):
        return []
    return [model, *(inner for child in model.children() for inner in _outside_backbones(child))]


def reparameterize(model: M) -> M:
    """Call `reparameterize()` of every submodule that defines it, in place and once each.

    Submodules of such a module are left to it. Idempotent. Convolutions with BatchNorm in the neck are handled by
    `fuse_conv_bn`.

    Returns:
        `model`.
    """
    if isinstance(model, Backbone):
        model.reparameterize()
        return model
    done: set[int] = set()

    def walk(module: nn.Module) -> None:
        for child in module.children():
            method = getattr(child, "reparameterize", None)
            if not callable(method):
                walk(child)
            elif id(child) not in done:
                done.add(id(child))
                method()

    walk(model)
    return model


def max_output_difference(a: nn.Module, b: nn.Module, inputs: Tensor | Sequence[Tensor]) -> float:
    """Return the largest absolute difference between the outputs of two models.

    Args:
        a, b: models; run in eval mode without gradients, their modes are restored.
        inputs: one input tensor (B, C, H, W), or several.

    Returns:
        Maximum over all output tensors and inputs; infinity if an output is not finite or the structures or shapes of
        the outputs differ.
    """
    batches = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    modes = [(module, module.training) for model in (a, b) for module in model.modules()]
    a.eval(), b.eval()
    try:
        with torch.no_grad():
            return max((_max_difference(_tensors(a(x)), _tensors(b(x))) for x in batches), default=0.0)
    finally:
        for module, training in modes:
            module.training = training


def _tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [t for key in output for t in _tensors(output[key])]
    return [t for item in output for t in _tensors(item)] if isinstance(output, (list, tuple)) else []


def _max_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b)):
        return math.inf
    differences = [(x.double() - y.double()).abs().max().item() for x, y in zip(a, b) if x.numel()]
    return max((d if math.isfinite(d) else math.inf for d in differences), default=0.0)
