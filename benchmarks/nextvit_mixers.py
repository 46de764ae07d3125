"""Forward time of Next-ViT with each of its three token mixers, by image size.

    python -m benchmarks.nextvit_mixers [--device cpu] [--arch small] [--batch 8] [--sizes 224 384 640] [--rounds 5]

Re-parameterized, evaluation mode. The mixers alternate within a round, so that a change in the machine's speed affects
all three; reported is the median over the rounds, on a CPU of the process time over all threads. The published report
(TensorRT, V100, AMP16, batch 8) has, for `emhsa` : `emhsa2d` : `xca`, 1 : 1.00 : 0.99 at 224 and 1 : 0.89 : 0.78 at
384.

Results: benchmarks/results/nextvit_mixers.json and .md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import machine, markdown_table, write_results
from models.backbones.nextvit import ARCHITECTURES, NextViT
from models.backbones.nextvit_attention import MIXERS


def build(arch: str, mixer: str, device: torch.device) -> NextViT:
    """Return a re-parameterized model with random weights."""
    torch.manual_seed(0)
    model = NextViT(arch, mixer=mixer).eval()
    model.reparameterize()
    return model.requires_grad_(False).to(device)


def seconds(model: NextViT, image: Tensor, half: bool) -> float:
    """Return the seconds of one forward pass."""
    cuda = image.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    clock = time.perf_counter if cuda else time.process_time
    start = clock()
    with torch.inference_mode(), torch.autocast(image.device.type, enabled=half):
        model(image)
    if cuda:
        torch.cuda.synchronize()
    return clock() - start


def gflops(model: NextViT, side: int, device: torch.device) -> float:
    """Return 10^9 operations for one image; a multiply-add counts as two."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.rand(1, 3, side, side, device=device))
    return counter.get_total_flops() / 1e9


def measure(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Return one row per size: per mixer the median, fastest and all times, and the ratio to `emhsa`."""
    models = {mixer: build(options.arch, mixer, device) for mixer in MIXERS}
    rows = []
    for side in options.sizes:
        image = torch.rand(options.batch, 3, side, side, device=device)
        times: dict[str, list[float]] = {mixer: [] for mixer in MIXERS}
        for number in range(options.warmup + options.rounds):
            for mixer, model in models.items():
                taken = seconds(model, image, options.half)
                if number >= options.warmup:
                    times[mixer].append(taken)
        row: dict[str, Any] = {"size": side}
        for mixer, model in models.items():
            row[mixer] = {
                "median_s": statistics.median(times[mixer]),
                "best_s": min(times[mixer]),
                "ratio": statistics.median(a / b for a, b in zip(times[mixer], times["emhsa"])),
                "gflops": gflops(model, side, device),
                "times_s": times[mixer],
            }
        rows.append(row)
    return rows


def text(results: dict[str, Any]) -> str:
    header = ["pixels", *(f"{mixer}, ms" for mixer in MIXERS), "ratio", *(f"{mixer}, GFLOPs" for mixer in MIXERS)]
    lines = [
        [
            row["size"],
            *(f"{1000 * row[mixer]['median_s']:.1f}" for mixer in MIXERS),
            " : ".join(f"{row[mixer]['ratio']:.2f}" for mixer in MIXERS),
            *(f"{row[mixer]['gflops']:.2f}" for mixer in MIXERS),
        ]
        for row in results["rows"]
    ]
    about = (
        f"Next-ViT {results['arch']}, re-parameterized, batch {results['batch']}, "
        f"{'autocast' if results['half'] else 'float32'}; median of {results['rounds']} interleaved rounds, the ratio "
        "being the median of the rounds' ratios. Published (TensorRT, V100, AMP16): 1 : 1.00 : 0.99 at 224, "
        "1 : 0.89 : 0.78 at 384."
    )
    return f"# Next-ViT: token mixers\n\n{about}\n\n{markdown_table(header, lines)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Forward time of Next-ViT's token mixers.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arch", default="small", choices=list(ARCHITECTURES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 384, 640])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="discarded rounds")
    parser.add_argument("--half", action="store_true", help="autocast")
    parser.add_argument("--name", default="nextvit_mixers", help="name of the two result files")
    options = parser.parse_args()
    device = torch.device(options.device)
    results: dict[str, Any] = {"machine": machine(device), **vars(options), "rows": measure(options, device)}
    write_results(options.name, results, text(results))


if __name__ == "__main__":
    main()
