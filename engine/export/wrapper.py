"""Modules that are traced: a re-parameterized detector with one input and one output."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.fuse import reparameterize
from models.yolo import DetectionModel

# Input sides of a traced dynamic graph, in grid cells, and its batch: small, unequal, and neither 1 nor a multiple of a
# common partition, so that the tracer does not treat a size as a constant.
TRACE_CELLS = (3, 5)
TRACE_BATCH = 2


class ExportGraph(nn.Module):
    """A detector with one tensor in and one out.

    Args:
        model: re-parameterized, in evaluation mode; shared, not copied.
        dtype: dtype of the layers.
        layout: `v5` or `v8`, see `forward`.
    """

    def __init__(self, model: DetectionModel, dtype: torch.dtype = torch.float32, layout: str = "v5") -> None:
        super().__init__()
        self.model, self.dtype, self.layout = model, dtype, layout

    def forward(self, images: Tensor) -> Tensor:
        """Detect.

        Args:
            images: (B, 3, H, W) float32 in [0, 1], RGB; H and W multiples of the grid.

        Returns:
            Layout v5: (B, N, 5 + nc) cxcywh in input pixels, objectness, class scores. Layout v8: (B, 4 + nc, N)
            cxcywh, class confidences (objectness * class score). float32 even where the layers are float16, which has
            a resolution of one pixel above 1024.
        """
        decoded, _ = self.model(images.to(self.dtype))
        rows = decoded.float()
        if self.layout == "v5":
            return rows
        return torch.cat((rows[..., :4], rows[..., 4:5] * rows[..., 5:]), 2).transpose(1, 2)


class TupleGraph(nn.Module):
    """`ExportGraph` with a tuple of one tensor as output, as readers of YOLOv5's TorchScript files expect."""

    def __init__(self, graph: ExportGraph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """See `ExportGraph.forward`."""
        return (self.graph(images),)


def reparameterized_copy(model: DetectionModel) -> DetectionModel:
    """Return a copy with re-parameterized backbone and folded batch norms; `model` is unchanged."""
    copy = deepcopy(model).eval()
    reparameterize(copy)
    copy.fuse()
    return copy.requires_grad_(False)


@dataclass(frozen=True)
class GraphShape:
    """Input of an exported graph.

    Attributes:
        batch, height, width: shape of the input; only an example if `dynamic`.
        dynamic: batch, height and width are free (sides in multiples of `grid`).
        grid: pixels of which the sides are multiples.
    """

    batch: int
    height: int
    width: int
    dynamic: bool
    grid: int

    @property
    def example(self) -> tuple[int, int, int, int]:
        """(B, 3, H, W) of the tensor to trace with."""
        if self.dynamic:
            return TRACE_BATCH, 3, TRACE_CELLS[0] * self.grid, TRACE_CELLS[1] * self.grid
        return self.batch, 3, self.height, self.width
