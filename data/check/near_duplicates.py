"""Near-duplicate images in different splits: a detector is then tested on images it was trained on.

An image becomes a thumbnail of 32 x 32 gray values, and 128 bits that say where brightness increases to the right and
downwards (difference hash). Pairs with few differing bits are compared by the correlation of their thumbnails, as they
are and mirrored left-right, since exported sets often hold augmented copies.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data.images import read
from data.labels.labels import ImageRecord
from utils.errors import DataError

SIDE = 32  # of a thumbnail
BITS = 128
MOST_BITS = 24  # of 128 that may differ
LEAST_CORRELATION = 0.9  # inspected on aquarium: at 0.90 to 0.92 the same scene moments apart, below 0.9 also others
_FLAT = 2.0  # a thumbnail with a smaller deviation (gray values) has no pattern to compare
_TRIED = 5  # nearest images by bits whose thumbnails are compared
_CHUNK = 256  # images compared at a time with all of another split

Thumbnails = NDArray[np.uint8]


@dataclass(frozen=True)
class Pair:
    """Two near-duplicate images.

    Attributes:
        splits: split of the first and of the second one.
        first, second: the files.
        bits: hash bits that differ, of 128.
        correlation: of the thumbnails, at most 1.
        mirrored: whether the second one has to be mirrored.
    """

    splits: tuple[str, str]
    first: Path
    second: Path
    bits: int
    correlation: float
    mirrored: bool

    def __str__(self) -> str:
        how = ", mirrored" if self.mirrored else ""
        return f"{self.first} ({self.splits[0]}) and {self.second} ({self.splits[1]}): {self.correlation:.3f}{how}"


def thumbnails(records: Sequence[ImageRecord], progress: bool = True, name: str = "images") -> Thumbnails:
    """Return small gray versions of images.

    Returns:
        (n, 32, 32) uint8.

    Raises:
        DataError: an image cannot be read.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        made: Iterable[Thumbnails] = pool.map(_thumbnail, records)
        bar = tqdm(made, total=len(records), desc=f"comparing {name}", unit="image", leave=False, disable=not progress)
        return np.array(list(bar), np.uint8).reshape(-1, SIDE, SIDE)


def hash_bits(thumbs: Thumbnails) -> NDArray[np.bool_]:
    """Return the difference hash of thumbnails: (n, 128), brighter to the right (64), brighter below (64)."""
    gray = [np.asarray(t, np.float32) for t in thumbs]
    wide = np.array([cv2.resize(t, (9, 8), interpolation=cv2.INTER_AREA) for t in gray]).reshape(-1, 8, 9)
    tall = np.array([cv2.resize(t, (8, 9), interpolation=cv2.INTER_AREA) for t in gray]).reshape(-1, 9, 8)
    right, below = wide[:, :, 1:] > wide[:, :, :-1], tall[:, 1:] > tall[:, :-1]
    return np.concatenate((right.reshape(-1, 64), below.reshape(-1, 64)), 1)


def find_pairs(splits: Mapping[str, Sequence[ImageRecord]], thumbs: Mapping[str, Thumbnails]) -> list[Pair]:
    """Return images with a near-duplicate in an earlier split, each with its nearest one, the most similar first.

    One pair per image and earlier split: with a fixed camera nearly all images are alike.

    Args:
        splits: images by split.
        thumbs: their thumbnails.
    """
    found: dict[tuple[str, str, int], Pair] = {}
    for one, two in combinations(splits, 2):
        for i, j, distance, correlation, mirrored in _similar(thumbs[one], thumbs[two]):
            first, second = splits[one][i].path, splits[two][j].path
            known = found.get((one, two, j))
            if first != second and (known is None or correlation > known.correlation):
                found[one, two, j] = Pair((one, two), first, second, distance, correlation, mirrored)
    return sorted(found.values(), key=lambda pair: (-pair.correlation, str(pair.first), str(pair.second)))


def group_near_duplicates(thumbs: Thumbnails) -> NDArray[np.int64]:
    """Return group numbers: near-duplicates, directly or through others, are one group.

    Args:
        thumbs: (n, 32, 32) of all images.

    Returns:
        (n,) group numbers from 0.
    """
    parent = list(range(len(thumbs)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for i, j, *_ in _similar(thumbs, thumbs):
        parent[root(i)] = root(j)
    return np.unique([root(i) for i in range(len(thumbs))], return_inverse=True)[1]


def _similar(first: Thumbnails, second: Thumbnails) -> Iterator[tuple[int, int, int, float, bool]]:
    """Yield near-duplicates as (i, j, bits that differ, correlation, whether the second one is mirrored)."""
    hashes = hash_bits(first)
    for mirrored in (False, True):
        others = second[:, :, ::-1] if mirrored else second
        for i, j, distance in _near(hashes, hash_bits(others)):
            correlation = _correlation(first[i], others[j])
            if correlation >= LEAST_CORRELATION:
                yield i, j, distance, correlation, mirrored


def _near(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> list[tuple[int, int, int]]:
    """Return (i, j, bits that differ): for each of the second images the few nearest of the first ones, if any."""
    found = []
    a = np.where(first, np.float32(1), np.float32(-1))
    tried = min(_TRIED, len(first))
    for start in range(0, len(second) if tried else 0, _CHUNK):
        b = np.where(second[start : start + _CHUNK], np.float32(1), np.float32(-1))
        distance = (BITS - b @ a.T) / 2  # signs agree in BITS - d places and differ in d: their product is BITS - 2 d
        nearest = np.argpartition(distance, tried - 1, axis=1)[:, :tried]
        values = np.take_along_axis(distance, nearest, 1)
        rows, columns = np.nonzero(values <= MOST_BITS)
        chosen = nearest[rows, columns].tolist(), (rows + start).tolist(), values[rows, columns].astype(int).tolist()
        found += list(zip(*chosen))
    return found


def _correlation(first: Thumbnails, second: Thumbnails) -> float:
    a, b = (np.asarray(t, np.float64).reshape(-1) for t in (first, second))
    if a.std() < _FLAT or b.std() < _FLAT:
        return 1.0 if np.abs(a - b).max() < 2 * _FLAT else 0.0
    return float(((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std()))


def _thumbnail(record: ImageRecord) -> Thumbnails:
    shortest = min(record.height, record.width)
    reduced = next((k for k in (8, 4, 2) if shortest >= 2 * SIDE * k), 1)
    flags = {8: cv2.IMREAD_REDUCED_GRAYSCALE_8, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4, 2: cv2.IMREAD_REDUCED_GRAYSCALE_2}
    gray = None
    if reduced > 1:  # a JPEG is then decoded at that size: several times faster
        try:
            gray = cv2.imdecode(np.fromfile(record.path, np.uint8), flags[reduced])
        except (OSError, cv2.error) as error:
            raise DataError(f"{record.path}: cannot be read: {error}") from error
    if gray is None:
        gray = cv2.cvtColor(read(record.path), cv2.COLOR_BGR2GRAY)
    return np.asarray(cv2.resize(gray, (SIDE, SIDE), interpolation=cv2.INTER_AREA), np.uint8)
