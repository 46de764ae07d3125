"""EigenCAM: heat maps of the features that a detector's head reads.

Muhammad and Yeasin, "Eigen-CAM: Class Activation Map using Principal Components", 2020, https://arxiv.org/abs/2008.00299
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from models.summary import level_name
from models.yolo import DetectionModel

ROUNDING = 1e-5  # deviation relative to the largest activation below which a map is constant


def eigen_cam(features: Tensor) -> Tensor:
    """Return the projection of each cell's activations on their first principal component over the cells.

    The component is that of the mean-centered activations, by the eigenvectors of their covariance, so that equal maps
    give equal results. Its sign is the one with larger projections where the mean absolute activation is larger;
    negative projections become 0, as in the paper's figures.

    Args:
        features: (B, C, H, W) of any floating type; values that are not finite count as 0.

    Returns:
        (B, H, W) float32 in [0, 1], on the device of the features; 0 for a map that is constant over its cells.
    """
    cells = features.detach().float().nan_to_num(posinf=0.0, neginf=0.0).flatten(2).mT  # B, H * W, C
    largest = cells.abs().amax((1, 2), keepdim=True)
    cells = cells / torch.where(largest > 0, largest, 1.0)  # squares stay in the range of float32
    centered = cells - cells.mean(1, keepdim=True)
    variances, components = torch.linalg.eigh(centered.mT @ centered / cells.shape[1])  # ascending
    projection = (centered @ components[:, :, -1:])[..., 0]
    agreement = (projection * cells.abs().mean(2)).sum(1, keepdim=True)
    heat = torch.where(agreement < 0, -projection, projection).clamp(min=0)
    heat = heat / heat.amax(1, keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny)
    heat = torch.where(variances[:, -1:] > ROUNDING**2, heat, 0.0)
    return heat.view(features.shape[0], *features.shape[2:])


@torch.no_grad()
def heat_maps(model: DetectionModel, images: Tensor) -> dict[str, Tensor]:
    """Run a detector and return the EigenCAM of each level that its head reads.

    Args:
        model: in evaluation mode.
        images: (B, 3, H, W) in [0, 1] RGB, on the device and in the precision of the model.

    Returns:
        (B, H, W) float32 in [0, 1] on the CPU by level name (`P3`), interpolated to the pixels of the images.
    """
    levels: list[Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda _head, inputs: levels.extend(inputs[0]))
    try:
        model(images)
    finally:
        handle.remove()
    height, width = images.shape[2:]
    maps: dict[str, Tensor] = {}
    for stride, features in zip(model.head.strides, levels, strict=True):
        heat = F.interpolate(eigen_cam(features)[:, None], scale_factor=stride, mode="bilinear")
        maps[level_name(stride)] = heat[:, 0, :height, :width].cpu()  # a backbone may have padded the images
    return maps
