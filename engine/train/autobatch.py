"""Batch size: choice by measured GPU memory (`--batch-size -1`), and networks that cannot train on a single image."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from models.build.dry_run import call_on_meta
from models.yolo import DetectionModel
from utils.errors import ConfigError

LOGGER = logging.getLogger(__name__)
CPU_BATCH = 16
FRACTION = 0.8
"""Fraction of the free memory to use: optimizer state, fragmentation and other image sizes need the rest."""
PROBED = (1, 2, 4, 8, 16)
ONE_VALUE = "more than 1 value per channel"
"""Part of the error of a BatchNorm that gets one value per channel in training."""
_GIB = 2**30


def choose_batch(
    model: DetectionModel, imgsz: int, device: torch.device, amp: torch.dtype | None, num_images: int
) -> int:
    """Return the batch size for training: 16 on a CPU; on CUDA by measuring forward and backward of small batches.

    Args:
        model: model on `device`.
        imgsz: largest height and width of the images in pixels.
        device: training device.
        amp: autocast dtype, None for float32.
        num_images: size of the training split. A larger batch would only raise the weight decay, which scales with it.

    Raises:
        ConfigError: not even one image fits.
    """
    if device.type != "cuda":
        return CPU_BATCH
    free, total = torch.cuda.mem_get_info(device)
    used: dict[int, int] = {}
    for batch in PROBED:
        try:
            used[batch] = _step_bytes(model, batch, imgsz, device, amp)
        except torch.OutOfMemoryError:
            break
        except ValueError as error:  # of one image
            if ONE_VALUE not in str(error):
                raise
        finally:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
    if not used:
        raise ConfigError(f"--batch-size -1: not even one image of {imgsz} pixels fits in {free / _GIB:.1f} GiB")
    chosen = min(largest_batch(list(used), list(used.values()), FRACTION * free), num_images)
    LOGGER.info("--batch-size -1: %d (%.1f of %.1f GiB are free)", chosen, free / _GIB, total / _GIB)
    return chosen


def largest_batch(batches: Sequence[int], used: Sequence[float], capacity: float) -> int:
    """Return the largest batch whose memory stays within `capacity`, by a linear fit to the measurements.

    Args:
        batches: ascending batch sizes.
        used: bytes measured for each of them.
        capacity: bytes.

    Returns:
        At least 1; where memory does not increase (too small to measure), the largest measured batch that fits.
    """
    if len(batches) == 1:
        return batches[0]
    slope, base = np.polyfit(np.asarray(batches, float), np.asarray(used, float), 1)
    if slope <= 0:
        return max([b for b, u in zip(batches, used) if u <= capacity], default=1)
    return max(int((capacity - base) / slope + 1e-6), 1)


def _step_bytes(model: DetectionModel, batch: int, imgsz: int, device: torch.device, amp: torch.dtype | None) -> int:
    """Return the peak of allocated memory over forward and backward; the model's state is restored."""
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


def needs_two_images(model: DetectionModel, shape: Sequence[int]) -> bool:
    """Return whether a BatchNorm in training mode would get one value per channel from a single image.

    The network runs on shapes alone (device `meta`): no statistics and no random state change. False where it cannot.

    Args:
        model: with its frozen modules in evaluation mode.
        shape: (height, width) of the image.
    """
    try:
        with torch.no_grad():
            call_on_meta(model, torch.empty(1, 3, *shape, device="meta"))
    except ValueError as error:
        if ONE_VALUE in str(error):
            return True
        LOGGER.debug("no dry run of the network: %s", error)
    except (RuntimeError, TypeError) as error:  # includes NotImplementedError: an operation without a meta kernel
        LOGGER.debug("no dry run of the network: %s", error)
    return False
