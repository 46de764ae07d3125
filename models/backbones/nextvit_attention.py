"""Token mixers of Next-ViT: E-MHSA as published, with two-dimensional pooling, and cross-covariance attention.

Papers: Next-ViT, https://arxiv.org/abs/2207.05501, section 3.3; XCiT, https://arxiv.org/abs/2106.09681.
Shape legend: B batch, C channels, H and W height and width in cells, L = H * W tokens in row-major order, M tokens
after pooling, N heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones.layers import fold_norm_before, require

NORM_EPS = 1e-5
HEAD_DIM = 32


@dataclass(frozen=True)
class AttentionOptions:
    """Settings of a token mixer.

    Attributes:
        attn_drop_rate: dropout of attention weights.
        drop_rate: dropout of the output.
        head_dim: channels of a head.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: factor on q k^T; None = head_dim^-0.5.
    """

    attn_drop_rate: float = 0.0
    drop_rate: float = 0.0
    head_dim: int = HEAD_DIM
    qkv_bias: bool = True
    qk_scale: float | None = None


class TokenMixer(nn.Module):
    """Layers that the mixers share. `PROJECTIONS` names those of a subclass: "qk" computes q and k, in this order.

    Args:
        channels: channels of input and output.
        reduction: s, the spatial reduction ratio.
        options: other settings.
    """

    PROJECTIONS: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    v: nn.Linear

    def __init__(self, channels: int, reduction: int, options: AttentionOptions) -> None:
        super().__init__()
        self.reduction = reduction
        self.options = options
        for name in self.PROJECTIONS:
            self.add_module(name, nn.Linear(channels, channels * len(name), bias=options.qkv_bias))
        self.proj = nn.Linear(channels, channels)
        self.proj_drop = nn.Dropout(options.drop_rate)
        self.norm: nn.Module = nn.BatchNorm1d(channels, eps=NORM_EPS) if reduction > 1 else nn.Identity()

    @classmethod
    def upgrade_state(cls, state: dict[str, Tensor], prefix: str) -> None:
        """Merge projections that were separate layers: XCA had q and k (C, C) instead of qk (2 C, C).

        Args:
            state: state dict, changed in place; a part without its counterpart stays, so that loading reports it.
            prefix: of the keys of this module.
        """
        for name, kind in product(cls.PROJECTIONS, ("weight", "bias")):
            merged, parts = f"{prefix}{name}.{kind}", [f"{prefix}{letter}.{kind}" for letter in name]
            shapes = [state[part].shape if part in state else None for part in parts]
            if merged not in state and shapes[0] and shapes.count(shapes[0]) == len(parts):
                state[merged] = torch.cat([state.pop(part) for part in parts])

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        self.upgrade_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class EMHSA(TokenMixer):
    """Efficient Multi-Head Self-Attention as published: keys and values are computed from pooled tokens.

    SA(X) = Attention(X W_Q, P_s(X) W_K, P_s(X) W_V). The average pooling P_s is one-dimensional, over s^2 tokens in
    row-major order: it averages along rows and across their ends, and drops the remainder. The published weights were
    trained with it.
    """

    q: nn.Linear
    k: nn.Linear

    def pooled(self, x: Tensor) -> Tensor:
        """Pool (B, C, H, W) to (B, C, M) with M = floor(H * W / reduction^2)."""
        tokens = x.flatten(2)
        return F.avg_pool1d(tokens, self.reduction**2) if self.reduction > 1 else tokens

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x_BLC = x.flatten(2).transpose(1, 2)
        m_BMC = self.norm(self.pooled(x)).transpose(1, 2)
        pairs = ((self.q, x_BLC), (self.k, m_BMC), (self.v, m_BMC))
        q_BNLD, k_BNMD, v_BNMD = (_heads(layer(tokens), self.options.head_dim) for layer, tokens in pairs)
        drop = self.options.attn_drop_rate if self.training else 0.0
        y_BNLD = F.scaled_dot_product_attention(q_BNLD, k_BNMD, v_BNMD, dropout_p=drop, scale=self.options.qk_scale)
        y_BLC = self.proj_drop(self.proj(y_BNLD.transpose(1, 2).flatten(2)))
        return y_BLC.transpose(1, 2).reshape(x.shape)

    def fold_norm_before(self, norm: nn.Module) -> nn.Module:
        """Fold the norm before E-MHSA, and its own, into the linear layers (pooling commutes with both)."""
        self.norm = fold_norm_before(self.norm, self.k, self.v)
        return fold_norm_before(norm, self.q, self.k, self.v)


def _heads(x_BLC: Tensor, head_dim: int) -> Tensor:
    batch, tokens, channels = x_BLC.shape
    return x_BLC.reshape(batch, tokens, channels // head_dim, head_dim).transpose(1, 2)  # (B, N, L, D)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _conv(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a linear layer to the channels of (B, C, H, W) as a 1x1 convolution, which needs no transposition."""
    return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)


def _conv_heads(layer: nn.Linear, x: Tensor, head_dim: int) -> Tensor:
    y = _conv(layer, x).flatten(2)
    return y.reshape(y.shape[0], -1, head_dim, y.shape[2])  # (B, N, D, L)


class EMHSA2d(EMHSA):
    """E-MHSA with two-dimensional pooling over reduction x reduction cells; drops no cell. Same parameters."""

    def pooled(self, x: Tensor) -> Tensor:
        """Pool (B, C, H, W) to (B, C, M) with M = ceil(H / reduction) * ceil(W / reduction)."""
        return _pool2d(x, self.reduction).flatten(2)


def _pool2d(x: Tensor, reduction: int) -> Tensor:
    if reduction == 1:
        return x
    return F.avg_pool2d(x, reduction, reduction, ceil_mode=True, count_include_pad=False)


class XCA(TokenMixer):
    """Cross-covariance attention (XCiT, https://arxiv.org/abs/2106.09681) with queries and keys of pooled cells.

    A head attends over channels: softmax(q k^T * temperature) v, where the rows of q and k (one per channel, over M
    pooled cells) have unit length and v keeps the full resolution. The cost is linear in the number of cells. The
    parameters are those of `EMHSA`, with one layer for queries and keys, plus a temperature per head, which replaces
    `qk_scale`.
    """

    PROJECTIONS = ("qk", "v")
    qk: nn.Linear

    def __init__(self, channels: int, reduction: int, options: AttentionOptions) -> None:
        super().__init__(channels, reduction, options)
        unscaled = options.qk_scale is None
        require(unscaled, "NextViT: qk_scale has no effect with mixer xca, which learns a temperature")
        self.temperature = nn.Parameter(torch.ones(channels // options.head_dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        pooled = self.norm(_pool2d(x, self.reduction).flatten(2)).unsqueeze(3)  # (B, C, M, 1)
        qk, v_BNDL = (_conv_heads(layer, y, self.options.head_dim) for layer, y in ((self.qk, pooled), (self.v, x)))
        q_BNDM, k_BNDM = F.normalize(_wide(qk), dim=3).chunk(2, dim=1)
        weights_BNDD = (q_BNDM @ k_BNDM.transpose(2, 3) * self.temperature).softmax(dim=3).to(v_BNDL.dtype)
        weights_BNDD = F.dropout(weights_BNDD, self.options.attn_drop_rate, self.training)
        return self.proj_drop(_conv(self.proj, (weights_BNDD @ v_BNDL).reshape(x.shape)))

    def fold_norm_before(self, norm: nn.Module) -> nn.Module:
        """Fold as `EMHSA.fold_norm_before`; here queries and keys are computed from pooled cells."""
        self.norm = fold_norm_before(self.norm, self.qk)
        return fold_norm_before(norm, self.qk, self.v)


MIXERS: dict[str, type[EMHSA | XCA]] = {"emhsa": EMHSA, "emhsa2d": EMHSA2d, "xca": XCA}


def with_linear_attention(state: Mapping[str, Tensor], mixer: type[TokenMixer] = EMHSA) -> dict[str, Tensor]:
    """Return a state dict in which the layers of E-MHSA are linear and divided as in `mixer`.

    That is q, k, v and proj (C, C); in `XCA` qk (2 C, C), v and proj.
    """
    linear: dict[str, Tensor] = {}
    for key, value in state.items():
        head, _, name = key.rpartition(".e_mhsa.")
        layer, _, kind = name.rpartition(".")
        if not head or layer not in ("q", "k", "v", "qk", "qkv", "proj"):
            linear[key] = value
            continue
        parts = (layer,) if layer == "proj" else tuple(layer)
        matrix = value.flatten(1) if value.ndim == 4 else value  # a 1x1 convolution is (C', C, 1, 1)
        for part, chunk in zip(parts, matrix.chunk(len(parts)) if len(parts) > 1 else (matrix,)):
            linear[f"{head}.e_mhsa.{part}.{kind}"] = chunk
    for prefix in {key.removesuffix("q.weight") for key in linear if key.endswith(".e_mhsa.q.weight")}:
        mixer.upgrade_state(linear, prefix)
    return linear
