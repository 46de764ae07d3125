"""Detections of several images with the interface of the results of YOLOv5's hub models."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from engine.predict.detections import Detections, DrawStyle, annotated, counts_text
from engine.predict.writers import CropWriter, FileNames, crop_box, write_image
from utils.boxes import xyxy2xywh
from utils.draw import class_name
from utils.errors import ConfigError
from utils.files import make_run_folder

SAVE_DIR = "runs/detect/exp"
REPR_LINES = 16  # images that a notebook or debugger shows; print() shows all
CORNERS = ("xmin", "ymin", "xmax", "ymax")
CENTERS = ("xcenter", "ycenter", "width", "height")


class Results:
    """Detections of one or more images.

    Args:
        found: detections per image.
        names: class names by number.
        times_ms: milliseconds per image of preprocessing, inference, NMS.
        shape: (B, 3, H, W) of the network's input (of the last group, where images differ in shape).
        device: device of the tensors.

    Attributes:
        ims: images, (H, W, 3) uint8 RGB; after `render` with boxes.
        pred, xyxy: per image (n, 6) float32: xyxy in its pixels, confidence, class; sorted by descending confidence.
        xywh: the same with cxcywh; xyxyn, xywhn: normalized.
        files: names of the images, `<stem>.jpg`; `image<number>.jpg` for those without a name.
        names, n, t, s: class names, number of images, `times_ms`, `shape`.
    """

    def __init__(
        self,
        found: Sequence[Detections],
        names: Mapping[int, str],
        times_ms: tuple[float, float, float],
        shape: tuple[int, int, int, int],
        device: torch.device,
    ) -> None:
        self._found = tuple(found)
        self.names = dict(names)
        self.t, self.s, self.n = times_ms, shape, len(self._found)
        self.ims: list[NDArray[np.uint8]] = [np.ascontiguousarray(d.frame.image[..., ::-1]) for d in found]
        self.files = [d.frame.path.name for d in found]
        self.pred = [torch.from_numpy(d.boxes).to(device) for d in found]
        self.xyxy: list[Any] = self.pred
        self.xywh: list[Any] = [torch.cat((xyxy2xywh(p[:, :4]), p[:, 4:]), 1) for p in self.pred]
        sides = [p.new_tensor([im.shape[1], im.shape[0]] * 2 + [1, 1]) for p, im in zip(self.pred, self.ims)]
        self.xyxyn: list[Any] = [p / side for p, side in zip(self.xyxy, sides)]
        self.xywhn: list[Any] = [p / side for p, side in zip(self.xywh, sides)]

    def __len__(self) -> int:
        return self.n

    def __str__(self) -> str:
        lines = []
        for number, found in enumerate(self._found, 1):
            height, width = found.frame.image.shape[:2]
            lines.append(f"image {number}/{self.n}: {height}x{width} {counts_text(found.classes, self.names)}")
        speed = "{:.1f}ms pre-process, {:.1f}ms inference, {:.1f}ms NMS".format(*self.t)
        return "\n".join([*lines, f"Speed: {speed} per image at shape {self.s}"])

    def __repr__(self) -> str:
        *images, speed = str(self).split("\n")
        if len(images) > REPR_LINES:
            images[REPR_LINES:] = [f"... and {len(images) - REPR_LINES} more images"]
        return "\n".join([f"{type(self).__name__} of {self.n} image(s)", *images, speed])

    def print(self) -> None:
        """Print the counts per class, one line per image, and the speed."""
        print(self)

    def pandas(self) -> Results:
        """Return a copy whose xyxy, xyxyn, xywh and xywhn are lists of data frames.

        Columns are xmin, ymin, xmax, ymax (xcenter, ycenter, width, height), confidence, class, name.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ConfigError("results.pandas(): pandas is not installed; pip install pandas") from error
        out = copy.copy(self)
        for key, head in (("xyxy", CORNERS), ("xyxyn", CORNERS), ("xywh", CENTERS), ("xywhn", CENTERS)):
            tables = []
            for rows in getattr(self, key):
                values = rows.cpu().numpy().astype(np.float64)
                table = pandas.DataFrame(values[:, :5], columns=[*head, "confidence"])
                table["class"] = values[:, 5].astype(np.int64)
                table["name"] = pandas.Series([class_name(self.names, int(c)) for c in values[:, 5]], dtype="object")
                tables.append(table)
            setattr(out, key, tables)
        return out

    def tolist(self) -> list[Results]:
        """Return one `Results` per image."""
        return [Results([found], self.names, self.t, self.s, p.device) for found, p in zip(self._found, self.pred)]

    def _drawn(self, labels: bool) -> list[NDArray[np.uint8]]:
        style = DrawStyle(self.names, labels=labels)
        return [annotated(found, style) for found in self._found]

    def render(self, labels: bool = True) -> list[NDArray[np.uint8]]:
        """Draw the boxes into `ims` and return it; the arrays given to the model are not changed.

        Args:
            labels: draw names and confidences.

        Returns:
            (H, W, 3) uint8 RGB per image.
        """
        self.ims = [cv2.cvtColor(drawn, cv2.COLOR_BGR2RGB).astype(np.uint8) for drawn in self._drawn(labels)]
        return self.ims

    def show(self, labels: bool = True) -> None:
        """Show the images with their boxes: in a notebook below the cell, else in the system's viewer."""
        from PIL import Image

        notebook = "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None
        for drawn, name in zip(self._drawn(labels), self.files):
            image = Image.fromarray(cv2.cvtColor(drawn, cv2.COLOR_BGR2RGB))
            if notebook:
                from IPython.display import display

                display(image)
            else:
                image.show(name)

    def save(self, labels: bool = True, save_dir: str | Path = SAVE_DIR, exist_ok: bool = False) -> Path:
        """Write the images with their boxes as JPEG files.

        Args:
            labels: draw names and confidences.
            save_dir: folder; `exp2`, ... if it exists.
            exist_ok: use `save_dir` itself even if it exists.

        Returns:
            The folder.
        """
        folder = make_run_folder(save_dir, exist_ok)
        names = FileNames()
        for found, drawn in zip(self._found, self._drawn(labels)):
            write_image(folder / f"{names.stem_for(found.frame)}.jpg", drawn)
        return folder

    def crop(self, save: bool = True, save_dir: str | Path = SAVE_DIR, exist_ok: bool = False) -> list[dict[str, Any]]:
        """Return the crop of every box, with a small margin.

        Args:
            save: write them as `<save_dir>/crops/<class>/<stem>.jpg`.
            save_dir, exist_ok: as for `save`.

        Returns:
            One entry per box: `box` (xyxy), `conf`, `cls` (0-dim tensors), `label` (name and confidence),
            `im` (H, W, 3) uint8 BGR.
        """
        if save:
            folder = make_run_folder(save_dir, exist_ok)
            writer = CropWriter(folder / "crops", self.names, FileNames())
            for found in self._found:
                writer.write(found, None)
        out = []
        for found, rows in zip(self._found, self.pred):
            for row, values in zip(rows, found.boxes):
                name = class_name(self.names, int(values[5]))
                out.append(
                    {
                        "box": list(row[:4]),
                        "conf": row[4],
                        "cls": row[5],
                        "label": f"{name} {values[4]:.2f}",
                        "im": crop_box(found.frame.image, values[:4]).copy(),
                    }
                )
        return out
