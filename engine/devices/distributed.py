"""Process groups and collective operations of data-parallel training.

Objects exchanged outside of a training step (stop requests, validation results) go through the CPU by gloo with a
timeout of hours; gradients have their own group, nccl on CUDA, with a timeout of minutes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroup, Store

from utils.errors import ConfigError, TrainingError
from utils.log import FAILURE, end_silently, process_rank, status_of, world_size

T = TypeVar("T")
TIMEOUT = timedelta(hours=6)
"""How long processes wait for each other outside of a training step: for a download, a label scan, a slow disk."""

TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that torchrun sets besides WORLD_SIZE."""

_LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")  # in messages about a lost peer


@dataclass(frozen=True)
class World:
    """This process among those that torchrun started.

    Attributes:
        rank: 0 to size - 1; 0 for a single process.
        local_rank: rank among the processes of this machine.
        size: number of processes.
        gradients: process group of gradients and batch statistics; None for a single process.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    gradients: dist.ProcessGroup | None = None


def world_from_environment() -> World:
    """Read torchrun's environment variables.

    Raises:
        ConfigError: another launcher set WORLD_SIZE, but not all of them.
    """
    size = world_size()
    if size == 1:
        return World()
    missing = [name for name in TORCHRUN if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} not set: start several processes by torchrun, or unset "
            "WORLD_SIZE for a single one"
        )
    return World(process_rank(), int(os.environ["LOCAL_RANK"]), size)


def rank_device(text: str, world: World) -> str:
    """Return the `--device` of this process: with several on a machine, each takes one of the GPUs.

    Raises:
        ConfigError: fewer GPUs are named than there are processes on this machine.
    """
    if world.size == 1 or text.strip().lower() == "cpu" or not torch.cuda.is_available():
        return text
    gpus = [part for part in text.split(",") if part.strip()]
    if not gpus:
        return str(world.local_rank)
    if world.local_rank >= len(gpus):
        raise ConfigError(
            f"--device {text}: {len(gpus)} GPU(s) for more processes on one machine; each process takes "
            "one GPU: name as many as --nproc_per_node, or leave --device out"
        )
    return gpus[world.local_rank]


@contextmanager
def process_group(world: World) -> Iterator[None]:
    """Join the process group for the block; a no-op for a single process.

    When the block fails, only one process reports: the first that fails raises its error. The others, which fail for
    the same reason or because that one has exited, exit silently (SystemExit with the exit status of a failure).

    Raises:
        TrainingError: another process died without reporting an error.
    """
    if world.size == 1:
        yield
        return
    if not dist.is_available():
        raise ConfigError("torchrun: this PyTorch is built without torch.distributed; start python train.py instead")
    store = _join(world)
    try:
        yield
        broadcast(None, world)  # rank zero may still write files when the others are done: all exit together
    except Exception as error:
        if not _is_first(store):
            end_silently(FAILURE if _is_loss(error) else status_of(error))
        if _is_loss(error):
            raise TrainingError(
                f"rank {world.rank}: another process of this training is gone; its own message, or torchrun's summary, "
                "says why"
            ) from error
        raise
    # Not after an error: destroying a group may wait for processes that have exited. This one exits anyway.
    dist.destroy_process_group()


def _join(world: World) -> Store:
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"detector/{attempt}", store)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size, timeout=TIMEOUT)
    return store


def _is_first(store: Store) -> bool:
    """Return whether no other process has failed so far."""
    try:
        return store.add("failures", 1) == 1
    except RuntimeError:
        return True  # the store is gone: a duplicate message is better than none


def _is_loss(error: Exception) -> bool:
    if isinstance(error, TrainingError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST)


def with_gradients(world: World, device: torch.device) -> World:
    """Add the process group for gradients: nccl on CUDA (timeout 10 minutes), gloo on a CPU (30 minutes)."""
    if world.size == 1:
        return world
    group = dist.new_group(backend="nccl" if device.type == "cuda" else "gloo")
    return replace(world, gradients=group if isinstance(group, ProcessGroup) else None)


# ---- collectives ----------------------------------------------------------------------------------------------------


@contextmanager
def main_first(world: World) -> Iterator[None]:
    """Let rank zero run the block before the others (it downloads and writes what they read).

    Next is the first process of each other machine, which may have its own disk, then all others. All wait until
    every process is done; when one fails, all exit, and only that one reports an error.
    """
    if world.size == 1:
        yield
        return
    turn = 0 if world.rank == 0 else 1 if world.local_rank == 0 else 2
    for _ in range(turn):
        _end_turn(world)
    try:
        yield
    except Exception as error:
        gather_all(status_of(error), world)  # the others wait in `_end_turn`
        raise
    for _ in range(turn, 3):
        _end_turn(world)


def _end_turn(world: World) -> None:
    failed = max(gather_all(0, world))
    if failed:
        end_silently(failed)


def broadcast(value: T, world: World) -> T:
    """Return rank zero's value on every rank."""
    if world.size == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T, world: World) -> list[T]:
    """Return every rank's value, by rank, on rank zero; an empty list on the others."""
    if world.size == 1:
        return [value]
    values: list[Any] | None = [None] * world.size if world.rank == 0 else None
    dist.gather_object(value, values, dst=0)
    return values or []


def gather_all(value: T, world: World) -> list[T]:
    """Return every rank's value, by rank, on every rank."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool, world: World) -> bool:
    """Return whether the flag is set on at least one rank; every rank must call it."""
    if world.size == 1:
        return flag
    total = torch.tensor(int(flag))
    dist.all_reduce(total)
    return bool(total.item())


@torch.no_grad()
def mean_over_ranks(value: torch.Tensor, world: World) -> torch.Tensor:
    """Return the mean of a tensor (any shape) over all ranks, on every rank; by the process group of the gradients."""
    total = value.clone()
    dist.all_reduce(total, group=world.gradients)
    return total / world.size


@torch.no_grad()
def copy_from_main(module: nn.Module, world: World) -> None:
    """Copy parameters and buffers of a module from rank zero to all ranks."""
    if world.size == 1:
        return
    tensors = [t for t in module.state_dict().values() if isinstance(t, torch.Tensor)]
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        group = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in group])
        dist.broadcast(flat, src=0, group=world.gradients)
        for tensor, values in zip(group, flat.split([t.numel() for t in group])):
            tensor.copy_(values.view(tensor.shape))


@contextmanager
def file_from_main(path: Path, world: World) -> Iterator[Path | None]:
    """Provide rank zero's file on every rank, as a temporary copy on the others; None if it does not exist."""
    if world.size == 1:
        yield path if path.is_file() else None
        return
    content = broadcast(path.read_bytes() if world.rank == 0 and path.is_file() else None, world)
    if content is None or world.rank == 0:
        yield None if content is None else path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(content)
        yield copy
