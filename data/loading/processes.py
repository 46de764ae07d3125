"""Child processes: how many there may be, and that they end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """End this process as soon as the process that started it has ended, killed or not.

    PyTorch's loader workers compare their parent's process ID with the one that they read after their start: a worker
    whose parent was killed in between never ends. Python's pipe between the two exists before the start.
    """
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def processors() -> int:
    """Return the number of processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
