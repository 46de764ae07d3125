"""Splitting a dataset into train, val and test: stratified by class, seeded, near-duplicates kept together.

Iterative stratification (Sechidis, Tsoumakas, Vlahavas 2011, https://doi.org/10.1007/978-3-642-23808-6_10), with groups
of near-duplicates instead of single images: the class with the fewest images left is distributed first, each of its
groups to the split that lacks most of that class.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data.formats.yolo import ImageRecord
from utils.errors import ConfigError, DataError

NAMES = ("train", "val", "test")


def check_fractions(fractions: Sequence[float], seed: int) -> None:
    """Raise ConfigError unless there are two or three positive numbers of sum 1 and a seed from 0."""
    if len(fractions) not in (2, 3) or not all(0 < part < 1 for part in fractions) or abs(sum(fractions) - 1) > 1e-6:
        given = " ".join(f"{part:g}" for part in fractions)
        raise ConfigError(f"--split {given}: two or three numbers (train, val, test) of sum 1 are needed: 0.8 0.1 0.1")
    if seed < 0:
        raise ConfigError(f"--seed {seed}: an integer from 0 is needed")


def split_records(
    records: Sequence[ImageRecord], fractions: Sequence[float], groups: NDArray[np.int64], num_classes: int, seed: int
) -> dict[str, tuple[ImageRecord, ...]]:
    """Distribute images over the splits.

    Args:
        records: all images.
        fractions: of train, val and, with three of them, test; their sum is 1.
        groups: (n,) group number of each image, from 0 without gaps; a group is never divided.
        num_classes: class numbers run from 0 to `num_classes - 1`.
        seed: the result is a function of it and the arguments.

    Returns:
        The images of each split, in their order.

    Raises:
        DataError: a split would be empty.
    """
    contents = np.zeros((int(groups.max(initial=-1)) + 1, num_classes + 1), np.int32)
    for record, group in zip(records, groups.tolist()):
        contents[group, np.unique(record.labels[:, 0]).astype(int)] += 1
        contents[group, -1] += 1
    split = stratify(contents, np.asarray(fractions, np.float64), np.random.default_rng(seed))[groups]
    names = NAMES[: len(fractions)]
    parts = {name: tuple(records[i] for i in np.flatnonzero(split == k).tolist()) for k, name in enumerate(names)}
    empty = [name for name, part in parts.items() if not part]
    if empty:
        raise DataError(
            f"--split: no image for {', '.join(empty)}: {len(records)} images are {len(contents)} groups of"
            " near-duplicates that stay together; give another --split, or --split-duplicates"
        )
    return parts


def stratify(
    contents: NDArray[np.int32], fractions: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Assign groups of images to splits so that each split gets its fraction of every column.

    Args:
        contents: (groups, classes + 1) images of each group that hold the class; last column: all images of the group.
        fractions: (splits,) of sum 1.
        rng: decides between equals.

    Returns:
        (groups,) number of the split.
    """
    lacking = fractions[:, None] * contents.sum(0)
    split = np.full(len(contents), -1)
    order = rng.permutation(len(contents))
    while (free := split < 0).any():
        left = contents[free, :-1].sum(0)
        column = int(np.where(left > 0, left, np.iinfo(np.int64).max).argmin()) if left.any() else -1
        members = order[free[order] & (contents[order, column] > 0)]
        for group in members[np.argsort(-contents[members, -1], kind="stable")]:
            k = np.lexsort((rng.random(len(fractions)), lacking[:, -1], lacking[:, column]))[-1]
            split[group] = k
            lacking[k] -= contents[group]
    return split
