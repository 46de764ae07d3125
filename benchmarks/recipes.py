"""Accuracy of heads, recipes and backbones on real datasets: trainings one after another, resumed after a stop.

    python -m benchmarks.recipes --data bccd=path/to/bccd.yaml aquarium=path/to/aquarium.yaml [--only bccd-free]

Each training of `PLAN` is validated on the test split with its best weights and appends a row to
benchmarks/results/recipes.csv when it ends; those that have a row are not repeated. Afterwards the means and ranges
over seeds are written to benchmarks/results/recipes.md.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest.mock import patch

from torch import nn

import train
import val
from engine.train import schedule
from models.common import Conv
from models.heads import AnchorFreeDetect
from models.losses import anchor_free
from utils.files import ROOT
from utils.plots import read_history
from utils.yaml_lines import dump_yaml, load_yaml, plain

RESULTS = ROOT / "benchmarks/results/recipes.csv"
COLUMNS = ("run", "seed", "epoch", "val_map50", "val_map", "test_map50", "test_map")
BEST = {"val_map50": "metrics/mAP_0.5", "val_map": "metrics/mAP_0.5:0.95"}


class Run(NamedTuple):
    """Trainings with equal options: the dataset, the options, the seeds.

    `hyp` are changes of the hyperparameter file, `variant` a change of the code in `VARIANTS`.
    """

    data: str
    options: dict[str, object]
    seeds: tuple[int, ...] = (0, 1, 2)
    hyp: Mapping[str, float] = MappingProxyType({})
    variant: str = ""


def factorial(epochs: int) -> dict[str, dict[str, object]]:
    """Return the options of both heads with both recipes."""
    hyps = {"low": "hyp.scratch-low.yaml", "auto": "hyp.auto.yaml"}
    return {
        f"{head}-{name}": {"cfg": "models/yolov5n.yaml", "head": head, "hyp": hyp, "epochs": epochs}
        for head in ("anchor", "free")
        for name, hyp in hyps.items()
    }


FAMILIES = {
    "riformer": "RIFormer, {arch: {layers: [2, 2, 6, 2], embed_dims: [32, 64, 128, 256]}}",
    "revvit": (
        "RevViT, {arch: {embed_dims: 128, num_layers: 6, num_heads: 4, feedforward_channels: 512}, img_size: 320, "
        "strides: [8, 16, 32], widths: [64, 128, 256]}"
    ),
    "repmlp": (
        "RepMLPNet, {arch: {channels: [32, 64, 128, 256], depths: [2, 2, 4, 2], share_sets: [1, 4, 16, 64], "
        "nominal: 64}, tile_order: spatial}"
    ),
    "nextvit": (
        "NextViT, {arch: {depths: [1, 2, 3, 1], conv_channels: [32, 64, 96, 128], out_channels: [32, 64, 128, 192], "
        "transformer_every: [0, 2, 3, 1], stem_channels: [24, 16, 24]}}"
    ),
    "convnext": "timm/convnext_atto, []",
}
"""Small backbones of 1.5 to 4.3 M parameters with the neck: the first row of `models/yolov5-timm.yaml`."""


def replacing(old: str, new: str) -> Callable[[str], str]:
    """Return a function that replaces a string, which must appear once, in a text."""

    def edit(text: str) -> str:
        if text.count(old) != 1:
            raise ValueError(f"'{old}' must appear once")
        return text.replace(old, new)

    return edit


def scaling_neck(factor: float) -> Callable[[str], str]:
    """Return a function that multiplies the channels of the neck in the text of a model YAML, in steps of 32."""

    def edit(text: str) -> str:
        backbone, neck = text.split("\nhead:")
        scaled = re.sub(r"(Conv|C3), \[(\d+)", lambda row: f"{row[1]}, [{round(int(row[2]) * factor / 32) * 32}", neck)
        return f"{backbone}\nhead:{scaled}"

    return edit


REG8 = replacing("AnchorFreeDetect, [nc]", "AnchorFreeDetect, [nc, {reg_max: 8}]")
EDITED: dict[str, tuple[str, tuple[Callable[[str], str], ...]]] = {
    **{name: ("yolov5-timm.yaml", (replacing(FAMILIES["convnext"], row),)) for name, row in FAMILIES.items()},
    "reg8": ("yolov5n-free.yaml", (REG8,)),
    "reg8-neck1.25": ("yolov5n-free.yaml", (REG8, scaling_neck(1.25))),
    "neck0.75": ("yolov5n-free.yaml", (scaling_neck(0.75),)),
}
"""Model YAMLs that are written for a run: the file in `models/`, and what is changed in it."""


def written_yaml(name: str, folder: Path) -> Path:
    """Write a model YAML of `EDITED` and return its path."""
    source, edits = EDITED[name]
    text = (ROOT / "models" / source).read_text(encoding="utf-8")
    for edit in edits:
        text = edit(text)
    path = folder / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def written_hyp(name: str, source: str, changes: Mapping[str, float], folder: Path) -> Path:
    """Write a hyperparameter file with other values and return its path."""
    values = plain(load_yaml(ROOT / "data/hyps" / source))
    unknown = changes.keys() - values.keys()
    if unknown:
        raise ValueError(f"{source}: no {min(unknown)}")
    path = folder / f"hyp.{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    dump_yaml(path, {**values, **changes})
    return path


def uniform_biases(head: AnchorFreeDetect) -> None:
    """Let every distribution of the anchor-free head start with equal bins."""
    RESET_BIASES(head)
    for branch in head.box:
        nn.init.zeros_(branch[-1].bias)  # type: ignore[index,arg-type]


def dense_class_branch(
    head: AnchorFreeDetect, nc: int, channels: Sequence[int], strides: Sequence[int], *options: Any
) -> None:
    """Build the anchor-free head with 3x3 convolutions in the class branch instead of depth-wise and 1x1 ones."""
    INIT(head, nc, channels, strides, *options)
    width = max(channels[0], min(nc, 100))
    head.cls = nn.ModuleList(
        nn.Sequential(Conv(c, width, 3), Conv(width, width, 3), nn.Conv2d(width, nc, 1)) for c in channels
    )
    head.reset_biases()


def flat_cosine(epoch: int, epochs: int, lrf: float, _cosine: bool) -> float:
    """Return the factor on lr0: 1 for the first half of the training, then half a cosine to `lrf`."""
    return 1.0 if epoch < epochs / 2 else LR_FACTOR(epoch - epochs // 2, epochs - epochs // 2, lrf, cosine=True)


LR_FACTOR = schedule.lr_factor
RESET_BIASES, INIT = AnchorFreeDetect.reset_biases, AnchorFreeDetect.__init__
VARIANTS = {
    "uniform": (AnchorFreeDetect, "reset_biases", uniform_biases),
    "dense": (AnchorFreeDetect, "__init__", dense_class_branch),
    "top13": (anchor_free, "TOP_K", 13),
    "flat": (schedule, "lr_factor", flat_cosine),
}
"""Changes of the code: object, attribute, other value."""


def family_runs() -> dict[str, Run]:
    """Return the trainings of every family with both heads and the same recipe."""
    options = {"hyp": "hyp.auto.yaml", "epochs": 20}
    return {
        f"bccd-{name}-{head}": Run("bccd", {**options, "cfg": name, "head": head}, (0, 1))
        for name in FAMILIES
        for head in ("anchor", "free")
    }


FREE = {"cfg": "models/yolov5n.yaml", "head": "free", "hyp": "hyp.auto.yaml"}
SMALL = {**FREE, "epochs": 60, "imgsz": 96}
SHORT = {**FREE, "epochs": 30}
SCREENING = {
    "base": Run("bccd", SHORT),
    "cosine": Run("bccd", {**SHORT, "cos_lr": True}),
    "flat": Run("bccd", SHORT, variant="flat"),
    "decay": Run("bccd", SHORT, hyp={"weight_decay": 0.05}),
    "mixup": Run("bccd", SHORT, hyp={"mixup": 0.1}),
    "scale": Run("bccd", SHORT, hyp={"scale": 0.9}),
    "sgd": Run("bccd", {**SHORT, "optimizer": "SGD"}),
    "mosaic": Run("bccd", SHORT, hyp={"close_mosaic": 0}),
    "batch64": Run("bccd", SHORT, hyp={"nominal_batch": 64}),
    "reg8": Run("bccd", {**SHORT, "cfg": "reg8"}),
    "reg8-neck1.25": Run("bccd", {**SHORT, "cfg": "reg8-neck1.25"}),
    "neck0.75": Run("bccd", {**SHORT, "cfg": "neck0.75"}),
    "dense": Run("bccd", SHORT, variant="dense"),
    "top13": Run("bccd", SHORT, variant="top13"),
}
"""Elements of the recipe and of the head, one changed at a time, against `base`."""

PLAN = {
    **{f"bccd-{name}": Run("bccd", options) for name, options in factorial(60).items()},
    **{f"aquarium-{name}": Run("aquarium", options) for name, options in factorial(40).items()},
    **family_runs(),
    "bccd96-ramp": Run("bccd", SMALL),
    "bccd96-uniform": Run("bccd", SMALL, variant="uniform"),
    **{f"bccd30-{name}": run for name, run in SCREENING.items()},
}
COMMON: dict[str, object] = {
    "imgsz": 320, "batch_size": 16, "workers": 0, "cache": "ram", "amp": "bf16", "noplots": True
}  # fmt: skip


def measure(name: str, run: Run, seed: int, data: Path, folder: Path) -> list[object]:
    """Train, or continue a training that was stopped, and validate; return a row of `COLUMNS`."""
    last = folder / f"{name}-s{seed}/weights/last.pt"
    options = {**COMMON, **run.options, "data": data, "seed": seed, "project": folder, "name": f"{name}-s{seed}"}
    if options["cfg"] in EDITED:
        options["cfg"] = written_yaml(str(options["cfg"]), folder)
    if run.hyp:
        options["hyp"] = written_hyp(name, str(options["hyp"]), run.hyp, folder)
    with patch.object(*VARIANTS[run.variant]) if run.variant else nullcontext():
        result = train.run(resume=last) if last.is_file() else train.run(**options, exist_ok=True)
        test = val.run(weights=result.best, data=data, imgsz=options["imgsz"], task="test", project=folder, name="test")
    history = read_history(result.folder / "results.csv")
    best = int((0.1 * history[BEST["val_map50"]] + 0.9 * history[BEST["val_map"]]).argmax())
    values = [*(history[column][best] for column in BEST.values()), test.map50, test.map]
    return [name, seed, int(history["epoch"][best]), *(round(float(value), 4) for value in values)]


def read_rows() -> list[dict[str, str]]:
    """Return the rows of the results file; none if there is no such file."""
    if not RESULTS.is_file():
        return []
    with open(RESULTS, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def summary(rows: Iterable[dict[str, str]]) -> str:
    """Return a Markdown table with mean and range over the seeds of every run."""
    groups: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        groups[row["run"]].append(row)
    lines = ["| run | seeds | val mAP50 | val mAP50-95 | test mAP50 | test mAP50-95 |", "|---|---|---|---|---|---|"]
    for name, group in groups.items():
        cells = []
        for column in COLUMNS[3:]:
            values = [float(row[column]) for row in group if row[column]]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
        lines.append(f"| {name} | {', '.join(row['seed'] for row in group)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what has no row yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[], help="NAME=dataset.yaml")
    parser.add_argument("--only", default="", help="runs whose name begins with this")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/recipes", help="for the training runs")
    arguments = parser.parse_args()
    datasets = dict(pair.split("=", 1) for pair in arguments.data)
    done = {(row["run"], int(row["seed"])) for row in read_rows()}
    for name, run in PLAN.items():
        for seed in run.seeds:
            wanted = name.startswith(arguments.only) and (arguments.seeds is None or seed in arguments.seeds)
            if wanted and run.data in datasets and (name, seed) not in done:
                row = measure(name, run, seed, Path(datasets[run.data]), arguments.folder)
                with open(RESULTS, "a", newline="", encoding="utf-8") as stream:
                    writer = csv.writer(stream)
                    if not done:
                        writer.writerow(COLUMNS)
                    writer.writerow(row)
                done.add((name, seed))
    RESULTS.with_suffix(".md").write_text(summary(read_rows()), encoding="utf-8")


if __name__ == "__main__":
    main()
