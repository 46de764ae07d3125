"""Batch norm whose statistics are those of the whole batch, on all processes together (`--sync-bn`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.devices.distributed import World


def synchronize(model: nn.Module, world: World, device: torch.device) -> None:
    """Let the batch norms inside a model share their statistics; keys and values of its state stay as they are.

    On CUDA they become PyTorch's own, which refuse tensors on a CPU; there `CpuSyncBatchNorm` stands in for them.
    """
    if device.type != "cpu":
        nn.SyncBatchNorm.convert_sync_batchnorm(model, world.gradients)
        return
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = CpuSyncBatchNorm
            module.process_group = world.gradients


class CpuSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """`nn.SyncBatchNorm` in plain tensor operations, two sums over the processes per layer."""

    process_group: Any

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions will do."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape; statistics of all processes' batches in training mode."""
        if not self.training:
            return super().forward(input)
        x = input if input.dtype == torch.float64 else input.float()
        across = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        sums = torch.cat((x.sum(across), x.new_tensor([x.numel() / x.shape[1]])))
        sums = _SumOfRanks.apply(sums, self.process_group)
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centerd = x - mean.view(shape)
        variance = _SumOfRanks.apply(centerd.square().sum(across), self.process_group) / count
        self._remember(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        out = centerd * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is not None:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), rate)
        self.running_var.lerp_(variance.to(self.running_var), rate)


class _SumOfRanks(torch.autograd.Function):
    """Sum over the processes; each process's gradient is the sum of all of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
