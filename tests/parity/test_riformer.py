"""RIFormer against values of the published implementation: key names, feature maps, re-parameterized model."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from models.backbones.riformer import RIFormer
from tests.parity import rules
from tests.parity.backbone_cases import case_input, check_output, state_by_rule

pytestmark = pytest.mark.parity
NAMES = ("riformer_s12", "riformer_m36")
DTYPES = (torch.float32, torch.float64)


@lru_cache(maxsize=1)
def fixture(name: str) -> Any:
    return rules.backbone(name)


def build(name: str, dtype: torch.dtype = torch.float32) -> RIFormer:
    record = fixture(name)
    model = RIFormer(record["source"]["args"]["arch"], normalize=False)
    model.load_state_dict(state_by_rule(record["manifest"], record["weight_gain"]), strict=True)
    return model.to(dtype).eval()


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_shapes_are_the_official_ones(name: str) -> None:
    record = fixture(name)
    model = build(name)
    found = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert found == dict(record["manifest"])
    assert sum(p.numel() for p in model.parameters()) == record["num_params"]
    model.reparameterize()
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == dict(record["deploy"]["manifest"])
    assert sum(p.numel() for p in model.parameters()) == record["deploy"]["num_params"]


@pytest.mark.parametrize("deploy", [False, True], ids=["train", "deploy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_feature_maps(name: str, dtype: torch.dtype, deploy: bool) -> None:
    record = fixture(name)
    model = build(name, dtype)
    cases = record["cases"]
    if deploy:
        model.reparameterize()
        cases = record["deploy"]["cases"]
    for case in cases:
        with torch.no_grad():
            outputs = model(case_input(case, dtype))
        assert len(outputs) == len(case["outputs"])
        for wanted, output in zip(case["outputs"], outputs):
            check_output(wanted, output)


@pytest.mark.parametrize("name", NAMES)
def test_fused_parameters(name: str) -> None:
    model = build(name)
    model.reparameterize()
    state = model.state_dict()
    for wanted in fixture(name)["deploy"]["fused_parameters"]:
        check_output(wanted, state[wanted["name"]])


@pytest.mark.parametrize("name", NAMES)
def test_reparameterized_form_equals_training_form_in_float64(name: str) -> None:
    model = build(name, torch.float64)
    for case in fixture(name)["deploy"]["cases"][:1]:
        image = case_input(case, torch.float64)
        with torch.no_grad():
            before = model(image)
            model.reparameterize()
            after = model(image)
        for a, b in zip(before, after):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-11)
