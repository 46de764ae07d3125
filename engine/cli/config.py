"""Options of the commands and training hyperparameters, each stated once: name, default, help, allowed values.

`engine.cli.parser` generates the parsers from these dataclasses. Imports no torch: `--help` is instant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, cast

from engine.cli.keywords import settled
from models.build.spec import HEADS
from utils.errors import ConfigError, did_you_mean, hide_passwords, shown
from utils.files import name_problem
from utils.yaml_lines import LineDict, key_text, load_yaml, plain

T = TypeVar("T")
FLAG, OPTIONAL, MANY = "flag", "optional", "many"


def option(default: T, text: str, kind: Callable[[Any], Any] = str, **extra: Any) -> T:
    """Declare one option as a dataclass field.

    Args:
        default: value when the option is not given.
        text: its help.
        kind: type of one value.
        extra: `form` (FLAG, OPTIONAL: value may be left out, MANY: one or more values), `const` (value of OPTIONAL when
            left out), `choices`, `aliases` (further spellings), `low` / `high` (allowed range), `missing` (why the
            option is not available: giving it is an error), `resolved` (meaning of the default, for `--help`).
    """
    metadata = {"help": text, "kind": kind, **extra}
    if isinstance(default, list):
        return field(default_factory=lambda: cast(T, list(default)), metadata=metadata)
    return field(default=default, metadata=metadata)


def flag(text: str, **extra: Any) -> bool:
    """Declare an option without a value, off by default."""
    return option(False, text, bool, form=FLAG, **extra)


def confidence(text: str | float) -> str | float:
    """Return `auto` or the number."""
    return "auto" if text == "auto" else float(text)


OPTIMIZERS = ("SGD", "Adam", "AdamW", "auto")
IMGSZ_NAMES = ("--img", "--img-size")
PRECISIONS = ("auto", "fp16", "bf16", "off")
LARGEST = 2**31 - 1  # upper bound of options without another one
SIDE: dict[str, Any] = {"low": 32, "high": 16384}  # pixels of the input

# Allowed range of each numeric hyperparameter.
HYP_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("lr0", "lrf", "weight_decay", "warmup_bias_lr"), (0, 100)),
    **dict.fromkeys(("momentum", "warmup_momentum"), (0, 0.9999)),
    **dict.fromkeys(("warmup_epochs", "close_mosaic"), (0, 1e5)),
    **dict.fromkeys(("box", "cls", "cls_pw", "obj", "obj_pw", "free_box", "free_cls", "free_dfl"), (0, 1e4)),
    **dict.fromkeys(("hsv_h", "hsv_s", "hsv_v", "translate", "scale", "iou_t"), (0, 1)),
    **dict.fromkeys(("flipud", "fliplr", "mosaic", "mixup", "copy_paste"), (0, 1)),
    "anchor_t": (1.01, 1e4),  # no anchor matches at 1
    "fl_gamma": (0, 100),
    "degrees": (0, 360),
    "shear": (0, 89),
    "perspective": (0, 0.1),
    "anchors": (0, 100),
    "nominal_batch": (1, 1e6),
    "clip_norm": (1e-6, 1e9),  # 0 would clip every gradient to 0
}


def _plain(value: Any) -> Any:  # noqa: ANN401 (of the kind that was given)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return hide_passwords(str(value)) if isinstance(value, (str, Path)) else value


class Options:
    """Checks that all option dataclasses share.

    Attributes:
        given: names of the options that the user gave, even at their default value. `dataclasses.replace` drops them.
    """

    given: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_given(cls, values: Mapping[str, Any]) -> Self:
        """Build from the given options; all others keep their defaults."""
        config = cls(**values)
        object.__setattr__(config, "given", frozenset(values))
        return config

    def replaced(self, **changes: Any) -> Self:
        """Return a copy with some options changed, as `dataclasses.replace`; it keeps `given`."""
        config = replace(self, **changes)  # type: ignore[type-var]
        object.__setattr__(config, "given", self.given)
        return config

    def is_given(self, name: str) -> bool:
        """Return whether an option was given, or differs from its default in an object that a program built."""
        (f,) = (f for f in fields(self) if f.name == name)  # type: ignore[arg-type]
        default = f.default_factory() if callable(f.default_factory) else f.default
        return name in self.given or getattr(self, name) != default

    def check(self) -> None:
        """Raise one ConfigError that names every option that is out of range or not available."""
        problems = []
        for f in fields(self):  # type: ignore[arg-type]
            value, name = getattr(self, f.name), "--" + f.name.replace("_", "-")
            m = f.metadata
            default = f.default_factory() if callable(f.default_factory) else f.default
            if "missing" in m and value != default:
                problems.append(f"{name}: not available: {m['missing']}")
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(item, str) and "://" not in item and (problem := name_problem(item)):
                    problems.append(f"{name}: {shown(item)} {problem}")
                if isinstance(item, bool) or not isinstance(item, (int, float)):
                    continue
                low, high = m.get("low", -LARGEST), m.get("high", LARGEST)
                if not low <= item <= high:  # also true for NaN
                    problems.append(f"{name}: {shown(item)} is out of range; allowed: {low} to {high}")
            if f.name in ("project", "name") and "://" in value:
                problems.append(f"{name}: {shown(value)} is a URL; a folder is needed")
            elif f.name in ("project", "name") and value.encode(errors="ignore").decode() != value:
                problems.append(f"{name}: {shown(value)} is not UTF-8")  # TensorBoard accepts UTF-8 paths only
            if "choices" in m and value not in m["choices"]:
                problems.append(f"{name}: {shown(value)} is not one of {', '.join(map(str, m['choices']))}")
        if problems:
            raise ConfigError("; ".join(problems))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for YAML and checkpoints; passwords in URLs are hidden."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]

    def command_words(self, script: str) -> list[str]:
        """Return the command line of the options that were given; passwords in URLs are hidden."""
        words = ["python", script]
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if not self.is_given(f.name) or value is None or value is False or value == []:
                continue
            words.append("--" + f.name.replace("_", "-"))
            if value is not True:
                values = value if isinstance(value, (list, tuple)) else [value]
                words += [f"{v:g}" if isinstance(v, float) else hide_passwords(str(v)) for v in values]
        return words

    @classmethod
    def from_keywords(cls, **keywords: Any) -> Self:
        """Build from keywords (the flags with underscores), for use from Python; unknown ones are an error."""
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for name in keywords:
            if name not in names:
                raise ConfigError(f"{cls.__name__}: unknown option '{name}'{did_you_mean(name, names)}")
        config = cls.from_given(settled(fields(cls), {k: v for k, v in keywords.items() if v is not None}))  # type: ignore[arg-type]
        config.check()
        return config


@dataclass(frozen=True)
class TrainConfig(Options):
    """Options of train.py."""

    weights: str = option("", "checkpoint to start from; empty = random start (then --cfg is needed)")
    cfg: str = option("", "model YAML; with --weights too, the weights of matching layers are copied")
    data: str = option("data/shapes.yaml", "dataset YAML")
    head: str | None = option(
        None, "replace the head of the model YAML: anchor (Detect) or free (AnchorFreeDetect)",
        choices=(None, *HEADS),
    )  # fmt: skip
    hyp: str = option(
        "", "hyperparameter YAML; '' = hyp.scratch-low.yaml for the anchor head, hyp.auto.yaml for the anchor-free one"
    )
    epochs: int = option(100, "number of epochs", int, low=1)
    batch_size: int = option(16, "images per step over all devices; -1 = choose by GPU memory (CPU: 16)", int, low=-1)
    imgsz: int = option(640, "square side for training and validation in pixels", int, aliases=IMGSZ_NAMES, **SIDE)
    rect: bool = flag("rectangular batches sorted by shape: no mosaic, no shuffling")
    resume: Any = option(
        False, "continue with the newest run, or with the given last.pt", str, form=OPTIONAL, const=True
    )
    nosave: bool = flag("write checkpoints only after the final epoch")
    noval: bool = flag("validate only after the final epoch")
    noautoanchor: bool = flag("skip the anchor check")
    noplots: bool = flag("write no images")
    evolve: Any = option(None, "tune the hyperparameters: number of trials", int, form=OPTIONAL, const=300, low=1)
    evolve_population: str = option(
        "data/hyps", "folder with hyperparameter files that --evolve tries first, too", resolved="none, only --hyp"
    )
    resume_evolve: str | None = option(None, "resume or join a hyperparameter search (its study.db or folder)")
    bucket: str = option("", "Google storage bucket", missing="nothing is sent to cloud storage")
    cache: Any = option(
        None, "keep images in memory (ram) or in files beside the images (disk)", str,
        form=OPTIONAL, const="ram", choices=(None, "ram", "disk"),
    )  # fmt: skip
    image_weights: bool = flag("sample images by class weight and by the last mAP per class")
    device: str = option("", "'' = first GPU or CPU; cpu; 0; several GPUs by torchrun")
    multi_scale: bool = flag("random size 0.5 to 1.5 times --imgsz per step")
    single_cls: bool = flag("treat all labels as one class")
    optimizer: str | None = option(
        None, "optimizer; auto = AdamW in runs below 10,000 iterations, else SGD; not given = that of --hyp, else SGD",
        choices=(None, *OPTIMIZERS),
    )  # fmt: skip
    sync_bn: bool = flag("synchronized batch norm over GPUs (under torchrun)")
    workers: int = option(8, "loader processes per rank (also limited by CPU count and batch)", int, low=0)
    project: str = option("runs/train", "parent folder of runs", resolved="runs/train, with --evolve runs/evolve")
    name: str = option("exp", "run folder name; 'cfg' = the name of the model YAML, without one of the weights")
    exist_ok: bool = flag("reuse the folder instead of counting up")
    quad: bool = flag("four-in-one collate: a quarter of the images at double size")
    cos_lr: bool = flag("cosine instead of linear decay of the learning rate")
    label_smoothing: float = option(0.0, "epsilon of class label smoothing", float, low=0.0, high=0.5)
    patience: int = option(100, "epochs without better fitness before stopping (0 = never)", int, low=0)
    freeze: list[str] = option(
        ["0"],
        "one number n: freeze rows 0..n-1; several: those rows; 'backbone'; 'backbone:K': its stem and first K stages; "
        "or a regular expression over parameter names",
        str, form=MANY,
    )  # fmt: skip
    freeze_epochs: int = option(0, "unfreeze what --freeze froze after this many epochs (0 = never)", int, low=0)
    backbone_lr: float = option(1.0, "factor on the learning rate of the backbone", float, low=0.0)
    layer_decay: float = option(
        1.0, "factor on the learning rate per layer of depth in the backbone, from its end to its stem", float,
        low=0.01, high=1.0,
    )  # fmt: skip
    close_mosaic: int = option(
        -1, "no mosaic, mixup and copy-paste in the last N epochs; -1 = the hyperparameter file's (0 without), at most "
        "a sixth of the epochs", int, low=-1,
    )  # fmt: skip
    compile: bool = flag("compile the network with torch.compile for training")
    channels_last: str = option(
        "auto", "channels_last memory format in training; auto = on, except for networks that crash with it on a CPU",
        choices=("auto", "on", "off"),
    )  # fmt: skip
    save_period: int = option(-1, "extra checkpoint epoch<N>.pt every n epochs", int, low=-1)
    seed: int = option(0, "random seed", int, low=0)
    verbose: bool = flag("print the table of layers with all arguments, in lines longer than 80 characters")
    local_rank: int = option(-1, "ignored: torchrun sets the rank in the environment", int)
    logger: list[str] = option([], "also report to: wandb, mlflow, clearml, comet", str, form=MANY)
    entity: str | None = option(None, "team or workspace at W&B or Comet")
    upload_dataset: Any = option(
        False, "logger: upload the dataset", str, form=OPTIONAL, const=True,
        missing="datasets are not uploaded; use the tracker's own artifacts",
    )  # fmt: skip
    bbox_interval: int = option(
        -1, "logger: interval of box images", int,
        missing="val_batch*.jpg and report.html go to the trackers once, at the end",
    )  # fmt: skip
    amp: str = option(
        "auto", "mixed precision; auto = fp16 on CUDA, else off (bf16 saves time on CPUs that have it)",
        choices=PRECISIONS,
    )  # fmt: skip
    backbone_weights: str = option("", "weights of the backbone row: a file, a URL or a published name")
    partial_weights: bool = flag("accept weights that fit only in part")
    plugin: list[str] = option([], "Python files that register backbones of your own", str, form=MANY)

    @property
    def run_name(self) -> str:
        """Name of the run folder."""
        return Path(self.cfg or self.weights).stem if self.name == "cfg" else self.name


@dataclass(frozen=True)
class ValConfig(Options):
    """Options of val.py."""

    data: str = option("data/shapes.yaml", "dataset YAML")
    weights: list[str] = option([], "model file(s), several = ensemble; none = the newest trained run", str, form=MANY)
    batch_size: int = option(32, "images per step", int, low=1)
    imgsz: int = option(640, "image side in pixels", int, aliases=IMGSZ_NAMES, **SIDE)
    conf_thres: float = option(0.001, "confidence threshold", float, low=0.0, high=1.0)
    iou_thres: float = option(0.6, "IoU threshold of NMS", float, low=0.0, high=1.0)
    max_det: int = option(300, "boxes kept per image", int, low=1)
    task: str = option("val", "split, or speed / study", choices=("train", "val", "test", "speed", "study"))
    device: str = option("", "'' = first GPU or CPU; cpu; 0")
    workers: int = option(8, "loader processes", int, low=0)
    single_cls: bool = flag("treat all classes as one")
    augment: bool = flag("test-time augmentation")
    verbose: bool = flag("print per-class rows")
    save_txt: bool = flag("one label file per image")
    save_hybrid: bool = flag("add the labels to NMS as boxes of confidence 1; implies --save-txt")
    save_conf: bool = flag("write the confidence into the label files")
    save_json: bool = flag("COCO result file and COCO evaluation")
    noplots: bool = flag("write no images")
    project: str = option("runs/val", "parent folder of runs")
    name: str = option("exp", "run folder name")
    exist_ok: bool = flag("reuse the folder instead of counting up")
    half: bool = flag("half precision (ignored on a CPU)")
    amp: str = option(
        "auto",
        "mixed precision of .pt files; auto and off = float32 (auto: unless --half is given), fp16 on a GPU only",
        choices=PRECISIONS,
    )
    dnn: bool = flag("run ONNX through OpenCV DNN")
    tile: int | None = option(None, "detect on overlapping tiles of this side in pixels (small objects)", int, **SIDE)
    overlap: float = option(0.2, "with --tile: overlap of tiles as a fraction of the side", float, low=0.0, high=0.9)
    full_image: bool = flag("with --tile: detect on the whole image, too")
    plugin: list[str] = option([], "Python files that register backbones of your own", str, form=MANY)


@dataclass(frozen=True)
class DetectConfig(Options):
    """Options of detect.py."""

    weights: list[str] = option([], "model file(s), several = ensemble; none = the newest trained run", str, form=MANY)
    source: str = option("data/images", "file, folder, glob, .txt list, .streams list, URL, camera number, screen")
    data: str = option("", "dataset YAML for class names where the model file has none")
    imgsz: list[int] = option([640], "height width, or one number", int, form=MANY, aliases=IMGSZ_NAMES, **SIDE)
    conf_thres: float | str = option(
        0.25, "confidence threshold; auto = that of the best F1 in validation, which training stores in the model file",
        confidence, low=0.0, high=1.0,
    )  # fmt: skip
    iou_thres: float = option(0.45, "IoU threshold of NMS", float, low=0.0, high=1.0)
    max_det: int = option(1000, "boxes per image", int, low=1)
    device: str = option("", "'' = first GPU or CPU; cpu; 0")
    view_img: bool = flag("show windows")
    save_txt: bool = flag("write label files")
    save_format: int = option(0, "label files hold 0: center x, y, w, h; 1: xyxy (normalized)", int, choices=(0, 1))
    save_csv: bool = flag("one CSV with image, class, confidence and box of every detection")
    save_json: bool = flag("one JSON with the boxes of every image")
    save_conf: bool = flag("write the confidence into the label files")
    save_crop: bool = flag("crops of the boxes, per class")
    nosave: bool = flag("write no images or videos")
    classes: list[int] | None = option(None, "keep only these class numbers", int, form=MANY, low=0)
    agnostic_nms: bool = flag("NMS over all classes together")
    augment: bool = flag("test-time augmentation")
    visualize: bool = flag("write the feature maps of every slot as images")
    update: bool = flag("strip the training state from the given weights afterwards (rewrites the file)")
    project: str = option("runs/detect", "parent folder of runs")
    name: str = option("exp", "run folder name")
    exist_ok: bool = flag("reuse the folder instead of counting up")
    line_thickness: int = option(3, "box line width in pixels", int, low=1)
    hide_labels: bool = flag("no captions")
    hide_conf: bool = flag("no confidence in the captions")
    half: bool = flag("half precision (ignored on a CPU)")
    amp: str = option(
        "auto",
        "mixed precision of .pt files; auto and off = float32 (auto: unless --half is given), fp16 on a GPU only",
        choices=PRECISIONS,
    )
    dnn: bool = flag("run ONNX through OpenCV DNN")
    vid_stride: int = option(1, "use every n-th frame", int, low=1)
    tile: int | None = option(None, "detect on overlapping tiles of this side in pixels (small objects)", int, **SIDE)
    overlap: float = option(0.2, "with --tile: overlap of tiles as a fraction of the side", float, low=0.0, high=0.9)
    full_image: bool = flag("with --tile: detect on the whole image, too")
    plugin: list[str] = option([], "Python files that register backbones of your own", str, form=MANY)


@dataclass(frozen=True)
class Hyperparameters:
    """Training hyperparameters as YOLOv5's hyp files name them.

    Loss gains are the unscaled ones of the file. `anchors` is the number of anchors per level to start from (None:
    those of the model YAML). Keys of our own:

    - `nominal_batch`: target number of images per optimizer step.
    - `clip_norm`: maximum norm of the gradient.
    - `close_mosaic`: epochs at the end without mosaic, unless `--close-mosaic` is given.
    - `free_box`, `free_cls`, `free_dfl`: gains of the anchor-free head, which ignores `box`, `cls` and `obj`.
    - `optimizer`: the one that the learning rates are made for, and the default of `--optimizer` (another one is
      refused), or `auto`.
    - `class_weights`: factors on the class loss of each class: `none`, `balanced` (by rarity), one number per class, or
      numbers by class name (1 for the others).
    """

    lr0: float
    lrf: float
    momentum: float
    weight_decay: float
    warmup_epochs: float
    warmup_momentum: float
    warmup_bias_lr: float
    box: float
    cls: float
    cls_pw: float
    obj: float
    obj_pw: float
    iou_t: float
    anchor_t: float
    fl_gamma: float
    hsv_h: float
    hsv_s: float
    hsv_v: float
    degrees: float
    translate: float
    scale: float
    shear: float
    perspective: float
    flipud: float
    fliplr: float
    mosaic: float
    mixup: float
    copy_paste: float = 0.0
    anchors: float | None = None
    nominal_batch: float = 64
    clip_norm: float = 10.0
    close_mosaic: float = 0
    free_box: float = 7.5
    free_cls: float = 0.5
    free_dfl: float = 1.5
    optimizer: str | None = None
    class_weights: str | list[float] | dict[str | int, float] | None = None

    @classmethod
    def from_yaml(cls, path: str | Path) -> Hyperparameters:
        """Read a hyp file.

        Raises:
            ConfigError: unknown or missing keys and values that are not numbers, all in one message, with line numbers.
        """
        data = load_yaml(path)
        weights = data.get("class_weights")
        if isinstance(weights, LineDict):  # class names as they were written
            data["class_weights"] = {key_text(weights, key): value for key, value in weights.items()}
        return cls.from_mapping(data, where=str(path), lines=data.lines)

    @classmethod
    def from_mapping(
        cls, data: Mapping[str, Any], where: str = "hyp", lines: Mapping[str, int] | None = None
    ) -> Hyperparameters:
        """Build from a mapping (of a hyp file or a checkpoint)."""
        names = [f.name for f in fields(cls)]
        problems = []
        for key, value in data.items():
            place = f"{where}:{lines[key]}" if lines and key in lines else where
            if key not in names:
                problems.append(f"{place}: unknown hyperparameter '{key}'{did_you_mean(key, names)}")
            elif key == "optimizer":
                if value not in (None, *OPTIMIZERS):
                    problems.append(f"{place}: optimizer is {shown(value)}; allowed: {', '.join(OPTIMIZERS)}")
            elif key == "class_weights":
                problems += [f"{place}: {problem}" for problem in _problems_of_class_weights(value)]
            elif value is None and key in ("anchors", "optimizer", "class_weights"):
                continue
            elif isinstance(value, bool) or not isinstance(value, (int, float)):
                problems.append(f"{place}: {key} is {shown(value)}; a number is needed")
            elif not HYP_RANGES[key][0] <= value <= HYP_RANGES[key][1]:
                low, high = HYP_RANGES[key]
                problems.append(f"{place}: {key} is {shown(value)}; allowed: {low:g} to {high:g}")
        missing = [f.name for f in fields(cls) if f.name not in data and f.default is MISSING]
        if missing:
            problems.append(f"{where}: missing hyperparameter(s) {', '.join(missing)}")
        if problems:
            raise ConfigError("; ".join(problems))
        values = plain(data)
        if values.get("class_weights") == "none":
            values["class_weights"] = None
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `anchors`, `optimizer` and `class_weights` only if set."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


def _problems_of_class_weights(value: object) -> list[str]:
    """Return format errors of `class_weights`; class names are checked when the dataset is known."""
    if value is None or value in ("none", "balanced"):
        return []
    if not isinstance(value, (list, dict)):
        return [
            f"class_weights is {shown(value)}; allowed: none, balanced, a list of numbers, or numbers by class name"
        ]
    numbers = value.values() if isinstance(value, dict) else value
    wrong = [n for n in numbers if isinstance(n, bool) or not isinstance(n, (int, float)) or not 0 <= n < math.inf]
    return [f"class_weights holds {shown(n)}; finite numbers of at least 0 are needed" for n in wrong]
