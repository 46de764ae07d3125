"""Training: one epoch reads as a sentence; everything it needs is built in `engine.setup`."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from data.sizes import multi_scale_shape, multi_scale_sizes
from data.weights import labels_to_image_weights
from engine import pictures, run_state
from engine.config import TrainConfig
from engine.distributed import World, broadcast, process_group, world_from_environment
from engine.evaluator import EvalResult, evaluate
from engine.freeze import keep_still
from engine.hooks import CsvLog, TensorBoardLog
from engine.optim import CLIP_NORM, apply_settings
from engine.runtimes.pytorch import PyTorchRuntime
from engine.setup import Setup, build_setup, resolve_run, save_resolved
from models.backbones.base import Backbone
from utils.device import select_device
from utils.errors import ConfigError
from utils.metrics import fitness
from utils.seed import sample_rng
from utils.structures import Batch, to_unit

LOGGER = logging.getLogger(__name__)
BAR_HEAD = ("Epoch", "GPU_mem", "box_loss", "obj_loss", "cls_loss", "Instances", "Size")


class TrainingError(RuntimeError):
    """Training cannot go on: the loss is not a number any more."""


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


def train(config: TrainConfig) -> TrainResult:
    """Train a detector as the options say.

    Raises:
        UserError: an option, file or model that cannot be used; nothing is left half-written.
        TrainingError: the loss became infinite or not a number.
    """
    world = world_from_environment()
    config, resumed = resolve_run(config)
    device = select_device(str(world.local_rank) if _one_gpu_each(world, config) else config.device, config.batch_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with process_group(world, device):
        setup = build_setup(config, resumed, device, world)
        return Trainer(setup).run()


def _one_gpu_each(world: World, config: TrainConfig) -> bool:
    return world.size > 1 and torch.cuda.is_available() and config.device != "cpu"


class Trainer:
    """The loop over epochs.

    Args:
        setup: model, data, optimiser and loss, ready to go.
    """

    def __init__(self, setup: Setup) -> None:
        self.s = setup
        self.device, self.world, self.config = setup.device, setup.world, setup.config
        self.best_fitness, self.best_epoch = 0.0, -1
        self.last_step = -1
        self.amp_dtype = amp_dtype(self.config.amp, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype == torch.float16)
        self.network: nn.Module = setup.model
        if self.world.size > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            # A backbone may have levels that the neck does not read; their norms get no gradient.
            unread = any(isinstance(m, Backbone) for m in setup.model.modules())
            self.network = DistributedDataParallel(setup.model, device_ids=ids, find_unused_parameters=unread)
        self.class_maps = np.zeros(len(setup.data.names))
        self.logs: list[CsvLog | TensorBoardLog] = []

    def run(self) -> TrainResult:
        """Train from the setup's first epoch to the last; validate the best weights at the end."""
        s, config = self.s, self.config
        if self.world.is_main:
            save_resolved(s)
            csv = CsvLog(s.folder)
            csv.drop_from(s.start_epoch)
            self.logs = [csv, TensorBoardLog(s.folder)]
            if not config.noplots and s.start_epoch == 0:
                pictures.labels(s)
        run_state.restore(self)
        epoch, begin = s.start_epoch, time.time()
        for epoch in range(s.start_epoch, config.epochs):
            if self._epoch(epoch):
                LOGGER.info("No better fitness since epoch %d: stopped early (--patience)", self.best_epoch)
                break
        LOGGER.info("%d epochs in %.3f hours", epoch - s.start_epoch + 1, (time.time() - begin) / 3600)
        return self._finish(epoch)

    def _epoch(self, epoch: int) -> bool:
        """One epoch: train, validate, log, save. Returns whether to stop early."""
        s, config = self.s, self.config
        if config.image_weights:
            needed = s.class_weights * (1 - self.class_maps) ** 2  # classes that are found badly count more
            s.loader.set_image_weights(labels_to_image_weights(s.labels, len(needed), needed))
        losses, rates = self._train_epoch(epoch)
        final = epoch + 1 == config.epochs
        stop = False
        if self.world.is_main:
            result = self._validate() if not config.noval or final else None
            stop = self._note(epoch, losses, rates, result)
            if not config.nosave or final or stop:
                run_state.save(self, epoch, is_best=self.best_epoch == epoch)
        return bool(broadcast(stop, self.world))

    def _train_epoch(self, epoch: int) -> tuple[list[float], tuple[float, float, float]]:
        """Go once through the training data. Returns mean loss parts and the rates of the last batch."""
        s = self.s
        self.network.train()
        keep_still(s.model, s.frozen_rows)
        s.loader.set_epoch(epoch)
        mean = torch.zeros(3, device=self.device)
        LOGGER.info("\n%s", "".join(f"{word:>11}" for word in BAR_HEAD))
        bar = tqdm(s.loader, disable=not self.world.is_main, bar_format="{l_bar}{bar:10}{r_bar}")
        s.optimizer.zero_grad()
        shown = 0.0
        for i, batch in enumerate(bar):
            iteration = epoch * len(s.loader) + i
            settings = s.schedule.at(iteration, epoch)
            apply_settings(s.optimizer, settings)
            if epoch == 0 and i < 3 and self.world.is_main and not self.config.noplots:
                pictures.training_batch(s, batch, i)
            parts, size = self._backward(batch, epoch, i)
            mean = (mean * i + parts) / (i + 1)
            if iteration - self.last_step >= settings.accumulate:
                self._optimizer_step()
                self.last_step = iteration
            if time.time() - shown > 0.5 or i + 1 == len(s.loader):  # formatting waits for the device: not every step
                shown = time.time()
                self._show(bar, epoch, mean, (len(batch.targets), size))
        return mean.tolist(), settings.lr

    def _backward(self, batch: Batch, epoch: int, i: int) -> tuple[Tensor, int]:
        """Forward and backward of one batch. Returns the loss parts and the image size used."""
        s, config = self.s, self.config
        # The targets stay on the CPU: the loss assigns them there and copies the result without waiting for the device.
        images = to_unit(batch.images.to(self.device, non_blocking=True))
        images = images.contiguous(memory_format=torch.channels_last)
        if config.multi_scale:
            images = multi_scale(images, config.imgsz, s.grid, sample_rng(config.seed, epoch, 2**31 + i))
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            total, parts = s.criterion(self.network(images), batch.targets)
        if self.world.size > 1:
            total = total * self.world.size  # DDP averages the gradients; the loss is a sum over images
        if config.quad:
            total = total * 4.0
        self.scaler.scale(total).backward()
        return parts, images.shape[-1]

    def _optimizer_step(self) -> None:
        """Clip, step, and blend the new weights into the average."""
        s = self.s
        self.scaler.unscale_(s.optimizer)
        clip_grad_norm_(s.model.parameters(), max_norm=CLIP_NORM)
        self.scaler.step(s.optimizer)
        self.scaler.update()
        s.optimizer.zero_grad()
        if s.ema:
            s.ema.update(s.model)

    def _show(self, bar: tqdm, epoch: int, mean: Tensor, counts: tuple[int, int]) -> None:
        """Bring the progress bar up to date, and stop when the losses are no numbers any more."""
        box, obj, cls = mean.tolist()
        if not np.isfinite(box + obj + cls):
            raise TrainingError(
                f"the loss is not finite any more (box {box:.3g}, obj {obj:.3g}, cls {cls:.3g}); the last good "
                f"checkpoint is {self.s.folder / 'weights' / 'last.pt'}; try a lower lr0 in the hyper-parameters"
            )
        memory = torch.cuda.max_memory_reserved(self.device) / 2**30 if self.device.type == "cuda" else 0.0
        cells = [f"{epoch}/{self.config.epochs - 1}", f"{memory:.3g}G", *(f"{v:.4g}" for v in (box, obj, cls)), *counts]
        bar.set_description_str("".join(f"{cell:>11}" for cell in cells))

    def _validate(self) -> EvalResult:
        """Validate the averaged weights on the validation split, with losses."""
        s = self.s
        assert s.ema is not None  # rank zero has the average
        runtime = PyTorchRuntime.from_model(s.ema.module, self.device, half=self.amp_dtype is not None)
        return evaluate(runtime, s.val_loader, s.eval_options, criterion=s.criterion)

    def _note(self, epoch: int, losses: list[float], rates: tuple[float, ...], result: EvalResult | None) -> bool:
        """Log an epoch and keep the best. Returns whether patience is over."""
        metrics, val_losses = [0.0] * 4, [0.0] * 3
        if result is not None:
            metrics, val_losses = [result.mp, result.mr, result.map50, result.map], list(result.losses)
            self.class_maps = np.asarray(result.class_maps)
            value = float(fitness(np.array(metrics)))
            if value > self.best_fitness or self.best_epoch < 0:
                self.best_fitness, self.best_epoch = value, epoch
            elif value == self.best_fitness:
                self.best_epoch = epoch
        for log in self.logs:
            log.add([epoch, *losses, *metrics, *val_losses, *rates])
        if not self.config.noplots:
            pictures.results(self.s.folder)
        return bool(self.config.patience and result and epoch - self.best_epoch >= self.config.patience)

    def _finish(self, epoch: int) -> TrainResult:
        """Strip the last checkpoint, validate the best one with pictures, and say where everything is."""
        s = self.s
        last, best = s.folder / "weights/last.pt", s.folder / "weights/best.pt"
        metrics = None
        if self.world.is_main:
            run_state.strip(last)
            for log in self.logs:
                if isinstance(log, TensorBoardLog):
                    log.close()
            if best.is_file():
                LOGGER.info("Validating %s ...", best)
                runtime = PyTorchRuntime([str(best)], self.device, half=self.device.type == "cuda")
                options = replace(s.eval_options, folder=s.folder, plots=not self.config.noplots, verbose=True)
                metrics = evaluate(runtime, s.val_loader, options)
            LOGGER.info("Results saved to %s", s.folder)
        return TrainResult(s.folder, best if best.is_file() else None, last, metrics, epoch + 1, self.best_fitness)


def amp_dtype(text: str, device: torch.device) -> torch.dtype | None:
    """Type of mixed precision that `--amp` means on a device; None = everything in float32.

    Raises:
        ConfigError: float16 on a CPU, which has no fast arithmetic for it.
    """
    if text == "fp16" and device.type == "cpu":
        raise ConfigError("--amp fp16: not on a CPU; allowed there are bf16 and off")
    if text == "auto":
        return torch.float16 if device.type == "cuda" else None
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}[text]


def multi_scale(images: Tensor, imgsz: int, grid: int, rng: np.random.Generator) -> Tensor:
    """Scale a batch to a random size of 0.5 to 1.5 times `imgsz`.

    Args:
        images: (B, 3, H, W).
        imgsz: nominal side.
        grid: sides of the result are multiples of it.
        rng: draws the size.
    """
    height, width = images.shape[2:]
    shape = multi_scale_shape(height, width, int(rng.choice(multi_scale_sizes(imgsz, grid))), grid)
    if shape == (height, width):
        return images
    return nn.functional.interpolate(images, size=shape, mode="bilinear", align_corners=False)
