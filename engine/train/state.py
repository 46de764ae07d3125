"""Checkpoint files of a run: `last.pt` with the training state, `best.pt` with the weights alone; and `--resume`."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine.cli.config import TrainConfig
from engine.cli.plugins import load_plugins
from models.checkpoint.io import FORMAT, Checkpoint, read_checkpoint, write_checkpoint
from models.loading import spec_without_weights
from models.yolo import DetectionModel
from utils.errors import CheckpointError, ConfigError, TrainingError, shown
from utils.files import newest_file

LOGGER = logging.getLogger(__name__)
CHANGED_ON_RESUME = ("epochs", "workers", "device", "patience", "save_period", "data", "cache", "amp")
UNRESOLVED = {"batch_size": -1}


def inference_content(average: DetectionModel, epoch: int, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a checkpoint that inference needs: spec, class names and averaged weights.

    Args:
        average: EMA model.
        epoch: last finished epoch.
        metadata: plain values about the run; date and PyTorch version are added.
    """
    date = datetime.datetime.now().isoformat(timespec="seconds")
    return {
        "format": FORMAT,
        "spec": spec_without_weights(average.yaml),
        "names": dict(average.names),
        "stride": [float(x) for x in average.stride],
        "state": cpu_state(average),
        "epoch": epoch,
        "metadata": {"date": date, **metadata, "torch": str(torch.__version__)},
    }


def cpu_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict of a module, contiguous and on the CPU."""
    return {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}


def save_checkpoints(
    folder: Path, content: dict[str, Any], training: dict[str, Any], *, best: bool = False, periodic: bool = False
) -> None:
    """Write last.pt, on request also best.pt and epoch<N>.pt.

    last.pt is written last: a run killed between two files repeats the epoch and writes both again.

    Args:
        folder: for the checkpoints.
        content: see `inference_content`.
        training: state of the trainer, for `--resume`.
        best: also write best.pt, without the training state.
        periodic: also write epoch<N>.pt.

    Raises:
        TrainingError: weights are not finite; no file is written, those of earlier epochs stay.
    """
    _check_finite(folder / "last.pt", {"averaged weights": content["state"], "weights": training["model"]})
    full = {**content, "train": training}
    if best:
        write_checkpoint(folder / "best.pt", content)
    if periodic:
        write_checkpoint(folder / f"epoch{content['epoch']}.pt", full)
    write_checkpoint(folder / "last.pt", full)


def _check_finite(last: Path, states: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    for kind, state in states.items():
        bad = [key for key, value in state.items() if not torch.isfinite(value).all()]
        if bad:
            kept = f"the last good checkpoint is {last}" if last.is_file() else "there is no checkpoint yet"
            raise TrainingError(
                f"{len(bad)} of {len(state)} tensors of the {kind} are not finite (first: {bad[0]}): the training has "
                f"diverged; {kept}; try a lower lr0 or a longer warm-up in the hyperparameters, or --amp off"
            )


def resolve_run(config: TrainConfig) -> tuple[TrainConfig, Checkpoint | None]:
    """Resolve `--resume`: return the options of the interrupted run, changed as asked for, and its checkpoint.

    Plug-in files come from the command line only: a checkpoint names them, but what it names is never executed.

    Raises:
        CheckpointError: nothing to resume, or the run is finished.
        ConfigError: a given option that cannot differ from the interrupted run's, or a plug-in that is not given.
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
    saved = TrainConfig.from_keywords(**checkpoint.train["options"])
    if saved.plugin and not config.plugin:
        files = " ".join(saved.plugin)[:400]
        raise ConfigError(
            f"--resume {path}: the run used the plug-in file(s) {files}; files named in a checkpoint are not executed; "
            f"if you trust them, add: --plugin {files}"
        )
    LOGGER.info("Resuming %s after epoch %d", path, checkpoint.epoch)
    return _resumed_options(config, saved, path, checkpoint.train), checkpoint


def _resumed_options(config: TrainConfig, saved: TrainConfig, path: Path, training: Mapping[str, Any]) -> TrainConfig:
    """Return the saved options with those given that may differ; ConfigError for the others."""
    folder = path.resolve().parents[1]
    own_place: dict[str, Any] = {"project": str(folder.parent), "name": folder.name, "exist_ok": True}
    changed: dict[str, Any] = {}
    problems = []
    for name in sorted(config.given - {"resume", "plugin", "exist_ok", "local_rank"}):
        value, before = getattr(config, name), getattr(saved, name)
        flag = "--" + name.replace("_", "-")
        if name in ("project", "name"):
            if Path(value).resolve() != Path(own_place[name]).resolve():
                problems.append(f"{flag} {value}: the run stays in {folder}")
        elif value == before or value == UNRESOLVED.get(name) or (name == "imgsz" and rounded_size(value) == before):
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
    data = str(training.get("data_file") or saved.data)
    if "data" not in changed and Path(data).is_file():
        changed["data"] = data
    return replace(saved, **changed, **own_place, resume=str(path), plugin=config.plugin)


def rounded_size(imgsz: int, grid: int = 32) -> int:
    """Return the size rounded up to a multiple of the grid, at least two cells, as YOLOv5 does."""
    return max(-(-imgsz // grid) * grid, 2 * grid)
