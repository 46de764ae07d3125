"""Tests of the heat maps that a comparison shows of a few validation images."""

from __future__ import annotations

import base64

import cv2
import numpy as np
import torch

from engine.compare.worker.samples import HEAT_SIDE, heat_map_urls
from engine.runtimes.pytorch import PyTorchRuntime
from models.yolo import DetectionModel


def pooling_detector() -> PyTorchRuntime:
    """A detector whose head reads the mean colors of 8 x 8 pixels."""
    spec = {
        "nc": 1, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": [[10, 13]],
        "backbone": [[-1, 1, "nn.AvgPool2d", [8, 8]]], "head": [[[0], 1, "Detect", ["nc", "anchors"]]],
    }  # fmt: skip
    return PyTorchRuntime.from_model(DetectionModel(spec).eval(), torch.device("cpu"))


def test_heat_lies_over_the_image_without_its_padding():
    image = np.full((300, 800, 3), 30, np.uint8)  # letterboxed to 240 x 640 and padded to 256 rows
    image[:, 400:] = 220
    ((level, url),) = heat_map_urls(pooling_detector(), image, 640).items()
    content = base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))
    drawn = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    assert level == "P3" and drawn.shape == (120, HEAT_SIDE, 3)
    cold, hot = drawn[:, :140].astype(int), drawn[:, 180:].astype(int)
    assert np.abs(cold - 30).max() < 12  # as in the image
    assert (hot[..., 2] - hot[..., 0] > 60).all()  # reddish, to the upper and lower edge
