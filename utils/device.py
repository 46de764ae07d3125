"""Device selection, precision, memory and timing."""

from __future__ import annotations

import ctypes
import logging
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from utils.errors import ConfigError, MemoryLimitError

LOGGER = logging.getLogger(__name__)
CPUINFO = Path("/proc/cpuinfo")
BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")  # CPU flags of x86-64 and Arm as listed by Linux


def select_device(text: str = "") -> torch.device:
    """Return the device that `--device` names.

    Args:
        text: `''` = first CUDA GPU, else the CPU; `'cpu'`; a GPU number such as `'0'` or `'cuda:1'`; `'mps'`.

    Raises:
        ConfigError: the device is not available, or several are given for one process.
    """
    name = str(text).strip().lower().removeprefix("cuda:").replace("cuda", "")
    if name == "cpu" or (not name and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError("--device mps: not available in this PyTorch; use --device cpu")
        return torch.device("mps")
    numbers = [part.strip() for part in (name or "0").split(",") if part.strip()]
    if not all(part.isascii() and part.isdigit() for part in numbers):
        raise ConfigError(f"--device {text}: not a device; allowed are '', cpu, mps, or GPU numbers such as 0 or 0,1")
    count = torch.cuda.device_count()
    if not torch.cuda.is_available() or any(int(part) >= count for part in numbers):
        there = f"{count} CUDA GPU(s), numbered from 0" if count else "no CUDA GPU that this PyTorch can use"
        raise ConfigError(f"--device {text}: not available; there is {there}; use --device cpu")
    if len(numbers) > 1:
        start = f"torchrun --nproc_per_node {len(numbers)} train.py ..."
        raise ConfigError(f"--device {text}: one process uses one GPU; start with: {start}")
    _set_float32_arithmetic()
    return torch.device("cuda", int(numbers[0]))


def _set_float32_arithmetic() -> None:
    """Set how CUDA computes float32, whatever the defaults of the PyTorch version are (docs/gpu.md)."""
    torch.backends.cudnn.allow_tf32 = True  # convolutions
    torch.backends.cuda.matmul.allow_tf32 = False  # attention and linear layers
    torch.backends.cudnn.benchmark = False  # sizes vary (rectangular batches), and equal runs use equal algorithms


def describe_device(device: torch.device) -> str:
    """Return one line about the device: name and memory, or number of threads."""
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        return f"cuda:{device.index} ({p.name}, {p.total_memory / 2**20:.0f} MiB)"
    return f"{device.type} ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work (a no-op on a CPU)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def amp_dtype(text: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype of `--amp` on a device; None = float32.

    `auto` is float16 on CUDA, else float32: bfloat16 is faster on some CPUs, but four trainings of each kind did not
    reach the same accuracy (docs/yolov5-compatibility.md).

    Raises:
        ConfigError: float16 on a CPU, or bfloat16 on a GPU before compute capability 8.0: neither has fast arithmetic
            for it.
    """
    if text == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"--amp bf16: {name} has no bfloat16 arithmetic; allowed: fp16, off")
    if text == "fp16" and device.type == "cpu":
        raise ConfigError("--amp fp16: not supported on a CPU; allowed: bf16, off")
    if text == "auto":
        return torch.float16 if device.type == "cuda" else None
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}[text]


@contextmanager
def out_of_memory(shape: Sequence[int], advice: str) -> Iterator[None]:
    """Convert out-of-memory errors inside the block to a one-line error.

    Args:
        shape: (B, C, H, W) of the images that are processed.
        advice: options to try.

    Raises:
        MemoryLimitError: PyTorch ran out of memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        batch, _, height, width = shape
        size = f"{batch} images of {height} x {width} pixels"
        raise MemoryLimitError(f"out of memory with {size}; try {advice}") from error


@cache
def cpu_has_bf16() -> bool:
    """Return whether the CPU has bfloat16 instructions; False if the system does not report it (Linux does)."""
    try:
        words = set(CPUINFO.read_text(encoding="ascii", errors="replace").split())
    except OSError:
        return False
    return not words.isdisjoint(BF16_FLAGS)


def keep_freed_memory() -> None:
    """Let the C library reuse freed blocks instead of returning them to the system; glibc only.

    By default freed blocks of megabytes are returned, and each new one is mapped and zero-filled page by page: up to a
    tenth of the time of a training step on a CPU. Child processes inherit the setting.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            libc.mallopt(parameter, 2**31 - 1)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h


def to_device(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of any shape to a device; to CUDA from page-locked memory, so that the host does not wait."""
    if device.type != "cuda" or images.device.type != "cpu":
        return images.to(device)
    return (images if images.is_pinned() else images.pin_memory()).to(device, non_blocking=True)


class Profile:
    """Accumulates the seconds spent in `with profile:` blocks.

    On CUDA they are measured with events, and the host waits for the device only when a value is read.

    Attributes:
        count: number of blocks.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.count = 0
        self._total = self._last = self._start = 0.0
        self._begin: torch.cuda.Event | None = None
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def total(self) -> float:
        """Seconds over all blocks."""
        self._collect()
        return self._total

    @property
    def last(self) -> float:
        """Seconds of the latest block."""
        self._collect()
        return self._last

    def __enter__(self) -> Profile:
        if self.device is not None and self.device.type == "cuda":
            self._begin = self._event(self.device)
        else:
            self._start = self._now()
        return self

    def __exit__(self, *exc: object) -> None:
        self.count += 1
        if self._begin is not None and self.device is not None:
            self._pending.append((self._begin, self._event(self.device)))
        else:
            self._add(self._now() - self._start)

    def _now(self) -> float:
        if self.device is not None:
            synchronize(self.device)
        return time.perf_counter()

    def _event(self, device: torch.device) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def _add(self, seconds: float) -> None:
        self._last = seconds
        self._total += seconds

    def _collect(self) -> None:
        for begin, end in self._pending:
            if not end.query():
                end.synchronize()
            self._add(begin.elapsed_time(end) / 1000)
        self._pending.clear()
