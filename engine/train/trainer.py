"""Training loop over epochs; `engine.train.setup` builds its parts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data.loading.loader import worker_losses_reported
from data.loading.weights import labels_to_image_weights
from engine.cli.config import TrainConfig
from engine.devices.distributed import (
    any_rank,
    broadcast,
    copy_from_main,
    file_from_main,
    gather,
    gather_all,
    process_group,
    rank_device,
    with_gradients,
    world_from_environment,
)  # fmt: skip
from engine.devices.prefetch import prefetch
from engine.evaluate.evaluator import EvalOptions, EvalResult, conclude, measure
from engine.evaluate.worst_images import WorstImages
from engine.loggers import plots
from engine.loggers.run_logger import Logs, make_logs
from engine.loggers.trackers import check_loggers
from engine.runtimes.pytorch import PyTorchRuntime
from engine.train import state as checkpoints
from engine.train.freeze import Frozen, eval_frozen, unfreeze
from engine.train.optimizer import load_optimizer
from engine.train.options import resolve_run
from engine.train.run_report import collect_facts, write_report
from engine.train.schedule import apply_settings
from engine.train.setup import TrainingParts, build_parts
from engine.train.state import check_structure, damage_reported
from engine.train.step import TrainStep, restore_statistics
from engine.train.stopping import EarlyStopping, StopNow, StopRequest
from models.checkpoint.io import strip
from models.checkpoint.state_dict import entries_merged, upgraded
from utils.device import cpu_has_bf16, describe_device, select_device
from utils.files import remove_partial_files, warn_of_earlier_files
from utils.log import LINE_WIDTH, is_main_process
from utils.metrics import fitness
from utils.yaml_lines import dump_yaml

LOGGER = logging.getLogger(__name__)
TABLE = "%9s%9s%10s%10s%10s%10s%6s"
BAR = "{desc} {percentage:3.0f}%|{bar}| {remaining}"
LEARNED_NOTHING = 0.01
"""Fitness of the best epoch below which a training has learned nothing useful."""


def counted_epochs(number: int) -> str:
    """Return `1 epoch` or `3 epochs`."""
    return f"{number} epoch{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a human-readable time such as `1 h 02 min 05 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min {rest:02d} s"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


@dataclass
class EpochProgress:
    """Number of batches done in an epoch and their mean losses.

    Attributes:
        batches: batches done.
        counted: batches with finite losses.
        losses: (3,) mean box, objectness and class loss of those; on the device, read only when shown.
    """

    batches: int = 0
    counted: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    losses: torch.Tensor = field(default_factory=lambda: torch.zeros(3))

    def add(self, parts: torch.Tensor) -> None:
        """Add the losses (3,) of one batch."""
        self.batches += 1
        counted, losses = self.counted.to(parts.device), self.losses.to(parts.device)
        finite = torch.isfinite(parts).all()
        self.losses = torch.where(finite, (losses * counted + parts) / (counted + 1), losses)
        self.counted = counted + finite

    def mean(self) -> list[float]:
        """Return the mean losses."""
        return [float(x) for x in self.losses.tolist()]

    def state_dict(self) -> dict[str, Any]:
        """Return counts and losses as plain values."""
        return {"batches": self.batches, "counted": float(self.counted), "losses": self.mean()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; other keys are ignored, missing ones mean the start of an epoch."""
        self.batches = int(state.get("batches", 0))
        self.counted = torch.tensor(float(state.get("counted", 0)))
        self.losses = torch.tensor(state.get("losses", [0.0] * 3))


@dataclass(frozen=True)
class TrainResult:
    """Outcome of a training.

    Attributes:
        folder: run folder.
        best, last: checkpoints; `best` is None when no epoch was validated.
        metrics: validation of the best weights.
        epochs: epochs done.
        fitness: best value of 0.1 * mAP50 + 0.9 * mAP50-95.
    """

    folder: Path
    best: Path | None
    last: Path
    metrics: EvalResult | None
    epochs: int
    fitness: float


def train(config: TrainConfig, on_epoch: Callable[[int, float], bool] | None = None) -> TrainResult:
    """Train a detector.

    Args:
        config: options.
        on_epoch: called on rank zero after each validated epoch with its number and fitness; True ends the training
            with the current weights.

    Raises:
        UserError: an option, file or model that cannot be used; no partial files are left.
        TrainingError: the gradients stay infinite or NaN.
    """
    world = world_from_environment()
    with process_group(world):
        config, resumed = resolve_run(config)
        check_loggers(config.logger, config.entity)
        device = select_device(rank_device(config.device, world))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return Trainer(build_parts(config, resumed, device, with_gradients(world, device)), on_epoch).fit()


class Trainer:
    """Training loop.

    Args:
        parts: model, data, optimizer and loss.
        on_epoch: see `train`.
    """

    def __init__(self, parts: TrainingParts, on_epoch: Callable[[int, float], bool] | None = None) -> None:
        self.run, self.data, self.model_parts, self.on_epoch = parts.run, parts.data, parts.model, on_epoch
        self.model, self.ema, self.criterion = parts.model.model, parts.model.ema, parts.model.criterion
        self.optimizer, self.schedule = parts.optimizer, parts.schedule
        self.config, self.device, self.world = self.run.config, self.run.device, self.run.world
        self.frozen = parts.model.frozen
        self.stepper = TrainStep(
            parts.model, self.optimizer, self.config, self.run.hyp.clip_norm, self.device, self.world,
            last=self.run.weights("last.pt"),
        )  # fmt: skip
        faster = self.stepper.amp is None and self.device.type == "cpu" and cpu_has_bf16()
        LOGGER.info(
            "Precision: %s (--amp %s)%s", str(self.stepper.amp or torch.float32)[6:], self.config.amp,
            "; this CPU computes faster in bfloat16: --amp bf16" if faster else "",
        )  # fmt: skip
        self.early_stopping = EarlyStopping(self.config.patience)
        self.progress = EpochProgress()
        self.last_step = -1
        self.class_maps = np.zeros(len(self.data.names))
        self.eval_options = EvalOptions(names=self.data.names, single_cls=self.config.single_cls)
        self.logs = Logs(self.run.folder)
        self.best_conf: float | None = None
        self.stop = StopRequest()

    def fit(self) -> TrainResult:
        """Train from the first epoch to the last, then validate the best weights."""
        start = self.run.start_epoch
        if self.run.resumed is not None and self.run.resumed.train is not None:
            with damage_reported(self.run.resumed.path):
                self.load_state_dict(self.run.resumed.train)
                self.best_conf = self.run.resumed.metadata.get("best_conf")
        if is_main_process():
            self._open_run()
        done, begin = start, time.time()
        loaders = closing(self.data.loader), closing(self.data.val_loader)  # closing may reveal a lost worker, too
        with worker_losses_reported(), self.logs, loaders[0], loaders[1], worker_losses_reported():
            with self.stop:
                for epoch in range(start, self.config.epochs):
                    stop = self._epoch(epoch)
                    done = epoch + 1
                    if stop:
                        break
                    self._exit_if_requested(epoch + 1)
            resumed = f" (of {done}; resumed after {start})" if start else ""
            LOGGER.info("%s%s in %s", counted_epochs(done - start), resumed, duration(time.time() - begin))
            return self._finish(done)

    def _open_run(self) -> None:
        """Write resolved options and hyperparameters (opt.yaml, hyp.yaml), open the loggers, plot the labels."""
        run = self.run
        remove_partial_files(run.folder)  # of a killed process, with --resume and --exist-ok
        if run.resumed is None:
            warn_of_earlier_files(run.folder, {run.folder / "opt.yaml", run.folder / "hyp.yaml"})
        options, hyp = run.config.to_dict(), run.hyp.to_dict()
        typed = {k: v for k, v in run.given.to_dict().items() if k in ("cfg", "data", "hyp", "weights") and v}
        dump_yaml(run.folder / "opt.yaml", {**options, "save_dir": str(run.folder), "given": typed})
        dump_yaml(run.folder / "hyp.yaml", hyp)
        LOGGER.info("Training on %s, results in %s", describe_device(run.device), run.folder)
        self.logs = make_logs(
            run.config.logger, run.folder, options, hyp, run.start_epoch, self.criterion.names, run.resumed is not None
        )  # fmt: skip
        if not run.config.noplots and run.start_epoch == 0:
            plots.labels(run.folder, self.data.labels, self.data.names)

    def _epoch(self, epoch: int) -> bool:
        """Train, validate, log and save one epoch. Returns whether to stop early."""
        config = self.config
        if config.image_weights:
            weights = self.data.class_weights * (1 - self.class_maps) ** 2  # classes with a low AP count more
            self.data.loader.set_image_weights(labels_to_image_weights(self.data.labels, len(weights), weights))
        if 0 < config.freeze_epochs == epoch and self.frozen.names:
            LOGGER.info("%d frozen tensors are trained from now on (--freeze-epochs)", len(self.frozen.unfreeze))
            unfreeze(self.model, self.frozen)
            self.frozen = Frozen()
            self.stepper.wrap()
        lr = self._train_epoch(epoch)
        final = epoch + 1 == config.epochs
        losses = np.mean(gather_all(self.progress.mean(), self.world), 0).tolist()
        result = self._validate(epoch) if not config.noval or final else None
        stop = self._log_epoch(epoch, losses, lr, result) if is_main_process() else False
        stop, self.class_maps = broadcast((stop, self.class_maps), self.world)
        self.progress = EpochProgress()
        if not config.nosave or final or stop:
            periodic = config.save_period > 0 and epoch % config.save_period == 0
            self._save(epoch, best=self.early_stopping.best_epoch == epoch, periodic=periodic)
        return stop

    def _train_epoch(self, epoch: int) -> tuple[float, float, float]:
        """Train on the remaining batches of the epoch. Returns the learning rates of the last one."""
        progress, loader = self.progress, self.data.loader
        self.stepper.network.train()
        eval_frozen(self.model, self.frozen)
        loader.set_epoch(epoch, skip=progress.batches)
        LOGGER.info("\n%s", self._columns())
        total = len(loader)
        bar = tqdm(
            prefetch(loader, self.device), total=total, initial=progress.batches,
            disable=not is_main_process(), bar_format=BAR, ncols=LINE_WIDTH,
        )  # fmt: skip
        settings = self.schedule.at(epoch * total + max(total - 1, 0), epoch)
        self.optimizer.zero_grad()
        shown = 0.0
        for batch, images in bar:
            i = progress.batches
            iteration = epoch * total + i
            settings = self.schedule.at(iteration, epoch)
            apply_settings(self.optimizer, settings)
            if epoch == 0 and i < 3 and is_main_process() and not self.config.noplots:
                plots.training_batch(self.run.folder, batch, i, self.data.names)
            due = iteration - self.last_step >= settings.accumulate
            losses, size = self.stepper.backward(images, batch.targets, (epoch, i), average=due)
            progress.add(losses)
            if due:
                self.stepper.step()
                self.last_step = iteration
                self._exit_if_requested(epoch)
            if time.time() - shown > 0.5 or i + 1 == total:  # formatting waits for the device: not every step
                shown = time.time()
                bar.set_description_str(self._describe(epoch, len(batch.targets), size))
        restore_statistics(self.model, self.ema.module)  # of batches after the last step of the epoch
        return settings.lr

    def _columns(self) -> str:
        losses = (f"{name}_loss" for name in self.criterion.names)
        return TABLE % ("Epoch", "GPU_mem", *losses, "Instances", "Size")

    def _describe(self, epoch: int, instances: int, size: int) -> str:
        losses = self.progress.mean()
        memory = torch.cuda.max_memory_reserved(self.device) / 2**30 if self.device.type == "cuda" else 0.0
        cells = [f"{epoch}/{self.config.epochs - 1}", f"{memory:.3g}G", *(f"{v:.4g}" for v in losses), instances, size]
        return TABLE % tuple(cells)

    def _validate(self, epoch: int) -> EvalResult | None:
        """Validate the EMA of rank zero, with losses; each rank evaluates its batches. Rank zero gets the result.

        A signal interrupts the validation of a rank, which then informs the others; all of them exit together.
        """
        copy_from_main(self.ema.module, self.world)  # batch statistics differ between ranks
        copy_from_main(self.criterion, self.world)
        autocast = None if self.device.type == "cpu" else self.stepper.amp  # on a CPU, same metrics as val.py
        runtime = PyTorchRuntime.from_model(self.ema.module, self.device, autocast=autocast)
        tally = None
        with suppress(StopNow), self.stop.immediate():
            tally = measure(runtime, self.data.val_loader, self.eval_options, self.criterion, self.world)
        if any_rank(tally is None, self.world):
            self._exit_if_requested(epoch)
        assert tally is not None, "only a signal interrupts the validation"
        tallies = gather(tally, self.world)
        return conclude(tallies, self.eval_options) if tallies else None

    def _log_epoch(self, epoch: int, losses: list[float], lr: tuple[float, ...], result: EvalResult | None) -> bool:
        """Log an epoch and update the best fitness. Returns whether to stop, by patience or `on_epoch`."""
        metrics, val_losses, value = [0.0] * 4, [0.0] * 3, 0.0
        if result is not None:
            metrics, val_losses = [result.mp, result.mr, result.map50, result.map], list(result.losses)
            self.class_maps = np.asarray(result.class_maps)
            self.best_conf = result.best_conf
            value = float(fitness(np.array(metrics)))
            self.early_stopping.update(epoch, value)
        self.logs.add([epoch, *losses, *metrics, *val_losses, *lr])
        if not self.config.noplots:
            plots.results(self.run.folder)
        if result is None:
            return False
        if self.on_epoch is not None and self.on_epoch(epoch, value):
            LOGGER.info("Stopped after epoch %d", epoch)
            return True
        return self.early_stopping.should_stop(epoch)

    def _finish(self, epochs: int) -> TrainResult:
        """Strip the last checkpoint and validate the best one."""
        folder, last, best = self.run.folder, self.run.weights("last.pt"), self.run.weights("best.pt")
        if is_main_process():
            strip(last)
        metrics = self._validate_best(best)
        if is_main_process():
            self.logs.finish()
            if metrics is not None and metrics.nt.sum() and self.early_stopping.best_fitness < LEARNED_NOTHING:
                LOGGER.warning(
                    "The detector has learned nothing yet (mAP50 %.4f). Likely reasons: too few steps (%s of %d "
                    "batches: more --epochs, --weights of a trained model); labels that do not fit the images (look at "
                    "train_batch0.jpg, run python -m data.check); objects too small at %d pixels (a larger --imgsz)",
                    metrics.map50, counted_epochs(epochs), len(self.data.loader), self.config.imgsz,
                )  # fmt: skip
            LOGGER.info("Results saved to %s", folder)
        best_or_none = best if best.is_file() else None
        return TrainResult(folder, best_or_none, last, metrics, epochs, self.early_stopping.best_fitness)

    def _validate_best(self, best: Path) -> EvalResult | None:
        """Validate best.pt, re-parameterized; each rank evaluates its batches, rank zero plots and reports."""
        worst = WorstImages()
        draw = not self.config.noplots
        options = replace(
            self.eval_options, folder=self.run.folder, plots=draw, verbose=True, class_rows=True, sinks=(worst,)
        )
        with file_from_main(best, self.world) as file:
            if file is None:
                return None
            LOGGER.info("Validating %s ...", best)
            runtime = PyTorchRuntime([str(file)], self.device, half=self.device.type == "cuda")
        tallies = gather(measure(runtime, self.data.val_loader, options, world=self.world), self.world)
        if not tallies:
            return None
        result = conclude(tallies, options)
        if draw:
            facts = collect_facts(self.config, self.run.hyp, self.model, self.device, result, worst.found())
            write_report(self.run.folder, facts)
        return result

    # ---- state ------------------------------------------------------------------------------------------------------

    def _exit_if_requested(self, epoch: int) -> None:
        """Save the state and end the process if a signal asked for it; called where no gradient is pending."""
        if not any_rank(self.stop.signal is not None, self.world):
            return
        self._save(epoch - 1)  # the epoch itself is unfinished
        broadcast(None, self.world)  # torchrun ends all processes when the first one exits: wait for the files
        if is_main_process():
            last = self.run.weights("last.pt")
            LOGGER.info("Stopped in epoch %d; continue with\npython train.py --resume %s", epoch, last)
        self.stop.exit()

    def _save(self, epoch: int, *, best: bool = False, periodic: bool = False) -> None:
        """Write the checkpoints of the last finished epoch; every rank must call it, rank zero writes."""
        training = self.state_dict()
        if is_main_process():
            metadata = {
                "imgsz": self.config.imgsz,
                "data": str(self.config.data),
                "data_file": str(self.data.file),
                "best_fitness": self.early_stopping.best_fitness,
                "best_conf": self.best_conf,
            }
            content = checkpoints.inference_content(self.ema.module, epoch, metadata)
            folder = self.run.folder / "weights"
            checkpoints.save_checkpoints(folder, content, training, best=best, periodic=periodic)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed training needs to continue bit-equal, apart from the averaged weights.

        Every rank must call it; `others` holds the states of ranks 1, 2, ... and is complete on rank zero only.
        """
        rng: dict[str, Any] = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        adapted = {name: value.tolist() for name, value in self.criterion.state_dict().items()}
        own = {"rng": rng, **adapted, **self.progress.state_dict()}
        return {
            "model": checkpoints.cpu_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "ema_updates": self.ema.updates,
            **self.stepper.state_dict(),
            "data_hash": self.data.digest,
            **self.early_stopping.state_dict(),
            "last_step": self.last_step,
            "class_maps": [float(x) for x in self.class_maps],
            "options": self.config.to_dict(),
            "data_file": str(self.data.file),
            "hyp": self.run.hyp.to_dict(),
            **own,
            "others": gather(own, self.world)[1:],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned on rank zero; every rank must call it.

        A rank that the interrupted run did not have keeps its own random number generators.

        Args:
            state: training state of the checkpoint.

        Raises:
            ValueError: a damaged state.
        """
        own = self.state_dict()
        others, rank = state.get("others", []), self.world.rank
        if rank > 0:
            state = {**state, **(others[rank - 1] if rank <= len(others) else {"rng": own["rng"]})}
        merged = entries_merged(self.model, state["model"])
        state = {**state, "model": upgraded(self.model, state["model"])}
        check_structure(state, own)
        self.ema.updates = int(state["ema_updates"])
        self.model.load_state_dict(state["model"])
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        parameters = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
        load_optimizer(self.optimizer, state["optimizer"], [merged[names[parameter]] for parameter in parameters])
        self.stepper.load_state_dict(state)
        self.progress.load_state_dict(state)
        self.early_stopping.load_state_dict(state)
        self.last_step = int(state["last_step"])
        self.class_maps = np.array(state["class_maps"], dtype=float)
        for name, value in self.criterion.state_dict().items():
            value.copy_(torch.tensor(state[name]))
        torch.set_rng_state(state["rng"]["torch"].cpu().to(torch.uint8))
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"].cpu().to(torch.uint8), self.device)
