"""Memory saved by RevViT's reversible sequence, and its cost in time.

    python -m benchmarks.revvit_memory [--device cpu] [--rounds 2] [--skip-large]

Measured, for the reversible sequence and for plain autograd on the same weights:

- bytes that autograd saves between the forward and the backward pass, for 6, 12, 24 and 48 blocks (every storage that
  saved-tensor hooks see, once, parameters left out), and on a GPU the peak of allocated memory in a training step;
- the same for architecture `large` at 640 pixels, with the time of a training step (interleaved rounds, the fastest
  of each).

Results: benchmarks/results/revvit_memory.json and .md.
"""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import machine, markdown_table, write_results
from engine.compare.measure.detector import kept_for_backward
from models.backbones.revvit import RevViT, RevViTArchitecture

DEPTHS = (6, 12, 24, 48)
FORMS = {"reversible": False, "plain": True}  # name -> no_custom_backward


def kept_bytes(model: RevViT, image: Tensor) -> int:
    """Return the bytes that autograd saves in a forward pass of `model.forward_features`, parameters not included."""
    return kept_for_backward(lambda: model.forward_features(image), model)


def training_step(model: RevViT, image: Tensor) -> tuple[float, int | None]:
    """Return the seconds of a forward and backward pass, and on a GPU the peak memory it allocated.

    On a CPU this is process time over all threads, so that other load is not included.
    """
    cuda = image.device.type == "cuda"
    model.zero_grad(set_to_none=True)
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    clock = time.perf_counter if cuda else time.process_time
    start = clock()
    model.forward_features(image)[0].square().mean().backward()
    if not cuda:
        return clock() - start, None
    torch.cuda.synchronize()
    return clock() - start, torch.cuda.max_memory_allocated() - before


def depth_rows(device: torch.device, side: int, rounds: int) -> list[dict[str, Any]]:
    """Return one row per depth, with blocks of the published small model's width."""
    rows = []
    image = torch.rand(1, 3, side, side, device=device)
    for depth in DEPTHS:
        row: dict[str, Any] = {"layers": depth}
        for form, plain in FORMS.items():
            torch.manual_seed(0)
            arch = RevViTArchitecture(384, depth, 6, 1536)
            model = RevViT(vars(arch), no_custom_backward=plain, drop_path_rate=0.1).to(device).train()
            row[f"{form}_bytes"] = kept_bytes(model, image)
            steps = [training_step(model, image) for _ in range(rounds)]
            row[f"{form}_step_s"] = min(seconds for seconds, _ in steps)
            row[f"{form}_peak_bytes"] = steps[-1][1]
        rows.append(row)
    return rows


def large_row(device: torch.device, rounds: int) -> dict[str, Any]:
    """Measure architecture `large` at 640 pixels, batch 1."""
    torch.manual_seed(0)
    model = RevViT("large").to(device).train()
    image = torch.rand(1, 3, 640, 640, device=device)
    row: dict[str, Any] = {"arch": "large", "imgsz": 640, "batch": 1}
    steps: dict[str, list[float]] = {form: [] for form in FORMS}
    for number in range(rounds):
        for form, plain in FORMS.items():
            model.no_custom_backward = plain
            if number == 0:
                row[f"{form}_bytes"] = kept_bytes(model, image)
            seconds, row[f"{form}_peak_bytes"] = training_step(model, image)
            steps[form].append(seconds)
    row.update({f"{form}_step_s": min(seconds) for form, seconds in steps.items()})
    row["bytes_ratio"] = row["plain_bytes"] / row["reversible_bytes"]
    row["time_ratio"] = row["reversible_step_s"] / row["plain_step_s"]
    return row


def text(results: dict[str, Any]) -> str:
    mib = 2**20
    flat = results["growth_with_depth"]
    parts = [
        "# RevViT: memory saved for the backward pass",
        f"Published small width (384 channels per stream), {results['side']} pixels, batch 1, float32; processor time. "
        f"From {DEPTHS[0]} to {DEPTHS[-1]} blocks: reversible x {flat['reversible']:.3f}, plain x {flat['plain']:.3f}.",
        markdown_table(
            ["blocks", "reversible, MiB", "plain, MiB", "ratio", "step reversible, s", "step plain, s"],
            [
                [
                    row["layers"],
                    f"{row['reversible_bytes'] / mib:.2f}",
                    f"{row['plain_bytes'] / mib:.2f}",
                    f"{row['plain_bytes'] / row['reversible_bytes']:.1f}",
                    f"{row['reversible_step_s']:.3f}",
                    f"{row['plain_step_s']:.3f}",
                ]
                for row in results["depth"]
            ],
        ),
    ]
    large = results.get("large")
    if large:
        parts.append(
            f"Architecture `large` at {large['imgsz']} pixels, batch 1: {large['reversible_bytes'] / mib:.1f} MiB "
            f"against {large['plain_bytes'] / mib:.1f} MiB (1 : {large['bytes_ratio']:.1f}); a training step takes "
            f"{large['reversible_step_s']:.2f} s against {large['plain_step_s']:.2f} s (x {large['time_ratio']:.2f})."
        )
    for row in [*results["depth"], *([large] if large else [])]:
        if row["plain_peak_bytes"] is not None:
            name = row.get("layers", row.get("arch"))
            parts.append(
                f"Peak on the GPU, {name}: {row['reversible_peak_bytes'] / mib:.0f} MiB reversible, "
                f"{row['plain_peak_bytes'] / mib:.0f} MiB plain (gradients of the parameters included)."
            )
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time of RevViT's reversible sequence.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side", type=int, default=224, help="pixels, for the table over depths")
    parser.add_argument("--rounds", type=int, default=2, help="timed training steps of each form")
    parser.add_argument("--skip-large", action="store_true")
    parser.add_argument("--name", default="revvit_memory", help="name of the two result files")
    options = parser.parse_args()
    device = torch.device(options.device)
    rows = depth_rows(device, options.side, options.rounds)
    results: dict[str, Any] = {"machine": machine(device), "side": options.side, "depth": rows}
    results["growth_with_depth"] = {form: rows[-1][f"{form}_bytes"] / rows[0][f"{form}_bytes"] for form in FORMS}
    if not options.skip_large:
        results["large"] = large_row(device, options.rounds)
    write_results(options.name, results, text(results))


if __name__ == "__main__":
    main()
