"""Resolution of the options of a training: files, recipe, `--resume`, and options without effect."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.cli.config import Hyperparameters, TrainConfig
from engine.cli.plugins import load_plugins
from engine.train.optimizer import auto_optimizer, auto_settings
from engine.train.state import damage_reported
from models.build.spec import FOLDERS, HEADS, HeadForm, read_model_spec
from models.checkpoint.file_kinds import find_checkpoint
from models.checkpoint.io import Checkpoint, read_checkpoint
from utils.errors import CheckpointError, ConfigError, shown
from utils.files import find_file, newest_file

LOGGER = logging.getLogger(__name__)
NO_MODEL = "--cfg and --weights are empty; give a model YAML, for example models/yolov5-riformer.yaml"
CHANGED_ON_RESUME = ("epochs", "workers", "device", "patience", "save_period", "data", "cache", "amp")
UNRESOLVED = {"batch_size": -1, "optimizer": "auto", "close_mosaic": -1}


def with_files(config: TrainConfig) -> TrainConfig:
    """Return the options with the absolute paths of the files that `--cfg`, `--weights` and `--hyp` name."""

    def path(name: str, *folders: str) -> str:
        return str(find_file(name, *folders).absolute()) if name else ""

    return replace(
        config,
        cfg=path(config.cfg, *FOLDERS),
        weights=str(find_checkpoint(config.weights).absolute()) if config.weights else "",
        hyp=path(config.hyp, "data/hyps"),
    )


def warn_without_effect(config: TrainConfig, world_size: int) -> None:
    """Log a warning for every given option that has no effect with the other options."""
    frozen = any(word != "0" for word in config.freeze)
    rules = (
        ("--image-weights", config.image_weights and config.rect, "--rect keeps the order of the images"),
        ("--close-mosaic", config.close_mosaic > 0 and config.rect, "--rect uses no mosaic"),
        ("--freeze-epochs", config.freeze_epochs > 0 and not frozen, "nothing is frozen; add --freeze"),
        (
            "--freeze-epochs", frozen and config.freeze_epochs >= config.epochs,
            f"nothing is unfrozen, since the training has {config.epochs} epochs",
        ),
        ("--sync-bn", config.sync_bn and world_size == 1, "one process; start several by torchrun"),
        ("--save-period", config.save_period > 0 and config.nosave, "--nosave writes the final epoch only"),
        ("--backbone-weights", config.backbone_weights and config.weights, "--weights has those of the backbone"),
        ("--partial-weights", config.partial_weights and not config.weights, "there are no --weights"),
    )  # fmt: skip
    for flag, given, reason in rules:
        if given:
            LOGGER.warning("%s has no effect: %s", flag, reason)


def head_form(config: TrainConfig) -> HeadForm:
    """Return the head form that `--head`, `--cfg` or `--weights` selects; that of the anchor head if unknown."""
    if config.cfg:
        spec = read_model_spec(find_file(config.cfg, *FOLDERS))[0]
    elif config.weights:
        spec = read_model_spec(read_checkpoint(find_checkpoint(config.weights)).spec)[0]
    else:
        raise ConfigError(NO_MODEL)
    return HEADS[config.head] if config.head else spec.head_form


def with_recipe(config: TrainConfig) -> TrainConfig:
    """Return the options with the hyperparameter file of the model's head, and its optimizer, where none is given."""
    if not config.hyp:
        config = replace(config, hyp=str(find_file(f"data/hyps/{head_form(config).recipe}").absolute()))
    if config.optimizer is None:
        hyp = Hyperparameters.from_yaml(find_file(config.hyp, "data/hyps"))
        config = replace(config, optimizer=hyp.optimizer or "SGD")
    return config


def resolve_auto(
    config: TrainConfig, hyp: Hyperparameters, num_classes: int, images: int
) -> tuple[TrainConfig, Hyperparameters]:
    """Replace `auto` (of `--optimizer` or of the file) and `--close-mosaic -1` by values, unless a resumed run did.

    Args:
        config: the options.
        hyp: hyperparameters; with `optimizer: auto` their learning rates are those of SGD.
        num_classes: of the dataset.
        images: in the training split; not used unless `--optimizer auto`.
    """
    if config.close_mosaic < 0:
        config = replace(config, close_mosaic=min(round(hyp.close_mosaic), config.epochs // 6))
    if "auto" not in (config.optimizer, hyp.optimizer):
        return config, hyp
    optimizer = config.optimizer or "SGD"
    if optimizer == "auto":
        optimizer = auto_optimizer(math.ceil(images / config.batch_size) * config.epochs)
    if optimizer == "SGD" and hyp.optimizer in (None, "auto", "SGD"):
        hyp = replace(hyp, optimizer=optimizer)
    else:
        hyp = replace(hyp, optimizer=optimizer, **auto_settings(optimizer, num_classes)._asdict())
    return replace(config, optimizer=optimizer), hyp


def choose_hyperparameters(config: TrainConfig, resumed: Checkpoint | None) -> Hyperparameters:
    """Return the hyperparameters of a resumed run, else those of `--hyp`.

    Raises:
        ConfigError: the file was made for another optimizer.
    """
    if resumed is not None and resumed.train is not None:
        return Hyperparameters.from_mapping(resumed.train["hyp"], where="--resume")
    hyp = Hyperparameters.from_yaml(find_file(config.hyp, "data/hyps"))
    optimizer = config.optimizer or hyp.optimizer or "SGD"
    if hyp.optimizer not in (None, "auto", optimizer) and optimizer != "auto":
        raise ConfigError(
            f"{config.hyp}: its learning rates are made for {hyp.optimizer}, not {optimizer}; add --optimizer "
            f"{hyp.optimizer} (or remove the line 'optimizer:' from a copy of the file)"
        )
    return hyp


def resolve_run(config: TrainConfig) -> tuple[TrainConfig, Checkpoint | None]:
    """Resolve `--resume`: return the options of the interrupted run, updated by the given ones, and its checkpoint.

    Plug-in files come from the command line only: a checkpoint names them, but named files are never executed.

    Raises:
        CheckpointError: nothing to resume, or the run is finished.
        ConfigError: a given option that must equal that of the interrupted run, or a plug-in that is not given.
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
            f"{path}: holds no training state (the run is finished, or another program wrote the file); "
            f"start a new run from its weights with: --weights {path}"
        )
    with damage_reported(path):
        saved = TrainConfig.from_keywords(**checkpoint.train["options"])
        Hyperparameters.from_mapping(checkpoint.train["hyp"], where=str(path))
        if saved.optimizer in (None, "auto"):
            raise ValueError(f"train.options: optimizer is {saved.optimizer}")
        if not -1 <= checkpoint.epoch < saved.epochs:
            raise ValueError(f"epoch {checkpoint.epoch} of {saved.epochs}")
    if saved.plugin and not config.plugin:
        files = " ".join(saved.plugin)[:400]
        raise ConfigError(
            f"--resume {path}: the run used the plug-in file(s) {files}; files named in a checkpoint are not executed; "
            f"if you trust them, add: --plugin {files}"
        )
    LOGGER.info("Resuming %s: %d of %d epochs are finished", path, checkpoint.epoch + 1, saved.epochs)
    return _resumed_options(config, saved, path, checkpoint.train), checkpoint


def _resumed_options(config: TrainConfig, saved: TrainConfig, path: Path, training: Mapping[str, Any]) -> TrainConfig:
    """Return the saved options, updated by given ones that may differ; ConfigError for the others."""
    folder = path.resolve().parents[1]
    own_place: dict[str, Any] = {"project": str(folder.parent), "name": folder.name, "exist_ok": True}
    changed: dict[str, Any] = {}
    problems = []
    hidden = config.to_dict()  # as passwords are saved
    for name in sorted(config.given - {"resume", "plugin", "exist_ok", "local_rank"}):
        value, before = getattr(config, name), getattr(saved, name)
        if name in ("cfg", "weights", "hyp") and value != before:
            value = getattr(with_files(config), name)
        flag = "--" + name.replace("_", "-")
        if name in ("project", "name"):
            if Path(value).resolve() != Path(own_place[name]).resolve():
                problems.append(f"{flag} {value}: the run stays in {folder}")
        elif (
            before in (value, hidden[name])
            or value == UNRESOLVED.get(name)
            or (name == "imgsz" and rounded_size(value) == before)
        ):
            continue  # the saved options are resolved ones
        elif name == "epochs" and value < before:
            problems.append(f"{flag} {value}: the run has {before}; only a larger number can be given")
        elif name in CHANGED_ON_RESUME:
            changed[name] = value
            LOGGER.info("--resume: %s is %s, was %s", flag, shown(value), shown(before))
        else:
            problems.append(f"{flag} {shown(value)}: the run has {shown(before)}")
    if problems:
        free = ", ".join("--" + name.replace("_", "-") for name in CHANGED_ON_RESUME)
        raise ConfigError(f"--resume {path}: {'; '.join(problems)}; what can differ: {free}")
    data = training.get("data_file")
    if "data" not in changed and isinstance(data, str) and os.path.isfile(data):
        changed["data"] = data
    return replace(saved, **changed, **own_place, resume=str(path), plugin=config.plugin)


def rounded_size(imgsz: int, grid: int = 32) -> int:
    """Return the size rounded up to a multiple of the grid, at least two cells, as YOLOv5 does."""
    return max(-(-imgsz // grid) * grid, 2 * grid)
