"""Conversion of the inputs of a hub model: paths, URLs, arrays, PIL images, tensors."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from data.images import read
from data.sources.frames import Frame
from utils.errors import ConfigError
from utils.files import download, url_file_name

ALLOWED = (
    "allowed are a path, a URL, a (H, W, 3) uint8 RGB array, a PIL image, a (3, H, W) tensor in 0..1, "
    "a list of these, or a (B, 3, H, W) tensor"
)


def as_list(images: object) -> list[Any]:
    """Return the images as a list.

    Raises:
        ConfigError: the list is empty.
    """
    out = list(images) if isinstance(images, (list, tuple)) else [images]
    if not out:
        raise ConfigError(f"no images given; {ALLOWED}")
    return out


def as_frames(images: Sequence[Any]) -> tuple[Frame, ...]:
    """Read or convert each image.

    Returns:
        Frames (uint8 BGR, upright). Their path names the result files: `<name>.jpg`, or `image<number>.jpg` for images
        without a name.

    Raises:
        ConfigError: an input that is not an image.
        DataError: a file that cannot be read.
    """
    out = []
    for number, item in enumerate(images):
        image, name = _image(item, f"image {number}")
        path = Path(name or f"image{number}").with_suffix(".jpg")
        out.append(Frame(image, path, str(item) if name else path.name, "image", number + 1, len(images)))
    return tuple(out)


def _image(item: object, where: str) -> tuple[NDArray[np.uint8], str]:
    """Return (H, W, 3) uint8 BGR, and the name of its file ('' without one)."""
    if isinstance(item, (str, Path)):
        return _file(str(item))
    if isinstance(item, np.ndarray):
        return _array(item, where), ""
    if isinstance(item, torch.Tensor):
        return _tensor(item, where), ""
    if isinstance(item, Image.Image):
        return _pil(item, where)
    raise ConfigError(f"{where}: a {type(item).__name__}; {ALLOWED}")


def _file(text: str) -> tuple[NDArray[np.uint8], str]:
    if not text.lower().startswith(("http://", "https://")):
        return read(Path(text).expanduser()), Path(text).name
    name = url_file_name(text) or "image"
    with tempfile.TemporaryDirectory(prefix="hub-") as folder:
        return read(download(text, Path(folder) / name, hint="fetch it by hand and give its path")), name


def _array(array: NDArray[Any], where: str) -> NDArray[np.uint8]:
    """Convert RGB, gray, or RGBA (alpha is dropped) to BGR; channels may come first, as in YOLOv5."""
    if array.dtype != np.uint8:
        hint = (
            "(im * 255).astype('uint8') if it is in 0..1" if np.issubdtype(array.dtype, np.floating) else "convert it"
        )
        raise ConfigError(f"{where}: an array of {array.dtype}; uint8 in 0..255 is needed; {hint}")
    if array.ndim == 3 and array.shape[0] < 5 <= array.shape[2]:
        array = array.transpose(1, 2, 0)  # CHW -> HWC
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.size == 0 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ConfigError(f"{where}: an array of shape {array.shape}; (H, W, 3) or (H, W) is needed")
    if array.ndim == 2:
        return np.repeat(array[..., None], 3, axis=2)
    return np.ascontiguousarray(array[..., 2::-1])  # RGB or RGBA -> BGR


def _tensor(tensor: torch.Tensor, where: str) -> NDArray[np.uint8]:
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise ConfigError(f"{where}: a tensor of shape {tuple(tensor.shape)}; in a list (3, H, W) is needed")
    return np.ascontiguousarray(pixels_of(tensor[None], where)[0][..., ::-1])


def pixels_of(images: torch.Tensor, where: str = "images") -> NDArray[np.uint8]:
    """Convert (B, 3, H, W), uint8 or floating point in 0..1, to (B, H, W, 3) uint8 RGB.

    Raises:
        ConfigError: another shape, dtype or range.
    """
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ConfigError(f"{where}: a tensor of shape {tuple(images.shape)}; (B, 3, H, W) is needed")
    if images.dtype != torch.uint8:
        if not images.is_floating_point():
            raise ConfigError(f"{where}: a tensor of {images.dtype}; uint8, or floating point in 0..1, is needed")
        low, high = float(images.min()), float(images.max())
        if not (low >= 0 and high <= 1):
            raise ConfigError(
                f"{where}: a tensor with values {low:.4g} to {high:.4g}; 0 to 1 is needed (divide by 255)"
            )
        images = (images.float() * 255).round().to(torch.uint8)
    return images.detach().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _pil(image: Image.Image, where: str) -> tuple[NDArray[np.uint8], str]:
    if image.mode.startswith(("I", "F")):
        raise ConfigError(f"{where}: a PIL image of mode {image.mode}; give its path, or convert it to 'RGB'")
    upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    return cv2.cvtColor(upright, cv2.COLOR_RGB2BGR).astype(np.uint8), Path(getattr(image, "filename", "") or "").name
