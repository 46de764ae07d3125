"""Two ends of a pipeline: a thread that fills a bounded queue, and one that empties another.

Order is kept. An error in either thread surfaces in the thread that uses the queue; nothing waits for ever.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
TICK_S = 0.2  # how often a waiting thread looks whether it should stop


class _End:
    """Marks the end of a queue."""


class Feed(Generic[T]):
    """Runs a generator in a thread of its own, ahead of who iterates over the feed.

    Args:
        items: made, advanced and closed in the thread.
        depth: how far ahead it may be.
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
        """Stop, and wait for the thread (a daemon: one that hangs in a driver does not keep the program alive)."""
        self._stop.set()
        self._thread.join(patience)


class Drain(Generic[T]):
    """Hands items to a function in a thread of its own.

    Args:
        work: called with each item, in order.
        depth: how many items may wait; `put` blocks when there are more.
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
        """Queue an item; raises what the function raised for an earlier one."""
        if self._error is not None:
            raise self._error
        self._queue.put(item)

    def close(self) -> None:
        """Wait until all is done; raises what the function raised."""
        self._queue.put(_End())
        self._thread.join()
        if self._error is not None:
            raise self._error
