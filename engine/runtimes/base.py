"""What the evaluator and the predictor ask of anything that runs a detector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch


@runtime_checkable
class Runtime(Protocol):
    """A detector that can be called, whatever runs it.

    Attributes:
        names: class names by number.
        stride: sides of the input must be multiples of it, unless `imgsz` is fixed.
        imgsz: (height, width) of the input where it cannot vary, else None.
        fixed_batch: batch size that the exported file was made for, else None. Smaller batches are padded by the
        runtime
            itself; larger ones are not taken.
        device: where the answers are.
    """

    @property
    def names(self) -> Mapping[int, str]: ...
    @property
    def stride(self) -> int: ...
    @property
    def imgsz(self) -> tuple[int, int] | None: ...
    @property
    def fixed_batch(self) -> int | None: ...
    @property
    def device(self) -> torch.device: ...

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Detect.

        Args:
            images: (B, 3, H, W) RGB, uint8 or floating point in [0, 1], on any device.

        Returns:
            (B, N, 5 + nc) float32: center x, center y, width, height in pixels of the input, objectness, class scores.
        """
        ...

    def warmup(self, shape: tuple[int, int, int, int]) -> None:
        """Make the first real call as quick as the later ones, for inputs of `shape` (B, 3, H, W)."""
        ...


@runtime_checkable
class RawRuntime(Runtime, Protocol):
    """A runtime that can also show what the head gave before decoding, for the validation loss."""

    def with_raw(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """As calling it; besides the decoded rows the raw levels (B, A, Y, X, 5 + nc)."""
        ...
