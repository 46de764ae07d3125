"""Random generators: one global seed for the network, one generator per (seed, epoch, sample) for the data."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the generator of sample `index` in `epoch`: equal for equal (seed, epoch, index) in every process."""
    return np.random.default_rng(np.random.SeedSequence((seed, epoch, index)))
