"""BatchNorm with statistics over the batches of all processes (`--sync-bn`), on CUDA and on CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.devices.distributed import World
from utils.errors import ConfigError

ACTIVATED = "BatchNormAct2d"
"""timm's BatchNorm with dropout and activation: its own forward applies `drop` and `act` after the norm."""


def convert_sync_batchnorm(model: nn.Module, world: World, device: torch.device) -> None:
    """Synchronize the statistics of all BatchNorm layers inside a model; keys and values of its state are unchanged.

    On CUDA they become `nn.SyncBatchNorm`, which refuses CPU tensors; on a CPU they become `CpuSyncBatchNorm`. timm's
    layers with an activation keep it.

    Raises:
        ConfigError: a subclass of BatchNorm with a forward of its own, which would be lost.
    """
    on_cpu = device.type == "cpu"
    plain, activated = (CpuSyncBatchNorm, CpuSyncBatchNormAct) if on_cpu else (nn.SyncBatchNorm, SyncBatchNormAct)
    base = nn.modules.batchnorm._BatchNorm
    norms = [module for module in model.modules() if isinstance(module, base)]
    own = {type(m).__name__ for m in norms if type(m).forward is not base.forward} - {ACTIVATED}
    if own:
        raise ConfigError(
            f"--sync-bn: {min(own)} is a BatchNorm with a forward of its own, which cannot be synchronized"
        )
    for module in norms:
        module.__class__ = activated if type(module).__name__ == ACTIVATED else plain
        module.process_group = world.gradients  # type: ignore[assignment]


class CpuSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """`nn.SyncBatchNorm` in plain tensor operations, two all-reduces per layer."""

    process_group: Any

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of dimensions."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (B, C, ...) to the same shape and dtype; in training mode by statistics over all processes."""
        if not self.training:
            return super().forward(input)
        x = input if input.dtype == torch.float64 else input.float()
        dims = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        sums = torch.cat((x.sum(dims), x.new_tensor([x.numel() / x.shape[1]])))
        sums = _AllReduceSum.apply(sums, self.process_group)
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centered = x - mean.view(shape)
        variance = _AllReduceSum.apply(centered.square().sum(dims), self.process_group) / count
        self._update_running(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        out = centered * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is not None:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), factor)
        self.running_var.lerp_(variance.to(self.running_var), factor)


class CpuSyncBatchNormAct(CpuSyncBatchNorm):
    """`CpuSyncBatchNorm` followed by the dropout and activation of timm's BatchNormAct2d."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (B, C, H, W), then apply dropout and activation."""
        return self.act(self.drop(super().forward(input)))


class SyncBatchNormAct(nn.SyncBatchNorm):
    """`nn.SyncBatchNorm` followed by the dropout and activation of timm's BatchNormAct2d."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (B, C, H, W), then apply dropout and activation."""
        return self.act(self.drop(super().forward(input)))


class _AllReduceSum(torch.autograd.Function):
    """Sum over the processes; the gradient of each process is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)  # type: ignore[attr-defined]
        return total, None
