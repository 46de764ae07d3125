"""Roofline of the training step and the forward pass: operations and bytes against what the processor can do.

    python -m benchmarks.roofline [--rounds 9]

The operations are those of convolutions and matrix products (2 per multiply-add), the bytes those of all inputs and
outputs of every operator outside the caches' reach: each tensor is counted once per operator that reads or writes it.
The peak rate is that of a product of two 2048 x 2048 matrices in the same precision, the bandwidth that of copying
256 MB (read and written). A pass cannot take less than the larger of operations / peak and, where no operator finds its
input in a cache, bytes / bandwidth (Williams et al., https://doi.org/10.1145/1498765.1498785).

Results: benchmarks/results/roofline.json and .md.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import machine, markdown_table, write_results
from benchmarks.training import VARIANTS, Step, fresh_model, seconds_of
from models.fuse import fuse_conv_bn
from utils.device import keep_freed_memory

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MATRIX, COPIED = 2048, 2**26  # rows of the matrices; float32 values that are copied


class ByteCounter(TorchDispatchMode):
    """Counts the bytes of the inputs and outputs of every operator that is not a view."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
        return out


def median_of(work: Callable[[], object], rounds: int) -> float:
    """Return the median seconds of a function after two calls."""
    return statistics.median([seconds_of(work, CPU) for _ in range(rounds + 2)][2:])


def limits(rounds: int) -> dict[str, float]:
    """Return operations per second of each precision, and bytes per second of a copy."""
    found = {}
    for name, dtype in DTYPES.items():
        a, b = (torch.rand(MATRIX, MATRIX).to(dtype) for _ in range(2))
        found[name] = 2 * MATRIX**3 / median_of(lambda a=a, b=b: a @ b, rounds)  # type: ignore[misc]
    source, target = torch.rand(COPIED), torch.empty(COPIED)
    found["copy"] = 2 * 4 * COPIED / median_of(lambda: target.copy_(source), rounds)
    return found


def passes() -> dict[str, tuple[str, Callable[[], object]]]:
    """Return what is measured, with its precision."""
    model = fresh_model("yolov5n", CPU)
    works: dict[str, tuple[str, Callable[[], object]]] = {
        "training step, yolov5n, 320, batch 16": ("float32", Step(model, VARIANTS["channels_last"], 320, 16)),
        "training step, yolov5n, 320, batch 16, bfloat16": (
            "bfloat16",
            Step(model, VARIANTS["bf16, channels_last"], 320, 16),
        ),
    }
    fused = fuse_conv_bn(fresh_model("yolov5s", CPU).eval()).to(memory_format=torch.channels_last)
    for batch in (1, 8):
        images = torch.rand(batch, 3, 640, 640).contiguous(memory_format=torch.channels_last)

        @torch.inference_mode()
        def forward(images: Tensor = images) -> object:
            return fused(images)

        works[f"forward, fused yolov5s, 640, batch {batch}"] = "float32", forward
    return works


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    keep_freed_memory()  # as train.py, val.py and detect.py do
    peak = limits(args.rounds)
    rows = []
    for name, (precision, work) in passes().items():
        seconds = median_of(work, args.rounds)
        with FlopCounterMode(display=False) as flops:
            work()
        with ByteCounter() as counted:
            work()
        rows.append(
            {
                "name": name,
                "precision": precision,
                "seconds": seconds,
                "operations": flops.get_total_flops(),
                "bytes": counted.bytes,
            }
        )
    lines = []
    for row in rows:
        compute, memory = row["operations"] / peak[row["precision"]], row["bytes"] / peak["copy"]
        times = (f"{1000 * value:.0f}" for value in (row["seconds"], compute, memory))
        lines.append((row["name"], f"{row['operations'] / 1e9:.1f}", f"{row['bytes'] / 1e9:.2f}", *times))
    rates = ", ".join(f"{peak[name] / 1e9:.0f} GFLOP/s in {name}" for name in DTYPES)
    text = f"# Roofline\n\nProducts of matrices: {rates}; copies: {peak['copy'] / 1e9:.1f} GB/s.\n\n"
    head = ("pass", "GFLOP", "GB", "measured, ms", "ms at the peak rate", "ms at the bandwidth")
    text += markdown_table(head, lines) + "\n"
    write_results("roofline", {"machine": machine(CPU), "limits": peak, "rows": rows}, text)


if __name__ == "__main__":
    main()
