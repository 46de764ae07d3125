"""RepMLPNet against reference values: keys in both layouts, stage outputs, re-parameterized model."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.backbones.repmlp import RepMLPNet
from tests.parity import rules
from tests.parity.backbone_cases import case_input, check_output, state_by_rule

pytestmark = pytest.mark.parity
NAMES = ("repmlp_t224_original", "repmlp_b256_original", "repmlp_base224_mmpretrain")
ARCH = {NAMES[0]: "T224", NAMES[1]: "B256", NAMES[2]: "base"}
HEAD = ("head.", "head_norm.", "final_norm.")


@lru_cache(maxsize=1)
def fixture(name: str) -> Any:
    return rules.backbone(name)


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[RepMLPNet, dict[str, Tensor]]:
    """The model with weights by rule, and the whole official state dict under our names."""
    record = fixture(name)
    model = RepMLPNet(ARCH[name], normalize=False)
    official = {model.official_key(k): v for k, v in state_by_rule(record["manifest"], record["weight_gain"]).items()}
    model.load_state_dict({k: v for k, v in official.items() if not k.startswith(HEAD)}, strict=True)
    return model.to(dtype).eval(), official


def official_outputs(model: RepMLPNet, official: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Every output that the published classes name, made from our stages."""
    with torch.no_grad():
        stages = model(x)
        found = {f"stage{i}": s for i, s in enumerate(stages)}
        found |= {f"embed{i}": model.embeds[i](stages[i]).relu() for i in range(3)}
        norm = nn.BatchNorm2d(stages[3].shape[1], eps=1e-5).to(x.dtype).eval()
        prefix = "head_norm."
        norm.load_state_dict({k.removeprefix(prefix): v for k, v in official.items() if k.startswith(prefix)})
        found["head_norm"] = norm(stages[3])
        if "head.weight" in official:
            pooled = found["head_norm"].mean((2, 3))
            found["logits"] = pooled @ official["head.weight"].to(x.dtype).T + official["head.bias"].to(x.dtype)
    found |= {"out0": found["embed0"], "out1": found["embed1"], "out2": found["embed2"], "out3": found["head_norm"]}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_shapes_in_both_layouts(name: str) -> None:
    record = fixture(name)
    with torch.device("meta"):
        model = RepMLPNet(ARCH[name])
    for part, manifest in (("train", record["manifest"]), ("deploy", record["deploy"]["manifest"])):
        if part == "deploy":
            model.reparameterize()
        expected = {model.official_key(k): shape for k, shape in manifest}
        expected = {k: v for k, v in expected.items() if not k.startswith(HEAD)}
        assert {k: list(v.shape) for k, v in model.state_dict().items()} == expected, part


def test_the_two_layouts_map_one_to_one() -> None:
    record = rules.backbone("repmlp_key_map")
    model = RepMLPNet({"channels": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "share_sets": [1, 1, 1, 1], "nominal": 32})
    for original, mmpretrain, _shape in record["keys_base224"] + record["deploy_keys_base224"]:
        assert model.official_key(mmpretrain) == original
        assert model.official_key(original) == original


def _outputs_cases() -> list:
    """Both forms and precisions of each file; float64 of the large ones is slow, so the default is T224 only."""
    out = []
    for name in NAMES:
        for dtype in (torch.float32, torch.float64):
            for deploy in (False, True):
                slow = name != NAMES[0] and (dtype == torch.float64 or deploy)
                form = f"{name}-{str(dtype)[6:]}-{'deploy' if deploy else 'train'}"
                out.append(pytest.param(name, dtype, deploy, id=form, marks=[pytest.mark.slow] if slow else []))
    return out


@pytest.mark.parametrize(("name", "dtype", "deploy"), _outputs_cases())
def test_outputs(name: str, dtype: torch.dtype, deploy: bool) -> None:
    record = fixture(name)
    model, official = build(name, dtype)
    if deploy:
        model.reparameterize()
    for case in (record["deploy"] if deploy else record)["cases"]:
        found = official_outputs(model, official, case_input(case, dtype))
        for wanted in case["outputs"]:
            check_output(wanted, found[wanted["name"]])


@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES[1:])])
def test_folded_parameters(name: str) -> None:
    record = fixture(name)
    model, _ = build(name)
    model.reparameterize()
    state = model.state_dict()
    assert record["deploy"]["fused_parameters"]
    for wanted in record["deploy"]["fused_parameters"]:
        check_output(wanted, state[model.official_key(wanted["name"])])
