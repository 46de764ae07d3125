"""Splits: fractions of every class, seeds, groups of near-duplicates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.formats.yolo import ImageRecord
from data.split import check_fractions, split_records, stratify
from utils.errors import ConfigError, DataError


def records(classes: list[list[int]]) -> list[ImageRecord]:
    rows = [np.array([[number, 0.5, 0.5, 0.1, 0.1] for number in image], np.float32) for image in classes]
    return [ImageRecord(Path(f"{i}.jpg"), 40, 60, row.reshape(-1, 5)) for i, row in enumerate(rows)]


def test_split_gives_every_class_its_fraction() -> None:
    rng = np.random.default_rng(0)
    images = records([sorted(set(rng.choice(5, 3, p=(0.6, 0.3, 0.06, 0.03, 0.01)).tolist())) for _ in range(1000)])
    parts = split_records(images, (0.8, 0.1, 0.1), np.arange(1000), 5, seed=0)
    assert [len(parts[name]) for name in ("train", "val", "test")] == pytest.approx([800, 100, 100], abs=3)
    assert len({record.path for part in parts.values() for record in part}) == 1000
    for number in range(5):
        counts = [sum(number in record.labels[:, 0] for record in part) for part in parts.values()]
        assert counts == pytest.approx([0.8 * sum(counts), 0.1 * sum(counts), 0.1 * sum(counts)], abs=2.5), number


def test_split_is_a_function_of_the_seed() -> None:
    images = records([[i % 3] for i in range(60)])
    first, again, other = (split_records(images, (0.5, 0.5), np.arange(60), 3, seed) for seed in (0, 0, 1))
    paths = [[record.path for record in parts["train"]] for parts in (first, again, other)]
    assert paths[0] == paths[1] != paths[2]


def test_groups_stay_together() -> None:
    groups = np.repeat(np.arange(20), 5)
    parts = split_records(records([[0]] * 100), (0.7, 0.2, 0.1), groups, 1, seed=3)
    numbers = {name: {groups[int(record.path.stem)] for record in part} for name, part in parts.items()}
    assert [len(part) for part in parts.values()] == [70, 20, 10]
    assert sum(map(len, numbers.values())) == 20


def test_backgrounds_are_shared_out_too() -> None:
    split = stratify(np.array([[1, 1]] * 10 + [[0, 1]] * 10, np.int32), np.array([0.8, 0.2]), np.random.default_rng(0))
    assert np.bincount(split[:10]).tolist() == [8, 2] and np.bincount(split[10:]).tolist() == [8, 2]


def test_split_that_would_be_empty_is_an_error() -> None:
    with pytest.raises(DataError, match=r"no image for val: 4 images are 1 groups of near-duplicates"):
        split_records(records([[0]] * 4), (0.5, 0.5), np.zeros(4, np.int64), 1, seed=0)


@pytest.mark.parametrize("fractions", [(1.0,), (0.5, 0.6), (0.5, -0.5, 1.0), (0.25,) * 4, (float("nan"), 0.5), (1, 0)])
def test_fractions_have_sum_one(fractions: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="two or three numbers"):
        check_fractions(fractions, 0)
    check_fractions((0.8, 0.1, 0.1), 0)
