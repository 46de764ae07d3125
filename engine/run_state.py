"""What a run writes to continue or to be used: `last.pt` with the training state, `best.pt` with the weights alone."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.setup import Setup
from models.checkpoint import read_checkpoint, spec_without_weights, write_checkpoint

if TYPE_CHECKING:
    from engine.trainer import Trainer

FORMAT = "detector-1"


def save(trainer: Trainer, epoch: int, is_best: bool) -> None:
    """Write last.pt (resumable), best.pt when this epoch is the best so far, and epoch<N>.pt when asked for.

    last.pt comes last: a process killed between two files repeats the epoch and writes both again.
    """
    s = trainer.s
    folder = s.folder / "weights"
    content = weights_content(s, epoch, trainer.best_fitness)
    full = {**content, "train": training_state(trainer)}
    if is_best:
        write_checkpoint(folder / "best.pt", content)
    if s.config.save_period > 0 and epoch % s.config.save_period == 0:
        write_checkpoint(folder / f"epoch{epoch}.pt", full)
    write_checkpoint(folder / "last.pt", full)


def save_unfinished(trainer: Trainer, epoch: int) -> None:
    """Write last.pt in the middle of an epoch, right after an optimiser step; `resume` does the rest of it."""
    content = weights_content(trainer.s, epoch - 1, trainer.best_fitness)
    progress = trainer.progress
    state = training_state(trainer) | {
        "batches": progress.batches,
        "counted": float(progress.counted),
        "losses": progress.mean(),
    }
    write_checkpoint(trainer.s.folder / "weights" / "last.pt", {**content, "train": state})


def weights_content(s: Setup, epoch: int, best_fitness: float) -> dict[str, Any]:
    """The part of a checkpoint that detection needs: description, names and averaged weights."""
    model = s.ema.module if s.ema else s.model
    return {
        "format": FORMAT,
        "spec": spec_without_weights(s.model.yaml),
        "names": dict(s.data.names),
        "stride": [float(x) for x in s.model.stride],
        "state": {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()},
        "epoch": epoch,
        "metadata": {
            "date": datetime.datetime.now().isoformat(timespec="seconds"),
            "imgsz": s.config.imgsz,
            "data": str(s.config.data),
            "best_fitness": best_fitness,
            "torch": str(torch.__version__),
        },
    }


def training_state(trainer: Trainer) -> dict[str, Any]:
    """Everything that must come back for the next epoch to go on as if nothing had happened."""
    s = trainer.s
    rng: dict[str, Any] = {"torch": torch.get_rng_state()}
    if trainer.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(trainer.device)
    return {
        "model": {k: v.detach().cpu().contiguous() for k, v in s.model.state_dict().items()},
        "optimizer": s.optimizer.state_dict(),
        "ema_updates": s.ema.updates if s.ema else 0,
        "scaler": trainer.stepper.scaler.state_dict(),
        "skipped": trainer.stepper.skipped,
        "data_hash": s.data_hash,
        "best_fitness": trainer.best_fitness,
        "best_epoch": trainer.best_epoch,
        "last_step": trainer.last_step,
        "class_maps": [float(x) for x in trainer.class_maps],
        "balance": [float(x) for x in s.criterion.balance],
        "options": s.config.to_dict(),
        "hyp": s.hyp.to_dict(),
        "rng": rng,
    }


def restore(trainer: Trainer) -> None:
    """Put the state of a resumed run back; nothing to do for a new one."""
    s = trainer.s
    if s.resumed is None or s.resumed.train is None:
        return
    state = s.resumed.train
    if s.ema:
        s.ema.updates = int(state["ema_updates"])
    s.model.load_state_dict(state["model"])
    s.optimizer.load_state_dict(state["optimizer"])
    trainer.stepper.scaler.load_state_dict(state["scaler"])
    trainer.stepper.skipped = int(state.get("skipped", 0))
    trainer.progress.batches = int(state.get("batches", 0))
    trainer.progress.counted = torch.tensor(float(state.get("counted", 0)), device=trainer.device)
    trainer.progress.losses = torch.tensor(state.get("losses", [0.0] * 3), device=trainer.device)
    trainer.best_fitness, trainer.best_epoch = float(state["best_fitness"]), int(state["best_epoch"])
    trainer.last_step = int(state["last_step"])
    trainer.class_maps[:] = state["class_maps"]
    s.criterion.balance.copy_(torch.tensor(state["balance"]))
    torch.set_rng_state(state["rng"]["torch"].cpu().to(torch.uint8))
    if trainer.device.type == "cuda" and "cuda" in state["rng"]:
        torch.cuda.set_rng_state(state["rng"]["cuda"].cpu().to(torch.uint8), trainer.device)


def strip(path: Path) -> None:
    """Rewrite a checkpoint without its training state: the run is finished."""
    if not path.is_file():
        return
    c = read_checkpoint(path)
    write_checkpoint(
        path,
        {
            "format": FORMAT,
            "spec": c.spec,
            "names": c.names,
            "stride": list(c.stride),
            "state": c.state,
            "epoch": c.epoch,
            "metadata": dict(c.metadata),
        },
    )
