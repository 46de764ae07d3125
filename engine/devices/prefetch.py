"""Pictures on their way to the device while it still works on the batch before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from utils.structures import Batch


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[tuple[Batch, Tensor]]:
    """Batches with their pictures on `device`; on CUDA the next copy runs on a stream of its own meanwhile.

    Targets stay where they are: the loss assigns them on the CPU and copies the result without waiting for the device.

    Args:
        batches: with pictures (B, 3, H, W) uint8, pinned where the copy is not to block.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch, batch.images.to(device)
        return
    copies = torch.cuda.Stream(device)
    waiting: tuple[Batch, Tensor, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(copies):
            images = batch.images.to(device, non_blocking=True)
            done = torch.cuda.Event()
            done.record(copies)
        if waiting is not None:
            yield _arrived(*waiting)
        waiting = batch, images, done
    if waiting is not None:
        yield _arrived(*waiting)


def _arrived(batch: Batch, images: Tensor, done: torch.cuda.Event) -> tuple[Batch, Tensor]:
    current = torch.cuda.current_stream(images.device)
    current.wait_event(done)
    images.record_stream(current)  # made on the other stream: its memory is not to be given away before it is read here
    return batch, images
