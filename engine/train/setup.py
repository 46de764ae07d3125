"""From options to everything a training needs: run folder, data, model, loss, optimiser, schedule."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from data.anchors import check_anchors
from data.augment.config import AugmentConfig
from data.config import DataConfig, load_data_config
from data.labels.labels import Annotations, load_annotations
from data.loading.dataset import DetectionDataset
from data.loading.loader import DetectionLoader, create_loader
from data.loading.weights import class_loss_weights, labels_to_class_weights
from engine.cli.config import Hyperparameters, TrainConfig
from engine.cli.plugins import load_plugins
from engine.devices.distributed import World, broadcast, copy_from_main, gather_all, main_first
from engine.devices.sync_bn import synchronize
from engine.evaluate.evaluator import EvalOptions
from engine.runtimes.pytorch import grid_of
from engine.train.autobatch import choose_batch
from engine.train.ema import ModelEma
from engine.train.freeze import Frozen, freeze, log_frozen, names_to_freeze
from engine.train.optimizer import (
    Schedule,
    build_optimizer,
    describe_groups,
    parameter_groups,
    rate_scales,
    scaled_decay,
)
from models.checkpoint.io import Checkpoint, read_checkpoint
from models.loading import spec_without_weights, transfer_weights
from models.losses.anchor_based import DetectionLoss, LossConfig
from models.yolo import DetectionModel
from utils.device import amp_dtype, describe_device
from utils.errors import CheckpointError, ConfigError
from utils.files import find_file, increment_path, make_folder, newest_file
from utils.seed import seed_everything
from utils.yaml_lines import dump_yaml

LOGGER = logging.getLogger(__name__)


@dataclass
class Setup:
    """The parts of one training.

    Attributes:
        grid: input sides are multiples of it.
        frozen: what `--freeze` holds still; empty once `--freeze-epochs` are over.
        labels: per training picture (n, 5) class, xywhn.
        class_weights: (nc,) inverse frequency, sum 1.
        ema: the averaged model. Every rank keeps one; before a validation they take the values of rank zero's.
        data_hash: of names, sizes and labels of the training and validation pictures.
        start_epoch: first epoch to do.
    """

    config: TrainConfig
    hyp: Hyperparameters
    data: DataConfig
    folder: Path
    device: torch.device
    world: World
    model: DetectionModel
    grid: int
    frozen: Frozen
    loader: DetectionLoader
    val_loader: DetectionLoader
    labels: list[np.ndarray]
    class_weights: np.ndarray
    criterion: DetectionLoss
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    ema: ModelEma[DetectionModel]
    eval_options: EvalOptions
    resumed: Checkpoint | None = None
    data_hash: str = ""
    start_epoch: int = 0


def resolve_run(config: TrainConfig) -> tuple[TrainConfig, Checkpoint | None]:
    """Follow `--resume`: the options of the interrupted run, and its checkpoint.

    Device and workers may be given anew, since the machine may be another one.

    Raises:
        CheckpointError: nothing to resume, or a run that is finished.
    """
    load_plugins(config.plugin)
    if not config.resume:
        return config, None
    if config.resume is True:
        path = newest_file("runs/train", "*/weights/last.pt")
        if path is None:
            raise CheckpointError("--resume: there is no runs/train/*/weights/last.pt; give the file: --resume last.pt")
    else:
        path = Path(config.resume)
    checkpoint = read_checkpoint(path)
    if checkpoint.train is None or "options" not in checkpoint.train:
        raise CheckpointError(
            f"{path}: holds no training state (the run is finished, or it is another program's file); "
            f"start anew from its weights with: --weights {path}"
        )
    saved = dict(checkpoint.train["options"])
    known = TrainConfig.from_keywords(**saved)
    LOGGER.info("Resuming %s after epoch %d", path, checkpoint.epoch)
    chosen = {
        "resume": str(path),
        "device": config.device or known.device,
        "workers": known.workers if config.workers == TrainConfig().workers else config.workers,
        "project": str(path.resolve().parents[2]),
        "name": path.resolve().parents[1].name,
        "exist_ok": True,
    }
    load_plugins(known.plugin)
    return replace(known, **chosen), checkpoint


def build_setup(config: TrainConfig, resumed: Checkpoint | None, device: torch.device, world: World) -> Setup:
    """Build everything; all mistakes of the user are found here, before the run folder is made."""
    hyp = choose_hyperparameters(config, resumed)
    seed_everything(config.seed + 1 + world.rank)
    data = load_data_config(config.data)
    declared = len(data.names)
    if config.single_cls:
        data = replace(data, names={0: "item"} if len(data.names) != 1 else data.names)
    model = build_model(config, hyp, data, resumed).to(device)
    grid = grid_of(model)
    config = replace(config, imgsz=_whole(config.imgsz, grid))
    if device.type == "cpu" and not resumed:
        _quick_look(config)
    train_set, val_set = _annotations(config, data, declared, world)
    config = _batch_size(config, model, device, world, len(train_set.records))
    frozen_names = names_to_freeze(model, config.freeze)
    data_hash = hash_of(train_set, val_set)
    _same_data(resumed, data_hash, data)
    labels = [r.labels for r in train_set.records]
    factors = _class_factors(config, hyp, data, labels)
    folder = _run_folder(config, world)
    if not config.noautoanchor and not resumed:
        _fit_anchors(model, train_set, config, hyp)
    copy_from_main(model, world)  # each rank has drawn values of its own, and only rank zero reads published weights
    start_epoch = resumed.epoch + 1 if resumed else 0
    thawed = 0 < config.freeze_epochs <= start_epoch
    frozen = freeze(model, set() if thawed else frozen_names)
    log_frozen(model, frozen)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(f"--freeze {' '.join(config.freeze)}: holds every parameter; nothing is left to learn")
    model = model.to(memory_format=torch.channels_last)
    ema = ModelEma(model)
    if config.sync_bn and world.size > 1:
        synchronize(model, world, device)
    loader, val_loader = _loaders(config, hyp, (train_set, val_set), grid, world)
    decay = scaled_decay(hyp.weight_decay, config.batch_size, int(hyp.nominal_batch))
    groups = parameter_groups(model, decay, rate_scales(model, config.backbone_lr, config.layer_decay))
    optimizer = build_optimizer(config.optimizer, groups, hyp.lr0, hyp.momentum)
    LOGGER.info("%s, lr0 %g\n%s", config.optimizer, hyp.lr0, describe_groups(groups))
    return Setup(
        config=config, hyp=hyp, data=data, folder=folder, device=device, world=world, model=model, grid=grid,
        frozen=frozen, loader=loader, val_loader=val_loader, labels=labels,
        class_weights=labels_to_class_weights(labels, len(data.names)),
        criterion=build_loss(model, hyp, config, factors), optimizer=optimizer,
        schedule=Schedule(hyp, config.epochs, len(loader), config.batch_size, config.cos_lr),
        ema=ema,
        eval_options=EvalOptions(names=data.names, single_cls=config.single_cls), resumed=resumed,
        data_hash=data_hash, start_epoch=start_epoch,
    )  # fmt: skip


def build_model(
    config: TrainConfig, hyp: Hyperparameters, data: DataConfig, resumed: Checkpoint | None
) -> DetectionModel:
    """The network: from `--cfg`, from a checkpoint's own description, or both, with the weights that fit."""
    anchors = hyp.anchors and round(hyp.anchors)
    num_classes = len(data.names)
    if resumed is not None:
        model = DetectionModel(spec_without_weights(resumed.spec), nc=num_classes)
        model.load_state_dict(resumed.state)
    elif config.weights:
        checkpoint = read_checkpoint(find_file(config.weights, error=CheckpointError))
        cfg = find_file(config.cfg, "models", "models/hub") if config.cfg else spec_without_weights(checkpoint.spec)
        model = DetectionModel(cfg, nc=num_classes, anchors=anchors)
        exclude = ("anchor",) if config.cfg or anchors else ()
        report = transfer_weights(model, checkpoint, exclude=exclude, partial=config.partial_weights)
        LOGGER.info("%s: %s", config.weights, report.summary())
    elif config.cfg:
        cfg = find_file(config.cfg, "models", "models/hub")
        model = DetectionModel(cfg, nc=num_classes, anchors=anchors, backbone_weights=config.backbone_weights or None)
    else:
        raise ConfigError("--cfg and --weights are empty; give a model YAML, for example models/yolov5-riformer.yaml")
    model.names = dict(data.names)
    LOGGER.info("%s", model.layer_table())
    LOGGER.info("%s", model.info())
    return model


def build_loss(
    model: DetectionModel, hyp: Hyperparameters, config: TrainConfig, class_weights: tuple[float, ...] | None = None
) -> DetectionLoss:
    """The loss with its gains scaled to levels, classes and image size."""
    head = model.head
    loss_config = LossConfig.from_hyp(
        hyp.to_dict(),
        num_levels=head.nl,
        num_classes=head.nc,
        imgsz=config.imgsz,
        label_smoothing=config.label_smoothing,
    )
    loss_config = replace(loss_config, class_weights=class_weights)
    return DetectionLoss(head.anchors * head.stride.view(-1, 1, 1).to(head.anchors), model.stride, loss_config)


def _class_factors(
    config: TrainConfig, hyp: Hyperparameters, data: DataConfig, labels: list[np.ndarray]
) -> tuple[float, ...] | None:
    """Factors on the class loss that the hyper-parameters ask for, which are said."""
    factors = class_loss_weights(hyp.class_weights, data.names, labels, config.hyp)
    if factors is not None:
        shown = ", ".join(f"{name} {factor:.3g}" for name, factor in zip(data.names.values(), factors))
        note = "" if len(factors) > 1 else " (without effect: a single class has no class loss)"
        LOGGER.info("Class loss weighted (class_weights): %s%s", shown, note)
    return factors


def choose_hyperparameters(config: TrainConfig, resumed: Checkpoint | None) -> Hyperparameters:
    """Those of a resumed run, else of `--hyp`; ConfigError when that file is made for another optimiser."""
    if resumed is not None and resumed.train is not None:
        return Hyperparameters.from_mapping(resumed.train["hyp"], where="--resume")
    hyp = Hyperparameters.from_yaml(find_file(config.hyp, "data/hyps"))
    if hyp.optimizer not in (None, config.optimizer):
        raise ConfigError(
            f"{config.hyp}: its rates are made for {hyp.optimizer}, not {config.optimizer}; add --optimizer "
            f"{hyp.optimizer} (or remove the line 'optimizer:' from a copy of the file)"
        )
    return hyp


def _batch_size(
    config: TrainConfig, model: DetectionModel, device: torch.device, world: World, images: int
) -> TrainConfig:
    if config.batch_size == 0:
        raise ConfigError("--batch-size 0: give a number of images, or -1 to choose it by GPU memory")
    if config.batch_size == -1:
        share = max(images // world.size, 1)
        batch = choose_batch(model, config.imgsz, device, amp_dtype(config.amp, device), share)
        config = replace(config, batch_size=min(gather_all(batch, world)) * world.size)  # the GPUs may differ
    if config.batch_size % world.size:
        raise ConfigError(
            f"--batch-size {config.batch_size}: is the total over all processes, and no multiple of the {world.size} "
            "that torchrun started"
        )
    return config


def _annotations(config: TrainConfig, data: DataConfig, declared: int, world: World) -> tuple[Annotations, Annotations]:
    """Pictures and labels for training and validation; rank zero fetches, scans and writes the caches."""
    with main_first(world):
        train_set, val_set = (
            load_annotations(data.split(name), declared, single_cls=config.single_cls, progress=world.is_main)
            for name in ("train", "val")
        )
    for part in (train_set, val_set):
        LOGGER.info("%s", part.report.summary())
    return train_set, val_set


def hash_of(*sets: Annotations) -> str:
    """Hex digest of the file names, sizes and labels of these pictures, wherever their folder is."""
    digest = hashlib.sha256()
    for part in sets:
        for record in part.records:
            digest.update(f"{record.path.name} {record.height} {record.width} {len(record.labels)}".encode())
            digest.update(np.ascontiguousarray(record.labels).tobytes())
    return digest.hexdigest()


def _same_data(resumed: Checkpoint | None, data_hash: str, data: DataConfig) -> None:
    before = resumed.train.get("data_hash") if resumed is not None and resumed.train is not None else None
    if before not in (None, data_hash):
        raise CheckpointError(
            f"--resume: {data.file}: its pictures or labels have changed since this run began, so that it cannot go on "
            "as it was; start a new run from its weights: --weights .../last.pt"
        )


def _whole(imgsz: int, grid: int) -> int:
    """The size rounded up to the grid, at least two cells of it, as YOLOv5 does."""
    size = max(-(-imgsz // grid) * grid, 2 * grid)
    if size != imgsz:
        LOGGER.warning("--imgsz %d is not a multiple of %d: %d is used", imgsz, grid, size)
    return size


def _quick_look(config: TrainConfig) -> None:
    if config.epochs * config.imgsz**2 > 30 * 256**2:
        LOGGER.info(
            "No GPU in use: %d epochs at %d pixels can take hours. For a quick look: --epochs 10 --imgsz 192",
            config.epochs,
            config.imgsz,
        )


def _run_folder(config: TrainConfig, world: World) -> Path:
    name = Path(config.cfg).stem if config.name == "cfg" else config.name
    folder = Path(config.project) / name
    if world.is_main:
        folder = increment_path(folder, exist_ok=config.exist_ok)
        make_folder(folder / "weights")
    return broadcast(folder, world)


def save_resolved(setup: Setup) -> None:
    """Write the resolved options and hyper-parameters beside the results (opt.yaml, hyp.yaml)."""
    dump_yaml(setup.folder / "opt.yaml", {**setup.config.to_dict(), "save_dir": str(setup.folder)})
    dump_yaml(setup.folder / "hyp.yaml", setup.hyp.to_dict())
    LOGGER.info("Training on %s, results in %s", describe_device(setup.device), setup.folder)


def _fit_anchors(model: DetectionModel, train_set: Annotations, config: TrainConfig, hyp: Hyperparameters) -> None:
    """Check that the anchors reach the labels; replace them by fitted ones where they do not."""
    head = model.head
    stride = head.stride.view(-1, 1, 1).to(head.anchors)
    pixels = (head.anchors * stride).cpu().numpy()
    report = check_anchors(train_set.records, pixels, config.imgsz, thr=hyp.anchor_t, seed=config.seed)
    LOGGER.info("%s", report)
    if report.changed:
        head.anchors.copy_(torch.as_tensor(report.anchors).to(head.anchors) / stride)


def _loaders(
    config: TrainConfig, hyp: Hyperparameters, sets: tuple[Annotations, Annotations], grid: int, world: World
) -> tuple[DetectionLoader, DetectionLoader]:
    train_set, val_set = sets
    per_rank = config.batch_size // world.size
    with main_first(world if config.cache == "disk" else World()):  # in memory, each has a cache of its own
        train_data = DetectionDataset(
            train_set.records, config.imgsz, augment=AugmentConfig.from_hyp(hyp.to_dict()), rect=config.rect,
            batch_size=per_rank, stride=grid, cache=config.cache, seed=config.seed,
            close_mosaic_from=max(config.epochs - config.close_mosaic, 0) if config.close_mosaic else None,
        )  # fmt: skip
        val_data = DetectionDataset(
            val_set.records, config.imgsz, rect=True, batch_size=per_rank * 2, stride=grid, pad=0.5,
            cache=None if config.noval else config.cache,
        )  # fmt: skip
    loader = create_loader(
        train_data, per_rank, workers=config.workers, shuffle=not config.rect, seed=config.seed,
        rank=world.rank, world_size=world.size, quad=config.quad,
    )  # fmt: skip
    val_loader = create_loader(
        val_data, per_rank * 2, workers=config.workers, rank=world.rank, world_size=world.size, repeat=False
    )
    return loader, val_loader
