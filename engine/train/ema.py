"""Exponential moving average of the weights."""

from __future__ import annotations

import copy
import math
from typing import Generic, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class ModelEma(Generic[M]):
    """Averaged copy of a model, used for validation and for the saved weights.

    The decay ramps up, `decay * (1 - exp(-updates / tau))`, so that early averages follow the fast first steps. All
    floating-point entries of the state dict are averaged, buffers too; integer entries keep their first value.

    Attributes:
        module: the averaged model, in evaluation mode, without gradients.
        updates: number of updates so far.
    """

    def __init__(self, model: M, decay: float = 0.9999, tau: float = 2000.0, updates: int = 0) -> None:
        self.module: M = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.tau, self.updates = decay, tau, updates
        self._tensors: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None

    def decay_at(self, updates: int) -> float:
        """Return the decay at the given number of updates."""
        return self.decay * (1 - math.exp(-updates / self.tau))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average with the model's current state; called once per optimizer step, always with one model.

        The tensors are listed once: both models are changed in place only. A tensor that the state dict has under two
        names (a layer used twice) is listed once, too: it would be averaged twice.
        """
        self.updates += 1
        d = self.decay_at(self.updates)
        if self._tensors is None:
            source = model.state_dict(keep_vars=True)
            own = {id(v): (v, source[k]) for k, v in self.module.state_dict(keep_vars=True).items()}
            pairs = [pair for pair in own.values() if pair[0].dtype.is_floating_point]
            self._tensors = [v for v, _ in pairs], [v for _, v in pairs]
        averages, values = self._tensors
        torch._foreach_mul_(averages, d)
        torch._foreach_add_(averages, values, alpha=1 - d)
