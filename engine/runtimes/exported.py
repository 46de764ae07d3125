"""Base class of the runtimes of exported files: sizes, batches, input conversion, output layout."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch

from engine.runtimes.metadata import Metadata
from utils.boxes import xyxy2xywh
from utils.device import to_device
from utils.errors import CheckpointError, ConfigError
from utils.structures import to_unit

LOGGER = logging.getLogger(__name__)
Shape = tuple[int | None, ...]


class ExportedRuntime(ABC):
    """Base of the runtimes of exported files.

    A subclass opens the file, calls `_describe`, and defines `_infer`.
    """

    fixed_batch: int | None
    imgsz: tuple[int, int] | None

    def _describe(
        self,
        where: str,
        metadata: Metadata,
        device: torch.device,
        shape: Shape,
        output: Shape = (None, None, None),
    ) -> None:
        """Set the attributes of `Runtime` from the file.

        Args:
            where: name of the file, for messages.
            shape: (B, 3, H, W) of its input; None for free dimensions.
            output: shape of its output, likewise.
        """
        batch, _, height, width = shape
        self.where, self.metadata, self.device = where, metadata, device
        self.input_shape, self.output_shape = shape, output
        self.stride = metadata.stride
        self.fixed_batch = batch
        self.best_conf = _number(metadata.about.get("best_conf"))
        self.imgsz = None if height is None or width is None else (height, width)
        self.transposed = _is_layout_v8(metadata, output)
        columns = (output[1] + 1 if output[1] else None) if self.transposed else output[2]
        self.names: Mapping[int, str] = dict(metadata.names) or {i: str(i) for i in range((columns or 6) - 5)}
        if columns is not None:
            self._check_columns(columns)
        if metadata.nms:
            LOGGER.warning(
                "%s: NMS is part of the file (%s); looser thresholds have no effect",
                where,
                metadata.about.get("nms_options", "thresholds unknown"),
            )

    @abstractmethod
    def _infer(self, images: torch.Tensor) -> torch.Tensor:
        """Run the file on (B, 3, H, W) float32 in [0, 1], contiguous, on `device`; return its output on any device."""

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """See `Runtime`."""
        return rows_from_boxes(self.output(images), len(self.names)) if self.metadata.nms else self.output(images)

    def output(self, images: torch.Tensor) -> torch.Tensor:
        """Run the model on (B, 3, H, W) and return float32 (B, N, 5 + nc); batches below the fixed size are padded."""
        count, _, height, width = images.shape
        self._check_size(count, height, width)
        pixels = to_unit(to_device(images, self.device))
        if self.fixed_batch is not None and count < self.fixed_batch:
            pixels = torch.cat((pixels, pixels.new_zeros(self.fixed_batch - count, *pixels.shape[1:])))
        rows = self._infer(pixels.contiguous())[:count].to(self.device, torch.float32)
        if self.transposed:
            rows = rows_from_v8(rows)
        self._check_columns(rows.shape[-1])
        return rows

    def _check_columns(self, columns: int) -> None:
        needed = 6 if self.metadata.nms else 5 + len(self.names)
        if columns != needed:
            kind = "boxes" if self.metadata.nms else f"rows of {len(self.names)} classes"
            raise CheckpointError(
                f"{self.where}: its output has {columns} columns, {kind} have {needed}: metadata of another model"
            )

    def _check_size(self, count: int, height: int, width: int) -> None:
        if self.imgsz is not None and (height, width) != self.imgsz:
            raise ConfigError(f"{self.where}: takes {self.imgsz[0]} x {self.imgsz[1]} pixels, not {height} x {width}")
        if self.fixed_batch is not None and count > self.fixed_batch:
            raise ConfigError(f"{self.where}: takes batches of {self.fixed_batch}, not {count}")

    def warmup(self, shape: tuple[int, int, int, int]) -> None:
        """See `Runtime`."""
        batch = shape[0] if self.fixed_batch is None else min(shape[0], self.fixed_batch)
        self(torch.zeros((batch, 3, *(self.imgsz or shape[2:])), dtype=torch.uint8))


def _is_layout_v8(metadata: Metadata, output: Shape) -> bool:
    """Return whether a file has the layout (B, 4 + nc, N); files of other exporters do not state it.

    Args:
        metadata: of the file; without class names there are fewer columns than rows.
        output: shape of its output.
    """
    if "layout" in metadata.about or metadata.nms:
        return metadata.about.get("layout") == "v8"
    _, first, last = output
    if first is None:
        return False
    if not metadata.names:
        return last is None or first < last
    return first == 4 + len(metadata.names) and last != 5 + len(metadata.names)


def rows_from_v8(output: torch.Tensor) -> torch.Tensor:
    """Return the output (B, 4 + nc, N) of layout v8 as rows (B, N, 5 + nc) with an objectness of 1."""
    rows = output.transpose(1, 2)
    return torch.cat((rows[..., :4], torch.ones_like(rows[..., :1]), rows[..., 4:]), 2)


def rows_from_boxes(boxes: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Return boxes after NMS as rows of a detector without NMS, so that one predictor serves both.

    Args:
        boxes: (B, K, 6) xyxy, confidence, class; rows of confidence 0 are empty.
        num_classes: nc.

    Returns:
        (B, K, 5 + nc): the confidence as objectness, and a score of 1 for the class. A further NMS with the same or a
        looser IoU threshold keeps all of them.
    """
    rows = boxes.new_zeros(*boxes.shape[:2], 5 + num_classes)
    rows[..., :4] = xyxy2xywh(boxes[..., :4].reshape(-1, 4)).reshape_as(boxes[..., :4])
    rows[..., 4] = boxes[..., 4]
    labels = boxes[..., 5].long().clamp(0, num_classes - 1)
    return rows.scatter_(2, labels[..., None] + 5, 1.0)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
