"""Files in every published layout, made by the weight rule: each key is mapped to the right entry."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.backbones import Backbone, create_backbone
from models.backbones.published import load_published
from tests.parity import rules
from tests.parity.backbone_cases import state_by_rule
from utils.errors import CheckpointError

pytestmark = pytest.mark.parity


def official(fixture: str) -> dict[str, Tensor]:
    record = rules.backbone(fixture)
    return state_by_rule(record["manifest"], record["weight_gain"])


def mmpretrain(fixture: str) -> dict[str, Any]:
    """Return the state dict with wrapper, prefix and classifier."""
    state = {f"backbone.{key}": value for key, value in official(fixture).items()}
    width = next(reversed(state.values())).shape
    state |= {"head.fc.weight": torch.zeros(1000, *width[:1]), "head.fc.bias": torch.zeros(1000)}
    return {"meta": {"epoch": 300}, "state_dict": state}


def slowfast(fixture: str) -> dict[str, Any]:
    """Return mmpretrain's RevViT in SlowFast's naming: separate q, k and v, other names."""
    state: dict[str, Tensor] = {}
    for key, value in official(fixture).items():
        if ".attn.qkv." in key:
            for part, rows in zip("qkv", value.chunk(3)):
                state[_slowfast_name(key.replace(".qkv.", f".{part}."))] = rows.clone()
        else:
            state[_slowfast_name(key)] = value
    state |= {"head.projection.weight": torch.zeros(1000, 768), "head.projection.bias": torch.zeros(1000)}
    return {"model_state": state, "epoch": 100}


def _slowfast_name(key: str) -> str:
    parts = key.split(".")
    if parts[0] == "ln1":
        return key.replace("ln1.", "norm.")
    if parts[0] == "patch_embed":
        return key.replace(".projection.", ".proj.")
    if parts[0] != "layers":
        return key
    for ours, theirs in (
        (".ln1.", ".F.norm."),
        (".attn.", ".F.attn."),
        (".ln2.", ".G.norm."),
        (".ffn.layers.0.0.", ".G.mlp.fc1."),
        (".ffn.layers.1.", ".G.mlp.fc2."),
    ):
        key = key.replace(ours, theirs)
    return f"rev_backbone.{key}"


def timm_layout(fixture: str) -> dict[str, Tensor]:
    names = dict(rules.backbone(fixture)["timm"]["key_map_original_to_timm"])
    return {names[key]: value for key, value in official(fixture).items() if key in names}


def own_values(fixture: str) -> dict[str, Tensor]:
    """Return every value by the key of our module: the published one, except for mmpretrain's RepMLPNet."""
    if fixture != "repmlp_base224_mmpretrain":
        return official(fixture)
    ours = {theirs: original for original, theirs, _ in rules.backbone("repmlp_key_map")["keys_base224"]}
    return {ours[key]: value for key, value in official(fixture).items()}


# name, what the file holds, fixture
FILES: dict[str, tuple[str, Any, str]] = {
    "riformer": ("riformer_s12", lambda: mmpretrain("riformer_s12"), "riformer_s12"),
    "revvit mmpretrain": ("revvit_small", lambda: mmpretrain("revvit_small"), "revvit_small"),
    "revvit slowfast": ("revvit_small", lambda: slowfast("revvit_small"), "revvit_small"),
    "repmlp original": ("repmlp_t224", lambda: official("repmlp_t224_original"), "repmlp_t224_original"),
    "repmlp mmpretrain": (
        "repmlp_b224",
        lambda: mmpretrain("repmlp_base224_mmpretrain"),
        "repmlp_base224_mmpretrain",
    ),
    "nextvit original": ("nextvit_small", lambda: {"model": official("nextvit_small")}, "nextvit_small"),
    "nextvit timm": ("nextvit_small", lambda: timm_layout("nextvit_small"), "nextvit_small"),
}
CLASSIFIER = ("head.", "head_norm.", "final_norm.", "proj_head.", "norm.")


@pytest.mark.parametrize("case", FILES)
def test_load_published_maps_every_key(case: str, tmp_path: Path) -> None:
    name, make, fixture = FILES[case]
    torch.save(make(), tmp_path / "weights.pth")
    backbone = create_backbone(name)
    report = load_published(backbone, tmp_path / "weights.pth", name)
    assert report is not None and not report.mismatched and not report.resized
    assert [key for key in report.missing if not _is_new(backbone, key)] == []
    left = [key.removeprefix("backbone.") for key, _ in report.unexpected]
    assert [key for key in left if not key.startswith(CLASSIFIER)] == []
    assert {reason for _, reason in report.unexpected} <= {"not needed"}
    expected, state = own_values(fixture), backbone.state_dict()
    for key in report.matched:
        torch.testing.assert_close(state[key], expected[key], rtol=0, atol=0, msg=lambda m, key=key: f"{key}: {m}")


def _is_new(backbone: Backbone, key: str) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in getattr(backbone, "NEW_KEYS", ()))


@pytest.mark.parametrize(
    ("name", "fixture", "sentence"),
    [
        ("repmlp_t256", "repmlp_t224_original", "has shape"),
        ("nextvit_base", "nextvit_small", "has shape"),
        ("riformer_s24", "repmlp_t224_original", "entries of RIFormer; missing: patch_embed.proj.weight"),
        ("riformer_s12", "riformer_m36", "has shape"),
        ("revvit_base", "revvit_small", "has shape"),
    ],
)
def test_file_of_another_architecture_is_an_error_in_one_line(
    name: str, fixture: str, sentence: str, tmp_path: Path
) -> None:
    torch.save(official(fixture), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError) as caught:
        create_backbone(name, weights=tmp_path / "weights.pth")
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_position_embedding_of_another_size_is_resized(tmp_path: Path) -> None:
    torch.save(mmpretrain("revvit_small"), tmp_path / "weights.pth")
    backbone = create_backbone("revvit_small", img_size=320)
    report = load_published(backbone, tmp_path / "weights.pth", "revvit_small")
    assert report is not None and report.resized == ("pos_embed",)
    assert "1 resized: pos_embed" in report.summary()
