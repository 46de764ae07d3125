"""Batches of a dataset, made by stateless worker processes.

Workers receive keys (epoch, image index) and return whole batches. A worker gets the batches of one mosaic window at
once (see `data.loading.order`), so that each image is decoded about once per epoch, not once per use.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from data.loading.collate import collate, collate_quad
from data.loading.dataset import DetectionDataset
from data.loading.order import WINDOW, Index, Key, as_key, epoch_order, shard, weighted_keys, weighted_order
from data.loading.processes import end_with_parent, processors
from utils.errors import TrainingError, UserError
from utils.seed import sample_rng
from utils.structures import Batch

TASK_BYTES = 96 * 2**20
"""Most bytes of pixels that a worker returns at once when one task has several batches."""

GRACE_SECONDS = 30
"""Seconds for which a worker ignores SIGTERM; torchrun and SLURM wait as long before they send SIGKILL."""

_QUAD_STREAM = 2**33  # added to an image's number: the random numbers of the four-in-one collate

Keys = Sequence[Key]


@dataclass(eq=False)
class DetectionLoader:
    """Iterable of batches; each pass gives the batches of the current epoch, the same ones every time.

    Attributes:
        dataset: where samples come from. With `rect` its order and batch size are fixed: no shuffling.
        batch_size: images per batch; the last batch may be smaller.
        workers: processes that make batches; cut to the processors and batches available. 0 works in this process.
        shuffle: a new order each epoch, a function of (seed, epoch).
        seed: of the order.
        rank, world_size: share of one process in distributed training; rank -1 means all.
        repeat: give the ranks equally many batches by repeating some; else each occurs once, as validation needs it.
        image_weights: (n,) non-negative: draw images by weight, with replacement, instead of each one once.
        quad: four-in-one batches, see `collate_quad`.
        min_images: a smaller last batch is left out (counted after `quad`).

    Raises:
        UserError: while iterating, as raised in the worker: one line, without the worker's traceback.
        TrainingError: a worker process was killed.
    """

    dataset: DetectionDataset
    batch_size: int
    workers: int = field(default=0, kw_only=True)
    shuffle: bool = field(default=False, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    rank: int = field(default=-1, kw_only=True)
    world_size: int = field(default=1, kw_only=True)
    repeat: bool = field(default=True, kw_only=True)
    image_weights: NDArray[np.floating] | Sequence[float] | None = field(default=None, kw_only=True)
    quad: bool = field(default=False, kw_only=True)
    min_images: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch size {self.batch_size}; at least 1 is needed")
        if self.dataset.rect and self.dataset.batch_size != self.batch_size:
            raise ValueError(f"rectangular batches of {self.dataset.batch_size}, not of {self.batch_size}")
        self.epoch = self.skip = 0
        share = processors() // _neighbors(self.world_size)
        self.workers = min(self.workers, share, len(self)) if len(self) > 1 else 0
        self._tasks = _TaskList()
        self._loader: DataLoader[Any] | None = None

    def __len__(self) -> int:
        """Return the number of batches of this process per epoch."""
        if self.dataset.rect:
            return len(self._shard(len(self._starts(len(self.dataset)))))
        return len(self._starts(len(self._shard(len(self.dataset)))))

    @property
    def images_per_batch(self) -> int:
        """Images of a whole batch as the network receives it."""
        return -(-self.batch_size // 4) if self.quad else self.batch_size

    def smallest_batch(self) -> int:
        """Return the images of the smallest batch of an epoch, over all processes."""
        n = len(self.dataset) if self.dataset.rect else len(self._shard(len(self.dataset)))
        last = n % self.batch_size or self.batch_size
        return -(-last // 4) if self.quad else last

    def smallest_batch_shape(self) -> tuple[int, int]:
        """Return (height, width) of the smallest batch, or the smallest shape of those with as many images."""
        scale = 2 if self.quad else 1
        if not self.dataset.rect:
            return self.dataset.imgsz * scale, self.dataset.imgsz * scale
        shapes = self.dataset.batch_shapes if self.images_per_batch == 1 else self.dataset.batch_shapes[-1:]
        height, width = min(shapes, key=math.prod)
        return height * scale, width * scale

    def _starts(self, n: int) -> range:
        """Return the places at which the batches of `n` images start."""
        smallest = 4 * self.min_images - 3 if self.quad else self.min_images
        return range(0, max(n - smallest + 1, 0), self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if self._loader is None:
            self._loader = self._open()
        batches = self.batches()[self.skip :]
        group = self._batches_per_task()
        self._tasks.tasks = [batches[i : i + group] for i in range(0, len(batches), group)]
        with worker_losses_reported():
            for made in _received(self._loader):
                if isinstance(made, UserError):
                    raise made
                yield from made

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose the epoch of the next pass, and how many of its batches to leave out at the beginning."""
        self.epoch, self.skip = epoch, skip

    def set_image_weights(self, weights: NDArray[np.floating] | Sequence[float] | None) -> None:
        """Set the image weights (n,) used for sampling from the next pass on; None disables weighted sampling."""
        self.image_weights = weights

    def close(self) -> None:
        """End the worker processes; the next pass starts new ones."""
        passing = getattr(self._loader, "_iterator", None)
        self._loader = None
        if self.workers and passing is not None:  # a pass that an error interrupted may still hold them
            passing._shutdown_workers()

    def batches(self) -> list[Keys]:
        """Return the keys of every batch of this process in the current epoch."""
        size = self.batch_size
        keys = self._keys()
        if self.dataset.rect:  # whole batches are distributed: a batch has one shape
            starts = self._starts(len(keys))
            return [keys[starts[k] : starts[k] + size] for k in self._shard(len(starts)).tolist()]
        mine = [keys[place] for place in self._shard(len(keys)).tolist()]
        return [mine[start : start + size] for start in self._starts(len(mine))]

    def _shard(self, n: int) -> Index:
        return shard(n, self.rank, self.world_size, self.repeat)

    def _keys(self) -> Keys:
        n = len(self.dataset)
        if self.image_weights is not None and not self.dataset.rect:
            if len(self.image_weights) != n:
                raise ValueError(f"{len(self.image_weights)} image weights for {n} images")
            order = weighted_order(self.image_weights, self.seed, self.epoch)
            return weighted_keys(order, self.epoch, self.dataset.window_size)
        shuffled = self.shuffle and not self.dataset.rect
        order = epoch_order(n, self.seed, self.epoch) if shuffled else self.dataset.visiting_order
        return [(self.epoch, index) for index in order.tolist()]

    def _batches_per_task(self) -> int:
        """Return the number of batches of one task: those of a mosaic window, if memory and a fair split allow."""
        if not self.workers or not self.dataset.uses_mosaic or self.dataset.window_size >= len(self.dataset):
            return 1
        batch_bytes = 3 * self.dataset.imgsz**2 * self.batch_size
        fair = -(-len(self) // (2 * self.workers))
        window = WINDOW // (self.batch_size * max(self.world_size, 1))
        return max(1, min(window, TASK_BYTES // batch_bytes, fair))

    def _open(self) -> DataLoader[Any]:
        return DataLoader(
            _Tasks(self.dataset, self.quad),
            batch_size=None,
            sampler=self._tasks,
            num_workers=self.workers,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # the loader draws one number per pass; not from the global generator
            prefetch_factor=(1 if self._batches_per_task() > 1 else 2) if self.workers else None,
            persistent_workers=self.workers > 0,
        )


def _received(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield the results of a loader; RuntimeError where a worker is gone whose tensors are to be received."""
    results = iter(loader)
    while True:
        try:
            result = next(results)
        except StopIteration:
            return
        except (ConnectionError, EOFError, FileNotFoundError) as error:  # of the socket that passes shared memory
            if not loader.num_workers:
                raise
            raise RuntimeError(f"DataLoader worker is gone: {type(error).__name__}: {error}") from error
        yield result


@contextmanager
def worker_losses_reported() -> Iterator[None]:
    """Raise TrainingError when a loader worker was killed; PyTorch raises its error anywhere in the block."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, TrainingError) or "DataLoader worker" not in str(error):
            raise
        reason = " ".join(str(error).split())
        raise TrainingError(f"a loader worker ended ({reason}); out of memory? fewer --workers may help") from error


class _TaskList(Sampler[Sequence[Any]]):
    """Tasks of the coming pass: lists of batches of keys."""

    tasks: Sequence[Sequence[Keys]] = ()

    def __init__(self) -> None: ...

    def __iter__(self) -> Iterator[Sequence[Keys]]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)


class _Tasks(Dataset[Any]):
    """Turns a task into batches; a user's mistake is a result, so that it arrives without the worker's traceback."""

    def __init__(self, dataset: DetectionDataset, quad: bool) -> None:
        self._dataset = dataset
        self._quad = quad

    def __getitem__(self, task: Sequence[Keys]) -> list[Batch] | UserError:
        try:
            return [self._batch(keys) for keys in task]
        except UserError as error:
            return error

    def _batch(self, keys: Keys) -> Batch:
        samples = [self._dataset[key] for key in keys]
        if not self._quad:
            return collate(samples)
        first = as_key(keys[0])
        return collate_quad(samples, sample_rng(self._dataset.seed, first.epoch, first.index + _QUAD_STREAM))


def _as_is(made: list[Batch] | UserError) -> list[Batch] | UserError:
    return made


def _start_worker(_: int) -> None:
    end_with_parent()
    cv2.setNumThreads(0)  # one thread per worker; the workers are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which then ends its workers
    signal.signal(signal.SIGTERM, _delay_termination)


def _delay_termination(*_: object) -> None:
    """Ignore a scheduler's SIGTERM for `GRACE_SECONDS`, while the main process saves its state."""
    signal.alarm(GRACE_SECONDS)


def _neighbors(world_size: int) -> int:
    """Return the number of training processes on this machine, as torchrun sets it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) if world_size > 1 else 1
