"""YOLOv5's learning-rate schedule as pure functions of (epoch, iteration)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from engine.cli.config import Hyperparameters


def accumulation(batch_size: int, nominal: int = 64) -> int:
    """Return the batches per optimizer step after warm-up, for about `nominal` images in one step."""
    return max(round(nominal / batch_size), 1)


def lr_factor(epoch: int, epochs: int, lrf: float, cosine: bool) -> float:
    """Return the learning rate at an epoch divided by lr0: from 1 to `lrf`, linear or as half a cosine."""
    if cosine:
        return (1 - math.cos(epoch * math.pi / epochs)) / 2 * (lrf - 1) + 1
    return (1 - epoch / epochs) * (1 - lrf) + lrf


@dataclass(frozen=True)
class StepSettings:
    """Settings of one iteration: learning rates of biases, weights and norms, momentum, batches per optimizer step."""

    lr: tuple[float, float, float]
    momentum: float
    accumulate: int


@dataclass(frozen=True)
class Schedule:
    """YOLOv5's schedule: warm-up by iteration, then one learning rate per epoch.

    Two properties are kept to reproduce YOLOv5: warm-up lasts at least 100 iterations, even past the end of a short
    training; and after warm-up epoch e uses the schedule's value for e - 1, since the official scheduler is one step
    behind (the warm-up itself ends at the value for e).
    """

    hyp: Hyperparameters
    epochs: int
    batches: int  # per epoch
    batch_size: int  # over all ranks
    cosine: bool = False

    @property
    def warmup_iterations(self) -> int:
        """Last iteration of the warm-up; 0 without one."""
        w = self.hyp.warmup_epochs
        return max(round(w * self.batches), 100) if w > 0 else 0

    def at(self, iteration: int, epoch: int) -> StepSettings:
        """Return the settings of an iteration, counted over the whole training from 0."""
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
    """Set learning rates and (for SGD) momentum of the optimizer's groups (see `parameter_groups`)."""
    for group in optimizer.param_groups:
        group["lr"] = settings.lr[group["kind"]] * group["lr_scale"]
        if "momentum" in group:
            group["momentum"] = settings.momentum
