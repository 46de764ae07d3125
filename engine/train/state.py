"""Checkpoint files of a run: `last.pt` with the training state, `best.pt` with the weights alone."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from models.checkpoint.io import FORMAT, write_checkpoint
from models.loading import spec_without_weights
from models.yolo import DetectionModel
from utils.errors import TrainingError


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
