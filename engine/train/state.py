"""What a run writes to continue or to be used: `last.pt` with the training state, `best.pt` with the weights alone."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.devices.distributed import gather
from engine.train.setup import Setup
from models.checkpoint.io import read_checkpoint, write_checkpoint
from models.loading import spec_without_weights

if TYPE_CHECKING:
    from engine.train.trainer import Trainer

FORMAT = "detector-1"


def save(trainer: Trainer, epoch: int, is_best: bool) -> None:
    """Write last.pt (resumable), best.pt when this epoch is the best so far, and epoch<N>.pt when asked for.

    All ranks call it, each has a state of its own; rank zero writes. last.pt comes last: a process killed between two
    files repeats the epoch and writes both again.
    """
    s = trainer.s
    folder = s.folder / "weights"
    ranks = gather(rank_state(trainer), s.world)
    if not ranks:
        return
    content = weights_content(s, epoch, trainer.best_fitness)
    full = {**content, "train": training_state(trainer) | ranks[0] | {"others": ranks[1:]}}
    if is_best:
        write_checkpoint(folder / "best.pt", content)
    if s.config.save_period > 0 and epoch % s.config.save_period == 0:
        write_checkpoint(folder / f"epoch{epoch}.pt", full)
    write_checkpoint(folder / "last.pt", full)


def save_unfinished(trainer: Trainer, epoch: int) -> None:
    """Write last.pt in the middle of an epoch, right after an optimiser step; `resume` does the rest of it.

    All ranks call it; rank zero writes.
    """
    progress = trainer.progress
    ranks = gather(
        rank_state(trainer) | {"counted": float(progress.counted), "losses": progress.mean()}, trainer.s.world
    )
    if not ranks:
        return
    content = weights_content(trainer.s, epoch - 1, trainer.best_fitness)
    state = training_state(trainer) | ranks[0] | {"batches": progress.batches, "others": ranks[1:]}
    write_checkpoint(trainer.s.folder / "weights" / "last.pt", {**content, "train": state})


def weights_content(s: Setup, epoch: int, best_fitness: float) -> dict[str, Any]:
    """The part of a checkpoint that detection needs: description, names and averaged weights."""
    return {
        "format": FORMAT,
        "spec": spec_without_weights(s.model.yaml),
        "names": dict(s.data.names),
        "stride": [float(x) for x in s.model.stride],
        "state": {k: v.detach().cpu().contiguous() for k, v in s.ema.module.state_dict().items()},
        "epoch": epoch,
        "metadata": {
            "date": datetime.datetime.now().isoformat(timespec="seconds"),
            "imgsz": s.config.imgsz,
            "data": str(s.config.data),
            "best_fitness": best_fitness,
            "torch": str(torch.__version__),
        },
    }


def rank_state(trainer: Trainer) -> dict[str, Any]:
    """What differs between the ranks of a training."""
    rng: dict[str, Any] = {"torch": torch.get_rng_state()}
    if trainer.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(trainer.device)
    return {"rng": rng, "balance": [float(x) for x in trainer.s.criterion.balance]}


def training_state(trainer: Trainer) -> dict[str, Any]:
    """What is the same on all ranks, and must come back for the training to go on as if nothing had happened."""
    s = trainer.s
    return {
        "model": {k: v.detach().cpu().contiguous() for k, v in s.model.state_dict().items()},
        "optimizer": s.optimizer.state_dict(),
        "ema_updates": s.ema.updates,
        "scaler": trainer.stepper.scaler.state_dict(),
        "skipped": trainer.stepper.skipped,
        "data_hash": s.data_hash,
        "best_fitness": trainer.best_fitness,
        "best_epoch": trainer.best_epoch,
        "last_step": trainer.last_step,
        "class_maps": [float(x) for x in trainer.class_maps],
        "options": s.config.to_dict(),
        "hyp": s.hyp.to_dict(),
    }


def restore(trainer: Trainer) -> None:
    """Put the state of a resumed run back; nothing to do for a new one.

    A rank that the run did not have before goes on with random numbers of its own.
    """
    s = trainer.s
    if s.resumed is None or s.resumed.train is None:
        return
    state = dict(s.resumed.train)
    others = state.get("others", [])
    if s.world.number > 0:
        state |= others[s.world.number - 1] if s.world.number <= len(others) else {"rng": {}}
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
    if "torch" in state["rng"]:
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
