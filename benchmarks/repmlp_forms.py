"""RepMLPNet at detection resolution: parameters and forward time before and after re-parameterization.

`python -m benchmarks.repmlp_forms` writes results/repmlp_forms.{json,md}. The two forms alternate within each round.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch

from benchmarks.report import machine, markdown_table, write_results
from models.backbones.repmlp import RepMLPNet
from utils.device import select_device, synchronize


def main() -> None:
    """Measure the chosen architectures and write the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arch", nargs="+", default=["T224", "B224", "T256", "B256"])
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device = select_device(options.device)
    image = torch.rand(1, 3, options.size, options.size, device=device)
    found, rows = {}, []
    for arch in options.arch:
        training = RepMLPNet(arch, tile_order="spatial").eval().to(device)
        reparameterized = copy.deepcopy(training)
        reparameterized.reparameterize()
        forms = {"training": training, "re-parameterized": reparameterized}
        times: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(options.rounds + 1):
            for name, model in forms.items():
                synchronize(device)
                start = time.perf_counter()
                with torch.no_grad():
                    model(image)
                synchronize(device)
                times[name].append(time.perf_counter() - start)
        params = {name: sum(p.numel() for p in model.parameters()) for name, model in forms.items()}
        ms = {name: statistics.median(values[1:]) * 1000 for name, values in times.items()}
        found[arch] = {"parameters": params, "median_ms": ms, "ratio": ms["re-parameterized"] / ms["training"]}
        millions = [f"{params[name] / 1e6:.2f}" for name in forms]
        rows.append((arch, *millions, *(f"{ms[name]:.0f}" for name in forms), f"{found[arch]['ratio']:.2f}"))
        print(rows[-1], flush=True)
    head = ("arch", "parameters, M: training", "re-parameterized", "ms: training", "re-parameterized", "ratio")
    text = f"# RepMLPNet at {options.size} pixels, batch 1, evaluation mode\n\n{markdown_table(head, rows)}\n"
    write_results("repmlp_forms", {"machine": machine(device), "size": options.size, "forms": found}, text)


if __name__ == "__main__":
    main()
