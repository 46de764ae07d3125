"""The largest batch that fits a GPU, from measured memory (`--batch-size -1`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from models.yolo import DetectionModel
from utils.errors import ConfigError

LOGGER = logging.getLogger(__name__)
CPU_BATCH = 16
FRACTION = 0.8
"""Part of the free memory to use: the optimiser's state, fragmentation and other sizes need the rest."""
PROBED = (1, 2, 4, 8, 16)


def choose_batch(model: DetectionModel, imgsz: int, device: torch.device, amp: torch.dtype | None, images: int) -> int:
    """Batch size for training: 16 on a CPU; on CUDA by measuring forward and backward of a few small batches.

    Args:
        model: on the device.
        imgsz: side of the pictures.
        device: where.
        amp: type of autocast, None for float32.
        pictures: that there are to train on. A larger batch would only raise the weight decay, which goes by its size.

    Raises:
        ConfigError: not even one picture fits.
    """
    if device.type != "cuda":
        return CPU_BATCH
    free, total = torch.cuda.mem_get_info(device)
    used: list[int] = []
    for batch in PROBED:
        try:
            used.append(_bytes_of_a_step(model, batch, imgsz, device, amp))
        except torch.OutOfMemoryError:
            break
        finally:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
    if not used:
        raise ConfigError(f"--batch-size -1: not one picture of {imgsz} pixels fits in {free / 2**30:.1f} GiB")
    chosen = min(largest_batch(PROBED[: len(used)], used, FRACTION * free), images)
    gib = 2**30
    LOGGER.info("--batch-size -1: %d (%.1f of %.1f GiB are free)", chosen, free / gib, total / gib)
    return chosen


def largest_batch(batches: Sequence[int], used: Sequence[float], capacity: float) -> int:
    """The largest batch whose memory stays within `capacity`, by a straight line through what was measured.

    Args:
        batches: rising sizes.
        used: bytes that each of them took.
        capacity: bytes.

    Returns:
        At least 1; where the measurements do not rise (too small to see), the largest measured batch that fits.
    """
    if len(batches) == 1:
        return batches[0]
    slope, base = np.polyfit(np.asarray(batches, float), np.asarray(used, float), 1)
    if slope <= 0:
        return max([b for b, u in zip(batches, used) if u <= capacity], default=1)
    return max(int((capacity - base) / slope + 1e-6), 1)


def _bytes_of_a_step(
    model: DetectionModel, batch: int, imgsz: int, device: torch.device, amp: torch.dtype | None
) -> int:
    """Peak of the allocator over forward and backward, without a trace in the model: its statistics come back."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    training = model.training
    torch.cuda.reset_peak_memory_stats(device)
    try:
        images = torch.zeros(batch, 3, imgsz, imgsz, device=device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, amp, enabled=amp is not None):
            raw = model.train()(images)
        torch.stack([level.float().square().mean() for level in raw]).sum().backward()
        return torch.cuda.max_memory_allocated(device)
    finally:
        model.load_state_dict(state)
        model.train(training)
