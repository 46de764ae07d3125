"""Shared by the parity tests of the backbones: weights and inputs by rule, comparison within the records' own noise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.parity import rules


def state_by_rule(manifest: Iterable[tuple[str, list[int]]], gain: float = 1.0) -> dict[str, Tensor]:
    """A state dict in the official layout, every entry made from its key."""
    return {key: torch.from_numpy(rules.backbone_weight(key, tuple(shape), gain)) for key, shape in manifest}


def case_input(case: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(rules.backbone_input(case["input"]["seed"], tuple(case["input"]["shape"]))).to(dtype)


def check_output(record: Mapping[str, Any], output: Tensor, relative64: float = 1e-9) -> None:
    """Compare one output with its record.

    float32: samples within 10 noise + 1e-5 std; statistics within that too. float64: samples within `relative64` std of
    the reference's float64 run, where the record has one.
    """
    name = record["name"]
    assert list(output.shape) == record["shape"], f"{name}: {list(output.shape)} != {record['shape']}"
    flat = output.detach().contiguous().double().flatten()
    at = flat[torch.from_numpy(np.ascontiguousarray(rules.backbone_sample(flat.numel())))]
    if output.dtype == torch.float64 and "values64" in record:
        expected = torch.tensor(record["values64"], dtype=torch.float64)
        torch.testing.assert_close(at, expected, rtol=0, atol=relative64 * record["std"], msg=lambda m: f"{name}: {m}")
        return
    atol = 10 * record["noise"] + 1e-5 * record["std"]
    expected = torch.tensor(record["values"], dtype=torch.float64)
    torch.testing.assert_close(at, expected, rtol=0, atol=atol, msg=lambda m: f"{name}: {m}")
    found = torch.stack([flat.mean(), flat.std(correction=0), flat.min(), flat.max()])
    wanted = torch.tensor([record[key] for key in ("mean", "std", "min", "max")], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol, msg=lambda m: f"{name} mean, std, min, max: {m}")
