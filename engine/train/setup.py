"""Construction of the parts of a training: run folder, data, model, loss, optimizer, schedule."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data.anchors import check_anchors
from data.augment.config import AugmentConfig
from data.config import DataConfig, load_data_config
from data.labels.labels import Annotations, load_annotations
from data.loading.dataset import DetectionDataset
from data.loading.loader import DetectionLoader
from data.loading.weights import class_loss_weights, labels_to_class_weights
from data.sizes import multi_scale_shape, multi_scale_sizes
from engine.cli.config import Hyperparameters, TrainConfig
from engine.devices.distributed import World, broadcast, copy_from_main, gather_all, main_first, mean_over_ranks
from engine.devices.sync_bn import convert_sync_batchnorm
from engine.runtimes.pytorch import grid_of
from engine.train.autobatch import choose_batch, needs_two_images
from engine.train.ema import ModelEma
from engine.train.freeze import Frozen, eval_frozen, freeze, log_frozen, names_to_freeze
from engine.train.optimizer import build_optimizer, describe_groups, lr_scales, parameter_groups, scaled_decay
from engine.train.options import (
    NO_MODEL,
    choose_hyperparameters,
    resolve_auto,
    rounded_size,
    warn_without_effect,
    with_files,
    with_recipe,
)
from engine.train.schedule import Schedule
from models.backbones.base import Backbone
from models.checkpoint.io import Checkpoint, read_checkpoint
from models.loading import load_exactly, require_rgb, spec_without_weights, transfer_weights
from models.losses.base import LossModule, LossOptions
from models.yolo import DetectionModel
from utils.device import amp_dtype, keep_freed_memory
from utils.errors import CheckpointError, ConfigError
from utils.files import make_folder, make_run_folder
from utils.log import LINE_WIDTH, is_main_process, set_error_folder
from utils.seed import seed_everything

LOGGER = logging.getLogger(__name__)
SINGLE = World()


@dataclass(frozen=True)
class RunSettings:
    """Resolved options and environment of a run.

    Attributes:
        config: options; image size and batch size are resolved.
        hyp: hyperparameters.
        folder: run folder.
        device: device of this process.
        world: this process among those of the training.
        resumed: checkpoint of the interrupted run, None for a new one.
        given: options before they were resolved.
    """

    config: TrainConfig
    hyp: Hyperparameters
    folder: Path
    device: torch.device
    world: World
    resumed: Checkpoint | None
    given: TrainConfig

    @property
    def start_epoch(self) -> int:
        """First epoch to train."""
        return self.resumed.epoch + 1 if self.resumed else 0

    def weights(self, name: str) -> Path:
        """Return the path of a checkpoint of this run, such as `last.pt`."""
        return self.folder / "weights" / name


@dataclass(frozen=True)
class DataParts:
    """Training and validation data.

    Attributes:
        names: class names by index.
        loader: augmented training batches of this rank.
        val_loader: validation batches of this rank.
        labels: per training image (n, 5) class, xywhn.
        class_weights: (nc,) inverse class frequency, sum 1.
        digest: SHA-256 of names, sizes and labels of all images; a resumed run must have the same.
        file: dataset YAML, absolute.
    """

    names: dict[int, str]
    loader: DetectionLoader
    val_loader: DetectionLoader
    labels: list[np.ndarray]
    class_weights: np.ndarray
    digest: str
    file: Path


@dataclass(frozen=True)
class ModelParts:
    """The trained model and its loss.

    Attributes:
        model: model on the device, in `memory_format`.
        ema: averaged model. Every rank has one; before a validation that of rank zero is copied to the others.
        frozen: parameters that `--freeze` excludes from training at the start.
        criterion: loss.
        grid: input heights and widths are multiples of it.
    """

    model: DetectionModel
    ema: ModelEma[DetectionModel]
    frozen: Frozen
    criterion: LossModule
    grid: int
    memory_format: torch.memory_format = torch.channels_last


@dataclass(frozen=True)
class TrainingParts:
    """Everything `Trainer` needs, by concern."""

    run: RunSettings
    data: DataParts
    model: ModelParts
    optimizer: torch.optim.Optimizer
    schedule: Schedule


def build_parts(config: TrainConfig, resumed: Checkpoint | None, device: torch.device, world: World) -> TrainingParts:
    """Build all parts of a training; user errors are raised before the run folder is created."""
    keep_freed_memory()
    given = config
    if not resumed:
        config = with_recipe(with_files(config))
        warn_without_effect(config, world.size)
    hyp = choose_hyperparameters(config, resumed)
    seed_everything(config.seed + (1 + world.rank if world.size > 1 else 0))
    data = load_data_config(config.data)
    declared = len(data.names)
    if config.single_cls:
        data = replace(data, names={0: "item"} if declared != 1 else data.names)
    model = build_model(config, hyp, data, resumed)
    grid = grid_of(model)
    config = replace(config, data=str(data.file.absolute()), imgsz=_round_to_grid(config.imgsz, grid))
    square = {(config.imgsz, config.imgsz)}
    _check_sizes(model, square, config, grid)
    model.to(device)
    if device.type == "cpu" and not resumed:
        _hint_short_run(config)
    annotations = _load_annotations(config, data, declared, world)
    records = annotations[0].records
    config = replace(config, batch_size=_batch_size(config, model, device, world, len(records)))
    config, hyp = resolve_auto(config, hyp, len(data.names), len(records))
    frozen_names = names_to_freeze(model, config.freeze)
    digest = data_digest(*annotations)
    _check_same_data(resumed, digest, data)
    labels = [record.labels for record in records]
    class_factors = class_loss_weights(hyp.class_weights, data.names, labels, config.hyp)
    _log_class_factors(class_factors, data)
    sizes = model.head.anchor_sizes
    if sizes is not None and not resumed and not (config.noautoanchor and (sizes > 0).all()):  # 0: not chosen yet
        _fit_anchors(model, sizes, annotations[0], config, hyp)
    unfrozen = resumed is not None and 0 < config.freeze_epochs <= resumed.epoch + 1
    frozen = _freeze(model, config, set() if unfrozen else frozen_names)
    loader, val_loader = _loaders(config, hyp, world, annotations, grid)
    _check_sizes(model, loader.dataset.smallest_shapes() - square, config, grid)
    _check_sizes(model, val_loader.dataset.smallest_shapes() - square, replace(config, multi_scale=False), grid)
    if not (config.sync_bn and world.size > 1):
        _check_single_images(model, frozen, loader, config, grid)
    model_parts = _model_parts(model, frozen, grid, config, hyp, class_factors, device, world)
    weights = labels_to_class_weights(labels, len(data.names))
    data_parts = DataParts(dict(data.names), loader, val_loader, labels, weights, digest, data.file.resolve())
    optimizer = _build_optimizer(model_parts.model, config, hyp)
    schedule = Schedule(hyp, config.epochs, len(loader), config.batch_size, config.cos_lr)
    run = RunSettings(config, hyp, _run_folder(config, world), device, world, resumed, given)
    return TrainingParts(run, data_parts, model_parts, optimizer, schedule)


def _freeze(model: DetectionModel, config: TrainConfig, names: set[str]) -> Frozen:
    frozen = freeze(model, names)
    log_frozen(model, frozen)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(f"--freeze {' '.join(config.freeze)}: freezes every parameter; nothing is left to train")
    return frozen


def _model_parts(
    model: DetectionModel, frozen: Frozen, grid: int, config: TrainConfig, hyp: Hyperparameters,
    class_factors: tuple[float, ...] | None, device: torch.device, world: World,
) -> ModelParts:  # fmt: skip
    copy_from_main(model, world)  # each rank initialized its own weights, and only rank zero loads published ones
    layout = memory_format(model, device, config.channels_last)
    model = model.to(memory_format=layout)
    ema = ModelEma(model)
    if config.sync_bn and world.size > 1:
        convert_sync_batchnorm(model, world, device)
    return ModelParts(model, ema, frozen, build_loss(model, hyp, config, class_factors, world), grid, layout)


def memory_format(model: DetectionModel, device: torch.device, choice: str = "auto") -> torch.memory_format:
    """Return the memory format to train in: channels_last, unless `--channels-last` or a backbone says otherwise."""
    crashing = [m for m in model.modules() if isinstance(m, Backbone) and not m.channels_last]
    if choice == "off":
        return torch.contiguous_format
    if choice == "on" or device.type != "cpu" or not crashing:
        return torch.channels_last
    LOGGER.warning(
        "%s: training in channels_last crashes on a CPU (a bug in oneDNN); contiguous tensors are used, which is "
        "slower (--channels-last on: try it)", getattr(crashing[0], "name", type(crashing[0]).__name__),
    )  # fmt: skip
    return torch.contiguous_format


def _build_optimizer(model: DetectionModel, config: TrainConfig, hyp: Hyperparameters) -> torch.optim.Optimizer:
    decay = scaled_decay(hyp.weight_decay, config.batch_size, int(hyp.nominal_batch))
    groups = parameter_groups(model, decay, lr_scales(model, config.backbone_lr, config.layer_decay))
    assert config.optimizer is not None, "with_recipe sets it"
    LOGGER.info("%s, lr0 %g\n%s", config.optimizer, hyp.lr0, describe_groups(groups))
    return build_optimizer(config.optimizer, groups, hyp.lr0, hyp.momentum)


def _check_sizes(model: DetectionModel, shapes: Iterable[tuple[int, int]], config: TrainConfig, grid: int) -> None:
    """Raise SpecError where batches of one of these heights and widths are too small for a row."""
    smallest = multi_scale_sizes(config.imgsz, grid)[0]
    for shape in shapes:
        model.check_size(*(multi_scale_shape(*shape, smallest, grid) if config.multi_scale else shape))


def _check_single_images(
    model: DetectionModel, frozen: Frozen, loader: DetectionLoader, config: TrainConfig, grid: int
) -> None:
    """Leave out a last batch of one image, or refuse batches of one, where a BatchNorm needs more than one value."""
    if loader.smallest_batch() > 1:
        return
    shape = loader.smallest_batch_shape()
    if config.multi_scale:
        shape = multi_scale_shape(*shape, multi_scale_sizes(config.imgsz, grid)[0], grid)
    model.train()
    eval_frozen(model, frozen)
    if not needs_two_images(model, shape):
        return
    if len(loader) == 1 or loader.images_per_batch == 1:
        raise ConfigError(
            f"--batch-size {config.batch_size}: a BatchNorm of this network gets one value per channel from one image "
            f"of {shape[0]} x {shape[1]} pixels, which it cannot train on; give a larger --batch-size"
        )
    LOGGER.warning("The last batch of each epoch has a single image, too few for BatchNorm: it is left out")
    loader.min_images = 2


def build_model(
    config: TrainConfig, hyp: Hyperparameters, data: DataConfig, resumed: Checkpoint | None
) -> DetectionModel:
    """Build the model from `--cfg`, from the spec in a checkpoint, or from both, with all matching weights loaded."""
    anchors, head = hyp.anchors and round(hyp.anchors), config.head
    num_classes = len(data.names)
    if resumed is not None:
        model = DetectionModel(spec_without_weights(resumed.spec), nc=num_classes)
        load_exactly(model, resumed)
    elif config.weights:
        checkpoint = read_checkpoint(config.weights)
        cfg = Path(config.cfg) if config.cfg else spec_without_weights(checkpoint.spec)
        model = DetectionModel(cfg, nc=num_classes, anchors=anchors, head=head)
        exclude = ("anchor",) if config.cfg or anchors or head else ()
        report = transfer_weights(model, checkpoint, exclude=exclude, partial=config.partial_weights)
        LOGGER.info("%s: %s", config.weights, report.summary())
    elif config.cfg:
        weights = config.backbone_weights or None
        model = DetectionModel(config.cfg, nc=num_classes, anchors=anchors, backbone_weights=weights, head=head)
    else:
        raise ConfigError(NO_MODEL)
    require_rgb(model)
    model.names = dict(data.names)
    LOGGER.info("%s", model.layer_table(None if config.verbose else LINE_WIDTH))
    LOGGER.info("%s", model.info())
    return model


def build_loss(
    model: DetectionModel,
    hyp: Hyperparameters,
    config: TrainConfig,
    class_weights: tuple[float, ...] | None = None,
    world: World = SINGLE,
) -> LossModule:
    """Build the loss of the head with gains scaled to the number of levels and classes and to the image size."""
    mean = None if world.size == 1 else partial(mean_over_ranks, world=world)
    options = LossOptions(config.imgsz, config.label_smoothing, class_weights, mean, world.size)
    if model.head.unused:
        LOGGER.info("%s: without effect: %s", type(model.head).__name__, ", ".join(model.head.unused))
    if config.label_smoothing and "--label-smoothing" in model.head.unused:
        LOGGER.warning("--label-smoothing has no effect: %s has no label smoothing", type(model.head).__name__)
    return model.head.loss(hyp.to_dict(), options)


def _log_class_factors(factors: tuple[float, ...] | None, data: DataConfig) -> None:
    if factors is not None:
        shown = ", ".join(f"{name} {factor:.3g}" for name, factor in zip(data.names.values(), factors))
        note = "" if len(factors) > 1 else " (without effect: a single class has no class loss)"
        LOGGER.info("Class loss weighted (class_weights): %s%s", shown, note)


def _batch_size(config: TrainConfig, model: DetectionModel, device: torch.device, world: World, images: int) -> int:
    """Return the total batch size over all ranks."""
    batch_size = config.batch_size
    if batch_size == 0:
        raise ConfigError("--batch-size 0: give a number of images, or -1 to choose it by GPU memory")
    if batch_size == -1:
        share = max(images // world.size, 1)
        sizes = multi_scale_sizes(config.imgsz, grid_of(model)) if config.multi_scale else [config.imgsz]
        batch = choose_batch(model, max(sizes), device, amp_dtype(config.amp, device), share)
        batch_size = min(gather_all(batch, world)) * world.size  # the GPUs may differ
    if batch_size % world.size:
        raise ConfigError(
            f"--batch-size {batch_size}: is the total over all processes, and not a multiple of the {world.size} "
            "that torchrun started"
        )
    return batch_size


def _load_annotations(
    config: TrainConfig, data: DataConfig, declared: int, world: World
) -> tuple[Annotations, Annotations]:
    """Load images and labels for training and validation; rank zero downloads, scans and writes the caches."""
    with main_first(world):
        train_set, val_set = (
            load_annotations(
                data.split(name),
                declared,
                single_cls=config.single_cls,
                progress=is_main_process(),
                require_labels=name == "train",
            )
            for name in ("train", "val")
        )
    for split in (train_set, val_set):
        LOGGER.info("%s", split.report.summary())
    if not val_set.report.boxes:
        LOGGER.warning("%s: the validation split has no objects: mAP is undefined and reported as 0", data.file)
    return train_set, val_set


def data_digest(*splits: Annotations) -> str:
    """Return a hex digest of file names, sizes and labels, independent of the folder the images are in."""
    digest = hashlib.sha256()
    for split in splits:
        for record in split.records:
            text = f"{record.path.name} {record.height} {record.width} {len(record.labels)}"
            digest.update(text.encode("utf-8", "surrogatepass"))
            digest.update(np.ascontiguousarray(record.labels).tobytes())
    return digest.hexdigest()


def _check_same_data(resumed: Checkpoint | None, digest: str, data: DataConfig) -> None:
    before = resumed.train.get("data_hash") if resumed is not None and resumed.train is not None else None
    if before not in (None, digest):
        raise CheckpointError(
            f"--resume: {data.file}: its images or labels have changed since this run started, so it cannot be "
            "resumed; start a new run from its weights: --weights .../last.pt"
        )


def _round_to_grid(imgsz: int, grid: int) -> int:
    size = rounded_size(imgsz, grid)
    if size != imgsz:
        LOGGER.warning("--imgsz %d is not a multiple of %d: %d is used", imgsz, grid, size)
    return size


def _hint_short_run(config: TrainConfig) -> None:
    if config.epochs * config.imgsz**2 > 30 * 256**2:
        LOGGER.info(
            "No GPU in use: %d epochs at %d pixels can take hours. For a quick look: --epochs 10 --imgsz 192",
            config.epochs,
            config.imgsz,
        )


def _run_folder(config: TrainConfig, world: World) -> Path:
    folder = Path(config.project) / config.run_name
    if is_main_process():
        folder = make_run_folder(folder, config.exist_ok)
        make_folder(folder / "weights")
    folder = broadcast(folder, world)
    set_error_folder(folder)
    return folder


def _fit_anchors(
    model: DetectionModel, sizes: torch.Tensor, train_set: Annotations, config: TrainConfig, hyp: Hyperparameters
) -> None:
    """Check how well the anchors fit the labels; replace them if they do not."""
    report = check_anchors(train_set.records, sizes.cpu().numpy(), config.imgsz, thr=hyp.anchor_t, seed=config.seed)
    LOGGER.info("%s", report)
    if report.changed:
        model.head.set_anchor_sizes(torch.as_tensor(report.anchors))


def _loaders(
    config: TrainConfig, hyp: Hyperparameters, world: World, annotations: tuple[Annotations, Annotations], grid: int
) -> tuple[DetectionLoader, DetectionLoader]:
    train_set, val_set = annotations
    per_rank = config.batch_size // world.size
    with main_first(world if config.cache == "disk" else World()):  # in RAM, each rank has its own cache
        train_data = DetectionDataset(
            train_set.records, config.imgsz, augment=AugmentConfig.from_hyp(hyp.to_dict()), rect=config.rect,
            batch_size=per_rank, stride=grid, cache=config.cache, seed=config.seed,
            close_mosaic_from=max(config.epochs - config.close_mosaic, 0) if config.close_mosaic else None,
        )  # fmt: skip
        val_data = DetectionDataset(
            val_set.records, config.imgsz, rect=True, batch_size=per_rank * 2, stride=grid, pad=0.5,
            cache=None if config.noval else config.cache,
        )  # fmt: skip
    loader = DetectionLoader(
        train_data, per_rank, workers=config.workers, shuffle=not config.rect, seed=config.seed,
        rank=world.rank, world_size=world.size, quad=config.quad,
    )  # fmt: skip
    val_loader = DetectionLoader(
        val_data, per_rank * 2, workers=config.workers, rank=world.rank, world_size=world.size, repeat=False
    )
    return loader, val_loader
