"""Measure the training loader in images per second.

    python -m benchmarks.loader --data FOLDER [--imgsz 640] [--batch-size 16] [--workers 0 2] [--rounds 5]

FOLDER holds images in YOLO layout (`.../images/train`, labels in `.../labels/train`); nothing is written there. The
recipe is that of hyp.scratch-low (mosaic of four, scale, translation, HSV, horizontal flip). A round is one epoch of
each setting in turn, so that a change of load affects all of them; the first epoch, which starts workers and fills
caches, is discarded. Reported: the median round and the range.

The dataset is repeated so that it does not fit into the loader's cache of recent images.

"paste, then warp" is the usual implementation, measured in the same run: four random images are read, resized and
pasted into a canvas of twice the side, which is warped; HSV by three look-up tables, a flip, a transposed copy.

Decodes per image: files opened in an epoch divided by the number of images, in this process, with the cache of recent
images empty at first and limited to one mosaic window.

Results: benchmarks/results/loader.json and .md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from benchmarks.report import machine, markdown_table, write_results
from data.augment.config import AugmentConfig
from data.images import read
from data.labels.labels import ImageRecord, load_annotations
from data.loading import image_cache as image_store
from data.loading.dataset import DetectionDataset
from data.loading.image_cache import ImageStore
from data.loading.loader import DetectionLoader
from data.loading.order import WINDOW
from utils.device import keep_freed_memory
from utils.files import ROOT
from utils.yaml_lines import load_yaml

MANY_CLASSES = 10**6  # class indices do not matter here


class Clock:
    """Images per second, and milliseconds of CPU time per image in this process (workers not included)."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.cpu_ms: list[float] = []

    def round(self, work: Callable[[], int]) -> None:
        """Time `work`, which returns the number of images it produced."""
        wall, cpu = time.perf_counter(), time.process_time()
        made = work()
        self.rates.append(made / (time.perf_counter() - wall))
        self.cpu_ms.append(1000 * (time.process_time() - cpu) / made)

    def to_dict(self) -> dict[str, list[float]]:
        """Return all rounds but the first, which is the warm-up."""
        return {"rates": self.rates[1:], "cpu_ms": self.cpu_ms[1:]}


def run_epoch(loader: DetectionLoader, epoch: int) -> int:
    """Iterate over an epoch and return the number of images."""
    loader.set_epoch(epoch)
    return sum(len(batch.paths) for batch in loader)


def usual_sample(record_images: Sequence[np.ndarray | Path], imgsz: int, rng: np.random.Generator) -> np.ndarray:
    """Return a (3, imgsz, imgsz) uint8 mosaic of four images (arrays or paths), pasted into a canvas and warped."""
    cx, cy = (int(v) for v in rng.uniform(imgsz / 2, imgsz * 1.5, 2))
    canvas = np.full((2 * imgsz, 2 * imgsz, 3), 114, np.uint8)
    for corner, chosen in enumerate(rng.integers(0, len(record_images), 4)):
        source = record_images[chosen]
        image = source if isinstance(source, np.ndarray) else read(source)
        factor = imgsz / max(image.shape[:2])
        if factor != 1:
            image = cv2.resize(image, None, fx=factor, fy=factor)
        h, w = image.shape[:2]
        x, y = (cx - w, cx)[corner % 2], (cy - h, cy)[corner // 2]
        x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, 2 * imgsz), min(y + h, 2 * imgsz)
        canvas[y1:y2, x1:x2] = image[y1 - y : y2 - y, x1 - x : x2 - x]
    zoom, (dx, dy) = rng.uniform(0.5, 1.5), rng.uniform(0.4, 0.6, 2) * imgsz
    matrix = np.array(((zoom, 0, dx - zoom * imgsz), (0, zoom, dy - zoom * imgsz)))
    image = cv2.warpAffine(canvas, matrix, (imgsz, imgsz), borderValue=(114, 114, 114))
    gains, tops = rng.uniform(0.6, 1.4, 3), (179, 255, 255)
    tables = [np.clip(np.arange(256) * gain, 0, top).astype(np.uint8) for gain, top in zip(gains, tops)]
    hsv = [cv2.LUT(plane, table) for plane, table in zip(cv2.split(cv2.cvtColor(image, cv2.COLOR_BGR2HSV)), tables)]
    image = cv2.cvtColor(cv2.merge(hsv), cv2.COLOR_HSV2BGR)
    if rng.random() < 0.5:
        image = np.fliplr(image)
    return np.ascontiguousarray(image.transpose(2, 0, 1)[::-1])


def run_usual(record_images: Sequence[np.ndarray | Path], imgsz: int, batch_size: int, epoch: int) -> int:
    """Run one epoch of `usual_sample`, stacked into batches, and return the number of images."""
    rng = np.random.default_rng(epoch)
    count = len(record_images)
    for first in range(0, count, batch_size):
        made = [usual_sample(record_images, imgsz, rng) for _ in range(min(batch_size, count - first))]
        torch.stack([torch.from_numpy(image) for image in made])
    return count


def decodes_per_image(records: Sequence[ImageRecord], imgsz: int, recipe: AugmentConfig) -> float:
    """Return files opened per image in a shuffled epoch, with a cache of one mosaic window."""
    dataset = DetectionDataset(records, imgsz, augment=recipe)
    largest = max(min(r.height, imgsz) * min(r.width, imgsz) * 3 for r in records)
    dataset._images = ImageStore(records, imgsz, smooth=False, recent_bytes=WINDOW * largest)
    opened = 0

    def counted(path: Any) -> Any:
        nonlocal opened
        opened += 1
        return read(path)

    plain, image_store.read = image_store.read, counted
    try:
        run_epoch(DetectionLoader(dataset, 16, shuffle=True), 0)
    finally:
        image_store.read = plain
    return opened / len(records)


def measure(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Measure all settings in interleaved rounds."""
    keep_freed_memory()  # as train.py does
    found = load_annotations([args.data], MANY_CLASSES, cache_folder=folder, progress=False).records
    records = list(found) * args.repeat
    recipe = AugmentConfig.from_hyp(load_yaml(ROOT / "data/hyps/hyp.scratch-low.yaml"))
    loaders = {}
    for cache in args.cache:
        for workers in args.workers:
            dataset = DetectionDataset(
                records, args.imgsz, augment=recipe, cache=None if cache == "none" else cache, cache_folder=Path(folder)
            )
            loaders[cache, workers] = DetectionLoader(dataset, args.batch_size, workers=workers, shuffle=True)
    sources: dict[str, list[Any]] = {"none": [r.path for r in records]}
    if "ram" in args.cache:
        sources["ram"] = [read(r.path) for r in records]
    clocks = {key: Clock() for key in loaders}
    usual = {cache: Clock() for cache in sources}
    for epoch in range(args.rounds + 1):
        for cache, source in sources.items():
            usual[cache].round(lambda s=source, e=epoch: run_usual(s, args.imgsz, args.batch_size, e))  # type: ignore[misc]
        for key, loader in loaders.items():
            clocks[key].round(lambda x=loader, e=epoch: run_epoch(x, e))  # type: ignore[misc]
    for loader in loaders.values():
        loader.close()
    return {
        "machine": {**machine(torch.device("cpu")), "opencv": cv2.__version__, "opencv threads": cv2.getNumThreads()},
        "images": len(records),
        "imgsz": args.imgsz,
        "batch_size": args.batch_size,
        "decodes_per_image": decodes_per_image(records, args.imgsz, recipe),
        "settings": [
            {"cache": cache, "workers": loaders[cache, asked].workers, "asked": asked, **c.to_dict()}
            for (cache, asked), c in clocks.items()
        ],
        "paste_then_warp": [{"cache": cache, "workers": 0, **c.to_dict()} for cache, c in usual.items()],
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of images")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--cache", nargs="+", default=["none", "ram"], choices=["none", "ram", "disk"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=3, help="how often the dataset is repeated")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(args, folder)
    rows = [
        ("this loader" if name == "settings" else "paste, then warp", *_row(setting))
        for name in ("settings", "paste_then_warp")
        for setting in results[name]
    ]
    text = (
        f"Training samples of {results['images']} images at {args.imgsz}, batch {args.batch_size}, mosaic of four; "
        f"{results['decodes_per_image']:.2f} files decoded per image and epoch.\n\n"
        + markdown_table(("how", "cache", "workers", "images/s (median)", "range", "CPU ms/image"), rows)
        + "\n"
    )
    write_results("loader", results, text)


def _row(setting: dict[str, Any]) -> tuple[Any, ...]:
    rates, workers = setting["rates"], setting["workers"]
    asked = setting.get("asked", workers)  # a loader starts at most one worker per processor
    cpu = "" if workers else f"{statistics.median(setting['cpu_ms']):.2f}"  # of this process only, so not with workers
    spread = f"{min(rates):.0f} .. {max(rates):.0f}"
    shown = workers if workers == asked else f"{workers} ({asked} asked)"
    return setting["cache"], shown, f"{statistics.median(rates):.0f}", spread, cpu


if __name__ == "__main__":
    main()
