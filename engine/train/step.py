"""One training step: forward, backward, clip, step; and what happens when a gradient is no number."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from data.sizes import multi_scale_shape, multi_scale_sizes
from engine.train.setup import Setup
from models.backbones.base import Backbone
from utils.errors import ConfigError, TrainingError
from utils.seed import sample_rng
from utils.structures import to_unit

LOGGER = logging.getLogger(__name__)
MOST_SKIPPED = 5
"""Steps in a row that may be skipped; more of them mean that the training has diverged."""
_MULTI_SCALE_STREAM = 2**31


class TrainStep:
    """The network as it is trained (mixed precision, data-parallel, compiled) with its optimiser.

    A step whose gradients are not finite is skipped: weights and their average stay as they are, and batch statistics
    that the bad batch spoilt come back from the average. After `MOST_SKIPPED` in a row the training stops. (float16
    skips steps by design while its loss scale finds its level; there the scale has to be below 1, too.)

    Attributes:
        network: what is called with pictures.
        skipped: steps skipped so far.
    """

    def __init__(self, setup: Setup, amp: torch.dtype | None) -> None:
        self.s, self.amp = setup, amp
        self.scaler = torch.amp.GradScaler(setup.device.type, enabled=amp == torch.float16)
        self.skipped = self.skipped_in_row = 0
        self.network: nn.Module = setup.model
        self.sizes_vary = setup.config.multi_scale or setup.config.rect
        self.full_batch = 0
        self.wrap()

    def wrap(self) -> None:
        """Compile and distribute the network; again whenever other parameters learn than before."""
        s = self.s
        self.network = s.model
        if s.config.compile:  # one graph: of the one size there is, or of any size where it changes from batch to batch
            self.network = torch.compile(s.model, dynamic=self.sizes_vary)  # type: ignore[assignment]
        if s.world.size > 1:
            ids = [s.device.index] if s.device.type == "cuda" else None
            # A backbone may have levels that the neck does not read; their norms get no gradient.
            unread = any(isinstance(m, Backbone) for m in s.model.modules())
            self.network = DistributedDataParallel(
                self.network, device_ids=ids, find_unused_parameters=unread, process_group=s.world.gradients
            )

    def backward(self, images: Tensor, targets: Tensor, place: tuple[int, int]) -> tuple[Tensor, int]:
        """Forward and backward of one batch.

        Args:
            images: (B, 3, H, W) uint8 on the device.
            targets: (M, 6) picture, class, xywhn, on the CPU.
            place: epoch and number of the batch, which the random size depends on.

        Returns:
            Loss parts (3,) box, objectness, class on the device, and the width used.
        """
        s, config = self.s, self.s.config
        images = to_unit(images).contiguous(memory_format=torch.channels_last)
        if config.multi_scale:
            rng = sample_rng(config.seed, place[0], _MULTI_SCALE_STREAM + place[1])
            images = multi_scale(images, config.imgsz, s.grid, rng)
        with self._compiled(len(images)):
            with torch.autocast(s.device.type, self.amp, enabled=self.amp is not None):
                total, parts = s.criterion(self._forward(images), targets)
            if s.world.size > 1:
                total = total * s.world.size  # DDP averages the gradients; the loss is a sum over images
            if config.quad:
                total = total * 4.0
            self.scaler.scale(total).backward()
        return parts, images.shape[-1]

    def _forward(self, images: Tensor) -> Any:
        return self.network(images)

    @contextmanager
    def _compiled(self, batch: int) -> Iterator[None]:
        """Where the network runs as compiled, but for an epoch's last batch if that is smaller: no graph for that.

        Raises:
            ConfigError: torch.compile does not get along with this network here.
        """
        if not self.s.config.compile:
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
        """Clip, step, and blend the new weights into the average; or skip.

        Raises:
            TrainingError: too many steps in a row were skipped.
        """
        s = self.s
        self.scaler.unscale_(s.optimizer)
        norm = clip_grad_norm_(s.model.parameters(), max_norm=s.hyp.clip_norm)
        finite = bool(torch.isfinite(norm))  # gradients are averaged over ranks: all of them decide alike
        if finite or self.scaler.is_enabled():
            self.scaler.step(s.optimizer)
        self.scaler.update()
        s.optimizer.zero_grad()
        if not finite:
            self._skip()
            return
        self.skipped_in_row = 0
        s.ema.update(s.model)

    def _skip(self) -> None:
        s = self.s
        self.skipped += 1
        self.skipped_in_row += 1
        repaired = restore_statistics(s.model, s.ema.module)
        LOGGER.warning(
            "gradients are not finite: step skipped (%d so far%s)",
            self.skipped,
            f", {repaired} spoilt batch statistics put back" if repaired else "",
        )
        scale_at_its_end = not self.scaler.is_enabled() or self.scaler.get_scale() < 1
        if self.skipped_in_row >= MOST_SKIPPED and scale_at_its_end:
            last = s.folder / "weights" / "last.pt"
            kept = f"the last good checkpoint is {last}" if last.is_file() else "there is no checkpoint yet"
            raise TrainingError(
                f"{self.skipped_in_row} steps in a row had gradients that are no finite numbers: the training has "
                f"diverged; {kept}; try a lower lr0 or a longer warm-up in the hyper-parameters, or --amp off"
            )


@torch.no_grad()
def restore_statistics(model: nn.Module, average: nn.Module) -> int:
    """Replace buffers of `model` that hold numbers which are not finite by those of `average`; returns how many."""
    good = dict(average.named_buffers())
    spoilt = [
        (name, buffer)
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and name in good and not torch.isfinite(buffer).all()
    ]
    for name, buffer in spoilt:
        buffer.copy_(good[name])
    return len(spoilt)


def multi_scale(images: Tensor, imgsz: int, grid: int, rng: Any) -> Tensor:
    """Scale a batch to a random size of 0.5 to 1.5 times `imgsz`.

    Args:
        images: (B, 3, H, W).
        imgsz: nominal side.
        grid: sides of the result are multiples of it.
        rng: NumPy generator that draws the size.
    """
    height, width = images.shape[2:]
    shape = multi_scale_shape(height, width, int(rng.choice(multi_scale_sizes(imgsz, grid))), grid)
    if shape == (height, width):
        return images
    return nn.functional.interpolate(images, size=shape, mode="bilinear", align_corners=False)
