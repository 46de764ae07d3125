"""Options of compare.py. No torch here: `--help` has to be instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.cli.config import IMGSZ_NAMES, MANY, OPTIMIZERS, OPTIONAL, Options, flag, option
from engine.export.config import FORMATS, require_packages
from models.build.spec import HEADS
from utils.errors import ConfigError, did_you_mean

PYTORCH = "pytorch"
RUNTIMES = (PYTORCH, *FORMATS)
HEAD_KINDS = tuple(HEADS)
# Options of the training recipe; part of the key of a stored training.
RECIPE = ("epochs", "imgsz", "batch_size", "hyp", "optimizer", "cos_lr", "amp", "cache")


@dataclass(frozen=True)
class CompareConfig(Options):
    """Options of compare.py."""

    cfg: list[str] = option(
        [],
        "candidates: model YAMLs, timm/<name>, or registered backbones, which get the neck of yolov5n",
        str,
        form=MANY,
    )
    head: list[str] = option(
        [], f"replace the head of every --cfg by each of: {', '.join(HEAD_KINDS)}; not given = its own head",
        str, form=MANY,
    )  # fmt: skip
    weights: list[str] = option([], "further candidates: trained checkpoints; they are not trained", str, form=MANY)
    data: str = option("data/shapes.yaml", "dataset YAML: images, classes, training and validation")
    imgsz: int = option(640, "square side in pixels, for training and measurements", int, aliases=IMGSZ_NAMES, low=32)
    epochs: int = option(0, "train each candidate for this many epochs; 0 = structure and speed only", int, low=0)
    seeds: list[int] = option([0], "train each candidate once per seed", int, form=MANY, low=0)
    runtimes: list[str] = option(
        [PYTORCH], f"of {', '.join(RUNTIMES)}; the first one counts for plot, limits and pick", str, form=MANY
    )
    batch: list[int] = option(
        [1], "images per call when latency is measured; the first one counts for plot, limits and pick", int,
        form=MANY, low=1,
    )  # fmt: skip
    device: str = option("", "'' = first GPU or CPU; cpu; 0")
    threads: int = option(0, "threads of a measurement on a CPU; 0 = PyTorch's default", int, low=0)
    max_latency_ms: float | None = option(None, "limit: milliseconds per image, all stages", float, low=0.0)
    max_params_m: float | None = option(None, "limit: millions of parameters", float, low=0.0)
    max_gflops: float | None = option(None, "limit: GFLOPs at --imgsz", float, low=0.0)
    max_memory_mb: float | None = option(None, "limit: peak memory of inference in MB", float, low=0.0)
    batch_size: int = option(16, "training: images per step", int, low=1)
    hyp: str = option("data/hyps/hyp.scratch-low.yaml", "training: hyperparameter YAML")
    optimizer: str | None = option(
        None, "training: optimizer; as in train.py, not given = that of --hyp, else SGD",
        choices=(None, *OPTIMIZERS),
    )  # fmt: skip
    cos_lr: bool = flag("training: cosine instead of linear decay of the learning rate")
    amp: str = option(
        "auto", "training: mixed precision; auto = fp16 on CUDA, else off", choices=("auto", "fp16", "bf16", "off")
    )
    cache: Any = option(
        None, "training: keep images in memory (ram) or as .npy files (disk)", str,
        form=OPTIONAL, const="ram", choices=(None, "ram", "disk"),
    )  # fmt: skip
    workers: int = option(8, "training: loader processes (also limited by CPU count and batch)", int, low=0)
    task: str = option("val", "split that accuracy is measured on", choices=("val", "test"))
    step_batch: int = option(
        0, "images of the training step that is measured; 0 = --batch-size on a GPU, at most 2 on a CPU", int, low=0
    )
    rounds: int = option(15, "maximum number of rounds; each measures every candidate once", int, low=3)
    seconds: float = option(
        10.0,
        "measuring time per runtime and batch for all candidates together; 5 rounds at least",
        float,
        low=0.0,
    )
    memory_gb: float = option(0.0, "memory limit of a candidate on a CPU; 0 = available memory", float, low=0.0)
    pretrained: bool = flag("backbones given by name start from their published weights")
    fresh: bool = flag("repeat all measurements and trainings instead of using stored results")
    project: str = option("runs/compare", "parent folder of runs, and of the stored results")
    name: str = option("exp", "run folder name")
    exist_ok: bool = flag("reuse the folder instead of counting up")
    plugin: list[str] = option([], "Python files that register backbones of your own", str, form=MANY)

    def check(self) -> None:
        """Check ranges, that there is a candidate, and that the runtimes are known and installed."""
        super().check()
        problems = []
        if not self.cfg and not self.weights:
            problems.append("--cfg and --weights are empty; name at least one candidate, such as --cfg yolov5n.yaml")
        for option_name, what, allowed in (("runtimes", "runtime", RUNTIMES), ("head", "head", HEAD_KINDS)):
            problems += [
                f"--{option_name} {name}: unknown {what}; allowed: {', '.join(allowed)}{did_you_mean(name, allowed)}"
                for name in getattr(self, option_name)
                if name not in allowed
            ]
        if not self.hyp:
            problems.append("--hyp: is empty; all candidates are trained with one hyperparameter file: name it")
        for name in ("head", "seeds", "runtimes", "batch"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                problems.append(f"--{name}: {' '.join(map(str, values))} is repeated")
        if problems:
            raise ConfigError("; ".join(problems))
        for name in self.runtimes:
            if name in FORMATS:
                require_packages(f"--runtimes {name}", FORMATS[name].packages)
