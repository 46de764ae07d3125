"""Several processes on one training: who am I, and how do we agree."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from utils.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process among those that torchrun started; rank -1 and size 1 without torchrun."""

    rank: int = -1
    local_rank: int = -1
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank in (-1, 0)


def world_from_environment() -> World:
    """Read what torchrun left in the environment."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return World()
    return World(int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), size)


@contextmanager
def process_group(world: World, device: torch.device) -> Iterator[None]:
    """Join the process group for the block (nccl on CUDA, gloo on a CPU); nothing to do for a single process."""
    if world.size == 1:
        yield
        return
    if not dist.is_available():
        raise ConfigError("torchrun: this PyTorch is built without torch.distributed; start python train.py instead")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def main_first(world: World) -> Iterator[None]:
    """Let rank zero go through the block before the others (it writes caches that they read)."""
    if world.size > 1 and not world.is_main:
        dist.barrier()
    yield
    if world.size > 1 and world.is_main:
        dist.barrier()


def broadcast(value: object, world: World) -> object:
    """Rank zero's value, on every rank."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def any_rank(flag: bool, world: World) -> bool:
    """Whether the flag is set on at least one rank; every rank has to ask."""
    if world.size == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(int(flag), device=device)
    dist.all_reduce(total)
    return bool(total.item())
