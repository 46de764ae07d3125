"""Optimiser groups and YOLOv5's learning-rate recipe as pure functions of (epoch, iteration)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from engine.config import Hyperparameters
from models.backbones.base import Backbone

CLIP_NORM = 10.0
_NORMS = tuple(v for k, v in vars(nn).items() if isinstance(v, type) and "Norm" in k)
_TOKENS = ("pos_embed", "cls_token", "relative_position_bias_table", "absolute_pos_embed", "dist_token")


def parameter_groups(model: nn.Module, decay: float) -> list[dict]:
    """Split all parameters into three groups: biases, decayed weights, and norm weights (no decay).

    YOLOv5's rule by name holds for its own layers: what is called `bias` is a bias, a norm layer's `weight` a norm
    weight, and everything else is decayed. Inside a `Backbone` whatever is not a matrix or a kernel (layer scales,
    position embeddings, tokens) joins the norm weights: pulling those to zero is not regularisation.

    Args:
        model: every parameter of it, frozen ones too, lands in exactly one group.
        decay: weight decay of the second group.

    Returns:
        Three dicts with `params`, `weight_decay` and `name`, in YOLOv5's order.
    """
    biases, weights, norms = [], [], []
    seen: set[int] = set()
    in_backbone = {id(p) for m in model.modules() if isinstance(m, Backbone) for p in m.parameters()}
    for module in model.modules():
        is_norm = isinstance(module, _NORMS) or type(module).__name__.endswith(("Norm", "Norm2d"))
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            vector = parameter.ndim <= 1 or name in _TOKENS or max(parameter.shape) == parameter.numel()
            if name == "bias":
                biases.append(parameter)
            elif (is_norm and name == "weight") or (id(parameter) in in_backbone and vector):
                norms.append(parameter)
            else:
                weights.append(parameter)
    return [
        {"params": biases, "weight_decay": 0.0, "name": "biases"},
        {"params": weights, "weight_decay": decay, "name": "weights"},
        {"params": norms, "weight_decay": 0.0, "name": "norms"},
    ]


def build_optimizer(name: str, groups: list[dict], lr: float, momentum: float) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, Adam or AdamW (momentum is their first beta) over groups that may be empty."""
    if name == "SGD":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=True)
    kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[name]
    return kind(groups, lr=lr, betas=(momentum, 0.999))


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
    """What holds for one iteration: rates of the three groups, momentum, batches per optimiser step."""

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
    """Write rates and (for SGD) momentum into the optimiser's groups."""
    for group, rate in zip(optimizer.param_groups, settings.lr, strict=True):
        group["lr"] = rate
        if "momentum" in group:
            group["momentum"] = settings.momentum
