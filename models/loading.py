"""Building detectors from checkpoints, and transfer of their weights to other models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from models.backbones import arguments_without_weights, is_backbone_name
from models.checkpoint.io import Checkpoint, read_checkpoint
from models.checkpoint.state_dict import LoadReport, load_state, shorten, upgraded
from models.transfer import matching_rows, split_key
from models.yolo import DetectionModel
from utils.errors import CheckpointError, SpecError, shown


def load_detector(path: str | Path, device: str | torch.device = "cpu") -> DetectionModel:
    """Build the detector of a checkpoint.

    Args:
        path: our file or an official one.
        device: device of the model.

    Returns:
        The model in evaluation mode, float32, with the class names of the file. Published backbone weights that its
        spec requests are not fetched.

    Raises:
        CheckpointError: as `read_checkpoint`; or the weights do not fit the model described in the file.
    """
    checkpoint = read_checkpoint(path)
    model = _build(checkpoint)
    # A published model whose BatchNorms were folded has none left in its keys.
    folded = not any(key.endswith("running_mean") for key in checkpoint.state)
    if folded and any(key.endswith("running_mean") for key in model.state_dict()):
        model.eval().fuse()
    load_exactly(model, checkpoint)
    model.spec = replace(model.spec, path=str(path))
    model.names = dict(checkpoint.names)
    stored = checkpoint.metadata.get("best_conf")
    model.best_conf = float(stored) if isinstance(stored, (int, float)) else None
    model.trained_imgsz = _trained_imgsz(checkpoint)
    if checkpoint.source == "own" and model.trained_imgsz is not None:
        model.default_imgsz = model.trained_imgsz
    return model.float().eval().to(device)


def _trained_imgsz(checkpoint: Checkpoint) -> int | None:
    """Return the side at which a checkpoint was trained if it says so (`imgsz`; `opt.imgsz` of official ones)."""
    about = checkpoint.metadata if checkpoint.source == "own" else checkpoint.metadata.get("opt")
    side = about.get("imgsz") if isinstance(about, Mapping) else None
    return side if type(side) is int and 32 <= side <= 16384 else None


def require_rgb(model: DetectionModel) -> None:
    """Raise SpecError for a model whose images do not have 3 channels: files are read with 3."""
    channels = model.spec.channels or 3
    if channels != 3:
        where = model.spec.key_where("ch")
        raise SpecError(f"{where}: ch is {channels}; images are read with 3 channels (RGB), so leave out ch or write 3")


def _build(checkpoint: Checkpoint) -> DetectionModel:
    try:
        return DetectionModel(spec_without_weights(checkpoint.spec))
    except SpecError as error:
        reasons = "; ".join(str(error).splitlines())
        raise CheckpointError(f"{checkpoint.path}: the model described in it cannot be built: {reasons}") from error


def _skeleton(checkpoint: Checkpoint) -> DetectionModel:
    """Return the network of a checkpoint without memory for its weights; the random generator is not used."""
    try:
        with torch.device("meta"):
            return _build(checkpoint)
    except (RuntimeError, TypeError):  # a backbone that reads values while it is built
        with torch.random.fork_rng():
            return _build(checkpoint)


def load_exactly(model: DetectionModel, checkpoint: Checkpoint) -> None:
    """Load every entry, or raise one CheckpointError that lists everything that does not fit."""
    state = upgraded(model, checkpoint.state)
    report = load_state(model, state, partial=True, where=str(checkpoint.path))
    problems = [f"missing {shown(key)}" for key in report.missing]
    problems += [
        f"{shown(key)} has shape {list(shape)}, needs {list(target)}" for key, shape, target in report.mismatched
    ]
    problems += [f"unknown {shown(key)}" for key, _ in report.unexpected]
    if problems:
        raise CheckpointError(
            f"{checkpoint.path}: {len(problems)} weights do not fit the model described in it: {shorten(problems, 8)}"
        )


def transfer_weights(
    model: DetectionModel, checkpoint: Checkpoint, exclude: Sequence[str] = ("anchor",), partial: bool = False
) -> LoadReport:
    """Start `model` from the weights of another run (`--weights` with `--cfg`, or another number of classes).

    Matching layers are found by what they are, never by row number or a shape that happens to be equal: see
    `models.transfer`. Nothing is taken from a head with another number of classes, as in YOLOv5.

    Args:
        model: changed in place.
        checkpoint: from `read_checkpoint`.
        exclude: entries whose key contains one of these strings keep their values.
        partial: take what agrees row by row, however little.

    Returns:
        The outcome of every entry.

    Raises:
        CheckpointError: the two networks have too little in common, unless `partial`.
    """
    where = str(checkpoint.path)
    trained = _skeleton(checkpoint)
    pairs = matching_rows(trained, model, where, partial)

    def target(key: str) -> str | None:
        row, name = split_key(key)
        own_key = f"model.{pairs[row]}.{name}" if row in pairs else ""
        return None if any(part in own_key for part in exclude) else own_key

    return load_state(model, upgraded(trained, checkpoint.state), partial=True, key_map=target, where=where)


def spec_without_weights(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a model mapping whose backbone rows ask for no pretrained weights.

    A model that is rebuilt from a checkpoint gets its weights from there; fetching others first would need a network.
    See `models.backbones.arguments_without_weights`.
    """
    plain_spec = deepcopy(dict(spec))
    for section in ("backbone", "head"):
        if isinstance(plain_spec.get(section), (list, tuple)):
            plain_spec[section] = [_row_without_weights(row) for row in plain_spec[section]]
    return plain_spec


def _row_without_weights(row: object) -> object:
    if not isinstance(row, (list, tuple)) or len(row) != 4 or not is_backbone_name(str(row[2])):
        return row
    if not isinstance(row[3], (list, tuple, Mapping)):
        return row
    return [*row[:3], arguments_without_weights(str(row[2]), row[3])]
