"""A checkpoint written by the official training script gives the official results."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from data import images
from data.augment import letterbox
from models.checkpoint.io import read_checkpoint
from models.fuse import max_output_difference
from models.loading import load_detector
from tests.parity import rules
from utils.nms import non_max_suppression

pytestmark = pytest.mark.parity
PATH, EXPECTED = rules.official_checkpoint()


@pytest.fixture(scope="module")
def model():
    return load_detector(PATH)


def test_read_checkpoint_describes_the_training(model):
    checkpoint = read_checkpoint(PATH)
    assert (checkpoint.source, checkpoint.epoch, checkpoint.train) == ("official", -1, None)
    assert checkpoint.names == model.names == {int(k): v for k, v in EXPECTED["names"].items()}
    assert checkpoint.nc == model.nc == EXPECTED["nc"]
    assert list(checkpoint.stride) == model.stride.tolist() == EXPECTED["stride"]
    assert sum(p.numel() for p in model.parameters()) == EXPECTED["num_params"]
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    assert checkpoint.metadata["opt"]["save_dir"] == "runs/train/exp"  # a path object in the file


def test_state_keys_match_the_reference(model):
    """Same names in the same order as the manifest of the 80-class model."""
    manifest = [name for name, *_ in rules.yolov5("model_yolov5n")["state_dict"]]
    assert list(read_checkpoint(PATH).state) == manifest == list(model.state_dict())


def test_anchors_match_the_reference(model):
    pixels = model.head.anchors * model.stride.view(-1, 1, 1)
    expected = torch.tensor(EXPECTED["anchors_px"]).reshape(pixels.shape)
    torch.testing.assert_close(pixels, expected, rtol=1e-3, atol=0)  # float16 in the file


@pytest.mark.parametrize("case", EXPECTED["cases"], ids=lambda case: str(case["seed"]))
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_decoded_outputs_match_the_reference(case, fused):
    model = load_detector(PATH)
    if fused:
        model.fuse()
        assert not any("bn" in key for key in model.state_dict())
    image = torch.from_numpy(rules.image_batch(case["seed"], case["shape"]))
    with torch.no_grad():
        decoded = model(image)[0]
    assert rules.compare(case["eval_decoded"], decoded.numpy()) < 1e-4


def test_fused_model_is_equal(model):
    fused = load_detector(PATH).fuse()
    image = torch.from_numpy(rules.image_batch(1, (1, 3, 64, 96)))
    assert 0 < max_output_difference(model, fused, image) < 1e-3  # pixels; boxes reach 200


@pytest.mark.skipif("BCCD_DIR" not in os.environ, reason="set BCCD_DIR to the BCCD dataset (images/val/...)")
@pytest.mark.parametrize("item", EXPECTED["images"]["items"], ids=lambda item: Path(item["image"]).stem)
def test_detections_on_images(model, item):
    """Read, letterbox to the smallest rectangle of 320, predict, NMS: boxes to 1e-2 pixels, confidences to 1e-4."""
    pixels = images.read(Path(os.environ["BCCD_DIR"]) / item["image"])
    boxed = letterbox(pixels, 320, stride=32, auto=True)[0]
    image = torch.from_numpy(np.ascontiguousarray(boxed[..., ::-1].transpose(2, 0, 1))).float()[None] / 255
    assert list(image.shape) == item["input_shape"]
    with torch.no_grad():
        detections = non_max_suppression(model(image)[0], 0.25, 0.45)[0]
    expected = torch.tensor(item["detections_xyxy_conf_cls_input_pixels"])
    assert detections.shape == expected.shape
    torch.testing.assert_close(detections[:, :4], expected[:, :4], rtol=0, atol=1e-2)
    torch.testing.assert_close(detections[:, 4:], expected[:, 4:], rtol=0, atol=1e-4)
