"""Inputs of verification and calibration: real images, and random images with the same statistics."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from data.config import DataConfig, load_data_config
from data.images import IMAGE_SUFFIXES, read
from data.labels.labels import list_images
from data.letterbox import letterbox
from utils.errors import DataError, UserError
from utils.files import ROOT

LOGGER = logging.getLogger(__name__)
SHIPPED = ROOT / "data" / "images"
# Splits in order of preference: verification on images that are new to the model, calibration of int8 ranges on
# images that are not used to measure accuracy.
VERIFICATION_SPLITS = ("val", "test", "train")
CALIBRATION_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class ImageSource:
    """Source of real images.

    Attributes:
        origin: description for the record of the verification.
        files: the images.
    """

    origin: str
    files: tuple[Path, ...]

    def load(self, count: int, height: int, width: int) -> NDArray[np.uint8]:
        """Return at most `count` images, evenly spaced over the files: (n, height, width, 3) RGB, letterboxed.

        Raises:
            DataError: none of them can be read.
        """
        step = max(len(self.files) // max(count, 1), 1)
        fitted: list[NDArray[np.uint8]] = []
        for path in self.files[::step]:
            if len(fitted) == count:
                break
            try:
                image = letterbox(read(path), (height, width), auto=False)[0]
            except DataError as error:
                LOGGER.warning("%s; left out", error)
                continue
            fitted.append(cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(np.uint8))
        if not fitted:
            raise DataError(f"{self.origin}: none of its {len(self.files)} images can be read")
        return np.stack(fitted)


def find_images(data: str, metadata: Mapping[str, Any], splits: Sequence[str] = VERIFICATION_SPLITS) -> ImageSource:
    """Return images of the given dataset, else of the training dataset, else those shipped with the project.

    Args:
        data: value of the option, or ''.
        metadata: metadata of the checkpoint.
        splits: the first one in the dataset is used (for the training dataset, the first one with existing images).

    Raises:
        UserError: `data` was given and cannot be used.
    """
    if data:
        config = load_data_config(data)
        return _of_split(config, next((name for name in splits if name in config.splits), splits[0]))
    trained_on = metadata.get("data_file") or metadata.get("data") or (metadata.get("opt") or {}).get("data")
    if trained_on and Path(str(trained_on)).is_file():
        try:
            config = load_data_config(str(trained_on))
            # `split` might download missing images, which is not wanted here.
            there = [name for name, paths in config.splits.items() if all(path.exists() for path in paths)]
            split = next((name for name in splits if name in there), "")
            if split:
                return _of_split(config, split)
        except UserError as error:
            LOGGER.info("images shipped with the project are used: %s", error)
    files = tuple(sorted(path for path in SHIPPED.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES))
    return ImageSource("data/images (shipped)", files)


def _of_split(config: DataConfig, split: str) -> ImageSource:
    files = tuple(sorted(list_images(config.split(split))[0]))
    if not files:
        raise DataError(f"{config.file}: its split '{split}' has no images")
    return ImageSource(f"{config.file.name}, {split}", files)


def as_images(images: NDArray[np.uint8]) -> torch.Tensor:
    """Convert (n, H, W, 3) uint8 to (n, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float().div_(255)


def random_images(count: int, like: NDArray[np.uint8], height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Return noise with the mean and standard deviation of real images per channel, and structure at several scales.

    Args:
        count: number of images.
        like: (n, h, w, 3) uint8 real images.
        height, width: size of the images in pixels.

    Returns:
        (count, 3, height, width) float32 in [0, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.zeros(count, 3, height, width)
    for scale in (1, 4, 16, 64):  # blobs of this many pixels
        coarse = torch.randn(count, 3, -(-height // scale), -(-width // scale), generator=generator)
        noise += torch.nn.functional.interpolate(coarse, (height, width), mode="nearest")
    noise = (noise - noise.mean((0, 2, 3), keepdim=True)) / noise.std((0, 2, 3), keepdim=True)
    pixels = torch.from_numpy(like).reshape(-1, 3).float() / 255
    mean, deviation = pixels.mean(0).view(1, 3, 1, 1), pixels.std(0).view(1, 3, 1, 1)
    return (noise * deviation + mean).clamp_(0, 1)
