"""Grid points of the levels of a head, and boxes from distances to them.

Shape legend: B images, A predictions per cell, H and W height and width of a level in cells, O = values per
prediction, R = bins per distance.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cell_offsets(level: Tensor) -> Tensor:
    """Return the x and y index of every cell of a level (B, A, H, W, O), less one half: (H, W, 2) of its dtype.

    They are counted with `cumsum`, since `arange` would store the device in traced graphs.
    """
    y = torch.ones_like(level[0, 0, :, 0, 0]).cumsum(0) - 1.5
    x = torch.ones_like(level[0, 0, 0, :, 0]).cumsum(0) - 1.5
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((grid_x, grid_y), 2)


def cell_centers(level: Tensor, stride: int) -> Tensor:
    """Return the centers of all cells of a level (B, A, H, W, O) in input pixels, (H * W, 2) of its dtype."""
    return ((cell_offsets(level) + 1) * stride).flatten(0, 1)


def distances(logits: Tensor, bins: Tensor) -> Tensor:
    """Return the distances to left, top, right and bottom in cells, (..., 4), all of them >= 0.

    The expectation over R bins, `sum_k k softmax(z)_k` (GFL, https://arxiv.org/abs/2006.04388, equation 3);
    with one bin `softplus(z)`.

    Args:
        logits: (..., 4 * R), of a floating-point dtype.
        bins: (R,) 0, 1, ..., R - 1.
    """
    if len(bins) == 1:
        return F.softplus(logits)
    probabilities = logits.unflatten(-1, (4, len(bins))).softmax(-1)
    # By a matrix: OpenVINO fuses a product with a vector and the scaling that follows into an invalid graph.
    return (probabilities @ bins.to(logits.dtype)[:, None]).squeeze(-1)


def boxes_around(points: Tensor, ltrb: Tensor) -> Tensor:
    """Return xyxy boxes (..., 4) from points (..., 2) and distances to the four sides (..., 4), in pixels."""
    return torch.cat((points - ltrb[..., :2], points + ltrb[..., 2:]), -1)
