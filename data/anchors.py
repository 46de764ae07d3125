"""Anchors: check their fit to a dataset's boxes, and find better ones.

A box and an anchor fit by the smaller one of their side ratios, each taken below 1:
r = min(w / aw, aw / w, h / ah, ah / h). The target assignment of the loss matches them when r > 1 / anchor_t.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import trange

from data.labels.labels import ImageRecord

LOGGER = logging.getLogger(__name__)

RECALL_NEEDED = 0.98
"""Best possible recall up to which new anchors are looked for."""

MIN_BOX = 2.0  # pixels; shorter sides are left out of the search, and no anchor side is shorter
_MUTATION_RATE, _MUTATION_SIZE = 0.9, 0.1

Sizes = NDArray[np.float64]


@dataclass(frozen=True)
class AnchorFit:
    """How anchors fit boxes.

    Attributes:
        best_possible_recall: fraction of the boxes that some anchor matches.
        anchors_past_thr: mean number of anchors that match a box.
        fitness: mean of each box's best r, counted as 0 below the threshold.
        mean_best: mean of each box's best r.
        mean_all: mean r over all pairs.
    """

    best_possible_recall: float
    anchors_past_thr: float
    fitness: float
    mean_best: float
    mean_all: float

    @property
    def is_poor(self) -> bool:
        """Whether new anchors should be looked for."""
        return self.best_possible_recall <= RECALL_NEEDED

    def __str__(self) -> str:
        return f"{self.anchors_past_thr:.2f} anchors per box, best possible recall {self.best_possible_recall:.4f}"


@dataclass(frozen=True)
class AnchorReport:
    """Outcome of an anchor check.

    Attributes:
        anchors: (levels, anchors per level, 2) widths and heights in pixels to train with, ordered as those given.
        before: fit of the given anchors.
        after: fit of `anchors`; equal to `before` when nothing was gained.
    """

    anchors: Sizes
    before: AnchorFit
    after: AnchorFit

    @property
    def changed(self) -> bool:
        """Whether `anchors` are new."""
        return self.after is not self.before

    def __str__(self) -> str:
        if not self.before.is_poor:
            return f"anchors: {self.before}; a good fit"
        if not self.changed:
            return f"anchors: {self.before}; a poor fit, but none better was found, so they stay"
        return f"anchors: {self.before}; a poor fit; new ones: {self.after}"


def box_sizes(records: Sequence[ImageRecord], imgsz: int, rng: np.random.Generator | None = None) -> Sizes:
    """Return widths and heights of all boxes, in pixels of images whose longer side is `imgsz`.

    Args:
        rng: when given, each image is zoomed by a random factor in 0.9 .. 1.1, as augmentation would.

    Returns:
        (n, 2) float64.
    """
    sizes = [np.zeros((0, 2))]
    for record in records:
        zoom = imgsz / max(record.height, record.width) * (1.0 if rng is None else rng.uniform(0.9, 1.1))
        sizes.append(record.labels[:, 3:5].astype(np.float64) * (record.width * zoom, record.height * zoom))
    return np.concatenate(sizes, 0)


def anchor_fit(wh: ArrayLike, anchors: ArrayLike, thr: float = 4.0) -> AnchorFit:
    """Measure how anchors fit boxes.

    Args:
        wh: (n, 2) widths and heights of boxes in pixels, n > 0.
        anchors: widths and heights in pixels; any shape that flattens to pairs.
        thr: `anchor_t`, the largest side ratio that matches.
    """
    ratios = _ratios(np.asarray(wh, np.float64), np.asarray(anchors, np.float64).reshape(-1, 2))
    best = ratios.max(1)
    return AnchorFit(
        best_possible_recall=float((best > 1 / thr).mean()),
        anchors_past_thr=float((ratios > 1 / thr).sum(1).mean()),
        fitness=float((best * (best > 1 / thr)).mean()),
        mean_best=float(best.mean()),
        mean_all=float(ratios.mean()),
    )


def check_anchors(
    records: Sequence[ImageRecord], anchors: ArrayLike, imgsz: int, *, thr: float = 4.0, seed: int = 0
) -> AnchorReport:
    """Check a model's anchors against a dataset, and look for better ones if they fit poorly.

    Args:
        anchors: (levels, anchors per level, 2), or flat per level, widths and heights in pixels.
        imgsz: longer side of the training images.
        thr: `anchor_t` of the loss.
        seed: of the random zoom and of the search.

    Returns:
        The anchors to train with and both fits. Datasets without boxes keep their anchors.
    """
    given = np.asarray(anchors, np.float64)
    given = given.reshape(len(given), -1, 2)
    wh = _with_area(box_sizes(records, imgsz, np.random.default_rng((seed, 0))))
    if not len(wh):
        perfect = AnchorFit(1.0, 0.0, 0.0, 0.0, 0.0)
        return AnchorReport(given, perfect, perfect)
    before = anchor_fit(wh, given, thr)
    if not before.is_poor:
        return AnchorReport(given, before, before)
    count = given.shape[0] * given.shape[1]
    searched = _with_area(box_sizes(records, imgsz))
    if (searched >= MIN_BOX).any(1).sum() < count:
        return AnchorReport(given, before, before)
    found = kmean_anchors(searched, count, thr=thr, seed=seed).reshape(given.shape)
    if given[0].prod(1).mean() > given[-1].prod(1).mean():  # a head that starts with its coarsest level
        found = found[::-1].copy()
    after = anchor_fit(wh, found, thr)
    if after.best_possible_recall <= before.best_possible_recall:
        return AnchorReport(given, before, before)
    return AnchorReport(found, before, after)


def kmean_anchors(
    wh: ArrayLike, n: int = 9, *, thr: float = 4.0, generations: int = 1000, seed: int = 0, progress: bool = False
) -> Sizes:
    """Find `n` anchors for boxes: k-means on their sizes, refined by random mutations that improve the fitness.

    Args:
        wh: (m, 2) widths and heights in pixels; at least `n` of them not tiny.
        generations: mutations to try.
        seed: the result is a function of it and the arguments.
        progress: show a bar.

    Returns:
        (n, 2) float64 widths and heights in pixels, by ascending area.
    """
    boxes = _with_area(np.asarray(wh, np.float64).reshape(-1, 2))
    boxes = boxes[(boxes >= MIN_BOX).any(1)]
    if len(boxes) < n:
        raise ValueError(f"{n} anchors from {len(boxes)} boxes; there must be at least as many boxes")
    rng = np.random.default_rng((seed, 1))
    spread = np.maximum(boxes.std(0), 1e-9)
    best = _by_area(_k_means(boxes / spread, n, rng) * spread)
    fitness = anchor_fit(boxes, best, thr).fitness
    for _ in trange(generations, desc="anchors", leave=False, disable=not progress):
        child = np.maximum(best * _mutation(best.shape, rng), MIN_BOX)
        of_child = anchor_fit(boxes, child, thr).fitness
        if of_child > fitness:
            best, fitness = child, of_child
    return _by_area(best)


def _with_area(wh: Sizes) -> Sizes:
    """Return the boxes whose sides are both longer than zero; no anchor fits the others."""
    return wh[(wh > 0).all(1)]


def _ratios(wh: Sizes, anchors: Sizes) -> Sizes:
    """Return r of each box with each anchor, (n, k)."""
    with np.errstate(divide="ignore"):  # a side of 0 (not chosen yet) gives r = 0
        r = wh[:, None] / anchors[None]
        return np.minimum(r, 1 / r).min(2)


def _by_area(anchors: Sizes) -> Sizes:
    return anchors[np.argsort(anchors.prod(1), kind="stable")]


def _mutation(shape: tuple[int, ...], rng: np.random.Generator) -> Sizes:
    """Return random factors 0.3 .. 3, most of them near 1, not all of them 1."""
    factors = np.ones(shape)
    while (factors == 1).all():
        change = (rng.random(shape) < _MUTATION_RATE) * rng.random() * rng.standard_normal(shape) * _MUTATION_SIZE
        factors = (1 + change).clip(0.3, 3.0)
    return factors


def _k_means(points: Sizes, k: int, rng: np.random.Generator, rounds: int = 30) -> Sizes:
    """Return (k, 2) centers: Lloyd's algorithm from k-means++ starts (https://doi.org/10.1145/1283383.1283494)."""
    centers = points[rng.integers(len(points))][None]
    while len(centers) < k:
        distance2 = ((points[:, None] - centers[None]) ** 2).sum(2).min(1)
        total = distance2.sum()
        chosen = rng.choice(len(points), p=distance2 / total if total > 0 else None)
        centers = np.concatenate((centers, points[chosen][None]), 0)
    for _ in range(rounds):
        nearest = ((points[:, None] - centers[None]) ** 2).sum(2).argmin(1)
        members = np.bincount(nearest, minlength=k)
        sums = np.stack([np.bincount(nearest, points[:, c], k) for c in range(2)], 1)
        moved = np.where(members[:, None] > 0, sums / np.maximum(members, 1)[:, None], centers)
        if np.array_equal(moved, centers):
            break
        centers = moved
    return centers
