"""Measured feature maps of timm's networks against the reference table."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.backbones.timm_measure import create_features, measure, timm_package
from tests.parity import rules

pytestmark = pytest.mark.parity
TABLE: dict[str, Any] = {entry["name"]: entry for entry in rules.backbone("timm_features")["models"]}
# vgg's first map has stride 1 and that of a plain vision transformer appears three times: kept as they are here


@pytest.mark.parametrize("name", TABLE)
def test_channels_strides_and_layout(name: str) -> None:
    entry = TABLE[name]
    found = measure(name)
    assert list(found.channels) == entry["channels"]
    assert list(found.strides) == entry["reduction"]
    assert found.channels_last == (entry["layout"] == "NHWC")


@pytest.mark.parametrize("name", TABLE)
def test_arguments_are_among_those_that_work(name: str) -> None:
    entry = TABLE[name]
    found = measure(name)
    if found.size_divisor == 32:
        assert dict(found.arguments) in entry["args_that_work_for_256x320"]
    else:  # takes multiples of its native size; the table frees it by another shape of its position tables
        assert [found.size_divisor] * 2 == entry["native_input"]
        assert {} not in entry["args_that_work_for_256x320"]


@pytest.mark.parametrize("name", TABLE)
def test_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        network = create_features(name, {})
    assert sum(p.numel() for p in network.parameters()) == TABLE[name]["params_features_only"]


@pytest.mark.parametrize("name", TABLE)
def test_normalization_is_that_of_the_pretrained_weights(name: str) -> None:
    config = timm_package().models.get_pretrained_cfg(name)
    assert list(config.mean) == TABLE[name]["mean"]
    assert list(config.std) == TABLE[name]["std"]
