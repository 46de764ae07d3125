"""Images from arrays: boxes with captions, grids, feature maps, heat maps. OpenCV only; no font is downloaded.

Text: OpenCV 5 has a built-in font for most scripts of the world. OpenCV 4 supports ASCII only and draws `?` for other
characters, so names are transliterated first (`größe` -> `grosse`; characters without an ASCII form become `?`).
"""

from __future__ import annotations

import colorsys
import math
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import PurePath

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

Color = tuple[int, int, int]
LabeledImage = NDArray[np.uint8]

FONT = cv2.FONT_HERSHEY_SIMPLEX
UNICODE_TEXT = int(cv2.__version__.split(".", maxsplit=1)[0]) >= 5
PADDING_GRAY = 114
MIN_TILE = 320
"""Minimum longer side of an image in a grid."""
HEAT_WEIGHT = 0.7
"""Weight of a heat map at its maximum when blended with the image."""
_GOLDEN_ANGLE = 0.6180339887
_LONGEST_CAPTION = 60


def class_color(index: int) -> Color:
    """Return the fixed BGR color (0..255) of a class; neighboring indices differ widely in hue."""
    number = abs(int(index))
    hue = (0.02 + number * _GOLDEN_ANGLE) % 1.0
    saturation, value = ((0.85, 1.0), (0.6, 0.9), (1.0, 0.75))[number // 8 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * blue), round(255 * green), round(255 * red)


def drawable(text: str, unicode_text: bool = UNICODE_TEXT, longest: int = _LONGEST_CAPTION) -> str:
    """Return text that OpenCV can draw: one line, limited length, no lone surrogates (OpenCV 5 crashes on them).

    Args:
        text: anything.
        unicode_text: whether non-ASCII characters can be drawn; if not, they are transliterated.
        longest: number of characters after which the text is cut.
    """
    if not (text.isascii() and text.isprintable()):
        text = text.encode("utf-8", "replace").decode("utf-8")
        text = "".join(" " if unicodedata.category(c).startswith("C") else c for c in text)
    if not unicode_text and not text.isascii():
        plain = unicodedata.normalize("NFKD", text.replace("ß", "ss"))
        text = "".join(c for c in plain if not unicodedata.combining(c)).encode("ascii", "replace").decode("ascii")
    return text if len(text) <= longest else text[: longest - 3] + "..."


def draw_boxes(
    image: LabeledImage,
    boxes_xyxy: NDArray[np.floating],
    classes: Sequence[int] | NDArray[np.integer],
    captions: Sequence[str] | None = None,
    line_thickness: int | None = None,
    reserved: tuple[int, int, int, int] | None = None,
) -> LabeledImage:
    """Draw boxes, then captions that do not overlap; the last ones get the best places.

    Args:
        image: (H, W, 3) uint8 BGR; not changed.
        boxes_xyxy: (n, 4) xyxy in pixels; parts outside the image are not visible.
        classes: n class numbers, for the colors.
        captions: n texts; not drawn if empty or if no place is free. None = no captions.
        line_thickness: in pixels; None = derived from the image size.
        reserved: xyxy in pixels that captions keep free.

    Returns:
        (H, W, 3) uint8 BGR, a new array.
    """
    out = np.ascontiguousarray(image).copy()
    width = line_thickness or max(round(sum(out.shape[:2]) / 2 * 0.003), 2)
    limit = 4 * max(out.shape[:2]) + 100  # OpenCV's fixed-point coordinates overflow far outside
    boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
    clipped = np.clip(np.nan_to_num(boxes, posinf=limit, neginf=-limit), -limit, limit).round().astype(np.int64)
    colors = [class_color(index) for index in classes]
    for (left, top, right, bottom), color in zip(clipped.tolist(), colors):
        cv2.rectangle(out, (left, top), (right, bottom), color, width)
    if captions is None:
        return out
    texts = [drawable(text) for text in captions]
    scale = min(width / 4 + 0.1, max(min(out.shape[:2]) / 500, 0.3))  # keeps text small on small images
    places = _caption_places(clipped, [_plate_size(text, scale) for text in texts], out.shape[:2], reserved)
    for text, place, color in zip(texts, places, colors):
        if place is not None:
            _draw_text(out, text, place, scale, color, _readable_on(color))
    return out


@lru_cache(4096)
def _plate_size(text: str, scale: float) -> tuple[int, int]:
    """Return width and height of a text with its background; zero for no text."""
    if not text:
        return 0, 0
    (width, height), base = cv2.getTextSize(text, FONT, scale, _weight(scale))
    return width + 4, height + base + 3


def _weight(scale: float) -> int:
    return max(round(2 * scale), 1)


def _draw_text(
    out: LabeledImage, text: str, place: tuple[int, int], scale: float, background: Color, color: Color
) -> None:
    """Draw text on a filled rectangle whose upper left corner is `place`, in place.

    There is no outline: OpenCV 5 spaces letters by their thickness, so the outline would show as a second text.
    """
    (x, y), (width, height) = place, _plate_size(text, scale)
    (_, text_height), _ = cv2.getTextSize(text, FONT, scale, _weight(scale))
    cv2.rectangle(out, (x, y), (x + width - 1, y + height - 1), background, -1)
    cv2.putText(out, text, (x + 2, y + text_height + 1), FONT, scale, color, _weight(scale), cv2.LINE_AA)


def _caption_places(
    boxes: NDArray[np.integer],
    sizes: Sequence[tuple[int, int]],
    shape: tuple[int, int],
    reserved: tuple[int, int, int, int] | None,
) -> list[tuple[int, int] | None]:
    """Choose places without overlap between captions; the last caption chooses first.

    A caption is placed above its box, else inside, beside the other corners, or a few lines away.

    Args:
        boxes: (n, 4) xyxy in pixels.
        sizes: n widths and heights.
        shape: (height, width) of the image; captions stay inside.
        reserved: xyxy that captions keep free.

    Returns:
        Upper left corner of each caption; None without text or without a free place.
    """
    (left, top, right, bottom), (width, height) = boxes.T, np.array(sizes, np.int64).reshape(-1, 2).T
    rows = np.stack((top - height, top, bottom, bottom - height, *(top + n * height for n in (1, -2, 2, -3, 3))), 1)
    columns = np.stack((left, right - width, right, left - width), 1)
    starts = np.stack(np.broadcast_arrays(columns[:, None], rows[:, :, None]), 3).reshape(-1, 36, 2)  # (n, 36, xy)
    room = np.stack((shape[1] - width, shape[0] - height), 1)[:, None]
    starts = np.clip(starts, 0, np.maximum(room, 0))
    ends = starts + np.stack((width, height), 1)[:, None]
    taken = np.zeros((len(boxes) + 1, 4), np.int64)
    count = 0
    if reserved:
        taken[0], count = reserved, 1
    places: list[tuple[int, int] | None] = [None] * len(boxes)
    for index in np.flatnonzero(width)[::-1].tolist():
        start, end, others = starts[index], ends[index], taken[:count]
        meets = ((start[:, None] < others[:, 2:]) & (others[:, :2] < end[:, None])).all(2).any(1)
        first = int(meets.argmin())
        if not meets[first]:
            places[index] = (int(start[first, 0]), int(start[first, 1]))
            taken[count, :2], taken[count, 2:] = start[first], end[first]
            count += 1
    return places


def _readable_on(color: Color) -> Color:
    """Return black or white, whichever has more contrast (luma of ITU-R BT.601)."""
    blue, green, red = color
    return (0, 0, 0) if 0.114 * blue + 0.587 * green + 0.299 * red > 140 else (255, 255, 255)


def image_grid(
    images: torch.Tensor | NDArray[np.generic],
    targets: torch.Tensor | NDArray[np.floating],
    paths: Sequence[str] = (),
    names: Mapping[int, str] | Sequence[str] | None = None,
    conf_thres: float = 0.25,
    max_images: int = 16,
    max_side: int = 1920,
) -> LabeledImage:
    """Draw the images of a batch side by side with their boxes, as YOLOv5's `train_batch*.jpg` and `val_batch*.jpg`.

    Small images are enlarged to a longer side of 320 pixels.

    Args:
        images: (B, 3, H, W) RGB, uint8, or floating point in [0, 1].
        targets: (M, 6) labels: image number, class, normalized cxcywh; or
            (M, 7) detections with the confidence as last column.
        paths: file names to write on the images.
        names: class names; None = numbers.
        conf_thres: detections below it are not drawn.
        max_images: further images are left out.
        max_side: the grid is scaled down to at most this many pixels a side.

    Returns:
        (rows * h, columns * w, 3) uint8 BGR; places without an image are white.
    """
    pixels = images.detach().cpu().float().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    if (isinstance(images, torch.Tensor) and images.dtype == torch.uint8) or pixels.dtype == np.uint8:
        pixels = pixels.astype(np.uint8)
    else:
        pixels = (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)
    rows = targets.detach().cpu().float().numpy() if isinstance(targets, torch.Tensor) else np.asarray(targets, float)
    count = min(len(pixels), max_images)
    columns = math.ceil(math.sqrt(max(count, 1)))
    lines = math.ceil(max(count, 1) / columns)
    height, width = pixels.shape[2:]
    scale = min(max(MIN_TILE / max(height, width), 1.0), max_side / max(lines * height, columns * width))
    height, width = max(1, int(height * scale)), max(1, int(width * scale))
    grid = np.full((lines * height, columns * width, 3), 255, np.uint8)
    for number in range(count):
        cell = np.ascontiguousarray(pixels[number].transpose(1, 2, 0)[..., ::-1])
        if scale != 1:
            smooth = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
            cell = cv2.resize(cell, (width, height), interpolation=smooth).astype(np.uint8)
        title = drawable(PurePath(paths[number]).name) if number < len(paths) else ""
        cell = _labeled_cell(
            cell, rows[rows[:, 0] == number] if len(rows) else rows.reshape(0, 6), names, conf_thres, title
        )
        cv2.rectangle(cell, (0, 0), (width - 1, height - 1), (255, 255, 255), 1)
        y, x = number // columns * height, number % columns * width
        grid[y : y + height, x : x + width] = cell
    return grid


def _labeled_cell(
    cell: LabeledImage,
    rows: NDArray[np.floating],
    names: Mapping[int, str] | Sequence[str] | None,
    conf_thres: float,
    title: str,
) -> LabeledImage:
    """Return the cell with its boxes, and the title on a dark background in the upper left corner."""
    has_conf = rows.shape[1] == 7
    if has_conf:
        rows = rows[rows[:, 6] >= conf_thres]
        rows = rows[np.argsort(rows[:, 6], kind="stable")]  # the most confident box on top
    height, width = cell.shape[:2]
    center, half = rows[:, 2:4], rows[:, 4:6] / 2
    boxes = np.concatenate((center - half, center + half), axis=1) * (width, height, width, height)
    classes = rows[:, 1].astype(int)
    captions = [class_name(names, c) + (f" {row[6]:.1f}" if has_conf else "") for c, row in zip(classes, rows)]
    scale = 0.4 if width < 400 else 0.5
    reserved = (0, 0, *_plate_size(title, scale)) if title else None
    out = draw_boxes(cell, boxes, classes, captions, 1 if max(height, width) < 400 else 2, reserved)
    if title:
        _draw_text(out, title, (0, 0), scale, (40, 40, 40), (255, 255, 255))
    return out


def class_name(names: Mapping[int, str] | Sequence[str] | None, index: int) -> str:
    """Return the name of a class, or its index if it has none."""
    if names is None or (isinstance(names, Mapping) and index not in names) or (
        not isinstance(names, Mapping) and not 0 <= index < len(names)
    ):  # fmt: skip
        return str(index)
    return str(names[index])


def feature_map_image(
    features: torch.Tensor | NDArray[np.floating],
    title: str,
    image: LabeledImage | None = None,
    channels: int = 30,
    tile: int = 160,
) -> LabeledImage:
    """Show the output of a slot of the network: mean activation and some of its channels.

    The heading gives the shape, the range, and how many channels are constant over the image (dead, or not yet
    trained). First tile: the input; second: the mean absolute activation blended over it; then evenly spaced
    channels, each normalized to its own range.

    Args:
        features: (C, H, W), any floating type.
        title: name of the slot.
        image: (h, w, 3) uint8 BGR, the network's input; None = omitted.
        channels: maximum number of channels shown.
        tile: longer side of a tile in pixels.

    Returns:
        (h, w, 3) uint8 BGR.
    """
    maps = features.detach().float().cpu().numpy() if isinstance(features, torch.Tensor) else np.asarray(features)
    maps = np.nan_to_num(maps.astype(np.float32))
    number, rows, columns = maps.shape
    height = max(1, round(tile * min(1.0, rows / columns)))
    width = max(1, round(tile * min(1.0, columns / rows)))
    size = (width, height)
    heat = cv2.applyColorMap(_stretched(np.abs(maps).mean(0), size), cv2.COLORMAP_VIRIDIS)
    tiles: list[tuple[str, NDArray[np.generic]]] = []
    if image is not None:
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        tiles.append(("input", small))
        heat = cv2.addWeighted(small, 0.35, heat, 0.65, 0)
    tiles.append(("mean |x|", heat))
    shown = np.unique(np.linspace(0, number - 1, min(channels, number)).round().astype(int))
    tiles += [(str(channel), cv2.cvtColor(_stretched(maps[channel], size), cv2.COLOR_GRAY2BGR)) for channel in shown]
    still = int((maps.reshape(number, -1).std(1) < 1e-6).sum()) if rows * columns > 1 else 0
    facts = f"{number} x {rows} x {columns}, {maps.min():.3g} .. {maps.max():.3g}, mean {maps.mean():.3g}"
    return _tile_sheet(tiles, [title, facts + (f", {still} constant channel(s)" if still else "")], size)


def heat_map_image(image: LabeledImage, heat: NDArray[np.floating]) -> LabeledImage:
    """Blend a heat map over an image, weighted by its values; where it is 0 the image is unchanged.

    Args:
        image: (h, w, 3) uint8 BGR.
        heat: (h, w) in [0, 1].

    Returns:
        (h, w, 3) uint8 BGR, a new array.
    """
    colors = cv2.applyColorMap((heat * 255).round().astype(np.uint8), cv2.COLORMAP_TURBO)
    weight = HEAT_WEIGHT * heat[..., None]
    return ((1 - weight) * image + weight * colors).round().astype(np.uint8)


def heat_map_sheet(image: LabeledImage, heats: Mapping[str, NDArray[np.floating]], title: str) -> LabeledImage:
    """Show an image (h, w, 3) uint8 BGR and its heat maps (h, w) in [0, 1] side by side, their names above them."""
    scale = max(MIN_TILE / max(image.shape[:2]), 1.0)
    size = round(image.shape[1] * scale), round(image.shape[0] * scale)
    shown = {"input": image, **{name: heat_map_image(image, heat) for name, heat in heats.items()}}
    tiles = [(name, cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC)) for name, pixels in shown.items()]
    return _tile_sheet(tiles, [title], size)


def _stretched(values: NDArray[np.floating], size: tuple[int, int]) -> LabeledImage:
    """Return a map as gray values normalized to its range, enlarged without interpolation."""
    low, high = float(values.min()), float(values.max())
    gray = (values - low) * (255.0 / (high - low)) if high > low else np.zeros_like(values)
    return cv2.resize(gray.round(), size, interpolation=cv2.INTER_NEAREST).astype(np.uint8)


def _tile_sheet(
    tiles: Sequence[tuple[str, NDArray[np.generic]]], headings: Sequence[str], size: tuple[int, int]
) -> LabeledImage:
    """Return tiles with captions above them, eight per row, below the headings."""
    width, height = size
    gap, caption, line = 4, 14, 20
    columns = min(8, max(len(tiles), 1))
    rows = math.ceil(len(tiles) / columns)
    top = line * len(headings) + gap
    total_width = max(columns * (width + gap) + gap, 560)
    sheet = np.full((top + rows * (height + caption + gap), total_width, 3), 32, np.uint8)
    for number, text in enumerate(headings):
        text = drawable(text, longest=120)
        cv2.putText(sheet, text, (gap, line * number + 15), FONT, 0.5, (255, 255, 255), 1, cv2.LINE_AA)
    for number, (text, pixels) in enumerate(tiles):
        x = gap + number % columns * (width + gap)
        y = top + number // columns * (height + caption + gap)
        cv2.putText(sheet, text, (x, y + caption - 3), FONT, 0.35, (200, 200, 200), 1, cv2.LINE_AA)
        sheet[y + caption : y + caption + height, x : x + width] = pixels
    return sheet
