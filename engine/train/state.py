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
    """
    full = {**content, "train": training}
    if best:
        write_checkpoint(folder / "best.pt", content)
    if periodic:
        write_checkpoint(folder / f"epoch{content['epoch']}.pt", full)
    write_checkpoint(folder / "last.pt", full)
