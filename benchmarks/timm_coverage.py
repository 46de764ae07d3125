"""Coverage of timm: one network of each family is built as a backbone, run, trained for a few steps and fused.

    python -m benchmarks.timm_coverage [--families resnet vgg ...] [--max-params 200] [--resume]

A family is a module of `timm.list_modules()`; its network is the one with the fewest parameters as a feature extractor.
Families without feature maps (none is built with `features_only`) are left out. Each network, with random weights, the
neck of `models/yolov5-timm.yaml` and `extra_levels: true`, must pass:

1. build; 2. images of 256 x 320 and 250 x 333 pixels, all outputs finite, one row per cell of the padded size;
3. state-dict round trip, equal outputs; 4. a finite gradient for every trainable parameter, four training steps on two
images in the memory format of train.py, two of them in bfloat16, finite loss afterwards; 5. re-parameterize and fuse,
outputs equal within 1e-3 of their standard deviation.

Each network has a process of its own: one that crashes is a result.

Results: benchmarks/results/timm_coverage.json and .md, written after every family.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.report import RESULTS, machine, markdown_table, write_results
from engine.train.optimizer import build_optimizer, parameter_groups
from engine.train.setup import memory_format
from models.backbones.base import Backbone
from models.backbones.timm_measure import create_features
from models.fuse import reparameterize
from models.losses.anchor_based import DetectionLoss, LossConfig
from models.yolo import DetectionModel
from utils.files import ROOT
from utils.yaml_lines import load_yaml, plain

NAME = "timm_coverage"
SIZES = ((256, 320), (250, 333))
SMALL = (128, 160)  # for checks that do not depend on the size
STEPS = ("build", "run", "state", "train", "fuse")
# Third-party code may raise anything; the exception is the result of the family.
FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    IndexError,
    KeyError,
    NotImplementedError,
)


class CheckFailedError(ValueError):
    """A step ran, but its result is wrong."""


def smallest(family: str) -> tuple[str, float] | None:
    """Return (name, 10^6 parameters) of the family's smallest feature extractor; None if it has none."""
    import timm

    best: tuple[str, float] | None = None
    for name in timm.list_models(module=family):
        try:
            with torch.device("meta"):
                count = sum(p.numel() for p in create_features(name, {}).parameters()) / 1e6
        except FAILURES:
            continue
        if best is None or count < best[1]:
            best = name, count
    return best


def detector_yaml(name: str) -> dict[str, Any]:
    """Return `models/yolov5-timm.yaml` with another network in its backbone row."""
    spec = plain(load_yaml(ROOT / "models" / "yolov5-timm.yaml"))
    spec["backbone"][0][2:] = [f"timm/{name}", {"extra_levels": True, "strides": [8, 16, 32]}]
    return spec


def randomize(model: nn.Module) -> None:
    """Move statistics and layer scales off their initial values, at which fusing would not be tested."""
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith("running_var"):
                value.uniform_(0.8, 1.2)
            elif key.endswith("running_mean"):
                value.normal_(0, 0.05)
            elif key.rsplit(".", 1)[-1].startswith(("gamma", "layer_scale", "ls")) and value.ndim == 1:
                value.uniform_(0.2, 0.4)


def decoded(model: DetectionModel, size: tuple[int, int]) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return model.eval()(torch.rand(1, 3, *size))[0]


def check_run(model: DetectionModel) -> None:
    multiple = model.model.size_multiple
    for size in SIZES:
        out = decoded(model, size)
        height, width = (math.ceil(side / multiple) * multiple for side in size)
        backbone = next(m for m in model.modules() if isinstance(m, Backbone))
        padded = [math.ceil(side / backbone.size_divisor) * backbone.size_divisor for side in size]
        allowed = {
            sum(3 * math.ceil(h / s) * math.ceil(w / s) for s in (8, 16, 32))
            for h, w in ((height, width), padded, size)
        }
        if out.shape[1] not in allowed:
            raise CheckFailedError(f"{out.shape[1]} rows at {size}, expected one of {sorted(allowed)}")
        if not torch.isfinite(out).all():
            raise CheckFailedError(f"values that are not finite at {size}")


def check_state(model: DetectionModel, spec: dict[str, Any]) -> None:
    other = DetectionModel(spec)
    other.load_state_dict(model.state_dict(), strict=True)
    a, b = decoded(model, SMALL), decoded(other, SMALL)
    if not torch.equal(a, b):
        raise CheckFailedError(f"outputs differ by {float((a - b).abs().max()):.2e} after a round trip")


def check_train(model: DetectionModel) -> None:
    torch.manual_seed(2)
    head = model.head
    strides = [int(s) for s in model.stride]
    loss = DetectionLoss((head.anchors * model.stride.view(-1, 1, 1)).cpu(), strides, LossConfig())
    layout = memory_format(model, torch.device("cpu"))
    groups = parameter_groups(model.to(memory_format=layout).train(), 5e-4)
    optimizer = build_optimizer("SGD", groups, 1e-3, 0.9)
    images = torch.rand(2, 3, *SMALL).contiguous(memory_format=layout)
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.3, 0.4], [1, 2, 0.3, 0.6, 0.1, 0.1], [1, 0, 0.7, 0.2, 0.5, 0.3]])
    loss(model(images), targets).total.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if without:
        raise CheckFailedError(f"{len(without)} parameters without gradient: {', '.join(without[:3])}")
    broken = [n for n, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    if broken:
        raise CheckFailedError(f"{len(broken)} gradients that are not finite: {', '.join(broken[:3])}")
    for dtype in (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            raw = model(images)
        optimizer.zero_grad()
        loss(raw, targets).total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    with torch.no_grad():
        after = loss(model(images), targets).total
    if not torch.isfinite(after):
        raise CheckFailedError("the loss is not finite after four steps")


def check_fuse(model: DetectionModel) -> None:
    randomize(model)
    model.double()
    torch.manual_seed(1)
    image = torch.rand(1, 3, *SMALL, dtype=torch.float64)
    with torch.no_grad():
        before = model.eval()(image)[1]
        reparameterize(model)
        model.fuse()
        after = model(image)[1]
    for a, b in zip(before, after):
        difference = float((a - b).abs().max() / a.std())
        if not difference < 1e-3:
            raise CheckFailedError(f"fused outputs are {difference:.1e} of their spread away")


def shortened(text: str, name: str) -> str:
    """Return the error without its row prefix, at most 160 characters, escaped for a table."""
    text = text.split(f"timm/{name}: ")[-1].replace("|", "/")
    return text if len(text) <= 160 else text[:157] + "..."


def examine(name: str) -> dict[str, Any]:
    """Run the steps for one network up to the first failure."""
    began = time.perf_counter()
    torch.manual_seed(0)
    result: dict[str, Any] = {"model": name, "passed": [], "failed": None, "reason": ""}
    spec = detector_yaml(name)
    model: Any = None

    def build() -> None:
        nonlocal model
        model = DetectionModel(spec)
        backbone = next(m for m in model.modules() if isinstance(m, Backbone))
        result.update(
            levels=[[level.channels, level.stride] for level in backbone.levels],
            native=list(backbone.measured.strides),
            size_divisor=backbone.size_divisor,
            tile=backbone.measured.tile,
            arguments=dict(backbone.measured.arguments),
            parameters=sum(p.numel() for p in backbone.parameters()),
        )

    steps: tuple[Callable[[], None], ...] = (
        build,
        lambda: check_run(model),
        lambda: check_state(model, spec),
        lambda: check_train(model),
        lambda: check_fuse(model),
    )
    for step, work in zip(STEPS, steps):
        try:
            work()
        except FAILURES as error:
            text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            result.update(failed=step, reason=shortened(text, name))
            break
        result["passed"].append(step)
        print(json.dumps({"step": step}), flush=True)
    result["seconds"] = round(time.perf_counter() - began, 1)
    return result


def examine_apart(name: str) -> dict[str, Any]:
    """Examine a network in a process of its own; a crash is a failure of the current step."""
    command = [sys.executable, "-m", "benchmarks.timm_coverage", "--examine", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and lines:
        return dict(lines[-1])
    passed = [line["step"] for line in lines if "step" in line]
    reason = signal.Signals(-done.returncode).name if done.returncode < 0 else done.stderr[-160:]
    return {"model": name, "passed": passed, "failed": STEPS[len(passed)], "reason": f"the process died: {reason}"}


def report(results: dict[str, Any]) -> None:
    found = results["families"]
    tried = {family: r for family, r in found.items() if r.get("model")}
    good = [family for family, r in tried.items() if not r["failed"]]
    rows = []
    for family, r in found.items():
        levels = " ".join(f"{c}@{s}" for c, s in r.get("levels", []))
        sizes = f"tiles of {r['tile']}" if r.get("tile") else f"multiples of {r.get('size_divisor', '')}"
        verdict = "pass" if r.get("model") and not r["failed"] else f"{r['failed'] or 'left out'}: {r['reason']}"
        million = f"{r['parameters'] / 1e6:.1f}" if "parameters" in r else ""
        rows.append([family, r.get("model") or "", million, levels, sizes if levels else "", verdict])
    header = ["family", "network", "parameters (M)", "levels (channels@stride)", "input sizes", "result"]
    share = 100 * len(good) / max(len(tried), 1)
    text = f"{len(good)} of {len(tried)} families pass ({share:.1f} %), timm {results['timm']}.\n\n"
    write_results(NAME, results, text + markdown_table(header, rows) + "\n")


def main() -> None:
    import timm

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="*", default=[], help="modules of timm (default: all)")
    parser.add_argument("--max-params", type=float, default=200.0, help="skip networks with more parameters (millions)")
    parser.add_argument("--resume", action="store_true", help="keep existing results")
    parser.add_argument("--examine", help="one network, in this process")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    if options.examine:
        print(json.dumps(examine(options.examine)))
        return
    path = RESULTS / f"{NAME}.json"
    old = json.loads(path.read_text(encoding="utf-8"))["families"] if options.resume and path.is_file() else {}
    results: dict[str, Any] = {"timm": timm.__version__, "machine": machine(torch.device("cpu")), "families": old}
    families = options.families or timm.list_modules()
    for family in tqdm([f for f in families if options.families or f not in old]):
        choice = smallest(family)
        if choice is None:
            results["families"][family] = {"model": None, "failed": None, "reason": "no network with feature maps"}
        elif choice[1] > options.max_params:
            reason = f"its smallest network, {choice[0]}, has {choice[1]:.0f} million parameters"
            results["families"][family] = {"model": None, "failed": None, "reason": reason}
        else:
            results["families"][family] = examine_apart(choice[0])
        gc.collect()
        results["families"] = {f: results["families"][f] for f in timm.list_modules() if f in results["families"]}
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    report(results)


if __name__ == "__main__":
    main()
