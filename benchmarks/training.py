"""Cost of a training step in float32 and bfloat16, with channels_last and torch.compile, and of the EMA update.

    python -m benchmarks.training [--device cpu] [--model yolov5n] [--imgsz 320] [--batch-size 16] [--rounds 9]

A step is what the trainer does with a batch on the device: pixels to [0, 1], forward, loss, backward, clipping,
optimizer, EMA. The variants alternate, one step each per round, so that a change of load affects all of them; the first
rounds, which compile and warm up, are discarded. Reported: the median, the quartiles, and the median of the ratios to
"plain" of the same round. The first loss of each variant is reported too: all start from the same weights.

The trainer itself always uses channels_last; `--amp` and `--compile` of train.py choose the rest.

On a GPU (`--device 0`) a table of detectors at 640 pixels follows: images per second and peak memory.

Results: benchmarks/results/training.json and .md. The loader has a benchmark of its own (benchmarks.loader).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from benchmarks.report import machine, markdown_table, write_results
from engine.cli.config import Hyperparameters, TrainConfig
from engine.train.ema import ModelEma
from engine.train.optimizer import build_optimizer, parameter_groups
from engine.train.setup import build_loss
from models.yolo import DetectionModel
from utils.device import keep_freed_memory, select_device, synchronize
from utils.files import ROOT
from utils.structures import to_unit

WARM_UP = 2  # discarded rounds
CLASSES, BOXES_PER_IMAGE = 80, 8
SMALL_RATE = 1e-5  # the weights hardly move: all rounds do the same work
GPU_MODELS = ("yolov5n", "yolov5s", "yolov5-riformer", "yolov5-revvit", "yolov5-repmlp", "yolov5-nextvit")
GPU_SIDE = 640


@dataclass(frozen=True)
class Variant:
    """Precision, memory format and compilation of a step.

    Attributes:
        channels_last: memory format of the model and the images.
        dtype: of autocast; None = float32.
        compiled: by torch.compile.
    """

    channels_last: bool = False
    dtype: torch.dtype | None = None
    compiled: bool = False


PLAIN = "plain"
VARIANTS: dict[str, Variant] = {
    PLAIN: Variant(),
    "channels_last": Variant(channels_last=True),
    "channels_last, compile": Variant(channels_last=True, compiled=True),
    "bf16": Variant(dtype=torch.bfloat16),
    "bf16, channels_last": Variant(channels_last=True, dtype=torch.bfloat16),
    "bf16, channels_last, compile": Variant(channels_last=True, dtype=torch.bfloat16, compiled=True),
}
ON_CUDA: dict[str, Variant] = {
    "fp16, channels_last": Variant(channels_last=True, dtype=torch.float16),
    "fp16, channels_last, compile": Variant(channels_last=True, dtype=torch.float16, compiled=True),
}


class Step:
    """A repeatable training step on one batch.

    Args:
        model: model on its device; a copy of it is trained.
        variant: precision, memory format and compilation.
        imgsz: side of the images in pixels.
        batch: images per step.
    """

    def __init__(self, model: DetectionModel, variant: Variant, imgsz: int, batch: int) -> None:
        self.variant = variant
        self.device = next(model.parameters()).device
        self.model = copy.deepcopy(model).train()
        if variant.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network: nn.Module = self.model
        if variant.compiled:
            self.network = torch.compile(self.model, dynamic=False)  # type: ignore[assignment]
        hyp = Hyperparameters.from_yaml(ROOT / "data/hyps/hyp.scratch-low.yaml")
        self.criterion = build_loss(model, hyp, TrainConfig(imgsz=imgsz))
        groups = parameter_groups(self.model, hyp.weight_decay)
        self.optimizer = build_optimizer("SGD", groups, SMALL_RATE, hyp.momentum)
        self.clip_norm = hyp.clip_norm
        self.ema = ModelEma(self.model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=variant.dtype == torch.float16)
        self.images, self.targets = random_batch(imgsz, batch, self.device)

    def __call__(self) -> Tensor:
        """Do one step and return the loss."""
        images = to_unit(self.images)
        if self.variant.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        dtype = self.variant.dtype
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            total, _ = self.criterion(self.network(images), self.targets)
        self.scaler.scale(total).backward()
        self.scaler.unscale_(self.optimizer)
        clip_grad_norm_(self.model.parameters(), max_norm=self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.ema.update(self.model)
        return total.detach()


def random_batch(imgsz: int, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return noise images (B, 3, imgsz, imgsz) uint8 on the device and targets (M, 6) on the CPU, always the same."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, imgsz, imgsz), generator=rng, dtype=torch.uint8)
    count = batch * BOXES_PER_IMAGE
    scale = torch.tensor([batch, CLASSES, 1, 1, 0.3, 0.3])
    targets = torch.rand(count, 6, generator=rng) * scale
    targets[:, :2] = targets[:, :2].floor()
    return images.to(device), targets


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def in_turns(works: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each function in each counted round; the functions alternate within a round."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(WARM_UP + rounds):
        for name, work in works.items():
            found = seconds_of(work, device)
            if number >= WARM_UP:
                times[name].append(found)
    return times


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, the first and the third quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def step_rows(model: DetectionModel, names: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure each variant of the step; one row per variant."""
    known = VARIANTS | ON_CUDA
    steps = {name: Step(model, known[name], args.imgsz, args.batch_size) for name in names}
    device = next(model.parameters()).device
    losses = {}
    for name, step in steps.items():
        print(f"{name}: first step ...", flush=True)
        start = time.perf_counter()
        losses[name] = float(step())
        print(f"{name}: first step took {time.perf_counter() - start:.1f} s", flush=True)
    times = in_turns(steps, device, args.rounds)
    rows = []
    for name, found in times.items():
        ratios = [own / plain for own, plain in zip(found, times[names[0]])]
        rows.append({"variant": name, "first_loss": losses[name], "seconds": found, "ratio": spread(ratios)})
    return rows


@torch.no_grad()
def update_one_by_one(ema: ModelEma[Any], model: nn.Module) -> None:
    """Do what `ModelEma.update` does, one tensor at a time."""
    ema.updates += 1
    decay = ema.decay_at(ema.updates)
    values = model.state_dict()
    for name, average in ema.module.state_dict().items():
        if average.dtype.is_floating_point:
            average *= decay
            average += (1 - decay) * values[name].detach()


def ema_row(model: DetectionModel, rounds: int) -> dict[str, Any]:
    """Measure the EMA update of all tensors at once and one by one."""
    ours, loop = ModelEma(model), ModelEma(model)
    works = {"together": lambda: ours.update(model), "one_by_one": lambda: update_one_by_one(loop, model)}
    times = in_turns(works, next(model.parameters()).device, rounds)
    for a, b in zip(ours.module.state_dict().values(), loop.module.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)  # both must compute the same for the times to be comparable
    return {"tensors": len(model.state_dict()), **times}


def gpu_rows(device: torch.device, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure detectors at 640 pixels as train.py runs them by default (float16, channels_last), and in float32."""
    rows = []
    for name in GPU_MODELS:
        model = fresh_model(name, device)
        for kind, variant in (("fp16", ON_CUDA["fp16, channels_last"]), ("float32", VARIANTS["channels_last"])):
            step = Step(model, variant, GPU_SIDE, args.batch_size)
            torch.cuda.reset_peak_memory_stats(device)
            times = in_turns({kind: step}, device, args.rounds)[kind]
            peak = torch.cuda.max_memory_allocated(device)
            rows.append({"model": name, "precision": kind, "seconds": times, "peak_bytes": peak})
            del step
            torch.cuda.empty_cache()
    return rows


def fresh_model(name: str, device: torch.device) -> DetectionModel:
    """Return a detector with random weights, the same in each run."""
    torch.manual_seed(0)
    return DetectionModel(ROOT / f"models/{name}.yaml", nc=CLASSES).to(device)


def text(results: Mapping[str, Any]) -> str:
    """Return the results as Markdown."""
    batch = results["batch_size"]
    steps = []
    for row in results["steps"]:
        middle, low, high = (1000 * s for s in spread(row["seconds"]))
        ratio = "{:.2f} ({:.2f} .. {:.2f})".format(*row["ratio"])
        rate, loss = f"{1000 * batch / middle:.1f}", f"{row['first_loss']:.3f}"
        steps.append((row["variant"], f"{middle:.0f}", f"{low:.0f} .. {high:.0f}", rate, ratio, loss))
    head = ("step", "median, ms", "quartiles, ms", "images/s", f"ratio to {steps[0][0]}", "first loss")
    ema, fastest = results["ema"], min(statistics.median(row["seconds"]) for row in results["steps"])
    costs = []
    for shown, key in (("all tensors together (ours)", "together"), ("one by one", "one_by_one")):
        middle, low, high = (1000 * s for s in spread(ema[key]))
        costs.append((shown, f"{middle:.2f}", f"{low:.2f} .. {high:.2f}", f"{100 * (middle / 1000) / fastest:.1f} %"))
    parts = [
        "# Training step",
        f"{results['model']}, {results['imgsz']} pixels, batch {batch}, {results['rounds']} interleaved rounds; "
        "ratios: medians (quartiles) over the rounds.",
        markdown_table(head, steps),
        f"EMA update, {ema['tensors']} tensors, once per step:",
        markdown_table(("how", "median, ms", "quartiles, ms", "of the fastest step above"), costs),
    ]
    if results["gpu"]:
        rows = []
        for row in results["gpu"]:
            middle = statistics.median(row["seconds"])
            rows.append((row["model"], row["precision"], f"{batch / middle:.0f}", f"{row['peak_bytes'] / 2**30:.2f}"))
        parts.append(f"Detectors at {GPU_SIDE} pixels, batch {batch}, channels_last:")
        parts.append(markdown_table(("model", "precision", "images/s", "peak memory, GiB"), rows))
    else:
        models = ", ".join(GPU_MODELS)
        parts.append(f"On a GPU ({models} at {GPU_SIDE} pixels: images/s, peak memory): not run (no GPU available).")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="yolov5n", help="name of a YAML in models/")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--variants", nargs="+", choices=[*VARIANTS, *ON_CUDA], help="variants to measure, 'plain' first"
    )
    parser.add_argument("--name", default="training", help="name of the two result files")
    args = parser.parse_args()
    device = select_device(args.device)
    keep_freed_memory()  # as train.py does
    known = VARIANTS | (ON_CUDA if device.type == "cuda" else {})
    names = args.variants or list(known)
    model = fresh_model(args.model, device)
    results: dict[str, Any] = {
        "machine": machine(device),
        "model": args.model,
        "imgsz": args.imgsz,
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "steps": step_rows(model, names, args),
        "ema": ema_row(model, 10 * args.rounds),
        "gpu": gpu_rows(device, args) if device.type == "cuda" else [],
    }
    write_results(args.name, results, text(results))


if __name__ == "__main__":
    main()
