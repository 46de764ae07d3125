"""Cross-covariance attention with one layer for queries and keys, and weights with two."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones.nextvit_attention import XCA, AttentionOptions
from models.checkpoint.state_dict import entries_merged, upgraded


class Separate(nn.Module):
    """XCA of pooled cells with a layer each for queries and keys: what older checkpoints hold."""

    def __init__(self, channels: int, reduction: int, bias: bool) -> None:
        super().__init__()
        self.reduction = reduction
        self.q, self.k, self.v = (nn.Linear(channels, channels, bias=bias) for _ in range(3))
        self.proj = nn.Linear(channels, channels)
        self.norm = nn.BatchNorm1d(channels)
        self.temperature = nn.Parameter(1 + torch.rand(channels // 32, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        tokens, pooled = (y.flatten(2).transpose(1, 2) for y in (x, F.avg_pool2d(x, self.reduction)))
        pooled = self.norm(pooled.transpose(1, 2)).transpose(1, 2)
        pairs = ((self.q, pooled), (self.k, pooled), (self.v, tokens))
        q, k, v = (layer(y).unflatten(2, (-1, 32)).permute(0, 2, 3, 1) for layer, y in pairs)  # (B, N, D, M or L)
        q, k = q / q.norm(dim=3, keepdim=True), k / k.norm(dim=3, keepdim=True)
        y = (q @ k.transpose(2, 3) * self.temperature).softmax(3) @ v
        return self.proj(y.flatten(1, 2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


def pair(bias: bool = True, seed: int = 0) -> tuple[XCA, Separate]:
    torch.manual_seed(seed)
    fused = XCA(64, 2, AttentionOptions(qkv_bias=bias))
    return fused.double().eval(), Separate(64, 2, bias).double().eval()


@pytest.mark.parametrize("bias", [True, False])
def test_weights_with_separate_queries_and_keys_load_exactly(bias: bool) -> None:
    fused, separate = pair(bias)
    fused.load_state_dict(separate.state_dict())
    assert torch.equal(fused.qk.weight, torch.cat((separate.q.weight, separate.k.weight)))
    x = torch.randn(2, 64, 8, 6, dtype=torch.float64)
    torch.testing.assert_close(fused(x), separate(x), rtol=0, atol=1e-13)


def test_gradients_are_those_of_separate_queries_and_keys() -> None:
    fused, separate = pair()
    fused.load_state_dict(separate.state_dict())
    x = torch.randn(2, 64, 8, 6, dtype=torch.float64)
    for module in (fused, separate):
        module(x).square().mean().backward()
    for kind in ("weight", "bias"):
        parts = [separate.get_parameter(f"{name}.{kind}").grad for name in "qk"]
        expected = torch.cat([part for part in parts if part is not None])
        torch.testing.assert_close(fused.get_parameter(f"qk.{kind}").grad, expected, rtol=0, atol=1e-13)


def test_upgrade_leaves_the_given_state_and_one_of_today_as_they_are() -> None:
    fused, separate = pair()
    old = {f"0.{key}": value for key, value in separate.state_dict().items()}
    new = upgraded(nn.Sequential(fused), old)
    assert new.keys() == nn.Sequential(fused).state_dict().keys() and "0.q.weight" in old
    again = upgraded(nn.Sequential(fused), new)
    assert again.keys() == new.keys() and all(again[key] is new[key] for key in new)


def test_entries_merged() -> None:
    fused, separate = pair()
    counts = entries_merged(fused, separate.state_dict())
    assert {key for key, count in counts.items() if count == 2} == {"qk.weight", "qk.bias"}
    assert sum(counts.values()) == len(separate.state_dict())
    assert set(entries_merged(fused, fused.state_dict()).values()) == {1}


@pytest.mark.parametrize("lacking", ["q.weight", "k.weight"])
def test_queries_without_keys_are_reported(lacking: str) -> None:
    fused, separate = pair()
    state = separate.state_dict()
    del state[lacking]
    rest = ({"q.weight", "k.weight"} - {lacking}).pop()
    with pytest.raises(RuntimeError, match=r"(?s)Missing key\(s\).*\"qk.weight\".*Unexpected key.*\"" + rest):
        fused.load_state_dict(state)


def test_queries_and_keys_of_different_shapes_are_reported() -> None:
    fused, separate = pair()
    state = {**separate.state_dict(), "k.weight": torch.zeros(32, 64)}
    with pytest.raises(RuntimeError, match=r"(?s)\"qk.weight\".*\"q.weight\", \"k.weight\""):
        fused.load_state_dict(state)


def test_both_layouts_at_once_are_reported() -> None:
    fused, separate = pair()
    state = {**fused.state_dict(), "q.weight": separate.q.weight, "k.weight": separate.k.weight}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*\"q.weight\", \"k.weight\""):
        fused.load_state_dict(state)
