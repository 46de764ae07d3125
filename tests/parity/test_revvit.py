"""RevViT against values of the published model: key names, maps, other output forms, gradients."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.backbones.revvit import RevViT
from tests.parity import rules
from tests.parity.backbone_cases import case_input, check_output, state_by_rule

pytestmark = pytest.mark.parity
SMALL, TINY = "revvit_small", "revvit_tiny_grad"
DTYPES = (torch.float32, torch.float64)
# The position embedding is resized in float32 even in float64 runs.
RESIZED64 = 1e-6


@lru_cache(maxsize=2)
def fixture(name: str) -> Any:
    return rules.backbone(name)


def build(name: str, dtype: torch.dtype, **options: Any) -> RevViT:
    record = fixture(name)
    model = RevViT(record["source"]["args"]["arch"], normalize=False, **options)
    report = model.load_state_dict(state_by_rule(record["manifest"], record["weight_gain"]), strict=False)
    assert not report.unexpected_keys
    assert all(key.startswith("pyramid.") for key in report.missing_keys)
    return model.to(dtype).eval()


def relative64(case: Any) -> float:
    return 1e-9 if case["input"]["shape"][2:] == [224, 224] else RESIZED64


@pytest.mark.parametrize("name", [SMALL, TINY])
def test_keys_and_shapes_are_the_official_ones(name: str) -> None:
    record = fixture(name)
    model = build(name, torch.float32)
    found = {k: list(v.shape) for k, v in model.state_dict().items() if not k.startswith("pyramid.")}
    assert found == dict(record["manifest"])
    count = sum(p.numel() for k, p in model.named_parameters() if not k.startswith("pyramid."))
    assert count == record["num_params"]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
def test_the_map(dtype: torch.dtype) -> None:
    model = build(SMALL, dtype)
    for case in fixture(SMALL)["cases"]:
        with torch.no_grad():
            (output,) = model.forward_features(case_input(case, dtype))
        check_output(case["outputs"][0], output, relative64(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
def test_other_output_forms_follow_from_the_map(dtype: torch.dtype) -> None:
    model = build(SMALL, dtype)
    forms = {"avg_featmap": lambda y: y.mean((2, 3)), "raw": lambda y: y.flatten(2).transpose(1, 2)}
    for case in fixture(SMALL)["other_out_types"]:
        with torch.no_grad():
            (output,) = model.forward_features(case_input(case, dtype))
        check_output(case["outputs"][0], forms[case["out_type"]](output))


@pytest.mark.parametrize("plain", [False, True], ids=["reversible", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
def test_loss_and_gradients(dtype: torch.dtype, plain: bool) -> None:
    record = fixture(TINY)
    for case in record["cases"]:
        model = build(TINY, dtype, no_custom_backward=plain).train()
        image = case_input(case, dtype).requires_grad_()
        (output,) = model.forward_features(image)
        g = np.random.RandomState(record["g_seed"]).randn(*output.shape)
        loss = (output * torch.from_numpy(g).to(dtype)).sum()
        loss.backward()
        wanted = case["float64" if dtype == torch.float64 else "float32"]
        tolerance = relative64(case) if dtype == torch.float64 else 1e-4
        assert loss.item() == pytest.approx(wanted["loss"], rel=10 * tolerance)
        check_samples(wanted["output"], output, tolerance)
        gradients = {"input": image.grad, **{name: p.grad for name, p in model.named_parameters()}}
        assert len(wanted["gradients"]) == 9
        for entry in wanted["gradients"]:
            found = gradients[entry["name"]]
            assert found is not None
            check_samples(entry, found, tolerance, entry.get("noise", 0.0))


def check_samples(record: Any, found: Tensor, relative: float, noise: float = 0.0) -> None:
    assert list(found.shape) == record["shape"]
    flat = found.detach().double().flatten()
    at = flat[torch.from_numpy(rules.backbone_sample(flat.numel()))]
    atol = relative * record["std"] + 10 * noise
    torch.testing.assert_close(at, torch.tensor(record["values"], dtype=torch.float64), rtol=0, atol=atol)
    torch.testing.assert_close(flat.std(correction=0).item(), record["std"], rtol=0, atol=atol)
