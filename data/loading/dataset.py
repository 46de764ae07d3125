"""DetectionDataset: from the index of an image to a training or validation sample.

Sample i in epoch e is a function of (seed, e, i) alone. The partners of a mosaic come from the block of
the epoch's order that holds i, so that a process that makes the samples of a block decodes each of its images once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data.augment import mosaic, warp
from data.augment.color import hsv_gains, mixup
from data.augment.config import AugmentConfig
from data.augment.mosaic import LabeledImage
from data.augment.warp import Labels
from data.labels.labels import ImageRecord
from data.labels.table import ImageRecords
from data.letterbox import Fit, Image, fit, place
from data.loading.image_cache import RECENT_BYTES, ImageStore, bytes_kept, enlarged
from data.loading.order import WINDOW, Index, Key, SampleKey, as_key, epoch_order, window_at
from data.sizes import HW, fit_long_side, rect_batch_shapes, rect_order
from utils.boxes import xyxy2xywhn
from utils.seed import sample_rng
from utils.structures import ImageShapes, Sample

CLIP_EPS = 1e-3  # boxes end that many pixels before the right and the bottom border, as in YOLOv5


@dataclass(eq=False)
class DetectionDataset:
    """Images with boxes, fitted to one size (or one shape per batch), augmented when a recipe is given.

    Attributes:
        records: images with labels.
        imgsz: longer side of what the network sees, in pixels.
        augment: training-time changes; None for validation samples.
        rect: one shape per batch of images of similar shape, instead of squares. No mosaics then.
        batch_size: of the rectangular batches.
        stride: rectangular shapes are multiples of it.
        pad: extra padding of rectangular shapes, in strides.
        cache: keep decoded images in memory ("ram") or in files ("disk").
        cache_folder: where these files go; None means beside the images.
        seed: of all random choices.
        close_mosaic_from: first epoch without mosaics, and so without mixup and copy-paste; None: there is none. The
            epoch is part of each key, so worker processes need no notification.

    Raises:
        DataError: at once when the cache cannot be filled; on access when an image cannot be read.
    """

    records: Sequence[ImageRecord]
    imgsz: int
    augment: AugmentConfig | None = field(default=None, kw_only=True)
    rect: bool = field(default=False, kw_only=True)
    batch_size: int = field(default=16, kw_only=True)
    stride: int = field(default=32, kw_only=True)
    pad: float = field(default=0.0, kw_only=True)
    cache: Literal["ram", "disk"] | None = field(default=None, kw_only=True)
    cache_folder: Path | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    close_mosaic_from: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self._records = ImageRecords.of(self.records)  # which worker processes share
        self.records = self._records
        self._images = ImageStore(
            self.records,
            self.imgsz,
            smooth=self.augment is None,
            mode=self.cache,
            folder=self.cache_folder,
            recent_bytes=RECENT_BYTES if self.uses_mosaic else 0,
        )
        self._order: tuple[int, Index, Index] | None = None
        self._window_size = self.window_size

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: Key) -> Sample:
        """Sample of image `i` (epoch 0), of `(epoch, i)`, or of a SampleKey.

        Returns:
            Image (H, W, 3) uint8 BGR, contiguous; labels class, cxcywh, normalized.
        """
        key = as_key(key)
        if not 0 <= key.index < len(self.records):
            raise IndexError(f"image {key.index} of a dataset of {len(self.records)}")
        if self.augment is None:
            return self._validation_sample(key.index)
        return self._training_sample(key, self.augment)

    @property
    def labels(self) -> list[NDArray[np.float32]]:
        """Per image (n, 5) class, cxcywh, normalized."""
        return [self._records.labels_of(i) for i in range(len(self._records))]

    @property
    def window_size(self) -> int:
        """How many images of an epoch's order may share a mosaic.

        All of them where one process can keep the whole dataset decoded; else a window, so that each image is decoded
        about once per epoch. A small dataset needs the variety: few windows make successive steps see few images.
        """
        needed = int(bytes_kept(self.sizes, self.imgsz).sum())
        return max(len(self.records), 1) if needed <= RECENT_BYTES else WINDOW

    @property
    def uses_mosaic(self) -> bool:
        """Whether samples may hold several images, in some epoch."""
        return self.augment is not None and self.augment.mosaic > 0 and not self.rect

    def mosaic_closed(self, epoch: int) -> bool:
        """Return whether samples of an epoch hold one image each, because it is one of the last ones."""
        return self.close_mosaic_from is not None and epoch >= self.close_mosaic_from

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(n, 2) heights and widths of the image files, in pixels."""
        return self._records.sizes

    @cached_property
    def visiting_order(self) -> Index:
        """Order of an unshuffled pass: as given; with `rect`, by shape."""
        return rect_order(self.sizes) if self.rect else np.arange(len(self.records))

    @cached_property
    def batch_shapes(self) -> list[HW]:
        """(height, width) of each rectangular batch, in visiting order."""
        return rect_batch_shapes(self.sizes, self.batch_size, self.imgsz, self.stride, self.pad)

    def smallest_shapes(self) -> set[HW]:
        """Return (height, width) of the lowest and of the narrowest batch."""
        if not self.rect:
            return {(self.imgsz, self.imgsz)}
        return {min(self.batch_shapes), min(self.batch_shapes, key=lambda shape: shape[::-1])}

    @cached_property
    def _place_in_order(self) -> Index:
        place_of = np.empty(len(self.records), np.int64)
        place_of[self.visiting_order] = np.arange(len(self.records))
        return place_of

    def shape_of(self, index: int) -> HW:
        """Return (height, width) of an image's sample."""
        if not self.rect:
            return self.imgsz, self.imgsz
        return self.batch_shapes[self._place_in_order[index] // self.batch_size]

    def _image(self, index: int) -> LabeledImage:
        records = self._records  # a record of its own would take longer to make
        height, width = records.sizes[index].tolist()
        size = fit_long_side(height, width, self.imgsz)
        return LabeledImage(self._images[index], size, records.labels_of(index), records.segments_of(index))

    def _fit(self, index: int, image: LabeledImage) -> tuple[Fit, ImageShapes]:
        """Return the place of a single image in its sample, and the geometry back to the file."""
        f = fit(image.size, self.shape_of(index), scaleup=self.augment is not None)
        height, width = self.sizes[index].tolist()
        ratio = (f.ratio[1] * (image.size[0] / height), f.ratio[0] * (image.size[1] / width))
        return f, ImageShapes((height, width), ratio, f.pad)

    def _validation_sample(self, index: int) -> Sample:
        source = self._image(index)
        f, shapes = self._fit(index, source)
        # The labels take the exact padding, the pixels the rounded one, as in YOLOv5.
        height, width = source.size
        labels = mosaic.place_labels(source.labels, (f.ratio[1] * height, f.ratio[0] * width), f.pad)
        image = place(enlarged(source.image, source.size), f)
        return Sample(image, _normalized(labels, f.shape), self._records.name_of(index), shapes, index)

    def _training_sample(self, key: SampleKey, config: AugmentConfig) -> Sample:
        rng = sample_rng(self.seed, key.epoch, key.index + key.repeat * len(self.records))
        flips = (bool(rng.random() < config.flipud), bool(rng.random() < config.fliplr))
        shapes = None
        if self.uses_mosaic and not self.mosaic_closed(key.epoch) and rng.random() < config.mosaic:
            window = self._window(key)
            image, labels = self._mosaic(key.index, window, flips, rng)
            if rng.random() < config.mixup:
                second = self._mosaic(int(rng.choice(window)), window, flips, rng)
                image, labels = mixup((image, labels), second, rng)
        else:
            image, labels, shapes = self._single(key.index, flips, rng)
        image = hsv_gains(image, config.hsv_h, config.hsv_s, config.hsv_v, rng)
        path = self._records.name_of(key.index)
        return Sample(image, _normalized(labels, image.shape[:2]), path, shapes, key.index)

    def _mosaic(
        self, index: int, window: Index, flips: tuple[bool, bool], rng: np.random.Generator
    ) -> tuple[Image, Labels]:
        """Make a sample from image `index` and three or eight of the window on one canvas, pasted, warped."""
        config = self.augment or AugmentConfig()
        nine = config.mosaic9 > 0 and rng.random() < config.mosaic9
        others = window[window != index]
        count = 8 if nine else 3
        partners = rng.choice(others if len(others) else window, count, replace=len(others) < count)
        members = rng.permutation([index, *partners]).tolist()
        lay_out = mosaic.mosaic9 if nine else mosaic.mosaic4
        canvas, labels, segments = lay_out([self._image(i) for i in members], self.imgsz, rng)
        chosen = mosaic.choose_pastes(labels, segments, canvas.shape[1], config.copy_paste, rng)
        move = warp.draw_warp(config, canvas.shape, (self.imgsz, self.imgsz), rng, flips)
        image = warp.render(canvas, move)
        if chosen:
            mosaic.paste_mirrored(image, canvas, [segments[i] for i in chosen], move)
            labels, segments = mosaic.mirror(labels, segments, chosen, canvas.shape[1])
        return image, warp.transform_labels(labels, segments, move)

    def _single(
        self, index: int, flips: tuple[bool, bool], rng: np.random.Generator
    ) -> tuple[Image, Labels, ImageShapes]:
        """Make a sample from one image, fitted and warped in one step."""
        image = self._image(index)
        f, shapes = self._fit(index, image)
        (h, w), (left, top) = f.size, f.offset
        canvas = warp.Canvas((warp.Tile(image.image, f.size, f.offset, (left, top, left + w, top + h)),), f.shape)
        move = warp.draw_warp(self.augment or AugmentConfig(), f.shape, f.shape, rng, flips)
        labels = mosaic.place_labels(image.labels, f.size, f.offset)
        placed = LabeledImage(image.image, f.size, image.labels, image.segments)
        segments = mosaic.place_segments(placed, f.offset) if image.segments else []
        return warp.render(canvas, move), warp.transform_labels(labels, segments, move), shapes

    def _window(self, key: SampleKey) -> Index:
        if key.window is not None:
            return key.window
        if self._order is None or self._order[0] != key.epoch:
            order = epoch_order(len(self.records), self.seed, key.epoch)
            self._order = key.epoch, order, np.argsort(order)
        return window_at(self._order[1], int(self._order[2][key.index]), self._window_size)


def _normalized(labels: Labels, shape: HW) -> Labels:
    """Convert (n, 5) class, xyxy in pixels to class, normalized cxcywh; clipped."""
    out = np.empty_like(labels)
    out[:, 0] = labels[:, 0]
    out[:, 1:] = xyxy2xywhn(labels[:, 1:], w=shape[1], h=shape[0], clip=True, eps=CLIP_EPS)
    return out
