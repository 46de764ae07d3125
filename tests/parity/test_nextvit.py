"""Next-ViT against values of the published implementation: key names, stage outputs, re-parameterized model."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from models.backbones.nextvit import NextViT
from tests.parity import rules
from tests.parity.backbone_cases import case_input, check_output, state_by_rule

pytestmark = pytest.mark.parity
NAMES = ("nextvit_small", "nextvit_base")
DTYPES = (torch.float32, torch.float64)
CLASSIFIER = ("norm.", "proj_head.")


@lru_cache(maxsize=1)
def fixture(name: str) -> Any:
    return rules.backbone(name)


def features_of(manifest: list[list[Any]]) -> list[tuple[str, list[int]]]:
    return [(key, shape) for key, shape in manifest if not key.startswith(CLASSIFIER)]


@lru_cache(maxsize=1)
def weights(name: str) -> dict[str, Tensor]:
    record = fixture(name)
    return state_by_rule(features_of(record["manifest"]), record["weight_gain"])


def build(name: str, dtype: torch.dtype = torch.float32) -> NextViT:
    model = NextViT(name.removeprefix("nextvit_"), normalize=False)
    model.load_state_dict(weights(name), strict=True)
    return model.to(dtype).eval()


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_shapes_are_the_official_ones(name: str) -> None:
    record = fixture(name)
    model = build(name)
    found = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert found == dict(features_of(record["manifest"]))
    classifier = 2 * 1024 + 1024 * 1000 + 1000
    assert sum(p.numel() for p in model.parameters()) == record["num_params"] - classifier


@pytest.mark.parametrize("deploy", [False, True], ids=["train", "deploy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_stage_outputs(name: str, dtype: torch.dtype, deploy: bool) -> None:
    record = fixture(name)
    model = build(name, dtype)
    cases = record["cases"]
    if deploy:
        model.reparameterize()
        cases = record["deploy"]["cases"]
    for case in cases:
        with torch.no_grad():
            outputs = model(case_input(case, dtype))
        wanted = [output for output in case["outputs"] if output["name"].startswith("stage")]
        assert len(outputs) == len(wanted) == 4
        for record_of_stage, output in zip(wanted, outputs):
            check_output(record_of_stage, output)


@pytest.mark.parametrize("name", NAMES)
def test_folded_parameters(name: str) -> None:
    model = build(name)
    model.reparameterize()
    state = model.state_dict()
    for wanted in fixture(name)["deploy"]["fused_parameters"]:
        check_output(wanted, state[wanted["name"]])


@pytest.mark.parametrize("name", NAMES)
def test_reparameterized_form_equals_training_form_in_float64(name: str) -> None:
    model = build(name, torch.float64)
    image = case_input(fixture(name)["cases"][-1], torch.float64)
    with torch.no_grad():
        before = model(image)
        model.reparameterize()
        after = model(image)
    for a, b in zip(before, after):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_timm_layout(name: str) -> None:
    """Weights under timm's names are converted back to the published ones, entry by entry."""
    record = fixture(name)
    theirs = {timm: torch.tensor(i) for i, (_, timm) in enumerate(record["timm"]["key_map_original_to_timm"])}
    wanted = {original: i for i, (original, _) in enumerate(record["timm"]["key_map_original_to_timm"])}
    found = NextViT(name.removeprefix("nextvit_")).convert_official(theirs)
    used = {key: int(value) for key, value in found.items() if not key.startswith(("norm.", "head."))}
    assert used == {key: i for key, i in wanted.items() if not key.startswith(CLASSIFIER)}
