"""Tiled detection: overlapping tiles of an image, each detected on its own, merged by NMS over all of them.

Objects that are too small in a resized image keep their size in a tile (SAHI, https://arxiv.org/abs/2202.06934; tiles
and merge are those of its `NMS` with the metric `IOS`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from engine.cli.config import DetectConfig, ValConfig
from engine.predict.inference import NmsSettings, preprocess
from engine.runtimes.base import Runtime
from engine.runtimes.exported import rows_from_boxes
from utils.boxes import scale_boxes
from utils.nms import non_max_suppression

LOGGER = logging.getLogger(__name__)
MERGE_IOS = 0.5
"""Overlap, as a fraction of the smaller box, above which the less confident one of two boxes is dropped."""
TILE_BATCH = 8
Image = NDArray[np.uint8]


@dataclass(frozen=True)
class TileSettings:
    """Division of images into tiles.

    Attributes:
        side: tile side in pixels; tiles at the borders are moved into the image.
        overlap: overlap of neighboring tiles as a fraction of the side; objects should be smaller than it.
        full_image: detect on the whole image, too.
    """

    side: int
    overlap: float = 0.2
    full_image: bool = False

    def boxes(self, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """Return xyxy in pixels of the tiles, row by row, then of the whole image if asked for."""
        rows, columns = (self._spans(length) for length in (height, width))
        tiles = [(left, top, right, bottom) for top, bottom in rows for left, right in columns]
        whole = (0, 0, width, height)
        return tiles + ([whole] if self.full_image and tiles != [whole] else [])

    def _spans(self, length: int) -> list[tuple[int, int]]:
        step = max(self.side - int(self.overlap * self.side), 1)
        last = max(length - self.side, 0)
        return [(start, min(start + self.side, length)) for start in (*range(0, last, step), last)]


class TiledRuntime:
    """A runtime that takes whole images and returns boxes after NMS as rows.

    Args:
        runtime: detects on tiles.
        tiles: division of images into tiles.
        size: (height, width) of the runtime's input, to which tiles are resized.
        nms: NMS settings of the tiles; `classes` and `max_det` apply to each tile.
    """

    imgsz: tuple[int, int] | None = None
    fixed_batch: int | None = None

    def __init__(self, runtime: Runtime, tiles: TileSettings, size: tuple[int, int], nms: NmsSettings) -> None:
        self.runtime, self.tiles, self.size, self.nms = runtime, tiles, size, nms
        self.names: Mapping[int, str] = runtime.names
        self.stride, self.device = runtime.stride, runtime.device

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Detect on (B, 3, H, W) uint8, or floating point in [0, 1]; return (B, N, 5 + nc), see `rows_from_boxes`."""
        if images.dtype != torch.uint8:
            images = (images.float() * 255).round().to(torch.uint8)
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()[..., ::-1]  # BCHW RGB -> BHWC BGR
        found = [self.detect(image) for image in pixels]
        padded = torch.nn.utils.rnn.pad_sequence(found, batch_first=True)
        return rows_from_boxes(padded, len(self.names)).to(self.device)

    def warmup(self, shape: tuple[int, int, int, int]) -> None:
        """See `Runtime`; whatever the shape, tiles have that of the input."""
        self.runtime.warmup((shape[0], 3, *self.size))

    def detect(self, image: Image) -> torch.Tensor:
        """Detect on one image.

        Args:
            image: (H, W, 3) uint8 BGR.

        Returns:
            (n, 6) float32 xyxy in pixels of the image, confidence, class; sorted by descending confidence.
        """
        boxes = self.tiles.boxes(*image.shape[:2])
        together: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
        for left, top, right, bottom in boxes:
            together.setdefault((bottom - top, right - left), []).append((left, top, right, bottom))
        limit = self.runtime.fixed_batch or TILE_BATCH
        found = [torch.zeros(0, 6)]
        for shape, places in together.items():
            for part in (places[start : start + limit] for start in range(0, len(places), limit)):
                found += self._detect_tiles(image, part, shape)
        return merge(torch.cat(found), self.nms.agnostic)

    def _detect_tiles(
        self, image: Image, places: Sequence[tuple[int, int, int, int]], shape: tuple[int, int]
    ) -> Iterator[torch.Tensor]:
        """Yield per tile (n, 6) in pixels of the image; all tiles have one shape."""
        crops = [image[top:bottom, left:right] for left, top, right, bottom in places]
        inputs = preprocess(crops, self.size, self.stride, auto=self.runtime.imgsz is None)
        n = self.nms
        kept = non_max_suppression(
            self.runtime(inputs), n.conf_thres, n.iou_thres, n.classes, n.agnostic, n.multi_label, max_det=n.max_det
        )
        for (left, top, _, _), rows in zip(places, kept):
            rows = rows.cpu().float()
            rows[:, :4] = scale_boxes(tuple(inputs.shape[2:]), rows[:, :4], shape)
            rows = rows[(rows[:, 2:4] > rows[:, :2]).all(1)]  # not outside the tile
            rows[:, :4] += torch.tensor([left, top, left, top])
            yield rows


def merge(boxes: torch.Tensor, agnostic: bool = False, threshold: float = MERGE_IOS) -> torch.Tensor:
    """Keep the most confident of boxes that overlap by more than a fraction of the smaller box's area.

    Unlike IoU, this criterion also drops the part of an object that was cut off by a tile border.

    Args:
        boxes: (n, 6) xyxy, confidence, class.
        agnostic: compare boxes of different classes, too.

    Returns:
        (m, 6), sorted by descending confidence.
    """
    area = (boxes[:, 2:4] - boxes[:, :2]).prod(1)
    order = area.argsort(descending=True, stable=True)  # for equal confidence the larger box wins
    order = order[boxes[order, 4].argsort(descending=True, stable=True)]
    boxes, area = boxes[order], area[order]
    keep = torch.ones(len(boxes), dtype=torch.bool)
    for i in range(len(boxes)):
        if keep[i]:
            box, others = boxes[i], boxes[i + 1 :]
            sides = torch.minimum(box[2:4], others[:, 2:4]) - torch.maximum(box[:2], others[:, :2])
            overlap = sides.clamp(min=0).prod(1) / torch.minimum(area[i], area[i + 1 :])
            keep[i + 1 :] &= (overlap <= threshold) | ((others[:, 5] != box[5]) & (not agnostic))
    return boxes[keep]


def tile_settings(config: DetectConfig | ValConfig) -> TileSettings | None:
    """Return the settings of `--tile`, `--overlap` and `--full-image`; None without `--tile`."""
    if config.tile is None:
        if config.full_image or config.is_given("overlap"):
            LOGGER.warning("--overlap and --full-image have no effect without --tile")
        return None
    return TileSettings(config.tile, config.overlap, config.full_image)
