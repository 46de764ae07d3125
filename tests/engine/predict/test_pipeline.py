"""`Feed` and `Drain`: order, bounds, and propagation of errors."""

import threading
import time

import pytest

from engine.predict.pipeline import Drain, Feed


def numbers(count, made, closed=None):
    try:
        for i in range(count):
            made.append(i)
            yield i
    finally:
        if closed is not None:
            closed.append(threading.current_thread().name)


def test_feed_keeps_order_within_its_depth():
    made = []
    feed = Feed(numbers(50, made), depth=3)
    seen = []
    for item in feed:
        if item == 0:
            time.sleep(0.2)
            assert len(made) <= 6  # one received, three queued, one in progress
        seen.append(item)
    assert seen == list(range(50))


def test_feed_raises_error_of_generator():
    def broken():
        yield 1
        raise ValueError("decoder")

    seen = []
    with pytest.raises(ValueError, match="decoder"):
        for item in Feed(broken(), depth=2):
            seen.append(item)  # noqa: PERF402 (the items before the error count)
    assert seen == [1]


def test_feed_close_closes_generator_in_its_thread():
    made, closed = [], []
    feed = Feed(numbers(10**9, made, closed), depth=2)
    iterator = iter(feed)
    assert next(iterator) == 0
    feed.close()
    assert closed == ["feed"]
    assert list(iterator) == [1, 2] or len(list(iterator)) <= 2  # queued items, then the end


def test_drain_works_in_order_in_its_thread():
    done, threads = [], set()

    def work(item):
        time.sleep(0.002)
        threads.add(threading.current_thread().name)
        done.append(item)

    drain = Drain(work, depth=2)
    for i in range(20):
        drain.put(i)
    drain.close()
    assert done == list(range(20)) and threads == {"drain"}


@pytest.mark.parametrize("at", [0, 5])
def test_drain_raises_error_of_work_without_blocking(at):
    done = []

    def work(item):
        if item == at:
            raise OSError("disk full")
        done.append(item)

    drain = Drain(work, depth=1)
    with pytest.raises(OSError, match="disk full"):
        for i in range(100):
            drain.put(i)
        drain.close()
    with pytest.raises(OSError, match="disk full"):
        drain.close()
    assert done == list(range(at))  # nothing after the failure
