"""Copies of the next batch to the device while the current one is processed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from utils.structures import Batch


def prefetch(batches: Iterable[Batch], device: torch.device) -> Iterator[tuple[Batch, Tensor]]:
    """Yield batches with their images on `device`; on CUDA the next copy runs concurrently on its own stream.

    Targets are not copied: the loss assigns them on the CPU and copies the result without a synchronization.

    Args:
        batches: with images (B, 3, H, W) uint8, in pinned memory for asynchronous copies.
        device: device of the model.

    Yields:
        The batch, and its images (B, 3, H, W) uint8 on the device.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch, batch.images.to(device)
        return
    stream = torch.cuda.Stream(device)
    pending: tuple[Batch, Tensor, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            images = batch.images.to(device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(stream)
        if pending is not None:
            yield _wait(*pending)
        pending = batch, images, copied
    if pending is not None:
        yield _wait(*pending)


def _wait(batch: Batch, images: Tensor, copied: torch.cuda.Event) -> tuple[Batch, Tensor]:
    current = torch.cuda.current_stream(images.device)
    current.wait_event(copied)
    images.record_stream(current)  # allocated on the other stream: its memory must not be reused before it is read here
    return batch, images
