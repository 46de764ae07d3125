"""Bounded queues with a thread at one end: `Feed` produces items in advance, `Drain` consumes them.

The order is kept. An error in either thread is raised in the thread that uses the queue; no thread waits forever.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
TICK_S = 0.2  # how often a waiting thread checks whether it should stop


class _End:
    """Marks the end of a queue."""


class Feed(Generic[T]):
    """Runs a generator in a thread, ahead of the loop that iterates over the feed.

    Args:
        items: advanced and closed in the thread.
        depth: number of items it may be ahead.
    """

    def __init__(self, items: Generator[T, None, None], depth: int) -> None:
        self._items = items
        self._queue: queue.Queue[T | _End] = queue.Queue(depth)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    break
        except BaseException as error:  # noqa: BLE001 -- raised again in the thread that iterates
            self._error = error
        finally:
            self._items.close()
            self._put(_End())

    def _put(self, item: T | _End) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=TICK_S)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[T]:
        while True:
            try:
                item = self._queue.get(timeout=TICK_S)
            except queue.Empty:
                if self._thread.is_alive():
                    continue
                return  # stopped by `close`
            if isinstance(item, _End):
                if self._error is not None:
                    raise self._error
                return
            yield item

    def close(self, patience: float = 5.0) -> None:
        """Stop, and wait for the thread; as a daemon it cannot keep the program alive if a driver hangs."""
        self._stop.set()
        self._thread.join(patience)


class Drain(Generic[T]):
    """Passes items to a function that runs in a thread.

    Args:
        work: called with each item, in order.
        depth: number of items that may wait; `put` blocks when there are more.
    """

    def __init__(self, work: Callable[[T], None], depth: int) -> None:
        self._work = work
        self._queue: queue.Queue[T | _End] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="drain", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            if isinstance(item, _End):
                return
            if self._error is not None:
                continue  # keep emptying, so that `put` does not block before it raises
            try:
                self._work(item)
            except BaseException as error:  # noqa: BLE001 -- raised again by `put` or `close`
                self._error = error

    def put(self, item: T) -> None:
        """Queue an item; raise the error that the function raised for an earlier one."""
        if self._error is not None:
            raise self._error
        self._queue.put(item)

    def close(self) -> None:
        """Wait until all items are done; raise the error that the function raised."""
        self._queue.put(_End())
        self._thread.join()
        if self._error is not None:
            raise self._error
