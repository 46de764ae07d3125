"""Optimiser groups and YOLOv5's learning-rate recipe as pure functions of (epoch, iteration)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from engine.cli.config import Hyperparameters
from engine.train.freeze import backbone_rows
from models.backbones.base import Backbone
from models.yolo import DetectionModel

CLIP_NORM = 10.0
KINDS = ("biases", "weights", "norms")
_NORMS = tuple(v for k, v in vars(nn).items() if isinstance(v, type) and "Norm" in k)
_TOKENS = ("pos_embed", "cls_token", "relative_position_bias_table", "absolute_pos_embed", "dist_token")


def parameter_groups(model: nn.Module, decay: float, scale_of: Callable[[str], float] = lambda name: 1.0) -> list[dict]:
    """Split all parameters by kind (biases, decayed weights, norm weights without decay) and by learning rate.

    YOLOv5's rule by name holds for its own layers: what is called `bias` is a bias, a norm layer's `weight` a norm
    weight, and everything else is decayed. Inside a `Backbone` whatever is not a matrix or a kernel (layer scales,
    position embeddings, tokens) joins the norm weights: pulling those to zero is not regularisation.

    Args:
        model: every parameter of it, frozen ones too, lands in exactly one group.
        decay: weight decay of the decayed weights.
        scale_of: factor on the learning rate of a parameter, by its name; see `rate_scales`.

    Returns:
        Dicts with `params`, `weight_decay`, `name`, `kind` (place of the name in `KINDS`) and `lr_scale`: of each
        scale, highest first, the kinds in YOLOv5's order. With one scale there are three, any of them may be empty.
    """
    kinds: dict[int, str] = {}
    in_backbone = {id(p) for m in model.modules() if isinstance(m, Backbone) for p in m.parameters()}
    for module in model.modules():
        is_norm = isinstance(module, _NORMS) or type(module).__name__.endswith(("Norm", "Norm2d"))
        for name, parameter in module.named_parameters(recurse=False):
            vector = parameter.ndim <= 1 or name in _TOKENS or max(parameter.shape) == parameter.numel()
            undecayed = (is_norm and name == "weight") or (id(parameter) in in_backbone and vector)
            kinds.setdefault(id(parameter), "biases" if name == "bias" else "norms" if undecayed else "weights")
    found: dict[float, dict[str, list[nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        groups = found.setdefault(scale_of(name), {kind: [] for kind in KINDS})
        groups[kinds[id(parameter)]].append(parameter)
    return [
        {"params": params, "weight_decay": decay if kind == "weights" else 0.0, "name": kind, "kind": KINDS.index(kind)}
        | {"lr_scale": scale}
        for scale in sorted(found, reverse=True)
        for kind, params in found[scale].items()
        if params or len(found) == 1
    ]


def rate_scales(model: DetectionModel, backbone_lr: float, layer_decay: float) -> Callable[[str], float]:
    """Factor on the learning rate of each parameter: 1 in neck and head, less in the backbone.

    Within the backbone a parameter at depth d of D gets `backbone_lr * layer_decay ** (D + 1 - d)`, so that early
    layers move least (BEiT, https://arxiv.org/abs/2106.08254). A `Backbone` tells the depth by `param_depth`; of a
    plain YOLOv5 model each row of the section `backbone:` is one deeper.
    """
    depths: dict[str, int] = {}
    for place, row in enumerate(backbone_rows(model)):
        module = model.model[row]
        for name, _ in module.named_parameters():
            depth = module.param_depth(name) if isinstance(module, Backbone) else place
            depths[f"model.{row}.{name}"] = depth
    last = max(depths.values(), default=0)
    return lambda name: backbone_lr * layer_decay ** (last + 1 - depths[name]) if name in depths else 1.0


def describe_groups(groups: Sequence[dict]) -> str:
    """A table of optimiser groups: what they hold, weight decay, factor on the learning rate."""
    lines = [f"{'group':<10}{'tensors':>9}{'parameters':>13}{'learning':>13}{'decay':>10}{'rate x':>10}"]
    for group in groups:
        sizes = [p.numel() for p in group["params"]]
        learning = sum(p.numel() for p in group["params"] if p.requires_grad)
        lines.append(
            f"{group['name']:<10}{len(sizes):>9}{sum(sizes):>13}{learning:>13}{group['weight_decay']:>10.4g}"
            f"{group['lr_scale']:>10.4g}"
        )
    return "\n".join(lines)


def build_optimizer(name: str, groups: list[dict], lr: float, momentum: float) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, Adam or AdamW (momentum is their first beta) over groups that may be empty.

    On CUDA each step is one fused kernel per group.
    """
    fused = any(p.is_cuda for group in groups for p in group["params"]) or None
    if name == "SGD":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=True, fused=fused)
    kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[name]
    return kind(groups, lr=lr, betas=(momentum, 0.999), fused=fused)


def accumulation(batch_size: int, nominal: int = 64) -> int:
    """Batches per optimiser step once warm-up is over, to see about `nominal` images in one step."""
    return max(round(nominal / batch_size), 1)


def scaled_decay(decay: float, batch_size: int, nominal: int = 64) -> float:
    """Weight decay for the images that one optimiser step really sees."""
    return decay * batch_size * accumulation(batch_size, nominal) / nominal


def lr_factor(epoch: int, epochs: int, lrf: float, cosine: bool) -> float:
    """Part of lr0 at an epoch: from 1 to `lrf`, straight or as half a cosine."""
    if cosine:
        return (1 - math.cos(epoch * math.pi / epochs)) / 2 * (lrf - 1) + 1
    return (1 - epoch / epochs) * (1 - lrf) + lrf


@dataclass(frozen=True)
class StepSettings:
    """What holds for one iteration: rates of the three kinds of parameters, momentum, batches per optimiser step."""

    lr: tuple[float, float, float]
    momentum: float
    accumulate: int


@dataclass(frozen=True)
class Schedule:
    """YOLOv5's recipe: warm-up by iteration, then one rate per epoch.

    Two of its properties are kept on purpose, for the same numbers: warm-up lasts at least 100 iterations, even past
    the end of a short training; and after warm-up epoch e runs at the curve's value for e - 1, since the official
    scheduler starts one step behind (the warm-up itself aims at the value for e).
    """

    hyp: Hyperparameters
    epochs: int
    batches: int  # per epoch
    batch_size: int  # over all ranks
    cosine: bool = False

    @property
    def warmup_iterations(self) -> int:
        """Last iteration of the warm-up; 0 where the hyper-parameters ask for none."""
        w = self.hyp.warmup_epochs
        return max(round(w * self.batches), 100) if w > 0 else 0

    def at(self, iteration: int, epoch: int) -> StepSettings:
        """Settings of an iteration, counted over the whole training from 0."""
        h, end = self.hyp, self.warmup_iterations
        if end and iteration <= end:
            target = h.lr0 * self._factor(epoch)
            rates = [np.interp(iteration, [0, end], [start, target]) for start in (h.warmup_bias_lr, 0.0, 0.0)]
            momentum = float(np.interp(iteration, [0, end], [h.warmup_momentum, h.momentum]))
            batches = np.interp(iteration, [0, end], [1, h.nominal_batch / self.batch_size])
            lr = (float(rates[0]), float(rates[1]), float(rates[2]))
            return StepSettings(lr, momentum, max(1, int(batches.round())))
        ended_in_this_epoch = end and end >= epoch * self.batches
        rate = h.lr0 * self._factor(epoch if ended_in_this_epoch else max(epoch - 1, 0))
        return StepSettings((rate, rate, rate), h.momentum, accumulation(self.batch_size, int(h.nominal_batch)))

    def _factor(self, epoch: int) -> float:
        return lr_factor(epoch, self.epochs, self.hyp.lrf, self.cosine)


def apply_settings(optimizer: torch.optim.Optimizer, settings: StepSettings) -> None:
    """Write rates and (for SGD) momentum into the optimiser's groups (see `parameter_groups`)."""
    for group in optimizer.param_groups:
        group["lr"] = settings.lr[group["kind"]] * group["lr_scale"]
        if "momentum" in group:
            group["momentum"] = settings.momentum
