"""DetectionLoader: the same batches whatever the number of workers; every image once; errors in one line."""

from __future__ import annotations

import functools
import multiprocessing
import operator
import os
import signal
import time

import numpy as np
import pytest
import torch

import data.loading.loader as loader_module
from data.augment.config import AugmentConfig
from data.loading.collate import collate, collate_quad
from data.loading.dataset import DetectionDataset
from data.loading.loader import DetectionLoader, _received, worker_losses_reported
from data.loading.order import as_key, epoch_order
from tests.helpers.image_files import write_set
from tests.helpers.processes import ends
from utils.errors import DataError, TrainingError
from utils.structures import Sample

RECIPE = AugmentConfig(hsv_s=0.5, translate=0.1, scale=0.5, fliplr=0.5, mosaic=0.8, mixup=0.2)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"), 22)


@pytest.fixture
def two_processors(monkeypatch):
    monkeypatch.setattr("data.loading.loader.processors", lambda: 8)


def dataset(records, **options):
    return DetectionDataset(records, 32, **{"augment": RECIPE, "seed": 5, **options})


def equal(a, b):
    same_pixels = torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets)
    return same_pixels and a.paths == b.paths and a.shapes == b.shapes


def all_equal(first, second):
    return len(first) == len(second) and all(equal(a, b) for a, b in zip(first, second))


def numbers(batches):
    return [int(path[-7:-4]) for batch in batches for path in batch.paths]


@pytest.mark.parametrize("options", [{}, {"image_weights": np.arange(22.0)}, {"quad": True}], ids=str)
def test_batches_do_not_depend_on_the_number_of_workers(records, options, two_processors):
    passes = []
    for workers in (0, 2, 8):
        loader = DetectionLoader(dataset(records), 4, workers=workers, shuffle=True, seed=5, **options)
        assert loader.workers == min(workers, len(loader))
        loader.set_epoch(3)
        passes.append(list(loader))
        loader.close()
    assert all_equal(passes[0], passes[1]) and all_equal(passes[0], passes[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_repeat_and_differ(records, workers, two_processors):
    loader = DetectionLoader(dataset(records), 4, workers=workers, shuffle=True, seed=5)
    loader.set_epoch(1)
    first = list(loader)
    assert all_equal(first, list(loader))  # the same epoch again
    next(iter(loader))  # a pass that is interrupted
    loader.set_epoch(2)
    second = list(loader)
    assert not all_equal(first, second)
    resumed = DetectionLoader(dataset(records), 4, shuffle=True, seed=5)  # a new process that starts at epoch 2
    resumed.set_epoch(2)
    assert all_equal(second, list(resumed))
    loader.close()


def test_every_image_once_in_the_order_of_the_epoch(records):
    loader = DetectionLoader(dataset(records), 4, shuffle=True, seed=5)
    batches = list(loader)
    assert len(batches) == len(loader) == 6 and len(batches[-1].paths) == 2
    assert numbers(batches) == epoch_order(22, 5, 0).tolist()
    assert numbers(DetectionLoader(dataset(records), 4)) == list(range(22))


def test_loader_leaves_global_generators_alone(records, two_processors):
    loader = DetectionLoader(dataset(records), 4, workers=2, shuffle=True)
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(loader)
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])
    loader.close()


def test_rect_batches_have_their_shapes(records):
    data = dataset(records, augment=None, rect=True, batch_size=4, pad=0.5)
    loader = DetectionLoader(data, 4, shuffle=True)  # rectangular batches are never shuffled
    assert [tuple(b.images.shape[2:]) for b in loader] == data.batch_shapes
    assert numbers(loader) == data.visiting_order.tolist()
    with pytest.raises(ValueError, match="rectangular batches of 4"):
        DetectionLoader(data, 8)


@pytest.mark.parametrize("rect", [False, True])
def test_ranks_share_the_epoch(records, rect):
    data = dataset(records, rect=rect, batch_size=4)
    loaders = [DetectionLoader(data, 4, shuffle=True, rank=rank, world_size=4) for rank in range(4)]
    per_rank = [numbers(loader) for loader in loaders]
    assert len({len(loader) for loader in loaders}) == 1
    assert set(functools.reduce(operator.iadd, per_rank, [])) == set(range(22))
    if not rect:  # as DistributedSampler: rank, rank + 4, ..., the start again at the end
        order = epoch_order(22, 0, 0).tolist()
        assert per_rank == [(order + order[:2])[rank::4] for rank in range(4)]


def test_image_weights_choose_the_images(records):
    weights = np.zeros(22)
    weights[[3, 8]] = 1
    loader = DetectionLoader(dataset(records), 4, shuffle=True, image_weights=weights)
    batches = list(loader)
    drawn = numbers(batches)
    assert len(drawn) == 22 and set(drawn) == {3, 8}
    images = torch.cat([b.images for b in batches])
    assert len(torch.unique(images.flatten(1), dim=0)) == 22  # repeated images look different
    loader.set_image_weights(None)
    assert sorted(numbers(loader)) == list(range(22))
    loader.set_image_weights([1, 2])
    with pytest.raises(ValueError, match="2 image weights for 22"):
        list(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_arrive_as_one_line(tmp_path, workers, two_processors):
    records = write_set(tmp_path, 8)
    records[5].path.unlink()
    loader = DetectionLoader(DetectionDataset(records, 32), 2, workers=workers)
    with pytest.raises(DataError) as caught:
        list(loader)
    assert "005.png" in str(caught.value) and "\n" not in str(caught.value)
    loader.close()


def test_close_ends_the_workers(records, two_processors):
    loader = DetectionLoader(dataset(records), 4, workers=2)
    batches = iter(loader)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    loader.close()
    assert multiprocessing.active_children() == []
    assert len(list(loader)) == 6  # and it can be used again
    loader.close()


def test_workers_are_limited(records, monkeypatch):
    monkeypatch.setattr("data.loading.loader.processors", lambda: 4)
    limits = [(8, 1, 1, 4), (3, 1, 1, 3), (8, 2, 1, 2), (8, 1, 22, 0), (8, 1, 11, 2)]
    for workers, world_size, batch_size, expected in limits:
        found = DetectionLoader(dataset(records), batch_size, workers=workers, world_size=world_size).workers
        assert found == expected, (workers, world_size, batch_size)


def test_window_of_a_small_dataset_holds_all_images(records, two_processors):
    """Nothing is gained by windows where every image stays in memory: partners come from the whole dataset."""
    small = dataset(records)
    assert small.window_size == len(records)
    assert set(small._window(as_key((3, 1))).tolist()) == set(range(len(records)))
    assert DetectionLoader(small, 4, workers=2)._batches_per_task() == 1


def test_window_is_decoded_once_by_one_worker(records, two_processors, monkeypatch):
    """The tasks of two workers hold whole windows where the dataset is large."""
    monkeypatch.setattr("data.loading.dataset.RECENT_BYTES", 0)
    monkeypatch.setattr("data.loading.dataset.WINDOW", 8)
    assert len(dataset(records)._window(as_key((3, 1)))) == 8
    monkeypatch.undo()
    monkeypatch.setattr("data.loading.loader.processors", lambda: 8)
    monkeypatch.setattr("data.loading.dataset.RECENT_BYTES", 0)
    loader = DetectionLoader(dataset(records * 50), 16, workers=2, shuffle=True)
    assert loader._batches_per_task() == 4
    assert DetectionLoader(dataset(records * 50, augment=None), 16, workers=2)._batches_per_task() == 1
    assert DetectionLoader(dataset(records * 5), 16, workers=2)._batches_per_task() == 2  # fair: both get work
    big = DetectionDataset(records * 50, 1280, augment=RECIPE)
    assert DetectionLoader(big, 16, workers=2)._batches_per_task() == 1  # memory


# ---- collate


def sample(value, labels, height=4, width=6):
    image = np.zeros((height, width, 3), np.uint8)
    image[...] = (value, value + 1, value + 2)
    return Sample(image, np.array(labels, np.float32).reshape(-1, 5), f"{value}", None, value)


def test_collate_gives_rgb_planes_and_numbered_targets():
    batch = collate([sample(10, [[1, 0.5, 0.5, 0.2, 0.2]]), sample(20, []), sample(30, [[2] * 5, [3] * 5])])
    assert batch.images.shape == (3, 3, 4, 6) and batch.images.dtype == torch.uint8 and batch.images.is_contiguous()
    assert batch.images[:, :, 0, 0].tolist() == [[12, 11, 10], [22, 21, 20], [32, 31, 30]]
    assert batch.targets[:, :2].tolist() == [[0, 1], [2, 2], [2, 3]] and batch.targets.dtype == torch.float32
    assert batch.paths == ("10", "20", "30") and batch.shapes == (None, None, None)
    assert collate([sample(0, [])]).targets.shape == (0, 6)
    with pytest.raises(ValueError, match="different sizes"):
        collate([sample(1, []), sample(2, [], height=5)])


def test_collate_quad_joins_or_enlarges():
    group = [sample(10 * k, [[k, 0.5, 0.25, 0.5, 0.5]]) for k in range(4)]
    seen = set()
    for seed in range(20):
        batch = collate_quad(group, np.random.default_rng(seed))
        assert batch.images.shape == (1, 3, 8, 12)
        seen.add(len(batch.targets))
        if len(batch.targets) == 1:
            assert batch.targets.tolist() == [[0, 0, 0.5, 0.25, 0.5, 0.5]]
            assert (batch.images[0, 2] == 0).all()
        else:
            assert batch.images[0, 2, ::4, ::6].tolist() == [[0, 10], [20, 30]]
            expected = [[0.25, 0.125], [0.75, 0.125], [0.25, 0.625], [0.75, 0.625]]
            assert batch.targets[:, 2:4].tolist() == expected
            assert (batch.targets[:, 4:] == 0.25).all()
    assert seen == {1, 4}
    rest = collate_quad(group[:2], np.random.default_rng(0))  # no image of a short group is lost
    assert rest.images.shape == (1, 3, 8, 12) and rest.targets[:, 1].tolist() == [0, 1]
    assert (rest.images[0, :, 4:] == 114).all()


def test_close_ends_the_workers_of_an_interrupted_pass(records, two_processors):
    """Also when a signal for all processes reached them: they wait for the main process, which has ended its pass."""
    loader = DetectionLoader(dataset(records), 4, workers=2, shuffle=True)
    before = set(multiprocessing.active_children())
    going = iter(loader)
    next(going)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    begin = time.monotonic()
    loader.close()
    assert time.monotonic() - begin < 4 and not any(worker.is_alive() for worker in workers)
    going.close()


class _Killed(DetectionDataset):
    def __getitem__(self, key):
        os.kill(os.getpid(), signal.SIGKILL)


def test_killed_worker_is_one_line(records, two_processors):
    loader = DetectionLoader(_Killed(records, 32), 4, workers=2)
    with pytest.raises(TrainingError, match="a loader worker ended"):
        list(loader)


def _end_during_start(records, path):
    """Iterate a loader whose workers kill this process before PyTorch has noted its process ID."""

    def start_worker(number):
        path.write_text(str(os.getpid()))
        os.kill(os.getppid(), signal.SIGKILL)
        while os.getppid() == parent:
            time.sleep(0.01)
        original(number)

    parent, original = os.getpid(), loader_module._start_worker
    loader_module._start_worker = start_worker
    list(DetectionLoader(dataset(records), 4, workers=1))


def test_worker_ends_although_its_parent_was_killed_during_its_start(records, tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_end_during_start, args=(records, tmp_path / "pid"))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    pid = int((tmp_path / "pid").read_text())
    assert ends(pid, seconds=20)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_worker_that_ends_while_it_passes_a_batch_is_reported(error) -> None:
    class Loader:
        num_workers = 2

        def __iter__(self):
            yield 1
            raise error

    with pytest.raises(TrainingError, match="a loader worker ended .*fewer --workers"), worker_losses_reported():
        assert list(_received(Loader())) == [1]
    Loader.num_workers = 0
    with pytest.raises(type(error)), worker_losses_reported():
        list(_received(Loader()))
