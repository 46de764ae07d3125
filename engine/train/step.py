"""Training step: forward, backward, gradient clipping, optimizer step, EMA update; non-finite gradients are skipped."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from data.sizes import multi_scale_shape, multi_scale_sizes
from engine.cli.config import TrainConfig
from engine.devices.distributed import World
from engine.train.setup import ModelParts
from models.backbones.base import Backbone
from utils.device import amp_dtype, out_of_memory
from utils.errors import ConfigError, TrainingError
from utils.seed import sample_rng
from utils.structures import to_unit

LOGGER = logging.getLogger(__name__)
MAX_SKIPPED = 5
"""Maximum number of consecutive skipped steps; beyond it the training has diverged."""
_MULTI_SCALE_STREAM = 2**31


class TrainStep:
    """Model wrapped for training (mixed precision, DistributedDataParallel, torch.compile) with its optimizer.

    A step whose gradients are not finite is skipped: weights and EMA are unchanged, and BatchNorm statistics that
    became non-finite are restored from the EMA. After `MAX_SKIPPED` consecutive steps the training stops. (With
    float16, GradScaler skips steps by design while it searches the loss scale, which is logged as INFO; there the
    scale must be below 1, too.)

    Args:
        parts: model, loss and EMA.
        optimizer: over the model's parameters.
        config: options; `amp`, `compile`, `imgsz`, `multi_scale`, `quad`, `rect` and `seed` are used.
        clip_norm: maximum norm of the gradient.
        device: the model's device.
        world: this process among those of the training.
        last: checkpoint named in the error if the training diverges.

    Attributes:
        amp: autocast dtype, None for float32.
        network: the wrapped model, called with images.
        skipped: number of steps skipped so far.
    """

    def __init__(
        self,
        parts: ModelParts,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        clip_norm: float,
        device: torch.device,
        world: World,
        last: Path | None = None,
    ) -> None:
        self.model, self.ema, self.criterion, self.grid = parts.model, parts.ema, parts.criterion, parts.grid
        self.memory_format = parts.memory_format
        self.optimizer, self.config, self.clip_norm = optimizer, config, clip_norm
        self.device, self.world, self.last = device, world, last
        self.amp = amp_dtype(config.amp, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == torch.float16)
        self.skipped = self.consecutive_skipped = 0
        self.sizes_vary = config.multi_scale or config.rect
        self.full_batch = 0
        self.shape: Sequence[int] = (0, 3, 0, 0)
        # Other layers count themselves: synchronized ones and cumulative averages (momentum None) need their counter.
        norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        counted = (m for m in self.model.modules() if type(m) in norms and m.num_batches_tracked is not None)
        self.norms = [m for m in counted if m.momentum is not None]
        self.network: nn.Module = self.model
        self.wrap()

    def wrap(self) -> None:
        """Compile and distribute the model; again whenever the set of trainable parameters changes."""
        self.network = self.model
        if self.config.compile:  # one graph: for the fixed size, or for any size where sizes vary between batches
            self.network = torch.compile(self.model, dynamic=self.sizes_vary)  # type: ignore[assignment]
        if self.world.size > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            # A backbone may have levels that the neck does not read; their norms get no gradient.
            unused = any(isinstance(m, Backbone) for m in self.model.modules())
            self.network = DistributedDataParallel(
                self.network, device_ids=ids, find_unused_parameters=unused, process_group=self.world.gradients,
                gradient_as_bucket_view=True,
            )  # fmt: skip

    def backward(
        self, images: Tensor, targets: Tensor, position: tuple[int, int], *, average: bool = True
    ) -> tuple[Tensor, int]:
        """Run forward and backward for one batch.

        Args:
            images: (B, 3, H, W) uint8 on the device.
            targets: (M, 6) image index, class, xywhn, on the CPU.
            position: epoch and batch index, which seed the random size.
            average: average the gradients over the ranks; False for a batch whose gradients are only accumulated.

        Returns:
            Loss parts (3,), named by the loss of the head, on the device, and the input width used.
        """
        config = self.config
        images = to_unit(images).contiguous(memory_format=self.memory_format)
        if config.multi_scale:
            rng = sample_rng(config.seed, position[0], _MULTI_SCALE_STREAM + position[1])
            images = multi_scale(images, config.imgsz, self.grid, rng)
        self.shape = images.shape
        local = isinstance(self.network, DistributedDataParallel) and not average
        unsynchronized = self.network.no_sync() if local else nullcontext()  # type: ignore[operator]
        with self._memory(), self._compiled(len(images)), unsynchronized:
            total, parts = self.loss(images, targets)
            if self.world.size > 1:
                total = total * self.world.size  # DDP averages the gradients; the loss is a sum over images
            if config.quad:
                total = total * 4.0
            self.scaler.scale(total).backward()
        return parts, images.shape[-1]

    def loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the total loss () and its components (3,) of a batch.

        Args:
            images: (B, 3, H, W) in [0, 1] on the device.
            targets: (M, 6) image index, class, xywhn, on the CPU.
        """
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            with self._batches_counted():
                raw = self.network(images)
            total, parts = self.criterion(raw, targets)
        return total, parts

    @contextmanager
    def _batches_counted(self) -> Iterator[None]:
        """Count the batches of all BatchNorm layers at once; each layer would launch a kernel for it."""
        counters = [(m._buffers, m._buffers["num_batches_tracked"]) for m in self.norms if m.training]
        if not counters or self.config.compile:
            yield
            return
        torch._foreach_add_([counter for _, counter in counters if counter is not None], 1)
        for buffers, _ in counters:
            buffers["num_batches_tracked"] = None
        try:
            yield
        finally:
            for buffers, counter in counters:
                buffers["num_batches_tracked"] = counter

    @contextmanager
    def _compiled(self, batch: int) -> Iterator[None]:
        """Run the compiled graph, except for an epoch's smaller last batch, which runs eagerly without a new graph.

        Raises:
            ConfigError: torch.compile fails on this network.
        """
        if not self.config.compile:
            yield
            return
        self.full_batch = max(self.full_batch, batch)
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor.exc import CppCompileError

        try:
            with torch.compiler.set_stance("default" if batch == self.full_batch else "force_eager"):
                yield
        except (TorchDynamoException, CppCompileError) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            sizes = " (sizes vary: --multi-scale, --rect)" if self.sizes_vary else ""
            raise ConfigError(f"--compile: torch.compile cannot compile this network here{sizes}: {reason}") from error

    def step(self) -> None:
        """Clip the gradients, step the optimizer and update the EMA; or skip the step.

        Raises:
            TrainingError: too many consecutive steps were skipped.
        """
        with self._memory():  # the first step allocates the optimizer's state
            finite = self._step()
        if not finite:
            self._skip()
            return
        self.consecutive_skipped = 0
        self.ema.update(self.model)

    def _step(self) -> bool:
        """Step the optimizer unless the gradients are not finite; returns whether they are."""
        self.scaler.unscale_(self.optimizer)
        norm = clip_grad_norm_(self.model.parameters(), max_norm=self.clip_norm)
        finite = bool(torch.isfinite(norm))  # gradients are averaged over ranks: all ranks decide equally
        if finite or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return finite

    def _memory(self) -> AbstractContextManager[None]:
        return out_of_memory(
            self.shape, "a smaller --batch-size (-1 measures what fits), a smaller --imgsz, or --amp fp16"
        )

    def _skip(self) -> None:
        self.skipped += 1
        self.consecutive_skipped += 1
        restored = restore_statistics(self.model, self.ema.module)
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else 0.0
        if scale >= 1 and not restored:
            LOGGER.info("gradients overflow in float16: step skipped, loss scale reduced to %g", scale)
            return
        LOGGER.warning(
            "gradients are not finite: step skipped (%d so far%s)",
            self.skipped,
            f", {restored} non-finite batch statistics restored" if restored else "",
        )
        if self.consecutive_skipped >= MAX_SKIPPED and scale < 1:
            saved = self.last is not None and self.last.is_file()
            kept = f"the last good checkpoint is {self.last}" if saved else "there is no checkpoint yet"
            raise TrainingError(
                f"{self.consecutive_skipped} consecutive steps had non-finite gradients: the training has "
                f"diverged; {kept}; try a lower lr0 or a longer warm-up in the hyperparameters, or --amp off"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the gradient scaler and the number of skipped steps."""
        return {"scaler": self.scaler.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; other keys are ignored."""
        if state["scaler"]:  # empty when it comes from a run without float16
            self.scaler.load_state_dict(state["scaler"])
        self.skipped = int(state.get("skipped", 0))


@torch.no_grad()
def restore_statistics(model: nn.Module, average: nn.Module) -> int:
    """Replace non-finite floating-point buffers of `model` by those of `average`; return how many."""
    good = dict(average.named_buffers())
    pairs = [(b, good[name]) for name, b in model.named_buffers() if b.is_floating_point() and name in good]
    if not pairs:
        return 0
    peaks = torch._foreach_norm([buffer for buffer, _ in pairs], math.inf)
    bad = [pair for pair, finite in zip(pairs, torch.isfinite(torch.stack(peaks)).tolist(), strict=True) if not finite]
    for buffer, value in bad:
        buffer.copy_(value)
    return len(bad)


def multi_scale(images: Tensor, imgsz: int, grid: int, rng: np.random.Generator) -> Tensor:
    """Scale a batch to a random size of 0.5 to 1.5 times `imgsz`.

    Args:
        images: (B, 3, H, W).
        imgsz: nominal size in pixels.
        grid: height and width of the result are multiples of it.
        rng: draws the size.

    Returns:
        (B, 3, H', W') of the same dtype.
    """
    height, width = images.shape[2:]
    shape = multi_scale_shape(height, width, int(rng.choice(multi_scale_sizes(imgsz, grid))), grid)
    if shape == (height, width):
        return images
    return nn.functional.interpolate(images, size=shape, mode="bilinear", align_corners=False)
