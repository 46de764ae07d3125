"""Models of few rows."""

from __future__ import annotations

from typing import Any

from models.build.builder import build_layers
from models.build.rows import Rows
from models.build.spec import load_model_spec

ANCHORS = [[10, 13, 16, 30], [30, 61, 62, 45]]


SIDE = 32


def spec_dict(backbone: list[Any], head: list[Any], anchors: Any = ANCHORS, **keys: Any) -> dict[str, Any]:
    return {"nc": 3, "anchors": anchors, "backbone": backbone, "head": head, **keys}


def build(backbone: list[Any], head: list[Any], anchors: Any = ANCHORS, **keys: Any) -> tuple[Rows, list[int]]:
    return build_layers(load_model_spec(spec_dict(backbone, head, anchors, **keys)))


def one_row(module: str, args: Any, channels: int = 16, repeats: int = 1, **keys: Any) -> Rows:
    """Image with a number of channels -> the row -> a head."""
    rows, _ = build([[-1, repeats, module, args]], [[[-1], 1, "Detect", ["nc", "anchors"]]], 2, ch=channels, **keys)
    return rows
