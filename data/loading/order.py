"""The order of the images of an epoch, its windows and its shards: pure functions.

No process keeps state between samples, so the same epoch has the same batches with any number of workers, and after a
resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from utils.seed import sample_rng

Index = NDArray[np.int64]

WINDOW = 64
"""Positions of an epoch's order whose images may share a mosaic: a block of that many is decoded once and reused."""

_ORDER_STREAM, _WEIGHTED_STREAM = 2**32 - 1, 2**32 - 2  # sample numbers no dataset reaches: streams of their own


@dataclass(frozen=True)
class SampleKey:
    """What a worker receives for one sample.

    Attributes:
        epoch: epoch number.
        index: image number.
        repeat: how often the image came before in this epoch (only a weighted draw repeats images).
        window: images that may join it in a mosaic; None: the window of the unweighted order.
    """

    epoch: int
    index: int
    repeat: int = 0
    window: Index | None = field(default=None, compare=False)


Key = int | tuple[int, int] | SampleKey


def as_key(key: Key) -> SampleKey:
    """Return the key of `index` (epoch 0) or of `(epoch, index)`."""
    if isinstance(key, SampleKey):
        return key
    epoch, index = key if isinstance(key, tuple) else (0, key)
    return SampleKey(int(epoch), int(index))


def epoch_order(n: int, seed: int, epoch: int) -> Index:
    """Return the shuffled order of `n` images in one epoch, a function of (n, seed, epoch)."""
    return sample_rng(seed, epoch, _ORDER_STREAM).permutation(n)


def weighted_order(weights: Sequence[float] | NDArray[np.floating], seed: int, epoch: int) -> Index:
    """Draw as many images as there are weights, with replacement, in proportion to them.

    Args:
        weights: (n,) non-negative; when all are 0 every image is equally likely.

    Returns:
        (n,) int64 image numbers, a function of (weights, seed, epoch).
    """
    w = np.asarray(weights, np.float64)
    if w.ndim != 1 or not np.isfinite(w).all() or (w < 0).any():
        raise ValueError("image weights are one finite, non-negative number per image")
    total = w.sum()
    return sample_rng(seed, epoch, _WEIGHTED_STREAM).choice(len(w), size=len(w), p=w / total if total > 0 else None)


def window_at(order: Index, position: int, size: int = WINDOW) -> Index:
    """Return the block of `size` entries of `order` that holds `position`; the last block starts earlier to be as long.

    Blocks, not sliding windows: a worker that makes all samples of a block decodes each of its images once.
    """
    if len(order) <= size:
        return order
    start = min(position // size * size, len(order) - size)
    return order[start : start + size]


def weighted_keys(order: Index, epoch: int, size: int = WINDOW) -> list[SampleKey]:
    """Return the keys for a weighted order: repeated images are numbered, and each key carries its mosaic window."""
    seen: dict[int, int] = {}
    keys = []
    window = order
    for position, index in enumerate(order.tolist()):
        if position % size == 0:
            window = window_at(order, position, size)
        keys.append(SampleKey(epoch, index, seen.get(index, 0), window))
        seen[index] = seen.get(index, 0) + 1
    return keys


def shard(n: int, rank: int, world_size: int, repeat: bool = True) -> Index:
    """Return the places of an order of length `n` that belong to `rank`: every `world_size`-th one.

    Args:
        rank: 0 .. world_size - 1, or -1 for a single process.
        repeat: first repeat the order from its start until it divides evenly, as
            `torch.utils.data.DistributedSampler` does, so that all ranks take equally many steps. Without it each place
            belongs to one rank, and some ranks may have one place less, or none at all.
    """
    if rank < 0 or world_size <= 1 or n == 0:
        return np.arange(n)
    if not repeat:
        return np.arange(rank, n, world_size)
    per_rank = -(-n // world_size)
    return (rank + np.arange(per_rank) * world_size) % n
