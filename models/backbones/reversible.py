"""Reversible transformer blocks of RevViT and the autograd function that recomputes their inputs.

Paper: "Reversible Vision Transformers", Mangalam et al., CVPR 2022, https://arxiv.org/abs/2302.04869.

A block maps two streams (x_1, x_2) of equal shape to (y_1, y_2). With F = attention(norm) and G = MLP(norm):

    y_1 = x_1 + F(x_2)                                                     (forward)
    y_2 = x_2 + G(y_1)

    x_2 = y_2 - G(y_1)                                                     (inverse)
    x_1 = y_1 - F(x_2)

Backward pass of a block, given y_1, y_2 and the gradients dy_1, dy_2 of the loss (only the outputs of the last block
are stored):

1. Recompute G(y_1) with gradients; x_2 = y_2 - G(y_1).
2. Backpropagate dy_2 through G: parameter gradients of G, and dx_1 = dy_1 + dy_2 dG/dy_1.
3. Recompute F(x_2) with gradients; x_1 = y_1 - F(x_2).
4. Backpropagate dx_1 through F: parameter gradients of F, and dx_2 = dy_2 + dx_1 dF/dx_2.
5. (x_1, x_2) and (dx_1, dx_2) are the outputs and gradients of the block before; continue with step 1.

Shape legend: B batch, L tokens, C embedding channels, N heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional

from models.backbones.layers import DropPath

NORM_EPS = 1e-6


@dataclass(frozen=True)
class DropRates:
    """Dropout rates of outputs, of attention weights, and of residual branches (stochastic depth)."""

    drop: float = 0.0
    attn: float = 0.0
    path: float = 0.0


@dataclass(frozen=True)
class BlockOptions:
    """Options of a block.

    Attributes:
        rates: dropout rates.
        qkv_bias: whether query, key and value have a bias.
        num_fcs: number of linear layers of the MLP.
        act_layer: activation of the MLP.
        eps: eps of the norms.
        shared_drop_path: F and G of a block are dropped together.
    """

    rates: DropRates = DropRates()
    qkv_bias: bool = True
    num_fcs: int = 2
    act_layer: type[nn.Module] = nn.GELU
    eps: float = NORM_EPS
    shared_drop_path: bool = True


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, embed_dims: int, num_heads: int, qkv_bias: bool, rates: DropRates) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop_rate = rates.attn
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(rates.drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        batch, tokens, channels = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, channels // self.num_heads)
        q_BNLD, k_BNLD, v_BNLD = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        drop = self.attn_drop_rate if self.training else 0.0
        y_BNLD = functional.scaled_dot_product_attention(q_BNLD, k_BNLD, v_BNLD, dropout_p=drop)
        return self.proj_drop(self.proj(y_BNLD.transpose(1, 2).reshape(batch, tokens, channels)))


class FeedForward(nn.Module):
    """Linear layers with an activation after each but the last; published keys `layers.0.0`, ..., `layers.<n - 1>`."""

    def __init__(self, embed_dims: int, hidden_channels: int, options: BlockOptions) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = embed_dims
        for _ in range(options.num_fcs - 1):
            linear = nn.Linear(channels, hidden_channels)
            layers.append(nn.Sequential(linear, options.act_layer(), nn.Dropout(options.rates.drop)))
            channels = hidden_channels
        self.layers = nn.Sequential(*layers, nn.Linear(channels, embed_dims), nn.Dropout(options.rates.drop))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.layers(x)


class ReversibleBlock(nn.Module):
    """Reversible block with the residual functions F (attention) and G (MLP).

    Args:
        embed_dims, num_heads, feedforward_channels: see `RevViTArchitecture`.
        options: rates, norm and activation.
    """

    def __init__(self, embed_dims: int, num_heads: int, feedforward_channels: int, options: BlockOptions) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(embed_dims, eps=options.eps)
        self.attn = Attention(embed_dims, num_heads, options.qkv_bias, options.rates)
        self.ln2 = nn.LayerNorm(embed_dims, eps=options.eps)
        self.ffn = FeedForward(embed_dims, feedforward_channels, options)
        self.drop_path = DropPath(options.rates.path)
        self.shared_drop_path = options.shared_drop_path

    def drop_path_masks(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Draw the drop-path factors of F and G, (B, 1, 1) each, for streams x (B, L, C); None where none apply.

        As published, one draw serves both, so that a sample skips the whole block or none of it.
        """
        if not self.drop_path.training or self.drop_path.drop_prob == 0:
            return None, None
        ones = x.new_ones((x.shape[0], 1, 1))
        mask = self.drop_path(ones)
        return mask, mask if self.shared_drop_path else self.drop_path(ones)

    def F(self, x: Tensor, mask: Tensor | None) -> Tensor:  # noqa: N802 (the paper's symbol)
        """Apply the attention branch, (B, L, C) -> (B, L, C), times `mask` (B, 1, 1)."""
        y = self.attn(self.ln1(x))
        return y if mask is None else y * mask

    def G(self, x: Tensor, mask: Tensor | None) -> Tensor:  # noqa: N802 (the paper's symbol)
        """Apply the MLP branch, (B, L, C) -> (B, L, C), times `mask` (B, 1, 1)."""
        y = self.ffn(self.ln2(x))
        return y if mask is None else y * mask

    def forward(self, x_1: Tensor, x_2: Tensor) -> tuple[Tensor, Tensor]:
        """Map the streams (B, L, C), (B, L, C) to (y_1, y_2) of the same shapes."""
        mask_F, mask_G = self.drop_path_masks(x_2)
        y_1 = x_1 + self.F(x_2, mask_F)
        y_2 = x_2 + self.G(y_1, mask_G)
        return y_1, y_2


@dataclass(frozen=True)
class AutocastState:
    """Autocast state of the forward pass."""

    device_type: str
    dtype: torch.dtype
    enabled: bool

    @classmethod
    def now(cls, device: torch.device) -> AutocastState:
        kind = device.type
        return cls(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def replay(self) -> torch.autocast:
        # Without the cache: weights cast without gradients must not be reused where gradients are needed.
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)

    def cast_linear(self, names: Sequence[str], theta: Sequence[Tensor]) -> Sequence[Tensor]:
        """Cast the parameters of linear layers as autocast would, in few launches; shapes are unchanged."""
        if not self.enabled:
            return theta
        norms = ("block.ln1.", "block.ln2.")
        return convert_together(
            theta,
            [t.dtype if n.startswith(norms) or t.dtype == torch.float64 else self.dtype for n, t in zip(names, theta)],
        )


def convert_together(tensors: Sequence[Tensor | None], dtypes: Sequence[torch.dtype]) -> list[Any]:
    """Convert tensors of any shapes to these dtypes by one multi-tensor copy; None stays None."""
    pairs = [
        (i, t, torch.empty_like(t, dtype=dtype))
        for i, (t, dtype) in enumerate(zip(tensors, dtypes))
        if t is not None and t.dtype != dtype
    ]
    if pairs:
        torch._foreach_copy_([new for _, _, new in pairs], [old for _, old, _ in pairs])
    converted = {i: new for i, _, new in pairs}
    return [converted.get(i, t) for i, t in enumerate(tensors)]


@dataclass(frozen=True)
class BranchState:
    """State a branch depends on besides input and parameters: random generators, module modes, drop-path mask."""

    modes: tuple[bool, ...]
    mask: Tensor | None
    cpu_state: Tensor | None = None
    cuda_states: dict[torch.device, Tensor] = field(default_factory=dict)

    @classmethod
    def now(cls, block: nn.Module, devices: Sequence[torch.device], mask: Tensor | None) -> BranchState:
        modes = tuple(module.training for module in block.modules())
        if not any(modes):
            return cls(modes, mask)  # no random numbers in eval mode
        return cls(modes, mask, torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices})

    @contextmanager
    def replay(self, block: nn.Module) -> Iterator[None]:
        """Run the block with the recorded random numbers; restore the global generators afterwards."""
        modules = list(block.modules())
        modes = [module.training for module in modules]
        with torch.random.fork_rng(list(self.cuda_states), enabled=self.cpu_state is not None):
            if self.cpu_state is not None:
                torch.set_rng_state(self.cpu_state)
            for device, state in self.cuda_states.items():
                torch.cuda.set_rng_state(state, device)
            try:
                for module, mode in zip(modules, self.modes):
                    module.training = mode
                yield
            finally:
                for module, mode in zip(modules, modes):
                    module.training = mode


class Branch(nn.Module):
    """F or G of a block as a separate module, so that it can be run with other parameter tensors."""

    def __init__(self, block: ReversibleBlock, branch: str) -> None:
        super().__init__()
        self.block, self.branch = block, branch
        parts = ("block.ln1.", "block.attn.") if branch == "F" else ("block.ln2.", "block.ffn.")
        self.theta = {name: value for name, value in self.named_parameters() if name.startswith(parts)}

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.block.F(x, mask) if self.branch == "F" else self.block.G(x, mask)

    def pull_back(
        self,
        moment: BranchState,
        autocast: AutocastState,
        x: Tensor,
        theta: Sequence[tuple[Tensor, bool]],
        d_out: Tensor,
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Recompute the branch at x (B, L, C); return its output and the gradients of x and of each required theta."""
        x = x.detach().requires_grad_()
        aliases = [value.detach().requires_grad_(required) for value, required in theta]
        with torch.enable_grad(), autocast.replay(), moment.replay(self.block):
            out = functional_call(self, dict(zip(self.theta, aliases)), (x, moment.mask))
        required = [alias for alias in aliases if alias.requires_grad]
        d_x, *d_required = torch.autograd.grad(out, [x, *required], d_out.to(out.dtype))
        gradients = iter(d_required)
        return out.detach(), d_x, [next(gradients) if alias.requires_grad else None for alias in aliases]


class ReversibleFunction(torch.autograd.Function):
    """The sequence of blocks as one autograd function that stores only its outputs.

    Every parameter is an input, so that gradients flow through the ordinary graph: parameter hooks, gradient scaling,
    DistributedDataParallel and `torch.autograd.grad` work as with plain blocks. The backward pass uses detached aliases
    of the parameters; with the parameters themselves, hooks would run twice.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 -- what backward needs is kept as attributes of its own
        blocks: Sequence[ReversibleBlock],
        buffered: frozenset[int],
        x_1: Tensor,
        x_2: Tensor,
        *theta: Tensor,
    ) -> tuple[Tensor, Tensor]:
        devices = sorted({t.device for t in (x_1, x_2, *theta) if t.device.type == "cuda"}, key=str)
        ctx.blocks = blocks
        ctx.autocast = AutocastState.now(x_1.device)
        ctx.moments = []
        kept: list[Tensor] = []
        ctx.kept_after = {}
        y_1, y_2 = x_1, x_2
        with ctx.autocast.replay():
            for index, block in enumerate(blocks):
                mask_F, mask_G = block.drop_path_masks(y_2)
                before_F = BranchState.now(block, devices, mask_F)
                y_1 = y_1 + block.F(y_2, mask_F)
                before_G = BranchState.now(block, devices, mask_G)
                y_2 = y_2 + block.G(y_1, mask_G)
                ctx.moments.append((before_F, before_G))
                if index in buffered and index + 1 < len(blocks):
                    ctx.kept_after[index] = len(kept)
                    kept += [y_1, y_2]
        ctx.num_kept = len(kept)
        ctx.save_for_backward(y_1, y_2, *kept, *theta)
        return y_1, y_2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_1: Tensor, d_y_2: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        y_1, y_2, *others = ctx.saved_tensors
        kept, needs_theta = others[: ctx.num_kept], ctx.needs_input_grad[4:]
        names = [name for block in ctx.blocks for branch in "FG" for name in Branch(block, branch).theta]
        theta = list(zip(ctx.autocast.cast_linear(names, others[ctx.num_kept :]), needs_theta))
        d_theta: list[Tensor | None] = [None] * len(theta)
        end = len(theta)
        for index in reversed(range(len(ctx.blocks))):
            if not any(ctx.needs_input_grad[2:4]) and not any(needs_theta[:end]):
                break  # all remaining blocks are frozen
            if index in ctx.kept_after:
                y_1, y_2 = kept[ctx.kept_after[index] :][:2]
            block, (before_F, before_G) = ctx.blocks[index], ctx.moments[index]
            branch = Branch(block, "G")
            start = end - len(branch.theta)
            # Steps 1 and 2 of the module docstring
            G_y_1, d, d_theta[start:end] = branch.pull_back(before_G, ctx.autocast, y_1, theta[start:end], d_y_2)
            x_2, d_x_1, end = y_2 - G_y_1, d_y_1 + d, start
            branch = Branch(block, "F")
            start = end - len(branch.theta)
            # Steps 3, 4 and 5
            F_x_2, d, d_theta[start:end] = branch.pull_back(before_F, ctx.autocast, x_2, theta[start:end], d_x_1)
            x_1, d_x_2, end = y_1 - F_x_2, d_y_2 + d, start
            y_1, y_2, d_y_1, d_y_2 = x_1, x_2, d_x_1, d_x_2
        dtypes = [value.dtype for value in others[ctx.num_kept :]]
        return None, None, d_y_1, d_y_2, *convert_together(d_theta, dtypes)
