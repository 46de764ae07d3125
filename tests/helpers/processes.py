"""Several processes on this machine, as torchrun would start them, for tests."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil
import torch


def free_ports(count: int) -> list[int]:
    """Return unused ports."""
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


def run_processes(work: Callable[[Path], None], folder: Path, count: int = 2, timeout: float = 150) -> list[int | None]:
    """Call `work(folder)` in new processes, each with torchrun's environment; return their exit codes by rank.

    `next_group` has to be called before each further process group. A process still alive at the end is killed: None.
    """
    context = multiprocessing.get_context("spawn")
    ports = free_ports(8)
    started = [context.Process(target=_child, args=(work, folder, rank, count, ports)) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
        process.join()
    return codes


def next_group() -> None:
    """Let the next process group meet at a port of its own."""
    first, *rest = os.environ["TEST_PORTS"].split(",")
    os.environ.update(MASTER_PORT=first, TEST_PORTS=",".join(rest))


def _child(work: Callable[[Path], None], folder: Path, rank: int, count: int, ports: list[int]) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1", TEST_PORTS=",".join(map(str, ports)),
    )  # fmt: skip
    next_group()
    work(folder)


def ends(pid: int, seconds: float) -> bool:
    """Return whether a process that is not a child ends in time; one that nobody waits for remains a zombie."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    return False
