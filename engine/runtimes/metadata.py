"""Metadata of exported files, written by export and read by the runtimes.

Keys and spellings are those of YOLOv5's files where it has them (`stride`, and `names` as the literal of a Python
dictionary), so that either project's tools read the other's files.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from utils.errors import CheckpointError, shown


@dataclass(frozen=True)
class Metadata:
    """Description of an exported file.

    Attributes:
        names: class names by number; empty where the file has none.
        stride: sides of the input are multiples of it.
        imgsz: (height, width) of the export; None if not stored.
        batch: batch size of the export; None if not stored.
        dynamic: batch, height and width are free.
        nms: the output is (B, K, 6) boxes after NMS (xyxy, confidence, class), not rows.
        about: other keys: layout, backbone, precision, date, versions, spec of the model.
    """

    names: Mapping[int, str]
    stride: int = 32
    imgsz: tuple[int, int] | None = None
    batch: int | None = None
    dynamic: bool = False
    nms: bool = False
    about: Mapping[str, str] = field(default_factory=dict)

    def to_texts(self) -> dict[str, str]:
        """Return the metadata as strings by key, as ONNX files and OpenVINO folders store them."""
        texts = {"stride": str(self.stride), "names": str(dict(self.names)), "dynamic": str(self.dynamic)}
        if self.imgsz is not None:
            texts["imgsz"] = str(list(self.imgsz))
        if self.batch is not None:
            texts["batch"] = str(self.batch)
        return {**texts, "nms": str(self.nms), **self.about}

    @classmethod
    def from_texts(cls, texts: Mapping[str, str], where: str) -> Metadata:
        """Read strings from `to_texts` or YOLOv5's exporter; missing keys get their defaults.

        Raises:
            CheckpointError: a value that cannot be read or is out of range.
        """
        known: dict[str, Any] = {}
        for key in ("stride", "names", "imgsz", "batch", "dynamic", "nms"):
            if key in texts:
                known[key] = _value(key, texts[key], where)
        names = known.pop("names", {})
        if isinstance(names, list):
            names = dict(enumerate(names))
        imgsz = known.pop("imgsz", None)
        about = {key: value for key, value in texts.items() if key not in {*known, "names", "imgsz"}}
        try:
            stride, batch = int(known.get("stride", 32)), known.get("batch")
            if (
                stride < 1
                or (batch is not None and int(batch) < 1)
                or (imgsz is not None and (not imgsz or min(map(int, imgsz)) < 1))
            ):
                raise ValueError(f"stride {stride}, batch {batch}, imgsz {imgsz}: positive numbers are needed")
            if sorted(map(int, names)) != list(range(len(names))):
                raise ValueError(f"names {shown(dict(names))}: classes 0, 1, 2, ... are needed")
            return cls(
                names={int(number): str(name) for number, name in names.items()},
                stride=stride,
                imgsz=None if imgsz is None else (int(imgsz[0]), int(imgsz[-1])),
                batch=None if batch is None else int(batch),
                dynamic=bool(known.get("dynamic", False)),
                nms=bool(known.get("nms", False)),
                about=about,
            )
        except (TypeError, ValueError, AttributeError, LookupError, OverflowError) as error:
            raise CheckpointError(f"{where}: its metadata cannot be read: {error}") from error

    def to_json(self, shape: tuple[int, int, int, int]) -> str:
        """Return the metadata as JSON for the `config.txt` of a TorchScript file: YOLOv5's three keys and ours."""
        extra = {"dynamic": self.dynamic, **self.about}
        return json.dumps({"shape": list(shape), "stride": self.stride, "names": dict(self.names), **extra})

    @classmethod
    def from_json(cls, text: str, where: str) -> Metadata:
        """Read JSON from `to_json` or YOLOv5's exporter."""
        try:
            values = json.loads(text)
            batch, _, height, width = values.pop("shape")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{where}: its config.txt is not that of YOLOv5 or of this project") from error
        texts = {"imgsz": str([height, width]), "batch": str(batch)}
        texts |= {key: value if isinstance(value, str) else str(value) for key, value in values.items()}
        return cls.from_texts(texts, where)


def _value(key: str, text: str, where: str) -> object:
    try:
        return ast.literal_eval(text)  # numbers, lists and dictionaries only: nothing is executed
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:  # the last two: deep nesting in the parser
        raise CheckpointError(f"{where}: metadata '{key}' is {shown(text)}; it cannot be read") from error
