"""Parameter groups with weight decay and learning-rate scale, and the optimizer over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from engine.train.freeze import backbone_rows
from engine.train.schedule import accumulation
from models.backbones.base import Backbone
from models.yolo import DetectionModel
from utils.log import aligned

AUTO_ITERATIONS = 10_000
_ADAM = {"step", "exp_avg", "exp_avg_sq"}
BUFFERS = {torch.optim.SGD: {"momentum_buffer"}, torch.optim.Adam: _ADAM, torch.optim.AdamW: _ADAM}
"""Names of the buffers of each parameter in an optimizer's state."""
KINDS = ("biases", "weights", "norms")
_NORMS = tuple(v for k, v in vars(nn).items() if isinstance(v, type) and "Norm" in k)
_TOKENS = ("pos_embed", "cls_token", "relative_position_bias_table", "absolute_pos_embed", "dist_token")


def parameter_groups(
    model: nn.Module, decay: float, scale_of: Callable[[str], float] = lambda _: 1.0
) -> list[dict[str, Any]]:
    """Split all parameters by kind (biases, decayed weights, norm weights without decay) and by learning rate.

    YOLOv5's rule by name applies to its own layers: a parameter named `bias` is a bias, a norm layer's `weight` a norm
    weight, and everything else is decayed. Inside a `Backbone` everything that is not a matrix or a kernel (layer
    scales, position embeddings, tokens) joins the norm weights: decaying those to zero is not regularization.

    Args:
        model: each of its parameters, including frozen ones, is put in exactly one group.
        decay: weight decay of the decayed weights.
        scale_of: factor on the learning rate of a parameter, by its name; see `lr_scales`.

    Returns:
        Dicts with `params`, `weight_decay`, `name`, `kind` (index of the name in `KINDS`) and `lr_scale`: for each
        scale, highest first, the kinds in YOLOv5's order. With one scale there are three, possibly empty groups.
    """
    kinds: dict[int, str] = {}
    in_backbone = {id(p) for m in model.modules() if isinstance(m, Backbone) for p in m.parameters()}
    for module in model.modules():
        is_norm = isinstance(module, _NORMS) or type(module).__name__.endswith(("Norm", "Norm2d"))
        for name, parameter in module.named_parameters(recurse=False):
            vector = parameter.ndim <= 1 or name in _TOKENS or max(parameter.shape) == parameter.numel()
            undecayed = (is_norm and name == "weight") or (id(parameter) in in_backbone and vector)
            kinds.setdefault(id(parameter), "biases" if name == "bias" else "norms" if undecayed else "weights")
    by_scale: dict[float, dict[str, list[nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        groups = by_scale.setdefault(scale_of(name), {kind: [] for kind in KINDS})
        groups[kinds[id(parameter)]].append(parameter)
    return [
        {"params": params, "weight_decay": decay if kind == "weights" else 0.0, "name": kind, "kind": KINDS.index(kind)}
        | {"lr_scale": scale}
        for scale in sorted(by_scale, reverse=True)
        for kind, params in by_scale[scale].items()
        if params or len(by_scale) == 1
    ]


def lr_scales(model: DetectionModel, backbone_lr: float, layer_decay: float) -> Callable[[str], float]:
    """Return a function from parameter name to learning-rate factor: 1 in neck and head, less in the backbone.

    Within the backbone a parameter at depth d of D gets `backbone_lr * layer_decay ** (D + 1 - d)`, so that early
    layers change least (BEiT, https://arxiv.org/abs/2106.08254). A `Backbone` defines the depth by `param_depth`; in
    a plain YOLOv5 model it is the index of the row in the section `backbone:`.
    """
    depths: dict[str, int] = {}
    for index, row in enumerate(backbone_rows(model)):
        module = model.model[row]
        for name, _ in module.named_parameters():
            depth = module.param_depth(name) if isinstance(module, Backbone) else index
            depths[f"model.{row}.{name}"] = depth
    last = max(depths.values(), default=0)
    return lambda name: backbone_lr * layer_decay ** (last + 1 - depths[name]) if name in depths else 1.0


def describe_groups(groups: Sequence[dict[str, Any]]) -> str:
    """Return a table of optimizer groups: tensors, parameters, weight decay, learning-rate factor."""
    rows: list[tuple[object, ...]] = [("group", "tensors", "parameters", "trainable", "decay", "lr x")]
    for group in groups:
        sizes = [p.numel() for p in group["params"]]
        trainable = sum(p.numel() for p in group["params"] if p.requires_grad)
        decay, scale = f"{group['weight_decay']:.4g}", f"{group['lr_scale']:.4g}"
        rows.append((group["name"], len(sizes), sum(sizes), trainable, decay, scale))
    return "\n".join(aligned(rows))


def auto_optimizer(iterations: int) -> str:
    """Return AdamW, which is better in short runs, below 10,000 iterations, else SGD, which is as good in long ones."""
    return "AdamW" if iterations < AUTO_ITERATIONS else "SGD"


class AutoSettings(NamedTuple):
    """Hyperparameters of an optimizer that `auto` chooses, or that is chosen for a file with `optimizer: auto`."""

    lr0: float
    momentum: float
    warmup_bias_lr: float


def auto_settings(optimizer: str, num_classes: int) -> AutoSettings:
    """Return a lower learning rate for more classes with AdamW and Adam, and those of YOLOv5's recipe with SGD."""
    if optimizer == "SGD":
        return AutoSettings(0.01, 0.937, 0.1)
    return AutoSettings(round(0.002 * 5 / (4 + num_classes), 6), 0.9, 0.0)


def build_optimizer(name: str, groups: list[dict[str, Any]], lr: float, momentum: float) -> torch.optim.Optimizer:
    """Return SGD with Nesterov momentum, Adam or AdamW (momentum is their beta1) over groups that may be empty.

    PyTorch refuses Nesterov's form of SGD for momentum 0. On CUDA each step is one fused kernel per group.
    """
    fused = any(p.is_cuda for group in groups for p in group["params"]) or None
    if name == "SGD":
        sgd = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=fused)
        _fill_momentum(sgd)
        return sgd
    kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[name]
    return kind(groups, lr=lr, betas=(momentum, 0.999), fused=fused)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], merged: Sequence[int] = ()) -> None:
    """Load the buffers of an optimizer state, which may come from another device.

    Settings of the groups are kept: they depend on the options and the schedule, and the implementation (fused or not)
    on the device. Fused SGD gets zero momentum where the state has none.

    Args:
        optimizer: changed in place.
        state: optimizer state of the checkpoint.
        merged: how many consecutive parameters of the state became each parameter, concatenated along the first
            dimension; empty if both have the same parameters.

    Raises:
        ValueError: buffers that do not fit the parameters.
    """
    own = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    stored = _merge_buffers(state["state"], merged) if merged else dict(state["state"])
    for index, buffers in stored.items():
        if not set(buffers) == BUFFERS[type(optimizer)]:
            raise ValueError(f"optimizer.state[{index}] has {', '.join(map(str, buffers))[:80]}")
        for name, value in buffers.items():
            shape = () if name == "step" else parameters[index].shape
            bad = isinstance(value, torch.Tensor) and (value.shape != shape or not torch.isfinite(value).all())
            if bad or not isinstance(value, (torch.Tensor, type(None))):
                raise ValueError(f"optimizer.state[{index}].{name} does not fit its parameter")
    optimizer.load_state_dict({"state": stored, "param_groups": own["param_groups"]})
    _fill_momentum(optimizer)


def _merge_buffers(stored: Mapping[int, Mapping[str, Any]], merged: Sequence[int]) -> dict[int, dict[str, Any]]:
    owner = [index for index, count in enumerate(merged) for _ in range(count)]
    parts: dict[int, list[Mapping[str, Any]]] = {}
    for index in sorted(stored):
        parts.setdefault(owner[index], []).append(stored[index])
    return {
        index: {
            name: value if name == "step" or len(found) == 1 else torch.cat([part[name] for part in found])
            for name, value in found[0].items()
        }
        for index, found in parts.items()
    }


def _fill_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Set zero momentum for every parameter of fused SGD; the first step is the same as without momentum.

    Without it the fused kernel allocates uninitialized memory in the first step and does not write it if that step is
    skipped (non-finite gradients); and it refuses groups in which only some parameters have momentum (when unfreezing).
    """
    if not isinstance(optimizer, torch.optim.SGD) or not optimizer.defaults["fused"]:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def scaled_decay(decay: float, batch_size: int, nominal: int = 64) -> float:
    """Return the weight decay scaled to the actual number of images per optimizer step."""
    return decay * batch_size * accumulation(batch_size, nominal) / nominal
