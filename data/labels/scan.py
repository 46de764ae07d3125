"""Verification of a split: each image and its labels, from the cache where nothing has changed, on all processors."""

from __future__ import annotations

import gc
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data.formats.detect_format import Listed
from data.formats.voc import UnknownClassError
from data.formats.yolo import LabelFile
from data.images import probe
from data.labels import cache as label_cache
from data.labels.table import Entry, ImageTable, Rows, join, pack
from data.loading.processes import end_with_parent, processors
from utils.errors import DataError, TrainingError

MIN_SIDE = 10
"""Images with a shorter side (pixels) are left out."""

MANY = 2000
"""Images from which on processes share the verification; fewer are done before these have started."""

_CHUNK = 256  # images of one task


def scan(paths: Sequence[Path], listed: Mapping[Path, Listed], cache: Path, progress: bool = False) -> ImageTable:
    """Return the table of images: from the cache where size and time of both files are unchanged, else verified.

    Files that could not be read or decoded are tried again: the reason may be gone (permissions, a network drive, the
    limit of pixels, a format that a newer decoder knows) although the files are unchanged.

    Args:
        paths: the images.
        listed: where the labels of each are.
        cache: file of earlier results; written again where something has changed.
        progress: show a bar on standard error.

    Raises:
        UnknownClassError: a class that the dataset does not name.
        TrainingError: a process was killed.
    """
    names, known = label_cache.read(cache)
    place = {name: row for row, name in enumerate(names)}
    rows = np.array([place.get(str(path), -1) for path in paths], np.int64)
    cached = np.flatnonzero(rows >= 0)
    if len(cached):
        now = np.concatenate(list(_in_parallel(partial(_stamps, listed), _parts(paths, cached), by_processes=False)))
        rows[cached[(known.stamps[rows[cached]] != now).any(1)]] = -1
    unread = np.append(known.numbers[:, 0] == 0, False)[rows]  # rows of -1 take the last entry
    rows[unread] = -1
    todo = np.flatnonzero(rows < 0)
    tables = [known]
    name = cache.name.split(".")[0]
    with tqdm(total=len(todo), desc=f"verifying {name}", leave=False, disable=not progress or not len(todo)) as bar:
        for table in _in_parallel(partial(_verify_all, listed), _parts(paths, todo), by_processes=len(todo) >= MANY):
            tables.append(table)
            bar.update(len(table))
    rows[todo] = len(known) + np.arange(len(todo))
    table = join(tables).take(rows)
    if (~unread[todo] | table.usable[todo]).any() or len(known) != len(paths):
        label_cache.write(cache, [str(path) for path in paths], table)
    return table


def _parts(paths: Sequence[Path], rows: Rows) -> list[list[Path]]:
    chosen = [paths[row] for row in rows.tolist()]
    return [chosen[i : i + _CHUNK] for i in range(0, len(chosen), _CHUNK)]


def _stamps(listed: Mapping[Path, Listed], part: Sequence[Path]) -> NDArray[np.int64]:
    return np.array([label_cache.stamp(image, listed[image].label) for image in part], np.int64)


def _verify_all(listed: Mapping[Path, Listed], part: Sequence[Path]) -> ImageTable:
    return pack([verify(image, label_cache.stamp(image, listed[image].label), listed[image]) for image in part])


def verify(image: Path, stamp: tuple[int, int, int, int], listed: Listed) -> Entry:
    """Check one image and its labels.

    Args:
        image: the image.
        stamp: result of `label_cache.stamp` for it.
        listed: where its labels are.

    Returns:
        The entry; problems of the image are messages in it, never exceptions.

    Raises:
        UnknownClassError: a class that the dataset does not name.
    """
    found, status = _NOTHING, "missing"
    height = width = 0
    try:
        if stamp[0] == -1:
            raise DataError(f"{image}: no such file{f' (listed in {listed.origin})' if listed.origin else ''}")
        height, width = probe(image)
        if min(height, width) < MIN_SIDE:
            raise DataError(f"{image}: {width}x{height} pixels; both sides need at least {MIN_SIDE}")
        if stamp[2] != -1:
            found = listed.read((height, width))
            status = "labeled" if len(found.labels) else "empty"
    except UnknownClassError:
        raise
    except DataError as error:
        status = "corrupt"
        if isinstance(error.__cause__, OSError):
            height = width = 0  # nothing is known about the files; see `scan`
        found = LabelFile(found.labels, notes=(f"{error} (left out)",))
    return Entry(stamp, height, width, status, found)


_NOTHING = LabelFile(np.zeros((0, 5), np.float32))

Result = TypeVar("Result")


def _in_parallel(
    work: Callable[[Sequence[Path]], Result], parts: Sequence[Sequence[Path]], by_processes: bool
) -> Iterator[Result]:
    """Yield the result of `work` for each part, in order, from processes where the system can fork safely."""
    can_fork = sys.platform == "linux" and not multiprocessing.current_process().daemon
    pool: Executor
    if by_processes and can_fork and processors() > 1:
        fork = multiprocessing.get_context("fork")  # child processes share the parts and what is listed, without a copy
        pool = ProcessPoolExecutor(processors(), fork, _start_process, (work, parts))
        found = pool.map(_work_on, range(len(parts)))
    else:
        pool = ThreadPoolExecutor(min(8, processors()))
        found = pool.map(work, parts)
    try:
        yield from found
    except BrokenProcessPool as error:
        raise TrainingError("a process that reads labels was killed; out of memory?") from error
    finally:
        pool.shutdown(cancel_futures=True)  # so that an interruption does not wait for the rest


_inherited: list[tuple[Callable[[Sequence[Path]], Any], Sequence[Sequence[Path]]]] = []  # of a child process


def _start_process(work: Callable[[Sequence[Path]], Any], parts: Sequence[Sequence[Path]]) -> None:
    end_with_parent()
    _inherited[:] = [(work, parts)]
    gc.freeze()  # a collection would write to, and so copy, what is shared with the parent
    cv2.setNumThreads(0)  # threads of the parent are not there
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent


def _work_on(part: int) -> Any:  # noqa: ANN401
    work, parts = _inherited[0]
    return work(parts[part])
