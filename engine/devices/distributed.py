"""Several processes on one training: who am I, how do we agree, and how do we end together.

What the processes tell each other outside of a training step (whether to stop, what a validation found) goes through
the CPU by gloo and may wait for hours; gradients have a group of their own, nccl on CUDA, that waits for minutes.
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

from utils.errors import ConfigError, TrainingError, UserError
from utils.log import end_silently

T = TypeVar("T")
WAIT = timedelta(hours=6)
"""How long processes wait for each other outside of a training step: for a download, a label scan, a slow disk."""

_LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")  # in messages about a lost peer


@dataclass(frozen=True)
class World:
    """This process among those that torchrun started; rank -1 and size 1 without torchrun.

    Attributes:
        gradients: process group of gradients and batch statistics; None for a single process.
    """

    rank: int = -1
    local_rank: int = -1
    size: int = 1
    gradients: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank in (-1, 0)

    @property
    def number(self) -> int:
        """The rank, 0 for a single process."""
        return max(self.rank, 0)


def world_from_environment() -> World:
    """Read what torchrun left in the environment."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return World()
    return World(int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), size)


def own_device(text: str, world: World) -> str:
    """What `--device` means for this process: with several on a machine, each takes its own of the GPUs.

    Raises:
        ConfigError: fewer GPUs are named than there are processes on this machine.
    """
    if world.size == 1 or text.strip().lower() == "cpu" or not torch.cuda.is_available():
        return text
    numbers = [part for part in text.split(",") if part.strip()]
    if not numbers:
        return str(world.local_rank)
    if world.local_rank >= len(numbers):
        raise ConfigError(
            f"--device {text}: {len(numbers)} GPU(s) for more processes than that on one machine; each process takes "
            "one GPU: name as many as --nproc_per_node, or leave --device out"
        )
    return numbers[world.local_rank]


@contextmanager
def process_group(world: World) -> Iterator[None]:
    """Join the other processes for the block; nothing to do for a single one.

    When the block fails, one process speaks for all: the first that fails raises its error. The others, which fail by
    the same mistake or because that one is gone, end silently (SystemExit with the status of a failure).

    Raises:
        TrainingError: another process died without a word.
    """
    if world.size == 1:
        yield
        return
    if not dist.is_available():
        raise ConfigError("torchrun: this PyTorch is built without torch.distributed; start python train.py instead")
    store = _join(world)
    try:
        yield
        broadcast(None, world)  # rank zero may have files to write when the others are done: all leave together
    except Exception as error:
        if not _is_first(store):
            end_silently(status_of(error))
        if _is_loss(error):
            raise TrainingError(
                f"rank {world.rank}: another process of this training is gone; its own message, or torchrun's summary, "
                "says why"
            ) from error
        raise
    # Not after an error: taking a group apart may wait for processes that are gone. This one ends anyway.
    dist.destroy_process_group()


def _join(world: World) -> dist.Store:
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"detector/{attempt}", store)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size, timeout=WAIT)
    return store


def _is_first(store: dist.Store) -> bool:
    """Whether no other process has failed so far."""
    try:
        return store.add("failures", 1) == 1
    except RuntimeError:
        return True  # nobody can be asked: a message too many is better than none


def _is_loss(error: Exception) -> bool:
    if isinstance(error, TrainingError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST)


def status_of(error: Exception) -> int:
    """Exit status of a process that ends by this error."""
    return 2 if isinstance(error, UserError) else 1


def with_gradients(world: World, device: torch.device) -> World:
    """The world with its group for gradients: nccl on CUDA (10 minutes' patience), gloo on a CPU (30 minutes')."""
    if world.size == 1:
        return world
    return replace(world, gradients=dist.new_group(backend="nccl" if device.type == "cuda" else "gloo"))


# ---- agreeing -------------------------------------------------------------------------------------------------------


@contextmanager
def main_first(world: World) -> Iterator[None]:
    """Let rank zero go through the block before the others (it fetches and writes what they read).

    Then comes the first process of each other machine, whose disk may be another one, then the rest. All wait until all
    are through; when one fails, all end, and only that one with a message.
    """
    if world.size == 1:
        yield
        return
    turn = 0 if world.is_main else 1 if world.local_rank == 0 else 2
    for _ in range(turn):
        _take_turn(0, world)
    try:
        yield
    except Exception as error:
        gather_all(status_of(error), world)  # the turn that the others wait in
        raise
    for _ in range(turn, 3):
        _take_turn(0, world)


def _take_turn(status: int, world: World) -> None:
    failed = max(gather_all(status, world))
    if failed:
        end_silently(failed)


def broadcast(value: T, world: World) -> T:
    """Rank zero's value, on every rank."""
    if world.size == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T, world: World) -> list[T]:
    """Every rank's value, by rank, on rank zero; nothing on the others."""
    if world.size == 1:
        return [value]
    found: list[Any] | None = [None] * world.size if world.is_main else None
    dist.gather_object(value, found, dst=0)
    return found or []


def gather_all(value: T, world: World) -> list[T]:
    """Every rank's value, by rank, on every rank."""
    if world.size == 1:
        return [value]
    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, value)
    return found


def any_rank(flag: bool, world: World) -> bool:
    """Whether the flag is set on at least one rank; every rank has to ask."""
    if world.size == 1:
        return flag
    total = torch.tensor(int(flag))
    dist.all_reduce(total)
    return bool(total.item())


@torch.no_grad()
def copy_from_main(module: nn.Module, world: World) -> None:
    """Give parameters and buffers of a module the values that they have on rank zero."""
    if world.size == 1:
        return
    tensors = [t for t in module.state_dict().values() if isinstance(t, torch.Tensor)]
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in same])
        dist.broadcast(flat, src=0, group=world.gradients)
        for tensor, values in zip(same, flat.split([t.numel() for t in same])):
            tensor.copy_(values.view(tensor.shape))


@contextmanager
def file_from_main(path: Path, world: World) -> Iterator[Path | None]:
    """Rank zero's file on every rank, whose disk may be another one: a copy for the block; None where there is none."""
    if world.size == 1:
        yield path if path.is_file() else None
        return
    content = broadcast(path.read_bytes() if world.is_main and path.is_file() else None, world)
    if content is None or world.is_main:
        yield None if content is None else path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(content)
        yield copy
