"""Time of single stages: `--help`, NMS, metrics, forward pass, training step.

`python -m benchmarks.stages` writes results/stages.{json,md}. Compare ratios measured in one run on an idle
machine only.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.report import machine, markdown_table, write_results
from engine.cli.config import Hyperparameters
from engine.train.optimizer import build_optimizer, parameter_groups
from models.losses.anchor_based import DetectionLoss, LossConfig
from models.yolo import DetectionModel
from utils.device import select_device, synchronize
from utils.files import ROOT
from utils.metrics import ap_per_class
from utils.nms import non_max_suppression

# Times of the official project on another 2-core machine, for orientation only.
OFFICIAL_MS = {
    "--help of train.py": 5100.0,
    "NMS, 8 images, 3.5k boxes each above 0.001": 52.0,
    "NMS, the same at conf 0.25": 2.5,
    "NMS, 8 images, 22k boxes each above 0.001": 1492.0,
    "AP of 200k detections, 80 classes": 165.0,
    "yolov5s forward, 640, batch 1, fused": 101.0,
    "train step yolov5n, 320, batch 16": 531.0,
}


def median_ms(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Return the median time of `work` in milliseconds, after one discarded round."""
    times = []
    for _ in range(rounds + 1):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) * 1000


def predictions(candidates: int, device: torch.device) -> torch.Tensor:
    """Return predictions (8, 25200, 85) in clusters; `candidates` rows per image have a confidence above 0.001."""
    g = torch.Generator().manual_seed(candidates)
    out = torch.zeros(8, 25200, 85)
    centers = torch.rand(8, 60, 2, generator=g) * 640
    at = torch.randint(60, (8, 25200), generator=g)
    out[..., :2] = centers.gather(1, at[..., None].expand(-1, -1, 2)) + torch.randn(8, 25200, 2, generator=g) * 6
    out[..., 2:4] = 40 + 40 * torch.rand(8, 25200, 2, generator=g)
    out[:, :candidates, 4] = torch.rand(8, candidates, generator=g) ** 4 * 0.9 + 0.05
    out[..., 5:].scatter_(2, (at % 80)[..., None], 0.3 + 0.6 * torch.rand(8, 25200, 1, generator=g))
    return out.to(device)


def train_step(device: torch.device) -> Callable[[], object]:
    """Return a function that does one training step of yolov5n at 320 pixels, batch 16."""
    model = DetectionModel(ROOT / "models/yolov5n.yaml", nc=80).to(device, memory_format=torch.channels_last)
    hyp = Hyperparameters.from_yaml(ROOT / "data/hyps/hyp.scratch-low.yaml").to_dict()
    config = LossConfig.from_hyp(hyp, num_levels=3, num_classes=80, imgsz=320)
    stride = model.stride.view(-1, 1, 1).to(device)
    criterion = DetectionLoss(model.head.anchors * stride, model.stride, config)
    optimizer = build_optimizer("SGD", parameter_groups(model, 5e-4), 0.01, 0.9)
    images = torch.rand(16, 3, 320, 320, device=device).contiguous(memory_format=torch.channels_last)
    targets = torch.rand(200, 6) * torch.tensor([16, 80, 1, 1, 0.3, 0.3])
    targets[:, :2].floor_()

    def step() -> None:
        total, _ = criterion(model(images), targets)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Measure every stage and write the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = select_device(options.device)
    found: dict[str, float] = {}

    def note(name: str, work: Callable[[], object]) -> None:
        found[name] = round(median_ms(work, device, options.rounds), 2)
        print(f"{name}: {found[name]} ms", flush=True)

    for script in ("train", "val", "detect", "export"):
        command = [sys.executable, str(ROOT / f"{script}.py"), "--help"]
        note(f"--help of {script}.py", lambda c=command: subprocess.run(c, capture_output=True, check=True))  # type: ignore[misc]
    few, many = predictions(3500, device), predictions(22000, device)
    note("NMS, 8 images, 3.5k boxes each above 0.001", lambda: non_max_suppression(few, 0.001, 0.6))
    note("NMS, the same at conf 0.25", lambda: non_max_suppression(few, 0.25, 0.45))
    note("NMS, 8 images, 22k boxes each above 0.001", lambda: non_max_suppression(many, 0.001, 0.6))
    r = np.random.RandomState(0)
    tp = r.rand(200_000, 10) < 0.4
    args = (tp, r.rand(200_000), r.randint(0, 80, 200_000), r.randint(0, 80, 30_000))
    note("AP of 200k detections, 80 classes", lambda: ap_per_class(*args))
    small = DetectionModel(ROOT / "models/yolov5s.yaml").fuse().eval().to(device, memory_format=torch.channels_last)
    image = torch.rand(1, 3, 640, 640, device=device).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        note("yolov5s forward, 640, batch 1, fused", lambda: small(image))
    note("train step yolov5n, 320, batch 16", train_step(device))
    rows = [(name, f"{ms:.1f}", OFFICIAL_MS.get(name, "")) for name, ms in found.items()]
    text = "# Time of the stages, medians in milliseconds\n\n"
    text += "The last column is the official project on another 2-core machine.\n\n"
    text += markdown_table(("stage", "here, ms", "official elsewhere, ms"), rows) + "\n"
    write_results("stages", {"machine": machine(device), "median_ms": found}, text)


if __name__ == "__main__":
    main()
