"""Checkpoint files of a run: `last.pt` with the training state, `best.pt` with the weights alone."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from models.checkpoint.io import FORMAT, write_checkpoint
from models.loading import spec_without_weights
from models.yolo import DetectionModel
from utils.errors import CheckpointError, TrainingError, UserError

OPTIONAL = {"skipped", "batches", "counted", "losses", "cuda"}
"""Entries that training states of version 0.1 or of another device lack."""
CHECKED_ELSEWHERE = {"options", "hyp", "data_hash", "data_file", "scaler", "optimizer", "others"}


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
        folder: folder of the checkpoints.
        content: see `inference_content`.
        training: state of the trainer, for `--resume`.
        best: also write best.pt, without the training state.
        periodic: also write epoch<N>.pt.

    Raises:
        TrainingError: weights are not finite; no file is written, and those of earlier epochs are kept.
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


@contextmanager
def damage_reported(path: Path) -> Iterator[None]:
    """Convert errors that a damaged training state raises inside the block to a CheckpointError."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CheckpointError(
            f"{path}: its training state is damaged ({reason}); start a new run from its weights: --weights {path}"
        ) from error


def check_structure(found: object, own: object, name: str = "train") -> None:
    """Raise ValueError unless a stored value has the keys, types, lengths and shapes of the trainer's own.

    Args:
        found: value of the checkpoint.
        own: value of the trainer at its start; `OPTIONAL` entries may be missing in `found`.
        name: name of the value, for messages.
    """
    if isinstance(own, Mapping):
        if not isinstance(found, Mapping):
            raise ValueError(f"{name} is not a mapping")
        for key in own.keys() - CHECKED_ELSEWHERE:
            if key in found:
                check_structure(found[key], own[key], f"{name}.{key}")
            elif key not in OPTIONAL:
                raise ValueError(f"{name}.{key} is missing")
    elif isinstance(own, torch.Tensor):
        _check_tensor(found, own, name)
    elif isinstance(own, list):
        if not isinstance(found, list) or len(found) != len(own):
            raise ValueError(f"{name} is not a list of {len(own)}")
        for index, pair in enumerate(zip(found, own)):
            check_structure(*pair, name=f"{name}[{index}]")
    elif isinstance(own, (int, float)):
        allowed = (int,) if isinstance(own, int) else (int, float)
        if type(found) not in allowed or not -1 <= found < math.inf:  # type: ignore[operator]
            raise ValueError(f"{name} is {found!r:.40}")
    elif not isinstance(found, type(own)):
        raise ValueError(f"{name} is a {type(found).__name__}")


def _check_tensor(found: object, own: torch.Tensor, name: str) -> None:
    if not isinstance(found, torch.Tensor) or found.shape != own.shape:
        shape = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ValueError(f"{name} is {shape}, not {list(own.shape)}")
    if found.is_floating_point() != own.is_floating_point() or found.is_complex():
        raise ValueError(f"{name} is {found.dtype}, not {own.dtype}")
    if found.is_floating_point() and "mask" not in name and not torch.isfinite(found).all():
        raise ValueError(f"{name} is not finite")
