"""Re-parameterization: batch norm folded into the preceding convolution, and `reparameterize` for whole models.

For a convolution with weight W and no bias, followed by batch norm with scale g, shift b, mean m, variance v:
`g * (W x - m) / sqrt(v + eps) + b = (f W) x + (b - f m)` with `f = g / sqrt(v + eps)`, one factor per output channel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from models.backbones.base import Backbone

M = TypeVar("M", bound=nn.Module)


def fuse_conv_bn(model: M) -> M:
    """Fold every `bn` into the `conv` beside it, in place: `conv.weight` and `conv.bias` stay, the keys of `bn` go.

    Modules of the form act(bn(conv(x))), that is with a convolution called `conv` and a batch norm called `bn`, are
    changed; all others stay, and so does all that is inside a `Backbone` (it has its own `reparameterize`). The sums
    are made in float64 and stored in the weight's type. A second call changes nothing. Outputs in evaluation mode stay
    the same up to rounding; training mode no longer uses batch statistics.

    Returns:
        `model`.
    """
    for module in _outside_backbones(model):
        conv, norm = getattr(module, "conv", None), getattr(module, "bn", None)
        if not isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d)) or not isinstance(norm, nn.BatchNorm2d):
            continue
        if norm.running_mean is None or norm.running_var is None:
            continue  # it normalizes by the batch in evaluation mode too: no constant factor to fold
        weight, bias = _folded(conv, norm)
        conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
        conv.bias = nn.Parameter(bias, requires_grad=conv.weight.requires_grad)
        module.bn = nn.Identity()
    return model


def _outside_backbones(model: nn.Module) -> list[nn.Module]:
    """`model` and all modules in it, without backbones and what is inside them."""
    if isinstance(model, Backbone):
        return []
    return [model, *(inner for child in model.children() for inner in _outside_backbones(child))]


def _folded(conv: nn.Conv2d | nn.ConvTranspose2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does both, in the type and memory format of the weight."""
    with torch.no_grad():
        mean, variance = norm.running_mean.double(), norm.running_var.double()  # type: ignore[union-attr]
        scale = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
        shift = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
        factor = scale / torch.sqrt(variance + norm.eps)
        weight = conv.weight.double() * _per_output(factor, conv)
        bias = shift - factor * mean
        if conv.bias is not None:
            bias = bias + factor * conv.bias.double()
        return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)


def _per_output(factor: Tensor, conv: nn.Conv2d | nn.ConvTranspose2d) -> Tensor:
    """`factor` (c_out) in a shape that multiplies `conv.weight`."""
    if isinstance(conv, nn.Conv2d):
        return factor.reshape(-1, 1, 1, 1)  # (c_out, 1, 1, 1)
    # The weight is (c_in, c_out / groups, kh, kw), and group j of the inputs makes group j of the outputs.
    each = conv.in_channels // conv.groups
    return factor.reshape(conv.groups, -1).repeat_interleave(each, 0)[:, :, None, None]  # (c_in, c_out / groups, 1, 1)


def reparameterize(model: M) -> M:
    """Bring every part that has a re-parameterized model into it, in place: one walk, and each part is asked once.

    A part is a module with a `reparameterize()` method (every `Backbone`); what is inside it is its own business. A
    second call changes nothing. Convolutions with batch norm in the neck are not touched: `fuse_conv_bn` does those.

    Returns:
        `model`.
    """
    if isinstance(model, Backbone):
        model.reparameterize()
        return model
    asked: set[int] = set()

    def walk(module: nn.Module) -> None:
        for child in module.children():
            method = getattr(child, "reparameterize", None)
            if not callable(method):
                walk(child)
            elif id(child) not in asked:
                asked.add(id(child))
                method()

    walk(model)
    return model


def max_output_difference(a: nn.Module, b: nn.Module, inputs: Tensor | Sequence[Tensor]) -> float:
    """How far the outputs of two forms of one model are apart.

    Args:
        a, b: models; run in evaluation mode without gradients, their mode is put back.
        inputs: one input tensor, or several that are tried one after the other.

    Returns:
        Largest absolute difference over all tensors of all outputs; infinity when one is not finite, or when the two
        models return different structures or shapes.
    """
    batches = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    modes = [(module, module.training) for model in (a, b) for module in model.modules()]
    a.eval(), b.eval()
    try:
        with torch.no_grad():
            return max((_distance(_tensors(a(x)), _tensors(b(x))) for x in batches), default=0.0)
    finally:
        for module, training in modes:
            module.training = training


def _tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [t for key in output for t in _tensors(output[key])]
    return [t for item in output for t in _tensors(item)] if isinstance(output, (list, tuple)) else []


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b)):
        return math.inf
    differences = [(x.double() - y.double()).abs().max().item() for x, y in zip(a, b) if x.numel()]
    return max((d if math.isfinite(d) else math.inf for d in differences), default=0.0)
