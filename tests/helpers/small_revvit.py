"""A small RevViT with random parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.backbones.revvit import RevViT

TINY = {"embed_dims": 32, "num_layers": 4, "num_heads": 4, "feedforward_channels": 64}


DROPS = {"drop_rate": 0.2, "attn_drop_rate": 0.2, "drop_path_rate": 0.4}


def build(seed: int = 0, **options: Any) -> RevViT:
    """A small RevViT whose parameters are all far from their initial zeros and ones."""
    torch.manual_seed(seed)
    model = RevViT(options.pop("arch", TINY), img_size=64, widths=8, **options)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn_like(value)
            value.copy_(noise / value[0].numel() ** 0.5 if value.ndim > 1 else 0.3 * noise + name.endswith("weight"))
    return model.train()


def image(seed: int = 1, shape: tuple[int, ...] = (2, 3, 64, 96)) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))
