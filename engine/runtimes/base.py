"""Interface between a detector in any runtime and the predictor and evaluator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch


@runtime_checkable
class Runtime(Protocol):
    """A callable detector.

    Attributes:
        names: class names by number.
        stride: sides of the input must be multiples of it, unless `imgsz` is fixed.
        imgsz: (height, width) of the input where it is fixed, else None.
        fixed_batch: batch size of the exported file where it is fixed, else None; the runtime pads smaller batches
            and refuses larger ones.
        device: device of the output.
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
            (B, N, 5 + nc) float32: cxcywh in pixels of the input, objectness, class scores.
        """
        ...

    def warmup(self, shape: tuple[int, int, int, int]) -> None:
        """Run once on inputs of `shape` (B, 3, H, W), so that the first real call is as fast as the later ones."""
        ...


@runtime_checkable
class RawRuntime(Runtime, Protocol):
    """A runtime that can also return the output of the head before decoding, for the validation loss."""

    def with_raw(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the decoded rows, as a call does, and the raw levels (B, A, Y, X, 5 + nc)."""
        ...
