"""Validation: run a detector on a dataset, match its detections with the labels, and compute metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from data.config import DataConfig, load_data_config
from data.labels.labels import Annotations, load_annotations
from data.loading.dataset import DetectionDataset
from data.loading.loader import DetectionLoader, worker_losses_reported
from engine.cli.config import ValConfig
from engine.cli.plugins import load_plugins
from engine.devices.distributed import World
from engine.evaluate import plots as eval_images
from engine.evaluate.accumulator import EvalResult, ImageOutcome, Tally, log_table, merge, summarize, table_head
from engine.evaluate.chart_process import ChartProcess, call
from engine.evaluate.outputs import CocoSink, TextSink, run_folder
from engine.evaluate.whole_images import WholeImages
from engine.predict.inference import NmsSettings
from engine.predict.tiles import TiledRuntime, tile_settings
from engine.runtimes.base import RawRuntime, Runtime
from engine.runtimes.pytorch import check_size
from engine.runtimes.registry import choose_weights, open_runtime, sides_for, split_device
from models.losses.base import LossModule
from utils.boxes import scale_boxes, xywh2xyxy
from utils.device import Profile, describe_device, select_device, to_device
from utils.errors import ConfigError, DataError
from utils.log import LINE_WIDTH, is_main_process
from utils.metrics import ConfusionMatrix
from utils.nms import non_max_suppression
from utils.structures import Batch, ImageShapes, to_unit

__all__ = ["EvalOptions", "EvalResult", "ImageOutcome", "conclude", "evaluate", "measure", "validate"]

LOGGER = logging.getLogger(__name__)

PLOTTED_BATCHES = 3
USUAL_CONF = 0.001  # a higher threshold truncates the curves
FEW_CLASSES = 50  # with fewer classes each gets a row without --verbose
SPEED_CONF, SPEED_IOU = 0.25, 0.45  # of --task speed
SINGLE = World()
VAL_BAR = "{desc}{percentage:4.0f}% {remaining}"
RECT_PAD = 0.5  # in strides: extra padding of rectangular batches


@dataclass(frozen=True)
class EvalOptions:
    """Options of an evaluation.

    Attributes:
        names: class names by number.
        single_cls: count every detection as class 0.
        conf_thres, iou_thres, max_det: NMS settings.
        hybrid: add the labels to NMS as boxes of confidence 1; the metrics are then not meaningful.
        folder: folder of the plots; required by `plots`.
        plots: plot curves, the confusion matrix, and the first batches.
        charts: the process that draws the curves; None = this one.
        verbose: log the speed and the confidence with the best F1.
        class_rows: log a row per class.
        sinks: called in order with the outcome of every image at the end.
    """

    names: Mapping[int, str]
    single_cls: bool = False
    conf_thres: float = USUAL_CONF
    iou_thres: float = 0.6
    max_det: int = 300
    hybrid: bool = False
    folder: Path | None = None
    plots: bool = False
    charts: ChartProcess | None = None
    verbose: bool = False
    class_rows: bool = False
    sinks: tuple[Callable[[ImageOutcome], None], ...] = ()


def evaluate(
    runtime: Runtime,
    loader: DetectionLoader | WholeImages,
    options: EvalOptions,
    criterion: LossModule | None = None,
) -> EvalResult:
    """Evaluate a detector and log its metrics.

    Args:
        runtime: the detector.
        loader: batches without augmentation.
        options: options of the evaluation.
        criterion: also compute the loss, from the raw outputs; its automatic balance is not updated. Needs a
            `RawRuntime`.
    """
    return conclude([measure(runtime, loader, options, criterion)], options)


@torch.no_grad()
def measure(
    runtime: Runtime,
    loader: DetectionLoader | WholeImages,
    options: EvalOptions,
    criterion: LossModule | None = None,
    world: World = SINGLE,
) -> Tally:
    """Detect and accumulate over the batches of this process; see `evaluate`."""
    tally = Tally(len(options.names), confusion=ConfusionMatrix(len(options.names)) if options.plots else None)
    timers = Profile(runtime.device), Profile(runtime.device), Profile(runtime.device)
    bar = tqdm(loader, desc=table_head(), bar_format=VAL_BAR, ncols=LINE_WIDTH, disable=not is_main_process())
    with _without_training(criterion), worker_losses_reported():
        for turn, batch in enumerate(bar):
            number = world.rank + turn * world.size  # as in a single process
            with timers[0]:
                images = to_unit(to_device(batch.images, runtime.device))
            with timers[1]:
                decoded, raw = _detect(runtime, images, criterion)
            if criterion is not None:
                tally.losses[number] = criterion(raw, batch.targets).parts.cpu()
            with timers[2]:
                found = _suppress(decoded, batch, options)
            _count(tally, number, batch, found, options)
            if options.plots and options.folder is not None and number < PLOTTED_BATCHES:
                tally.shown[number] = batch, found
    tally.seconds = timers[0].total, timers[1].total, timers[2].total
    return tally


def conclude(parts: Sequence[Tally], options: EvalOptions) -> EvalResult:
    """Compute metrics, log the table and draw the plots; see `evaluate`.

    Args:
        parts: results of `measure` by rank.
        options: options given to `measure`.
    """
    tally = merge(parts)
    for outcome in tally.outcomes:
        for sink in options.sinks:
            sink(outcome)
    result = summarize(tally)
    log_table(result, options.names, options.class_rows)
    if options.verbose:
        if result.best_conf is not None:
            LOGGER.info("Best F1 at confidence %.3f", result.best_conf)
        LOGGER.info("Speed per image: %.1f ms preprocess, %.1f ms inference, %.1f ms NMS", *result.speeds)
    if options.plots and options.folder is not None:
        draw = options.charts.draw if options.charts is not None else call
        eval_images.draw_charts(options.folder, result, options.names, draw)
        for number, (batch, found) in sorted(tally.shown.items()):
            eval_images.draw_batch(options.folder, number, batch, found, options.names)
        if options.charts is not None:
            options.charts.finish()
    return result


@contextmanager
def _without_training(criterion: LossModule | None) -> Iterator[None]:
    """Put the criterion into evaluation mode, so that validation data does not change its balance."""
    training = criterion is not None and criterion.training
    if criterion is not None:
        criterion.eval()
    try:
        yield
    finally:
        if criterion is not None:
            criterion.train(training)


def _detect(
    runtime: Runtime, images: torch.Tensor, criterion: LossModule | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    if criterion is None:
        return runtime(images), []
    if not isinstance(runtime, RawRuntime):
        raise TypeError(f"{type(runtime).__name__} has no raw outputs; a loss cannot be computed from it")
    return runtime.with_raw(images)


def _suppress(decoded: torch.Tensor, batch: Batch, options: EvalOptions) -> list[torch.Tensor]:
    """Return the boxes of every image (n, 6) in pixels of the input, on the CPU."""
    labels: list[torch.Tensor] = []
    if options.hybrid:
        height, width = batch.images.shape[2:]
        known = batch.targets.cpu() * torch.tensor([1, 1, width, height, width, height])
        labels = [known[known[:, 0] == k, 1:] for k in range(len(decoded))]
    found = non_max_suppression(
        decoded,
        options.conf_thres,
        options.iou_thres,
        labels=labels,
        multi_label=True,
        agnostic=options.single_cls,
        max_det=options.max_det,
    )
    # One copy for the whole batch: the matching that follows has many small steps, which are faster on a CPU.
    together = torch.cat(found).cpu()
    if options.single_cls:
        together[:, 5] = 0
    return list(together.split([len(rows) for rows in found]))


def _count(tally: Tally, number: int, batch: Batch, found: list[torch.Tensor], options: EvalOptions) -> None:
    """Scale boxes and labels back to the original images, and add them to the tally."""
    height, width = batch.images.shape[2:]
    targets = batch.targets.cpu()
    targets_xyxy = xywh2xyxy(targets[:, 2:] * torch.tensor([width, height, width, height]))
    for k, (path, fit, detections) in enumerate(zip(batch.paths, batch.shapes, found)):
        fit = fit or ImageShapes((height, width), (1.0, 1.0), (0.0, 0.0))
        mine = targets[:, 0] == k
        boxes = scale_boxes((height, width), targets_xyxy[mine], fit.original, fit.ratio_pad)
        labels = torch.cat((targets[mine, 1:2], boxes), 1)
        boxes = scale_boxes((height, width), detections[:, :4], fit.original, fit.ratio_pad)
        outcome = tally.add(path, fit.original, torch.cat((boxes, detections[:, 4:]), 1), labels, number)
        if options.sinks:
            tally.outcomes.append(outcome)


# ---- val.py ---------------------------------------------------------------------------------------------------------


def validate(config: ValConfig, charts: ChartProcess | None = None) -> EvalResult:
    """Validate with the options of val.py (all tasks except `study`).

    The run folder appears when the run is complete; a failed or interrupted run leaves no files.

    Raises:
        UserError: an option, a file or a dataset that cannot be used.
    """
    config, data, runtime = prepare(config)
    speed = config.task == "speed"
    annotations = split_annotations(config, data)
    loader: DetectionLoader | WholeImages
    if tiles := tile_settings(config):
        nms = NmsSettings(config.conf_thres, config.iou_thres, None, config.single_cls, True, config.max_det)
        check_size(runtime, config.imgsz, config.imgsz)
        runtime = TiledRuntime(runtime, tiles, (config.imgsz, config.imgsz), nms)
        loader = WholeImages(annotations.records)
    else:
        loader = build_loader(config, annotations, runtime, rect=not speed)
    names = {0: "item"} if config.single_cls else data.names
    text = TextSink(config.save_conf) if config.save_txt or config.save_hybrid else None
    coco = None
    if config.save_json:
        sources = () if config.single_cls else data.split(split_name(config, data))
        coco = CocoSink.for_data(data, annotations, names, sources)
    runtime.warmup((loader.batch_size, 3, config.imgsz, config.imgsz))
    with run_folder(Path(config.project) / config.name, config.exist_ok) as run:
        options = EvalOptions(
            names=names,
            single_cls=config.single_cls,
            conf_thres=config.conf_thres,
            iou_thres=config.iou_thres,
            max_det=config.max_det,
            hybrid=config.save_hybrid,
            folder=run.folder,
            plots=not (speed or config.noplots),
            charts=charts,
            verbose=True,
            class_rows=config.verbose or len(names) < FEW_CLASSES,
            sinks=tuple(sink for sink in (text, coco) if sink is not None),
        )
        result = evaluate(runtime, loader, options)
        if text is not None:
            text.write(run.folder / "labels")
        if coco is not None:
            weights = Path(config.weights[0]).stem
            result = replace(result, coco=coco.write(run.folder / f"{weights}_predictions.json"))
    LOGGER.info("Results saved to %s", run.final)
    return result


def prepare(config: ValConfig) -> tuple[ValConfig, DataConfig, Runtime]:
    """Open the dataset's YAML and the weights, and resolve the options.

    Returns:
        Resolved options (names of the weights, size on the grid), the dataset, the detector.
    """
    load_plugins(config.plugin)
    warn_without_effect(config)
    given = config.is_given("imgsz")
    data = load_data_config(config.data)
    if config.task == "speed":
        config = replace(config, conf_thres=SPEED_CONF, iou_thres=SPEED_IOU, save_json=False)
    elif data.file.name == "coco.yaml":
        config = replace(config, save_json=True)
    if config.tile is not None and config.task in ("speed", "study"):
        raise ConfigError(f"--tile: not with --task {config.task}; leave one of them out")
    if config.save_json:
        CocoSink.check()
    if config.conf_thres > USUAL_CONF and config.task != "speed":
        LOGGER.warning("--conf-thres %g: above %g boxes are missing from the curves", config.conf_thres, USUAL_CONF)
    if config.save_hybrid:
        LOGGER.warning("--save-hybrid: labels are added to NMS with confidence 1: the metrics are not meaningful")
    data.split(split_name(config, data))  # before the weights are read
    device_name, provider = split_device(config.device)
    device = select_device(device_name)
    config = replace(config, weights=choose_weights(config.weights))
    runtime = open_runtime(
        config.weights, device, half=config.half, amp=config.amp, augment=config.augment, dnn=config.dnn,
        provider=provider,
    )  # fmt: skip
    if not config.single_cls:
        check_classes(runtime.names, data, config.weights[0])
    LOGGER.info("Validating on %s", describe_device(device))
    side = max(sides_for(runtime, [config.imgsz], given))
    return replace(config, imgsz=input_side(side, runtime)), data, runtime


def warn_without_effect(config: ValConfig) -> None:
    """Log a warning for every given option that has no effect with the other options."""
    thresholds = f"--task speed uses confidence {SPEED_CONF} and IoU {SPEED_IOU}"
    rules = (
        ("save_conf", not (config.save_txt or config.save_hybrid), "no label files are written; add --save-txt"),
        ("conf_thres", config.task == "speed", thresholds),
        ("iou_thres", config.task == "speed", thresholds),
        ("imgsz", config.task == "study", "--task study chooses the sizes"),
        ("save_txt", config.task == "study", "--task study writes metrics only"),
        ("save_hybrid", config.task == "study", "--task study writes metrics only"),
        ("save_json", config.task in ("speed", "study"), f"--task {config.task} writes no COCO results"),
        ("batch_size", config.tile is not None, "with --tile images are read one by one"),
        ("workers", config.tile is not None, "with --tile images are read one by one"),
    )
    for name, useless, reason in rules:
        if useless and config.is_given(name):
            LOGGER.warning("--%s has no effect: %s", name.replace("_", "-"), reason)


def split_name(config: ValConfig, data: DataConfig) -> str:
    """Return the split of a task, or raise DataError if the YAML has none of that name."""
    name = config.task if config.task in ("train", "test") else "val"
    if name not in data.splits:
        has = ", ".join(data.splits) or "none"
        raise DataError(f"{data.file}: --task {config.task}: has no split '{name}:'; it has {has}")
    return name


def split_annotations(config: ValConfig, data: DataConfig) -> Annotations:
    """Return images and labels of the task's split; all labels may be missing if only files are written."""
    labels_needed = not (config.save_json or config.save_txt) or config.save_hybrid
    sources = data.split(split_name(config, data))
    classes = len(data.names)
    annotations = load_annotations(sources, classes, single_cls=config.single_cls, require_labels=labels_needed)
    LOGGER.info("%s", annotations.report.summary())
    return annotations


def build_loader(config: ValConfig, annotations: Annotations, runtime: Runtime, rect: bool) -> DetectionLoader:
    """Return the loader of the split: rectangular batches, or squares if the input size is fixed or `rect` is off."""
    rect = rect and runtime.imgsz is None
    batch_size = runtime.fixed_batch or config.batch_size
    pad = RECT_PAD if rect else 0.0
    dataset = DetectionDataset(
        annotations.records, config.imgsz, rect=rect, batch_size=batch_size, stride=runtime.stride, pad=pad
    )
    for shape in dataset.smallest_shapes():
        check_size(runtime, *shape)
    return DetectionLoader(dataset, batch_size, workers=config.workers)


def input_side(wanted: int, runtime: Runtime) -> int:
    """Return the input side of the detector: its own if fixed, else rounded up to a multiple of the stride."""
    if runtime.imgsz is not None:
        height, width = runtime.imgsz
        if height != width:
            raise ConfigError(f"--imgsz: the model's input is fixed to {height} x {width}; validation needs a square")
        side, reason = height, "the model's input is fixed"
    else:
        side = max(-(-wanted // runtime.stride) * runtime.stride, runtime.stride)
        reason = f"sides must be multiples of {runtime.stride}"
    if side != wanted:
        LOGGER.warning("--imgsz %d: %s, %d is used", wanted, reason, side)
    return side


def check_classes(names: Mapping[int, str], data: DataConfig, weights: str) -> None:
    """Raise DataError unless the model and the dataset have the same class names (ignoring case and spaces)."""
    if len(names) != len(data.names):
        raise DataError(
            f"{data.file}: has {len(data.names)} classes, {weights} was trained for {len(names)}"
            f" ({', '.join(list(names.values())[:5])}{', ...' if len(names) > 5 else ''}); give the dataset it was"
            " trained for, or --single-cls to look at boxes alone"
        )
    for number, name in data.names.items():
        placeholders = str(number), f"class{number}"
        if _plain(names[number]) not in (_plain(name), *placeholders) and _plain(name) not in placeholders:
            raise DataError(
                f"{data.file}: class {number} is '{name}', in {weights} it is '{names[number]}'; give the dataset the"
                " model was trained for, or --single-cls to look at boxes alone"
            )


def _plain(name: str) -> str:
    return "".join(name.lower().split())
