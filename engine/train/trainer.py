"""Training: one epoch reads as a sentence; everything it needs is built in `engine.train.setup`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.loading.weights import labels_to_image_weights
from engine.cli.config import TrainConfig
from engine.devices.distributed import (
    any_rank,
    broadcast,
    copy_from_main,
    file_from_main,
    gather,
    gather_all,
    own_device,
    process_group,
    with_gradients,
    world_from_environment,
)  # fmt: skip
from engine.devices.prefetch import on_device
from engine.evaluate.evaluator import EvalResult, conclude, measure
from engine.evaluate.worst_images import WorstImages
from engine.loggers import plots as pictures
from engine.loggers.run_logger import Logs, check_loggers, make_logs
from engine.runtimes.pytorch import PyTorchRuntime
from engine.train import state as run_state
from engine.train.freeze import Frozen, keep_still, unfreeze
from engine.train.interrupt import StopNow, StopRequest
from engine.train.optimizer import apply_settings
from engine.train.run_report import facts_of, write_report
from engine.train.setup import Setup, build_setup, resolve_run, save_resolved
from engine.train.step import TrainStep
from utils.device import amp_dtype, cpu_has_bf16, select_device
from utils.metrics import fitness

LOGGER = logging.getLogger(__name__)
BAR_HEAD = ("Epoch", "GPU_mem", "box_loss", "obj_loss", "cls_loss", "Instances", "Size")


@dataclass
class EpochProgress:
    """How far an epoch is, and the mean of its losses so far.

    Attributes:
        batches: batches done.
        counted: batches whose losses are numbers.
        losses: (3,) mean box, objectness and class loss of those; on the device, read only when it is shown.
    """

    batches: int = 0
    counted: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    losses: torch.Tensor = field(default_factory=lambda: torch.zeros(3))

    def add(self, parts: torch.Tensor) -> None:
        """Count one batch."""
        self.batches += 1
        counted, losses = self.counted.to(parts.device), self.losses.to(parts.device)
        good = torch.isfinite(parts).all()
        self.losses = torch.where(good, (losses * counted + parts) / (counted + 1), losses)
        self.counted = counted + good

    def mean(self) -> list[float]:
        """The mean losses."""
        return self.losses.tolist()


@dataclass(frozen=True)
class TrainResult:
    """What a training left behind.

    Attributes:
        folder: run folder.
        best, last: checkpoints; `best` is None when nothing was validated.
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
    """Train a detector as the options say.

    Args:
        config: options.
        on_epoch: called on rank zero after each validated epoch with its number and fitness; True ends the training
            with the weights that there are.

    Raises:
        UserError: an option, file or model that cannot be used; nothing is left half-written.
        TrainingError: the gradients stay infinite or not a number.
    """
    world = world_from_environment()
    with process_group(world):
        config, resumed = resolve_run(config)
        check_loggers(config.logger, config.entity)
        device = select_device(own_device(config.device, world))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        setup = build_setup(config, resumed, device, with_gradients(world, device))
        return Trainer(setup, on_epoch).run()


class Trainer:
    """The loop over epochs.

    Args:
        setup: model, data, optimiser and loss, ready to go.
        on_epoch: as in `train`.
    """

    def __init__(self, setup: Setup, on_epoch: Callable[[int, float], bool] | None = None) -> None:
        self.s, self.on_epoch = setup, on_epoch
        self.device, self.world, self.config = setup.device, setup.world, setup.config
        self.best_fitness, self.best_epoch = 0.0, -1
        self.last_step = -1
        self.progress = EpochProgress()
        self.amp_dtype = amp_dtype(self.config.amp, self.device)
        faster = self.amp_dtype is None and self.device.type == "cpu" and cpu_has_bf16()
        LOGGER.info(
            "Precision: %s (--amp %s)%s", str(self.amp_dtype or torch.float32)[6:], self.config.amp,
            "; this CPU computes faster in bfloat16: --amp bf16" if faster else "",
        )  # fmt: skip
        self.stepper = TrainStep(setup, self.amp_dtype)
        self.class_maps = np.zeros(len(setup.data.names))
        self.logs = Logs(setup.folder)
        self.stop = StopRequest()

    def run(self) -> TrainResult:
        """Train from the setup's first epoch to the last; validate the best weights at the end."""
        s, config = self.s, self.config
        if self.world.is_main:
            save_resolved(s)
            self.logs = make_logs(config.logger, s.folder, config.to_dict(), s.hyp.to_dict(), s.start_epoch)
            if not config.noplots and s.start_epoch == 0:
                pictures.labels(s)
        run_state.restore(self)
        done, begin = s.start_epoch, time.time()
        with self.logs, closing(s.loader), closing(s.val_loader):
            with self.stop:
                for epoch in range(s.start_epoch, config.epochs):
                    over = self._epoch(epoch)
                    done = epoch + 1
                    if over:
                        break
                    self._leave_if_asked(epoch + 1)
            LOGGER.info("%d epochs in %.3f hours", done - s.start_epoch, (time.time() - begin) / 3600)
            return self._finish(done)

    def _epoch(self, epoch: int) -> bool:
        """One epoch: train, validate, log, save. Returns whether to stop early."""
        s, config = self.s, self.config
        if config.image_weights:
            needed = s.class_weights * (1 - self.class_maps) ** 2  # classes that are found badly count more
            s.loader.set_image_weights(labels_to_image_weights(s.labels, len(needed), needed))
        if 0 < config.freeze_epochs == epoch and s.frozen.names:
            LOGGER.info("%d frozen tensors learn from now on (--freeze-epochs)", len(s.frozen.thaw))
            unfreeze(s.model, s.frozen)
            s.frozen = Frozen()
            self.stepper.wrap()
        rates = self._train_epoch(epoch)
        final = epoch + 1 == config.epochs
        losses = np.mean(gather_all(self.progress.mean(), self.world), 0).tolist()
        result = self._validate(epoch) if not config.noval or final else None
        stop = self._note(epoch, losses, rates, result) if self.world.is_main else False
        stop, self.class_maps = broadcast((stop, self.class_maps), self.world)
        if not config.nosave or final or stop:
            run_state.save(self, epoch, is_best=self.best_epoch == epoch)
        self.progress = EpochProgress()
        return stop

    def _train_epoch(self, epoch: int) -> tuple[float, float, float]:
        """Go through what is left of the epoch's batches. Returns the rates of the last one."""
        s, progress = self.s, self.progress
        self.stepper.network.train()
        keep_still(s.model, s.frozen)
        s.loader.set_epoch(epoch, skip=progress.batches)
        LOGGER.info("\n%s", "".join(f"{word:>11}" for word in BAR_HEAD))
        total = len(s.loader)
        bar = tqdm(
            on_device(s.loader, self.device), total=total, initial=progress.batches,
            disable=not self.world.is_main, bar_format="{l_bar}{bar:10}{r_bar}",
        )  # fmt: skip
        settings = s.schedule.at(epoch * total + max(total - 1, 0), epoch)
        s.optimizer.zero_grad()
        shown = 0.0
        for batch, images in bar:
            i = progress.batches
            iteration = epoch * total + i
            settings = s.schedule.at(iteration, epoch)
            apply_settings(s.optimizer, settings)
            if epoch == 0 and i < 3 and self.world.is_main and not self.config.noplots:
                pictures.training_batch(s, batch, i)
            parts, size = self.stepper.backward(images, batch.targets, (epoch, i))
            progress.add(parts)
            if iteration - self.last_step >= settings.accumulate:
                self.stepper.step()
                self.last_step = iteration
                self._leave_if_asked(epoch)
            if time.time() - shown > 0.5 or i + 1 == total:  # formatting waits for the device: not every step
                shown = time.time()
                self._show(bar, epoch, (len(batch.targets), size))
        return settings.lr

    def _leave_if_asked(self, epoch: int) -> None:
        """Where no gradient is pending: when a signal asked for it, save the state and end the process."""
        if not any_rank(self.stop.number is not None, self.world):
            return
        run_state.save_unfinished(self, epoch)
        broadcast(None, self.world)  # when the first one leaves, torchrun ends the others: not before all is written
        if self.world.is_main:
            last = self.s.folder / "weights" / "last.pt"
            LOGGER.info("Stopped in epoch %d; go on with: python train.py --resume %s", epoch, last)
        self.stop.leave()

    def _show(self, bar: tqdm, epoch: int, counts: tuple[int, int]) -> None:
        """Bring the progress bar up to date."""
        losses = self.progress.mean()
        memory = torch.cuda.max_memory_reserved(self.device) / 2**30 if self.device.type == "cuda" else 0.0
        cells = [f"{epoch}/{self.config.epochs - 1}", f"{memory:.3g}G", *(f"{v:.4g}" for v in losses), *counts]
        bar.set_description_str("".join(f"{cell:>11}" for cell in cells))

    def _validate(self, epoch: int) -> EvalResult | None:
        """Validate the averaged weights of rank zero, with losses: each rank its batches. The result is rank zero's.

        A signal breaks off the work of a rank, which then tells the others; all of them leave together.
        """
        s = self.s
        copy_from_main(s.ema.module, self.world)  # batch statistics differ from rank to rank
        s.criterion.balance.copy_(torch.tensor(broadcast(s.criterion.balance.tolist(), self.world)))
        autocast = None if self.device.type == "cpu" else self.amp_dtype  # on a CPU, the figures that val.py will give
        runtime = PyTorchRuntime.from_model(s.ema.module, self.device, autocast=autocast)
        tally = None
        with suppress(StopNow), self.stop.at_once():
            tally = measure(runtime, s.val_loader, s.eval_options, s.criterion, self.world)
        if any_rank(tally is None, self.world):
            self._leave_if_asked(epoch)
        assert tally is not None  # without one there was a signal
        parts = gather(tally, self.world)
        return conclude(parts, s.eval_options) if parts else None

    def _note(self, epoch: int, losses: list[float], rates: tuple[float, ...], result: EvalResult | None) -> bool:
        """Log an epoch and keep the best. Returns whether to stop: patience is over, or `on_epoch` says so."""
        metrics, val_losses = [0.0] * 4, [0.0] * 3
        if result is not None:
            metrics, val_losses = [result.mp, result.mr, result.map50, result.map], list(result.losses)
            self.class_maps = np.asarray(result.class_maps)
            value = float(fitness(np.array(metrics)))
            if value > self.best_fitness or self.best_epoch < 0:
                self.best_fitness, self.best_epoch = value, epoch
            elif value == self.best_fitness:
                self.best_epoch = epoch
        self.logs.add([epoch, *losses, *metrics, *val_losses, *rates])
        if not self.config.noplots:
            pictures.results(self.s.folder)
        if result is None:
            return False
        if self.on_epoch is not None and self.on_epoch(epoch, float(fitness(np.array(metrics)))):
            LOGGER.info("Stopped after epoch %d", epoch)
            return True
        impatient = 0 < self.config.patience <= epoch - self.best_epoch
        if impatient:
            LOGGER.info("No better fitness since epoch %d: stopped early (--patience)", self.best_epoch)
        return impatient

    def _finish(self, epochs: int) -> TrainResult:
        """Strip the last checkpoint, validate the best one with pictures, and say where everything is."""
        s = self.s
        last, best = s.folder / "weights/last.pt", s.folder / "weights/best.pt"
        if self.world.is_main:
            run_state.strip(last)
        metrics = self._validate_best(best)
        if self.world.is_main:
            self.logs.finish()
            LOGGER.info("Results saved to %s", s.folder)
        return TrainResult(s.folder, best if best.is_file() else None, last, metrics, epochs, self.best_fitness)

    def _validate_best(self, best: Path) -> EvalResult | None:
        """Validate best.pt in its deployed form: each rank its batches; rank zero draws and reports."""
        s = self.s
        worst = WorstImages()
        plots = not self.config.noplots
        options = replace(s.eval_options, folder=s.folder, plots=plots, verbose=True, sinks=(worst,))
        with file_from_main(best, self.world) as file:
            if file is None:
                return None
            LOGGER.info("Validating %s ...", best)
            runtime = PyTorchRuntime([str(file)], self.device, half=self.device.type == "cuda")
        parts = gather(measure(runtime, s.val_loader, options, world=self.world), self.world)
        if not parts:
            return None
        result = conclude(parts, options)
        if plots:
            write_report(s.folder, facts_of(s, result, worst.found()))
        return result
