"""Orders, windows and shards: deterministic, and they cover every image."""

from __future__ import annotations

import numpy as np
import pytest
from torch.utils.data import DistributedSampler

from data.loading.order import SampleKey, as_key, epoch_order, shard, weighted_keys, weighted_order, window_at


def test_epoch_order_is_a_permutation_that_depends_on_seed_and_epoch():
    base = epoch_order(50, 1, 2)
    assert sorted(base.tolist()) == list(range(50))
    assert np.array_equal(base, epoch_order(50, 1, 2))
    assert not np.array_equal(base, epoch_order(50, 1, 3))
    assert not np.array_equal(base, epoch_order(50, 2, 2))


def test_windows_are_blocks_and_the_last_one_is_as_long():
    order = np.arange(100, 110)
    found = [window_at(order, p, 4).tolist() for p in range(10)]
    first, second, last = [100, 101, 102, 103], [104, 105, 106, 107], [106, 107, 108, 109]
    assert found == [first] * 4 + [second] * 4 + [last] * 2
    assert window_at(order, 3, 64).tolist() == order.tolist()
    assert all(order[p] in window_at(order, p, 4) for p in range(10))


def test_weighted_order_follows_the_weights():
    drawn = np.concatenate([weighted_order([1, 0, 3], 0, epoch) for epoch in range(2000)])
    share = np.bincount(drawn, minlength=3) / len(drawn)
    np.testing.assert_allclose(share, [0.25, 0, 0.75], atol=0.03)
    assert len(weighted_order([0, 0, 0], 0, 0)) == 3  # all weights 0: uniform
    with pytest.raises(ValueError, match="non-negative"):
        weighted_order([1, -1], 0, 0)
    with pytest.raises(ValueError, match="finite"):
        weighted_order([1, np.nan], 0, 0)


def test_weighted_keys_number_the_repeats_and_carry_their_window():
    keys = weighted_keys(np.array([2, 0, 2, 2, 1]), 7, size=2)
    assert [(k.epoch, k.index, k.repeat) for k in keys] == [(7, 2, 0), (7, 0, 0), (7, 2, 1), (7, 2, 2), (7, 1, 0)]
    assert [k.window.tolist() for k in keys] == [[2, 0], [2, 0], [2, 2], [2, 2], [2, 1]]


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 30])
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_shard_pads_as_the_distributed_sampler_does(n, world_size):
    for rank in range(world_size):
        theirs = DistributedSampler(range(n), num_replicas=world_size, rank=rank, shuffle=False)
        assert shard(n, rank, world_size).tolist() == list(theirs)
    assert shard(n, -1, world_size).tolist() == list(range(n))


def test_as_key():
    assert as_key(3) == SampleKey(0, 3) and as_key((2, 3)) == SampleKey(2, 3)
