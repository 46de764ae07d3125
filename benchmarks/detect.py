"""Images per second of detection, and the gain by overlapping its three stages.

    python -m benchmarks.detect --source VIDEO_OR_FOLDER ... [--weights FILE.pt] [--imgsz 640] [--rounds 3]

Measured per source, writing annotated images or an mp4 as the command does:

- each stage alone, one after the other: reading and decoding, letterbox, inference, NMS,
  drawing and writing (milliseconds per frame; their sum is what a program without overlap would take);
- all of them together as `detect.py` runs them (frames per second), and the processor time of a frame over all threads;
- the whole command in a process of its own, start-up included (seconds).

Rounds of all sources take turns, so that a change of load hits all of them; shown is the median, and the range of the
frames per second. The machine's load (last minute, this measurement included) is kept too: on a busy machine only the
processor time is meaningful. Without --weights: the small checkpoint of the tests (yolov5n, 3 classes).

Results: benchmarks/results/detect.json and .md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import torch

from benchmarks.report import machine, markdown_table, write_results
from data.sources.files import open_source
from engine.cli.config import DetectConfig
from engine.predict.detections import DrawStyle
from engine.predict.inference import prepare
from engine.predict.predictor import Predictor, input_size
from engine.predict.writers import FileNames, ImageWriter
from engine.runtimes.registry import open_runtime
from utils.device import Profile
from utils.files import ROOT

CHECKPOINT = ROOT / "tests/parity/data/official_checkpoint/yolov5n_bccd.pt"
STAGES = ("read", "fit", "network", "nms", "draw+write")


def stage_times(source: str, predictor: Predictor, folder: Path) -> dict[str, float]:
    """Return the milliseconds per frame of each stage when it runs alone."""
    read, fit, write = Profile(), Profile(), Profile()
    network, nms_time = predictor.inference_time.total, predictor.nms_time.total
    writer = ImageWriter(folder, DrawStyle(predictor.names), FileNames())
    count = 0
    with open_source(source) as opened:
        batches = iter(opened)
        while True:
            with read:
                frames = next(batches, None)
            if frames is None:
                break
            with fit:
                prepared = prepare(frames, predictor.size, predictor.runtime.stride, True)
            (found,) = predictor.predict(prepared)
            with write:
                writer.write(found, None)
            count += 1
        with write:
            writer.close()
    network, nms_time = predictor.inference_time.total - network, predictor.nms_time.total - nms_time
    seconds = (read.total, fit.total, network, nms_time, write.total)
    return {name: 1000 * s / count for name, s in zip(STAGES, seconds)}


def measure(source: str, weights: str, config: DetectConfig) -> dict[str, float]:
    """Measure one round: stages, overlapped run, whole command."""
    device = torch.device("cpu" if config.device == "cpu" or not torch.cuda.is_available() else "cuda")
    runtime = open_runtime([weights], device)
    size = input_size(config.imgsz, runtime)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        values = stage_times(source, Predictor(runtime, config, runtime.names, size), folder)
        run_config = DetectConfig(imgsz=config.imgsz, project=name, device=config.device)
        processor = time.process_time()
        with open_source(source) as opened:
            report = Predictor(runtime, run_config, runtime.names, size).run(opened)
        values["processor"] = 1000 * (time.process_time() - processor) / report.frames
        values["frames/s"] = report.frames / report.elapsed_s
        values["frames"] = report.frames
        command = [sys.executable, str(ROOT / "detect.py"), "--weights", weights, "--source", source]
        command += ["--project", name, "--imgsz", *map(str, config.imgsz), "--device", config.device]
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        values["command s"] = time.perf_counter() - start
    return values


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(prog="benchmarks.detect", description="Frames per second of detection.")
    parser.add_argument("--source", nargs="+", required=True)
    parser.add_argument("--weights", default=str(CHECKPOINT))
    parser.add_argument("--imgsz", type=int, nargs="+", default=[640])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    config = DetectConfig(imgsz=options.imgsz, device=options.device)
    rounds: dict[str, list[dict[str, float]]] = {source: [] for source in options.source}
    for _ in range(options.rounds):
        for source, values in rounds.items():
            values.append(measure(source, options.weights, config))
    rows, results = [], []
    for source, values in rounds.items():
        middle = {key: statistics.median(v[key] for v in values) for key in values[0]}
        rates = [v["frames/s"] for v in values]
        alone = 1000 / sum(middle[s] for s in STAGES)
        results.append({"source": Path(source).name, "median": middle, "one_after_the_other": alone, "rounds": values})
        rows.append(
            [Path(source).name, f"{middle['frames']:.0f}", *(f"{middle[s]:.1f}" for s in STAGES), f"{alone:.1f}",
             f"{middle['frames/s']:.1f} ({min(rates):.1f}..{max(rates):.1f})", f"{middle['processor']:.1f}",
             f"{middle['command s']:.1f}"]
        )  # fmt: skip
    header = ["source", "frames", *(f"{s} ms" for s in STAGES), "frames/s one after the other", "frames/s overlapped",
              "processor ms", "whole command s"]  # fmt: skip
    text = f"# Detection, {Path(options.weights).stem}, {'x'.join(map(str, options.imgsz))}, batch 1\n\n"
    text += markdown_table(header, rows) + "\n"
    about: dict[str, Any] = {**machine(torch.device(options.device)), "opencv": cv2.__version__}
    about |= {"rounds": options.rounds, "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None}
    write_results("detect", {"machine": about, "results": results}, text)


if __name__ == "__main__":
    main()
