"""Metadata strings that no exporter writes."""

from __future__ import annotations

import json

import pytest

from engine.runtimes.metadata import Metadata
from utils.errors import CheckpointError


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("stride", "1e400"),
        ("stride", "-1"),
        ("batch", "(" * 5000),
        ("names", "[" * 3000 + "]" * 3000),
        ("names", "{0: 'a', 2: 'b'}"),
        ("names", "-" * 100_000 + "1"),
        ("imgsz", "[0, 64]"),
        ("names", "__import__('os')"),
    ],
)
def test_from_texts_refuses_in_one_short_line(key, text):
    with pytest.raises(CheckpointError, match="x.onnx: ") as error:
        Metadata.from_texts({key: text}, "x.onnx")
    assert len(str(error.value)) < 300


def test_from_json_refuses_deep_nesting():
    with pytest.raises(CheckpointError, match=r"x.torchscript: its config.txt"):
        Metadata.from_json("[" * 100_000, "x.torchscript")


def test_from_json_reads_the_keys_of_yolov5():
    text = json.dumps({"shape": [1, 3, 64, 96], "stride": 32, "names": {"0": "a"}})
    metadata = Metadata.from_json(text, "x.torchscript")
    assert (metadata.imgsz, metadata.batch, metadata.stride, metadata.names) == ((64, 96), 1, 32, {0: "a"})
