"""Settings that a candidate's process starts with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Setting:
    """Settings of a candidate's process.

    Attributes:
        file: model YAML or checkpoint.
        names: class names of the dataset by index.
        device: value of `--device`.
        threads: PyTorch threads; 0 = PyTorch's default.
        memory: bytes that may be allocated on a CPU; infinity = no limit.
        plugin: files that register backbones.
        head: value of `--head` of train.py; None = the head of the file.
    """

    file: Path
    names: dict[int, str]
    device: str = "cpu"
    threads: int = 0
    memory: float = float("inf")
    plugin: tuple[str, ...] = ()
    head: str | None = None
