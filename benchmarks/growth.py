"""Cost of large datasets, folders and images: label scan, first batch, memory of workers, files of detect.py, P6.

    python -m benchmarks.growth [--images 5000 20000 100000] [--classes 80 2000] [--side 320] [--workers 2]

A dataset is synthetic: links to 64 JPEGs of noise, 1 to 15 boxes an image. Each row is a process of its own. Processor
time counts all processes. A worker's own memory is what it does not share (unique set size), measured after the first
epoch over 1,024 images, which are drawn from the whole dataset. A second table has the forward pass of the fused
yolov5n6 (levels P3 to P6), one image, float32, at growing sizes.

Results: benchmarks/results/growth.json and .md.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import torch

from benchmarks.report import machine, markdown_table, write_results
from data.augment.config import AugmentConfig
from data.labels.labels import load_annotations
from data.loading.dataset import DetectionDataset
from data.loading.loader import DetectionLoader
from data.loading.weights import labels_to_class_weights, labels_to_image_weights
from data.sources.files import find_files
from models.fuse import fuse_conv_bn
from models.yolo import DetectionModel
from utils.device import keep_freed_memory
from utils.files import ROOT
from utils.yaml_lines import load_yaml

FILES = 64
MB = 2**20


def make(folder: Path, images: int, classes: int) -> Path:
    """Write a dataset in YOLO layout and return its folder of images."""
    rng = random.Random(0)
    noise = np.random.default_rng(0)
    for name in ("files", "images/train", "labels/train"):
        (folder / name).mkdir(parents=True)
    files = [folder / "files" / f"{i}.jpg" for i in range(FILES)]
    for file in files:
        pixels = cv2.GaussianBlur(noise.integers(0, 256, (480, 640, 3), np.uint8), (9, 9), 3)
        cv2.imwrite(str(file), pixels)
    for i in range(images):
        (folder / f"images/train/{i:07d}.jpg").symlink_to(files[i % FILES])
        rows = []
        for _ in range(rng.randint(1, 15)):
            w, h = rng.uniform(0.02, 0.4), rng.uniform(0.02, 0.4)
            x, y = rng.uniform(w / 2, 1 - w / 2), rng.uniform(h / 2, 1 - h / 2)
            rows.append(f"{rng.randrange(classes)} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n")
        (folder / f"labels/train/{i:07d}.txt").write_text("".join(rows), encoding="ascii")
    return folder / "images/train"


def processor_seconds() -> float:
    """Return the time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


def measure(source: str, classes: int, side: int, workers: int) -> dict[str, Any]:
    """Measure one dataset in this process."""
    found: dict[str, Any] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), processor_seconds()
        result = work()
        found[name] = {"seconds": time.perf_counter() - wall, "processor_seconds": processor_seconds() - cpu}
        return result

    timed("first_scan", lambda: load_annotations([source], classes, progress=False))
    found["files"] = len(timed("find_files", lambda: find_files(Path(source))).files)
    records = timed("cached_scan", lambda: load_annotations([source], classes, progress=False)).records
    recipe = AugmentConfig.from_hyp(load_yaml(ROOT / "data/hyps/hyp.scratch-low.yaml"))
    dataset = DetectionDataset(records, side, augment=recipe)
    weights = timed("class_weights", lambda: labels_to_class_weights(dataset.labels, classes))
    timed("image_weights", lambda: labels_to_image_weights(dataset.labels, classes, weights))
    loader = DetectionLoader(dataset, 16, workers=workers, shuffle=True)
    batches = timed("first_batch", lambda: _first(loader))
    for _ in range(1024 // 16):
        next(batches, None)
    children = [child.memory_full_info() for child in psutil.Process().children()]
    found["worker_uss_mb"] = [child.uss / MB for child in children]
    found["worker_rss_mb"] = [child.rss / MB for child in children]
    found["main_rss_mb"] = psutil.Process().memory_info().rss / MB
    found["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    loader.close()
    return found


def measure_forward(side: int) -> dict[str, Any]:
    """Measure a forward pass at side x side pixels in this process."""
    keep_freed_memory()  # as val.py and detect.py do
    torch.manual_seed(0)
    model = fuse_conv_bn(DetectionModel(ROOT / "models/hub/yolov5n6.yaml").eval()).to(memory_format=torch.channels_last)
    image = torch.rand(1, 3, side, side).contiguous(memory_format=torch.channels_last)
    seconds = []
    with torch.inference_mode():
        for _ in range(12):
            start = time.process_time()
            model(image)
            seconds.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"side": side, "processor_seconds": statistics.median(seconds[2:]), "peak_rss_mb": peak}


def _first(loader: DetectionLoader) -> Any:
    batches = iter(loader)
    next(batches)
    return batches


def in_process(*options: object) -> dict[str, Any]:
    """Run this benchmark with options of its own process and return what it prints."""
    command = [sys.executable, "-m", "benchmarks.growth", *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def row(images: int, classes: int, args: argparse.Namespace) -> dict[str, Any]:
    """Make a dataset and measure it in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        source = make(Path(folder), images, classes)
        options = ("--measure", source, "--classes", classes, "--side", args.side, "--workers", args.workers)
        return {"images": images, "classes": classes, **in_process(*options)}


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[5000, 20000, 100000])
    parser.add_argument("--classes", type=int, nargs="+", default=[80, 2000])
    parser.add_argument("--side", type=int, default=320)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--forward", type=int, nargs="+", default=[640, 960, 1280], help="sides of the second table")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--measure-forward", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure or args.measure_forward:
        found = (
            measure(args.measure, args.classes[0], args.side, args.workers)
            if args.measure
            else measure_forward(args.measure_forward)
        )
        print(json.dumps(found))
        return
    sizes = [(count, args.classes[0]) for count in args.images] + [(args.images[-1], c) for c in args.classes[1:]]
    rows = [row(images, classes, args) for images, classes in sizes]
    steps = ("first_scan", "cached_scan", "image_weights", "first_batch", "find_files")
    times = [f"{name.replace('_', ' ')}, s (processor s)" for name in steps]
    head = ("images", "classes", *times, "own MB of a worker", "MB of the main process")
    lines = []
    for r in rows:
        times = [f"{r[name]['seconds']:.2f} ({r[name]['processor_seconds']:.2f})" for name in steps]
        own = " / ".join(f"{value:.0f}" for value in r["worker_uss_mb"])
        lines.append((r["images"], r["classes"], *times, own, f"{r['main_rss_mb']:.0f}"))
    forward = [in_process("--measure-forward", side) for side in args.forward]
    sides = []
    for f in forward:
        ms = 1000 * f["processor_seconds"]
        per_pixel = ms / (f["side"] / 1000) ** 2
        sides.append((f["side"], f"{ms:.0f}", f"{per_pixel:.0f}", f"{f['peak_rss_mb']:.0f}"))
    about = {"machine": machine(torch.device("cpu")), "side": args.side, "workers": args.workers}
    forward_head = ("side", "yolov5n6 forward, processor ms", "per million pixels", "peak MB")
    text = f"# Large datasets\n\n{markdown_table(head, lines)}\n\n# Large images\n\n"
    text += markdown_table(forward_head, sides) + "\n"
    write_results("growth", {**about, "rows": rows, "forward": forward}, text)


if __name__ == "__main__":
    main()
