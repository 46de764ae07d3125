"""Interface between a training and the loss of a head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor, nn


class LossOutput(NamedTuple):
    """Result of one call.

    Attributes:
        total: 0-d float32, to call `backward` on: sum of the parts times the number of images.
        parts: (3,) float32, detached: the parts that `LossModule.names` names, with their gains.
    """

    total: Tensor
    parts: Tensor


@dataclass(frozen=True)
class LossOptions:
    """Settings of a training that a loss depends on.

    Attributes:
        imgsz: side of the training images in pixels.
        label_smoothing: epsilon of the class targets.
        class_weights: factor on the class loss of each class; None = 1 for all.
        mean: mean of a 0-d tensor over the processes of the training; None for a single process.
        processes: their number.
    """

    imgsz: int
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    mean: Callable[[Tensor], Tensor] | None = None
    processes: int = 1


class LossModule(nn.Module):
    """Loss of a head. What it adapts during training is in its `state_dict()`.

    Attributes:
        names: of the parts, for columns and charts.
    """

    names: ClassVar[tuple[str, str, str]]

    @abstractmethod
    def forward(self, raw: Sequence[Tensor], targets: Tensor) -> LossOutput:
        """Compute the loss of raw head outputs; float32 inside, also under autocast.

        Args:
            raw: raw outputs (B, A, H_i, W_i, O) per level.
            targets: (T, 6) image, class, xywhn; T may be 0. They may stay on the CPU while `raw` is on a GPU.
        """
