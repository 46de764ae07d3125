"""RevViT: shapes, options, published weights, errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from models.backbones.base import FeatureLevel
from models.backbones.layers import SimpleFeaturePyramid
from models.backbones.revvit import ARCHITECTURES, RevViT
from tests.helpers.small_revvit import DROPS, TINY, build, image
from utils.errors import SpecError

# ---- shapes, options, errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_builds(name: str) -> None:
    with torch.device("meta"):
        model = RevViT(name)
    assert len(model.layers) == ARCHITECTURES[name].num_layers
    assert model.levels == tuple(FeatureLevel(c, s) for c, s in zip((64, 128, 256, 512), (4, 8, 16, 32)))


@pytest.mark.parametrize(
    ("shape", "options", "sizes"),
    [
        ((64, 96), {}, [(16, 24), (8, 12), (4, 6), (2, 3)]),
        ((50, 70), {}, [(16, 20), (8, 10), (4, 5), (2, 3)]),  # rounded up to whole patches, then to whole cells
        ((64, 64), {"strides": (8, 16, 32)}, [(8, 8), (4, 4), (2, 2)]),
        ((64, 64), {"patch_size": 8, "strides": (8, 64)}, [(8, 8), (1, 1)]),
    ],
)
def test_levels(shape: tuple[int, int], options: dict[str, Any], sizes: Sequence[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    widths = tuple(4 * (i + 1) for i in range(len(sizes)))
    model = RevViT(TINY, img_size=64, widths=widths, **options)
    outputs = model(image(shape=(1, 3, *shape)))
    assert [tuple(y.shape[1:]) for y in outputs] == [(w, *size) for w, size in zip(widths, sizes)]
    assert [level.channels for level in model.levels] == list(widths)


def test_every_parameter_learns() -> None:
    model = build()
    sum(y.pow(2).sum() for y in model(image())).backward()  # type: ignore[union-attr]
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


@pytest.mark.parametrize("mode", ["add", "max", "min", "avg"])
def test_fusion_modes(mode: str) -> None:
    both = build().eval()
    fused = build(fusion_mode=mode).eval()
    fused.load_state_dict(both.state_dict() | {k: v for k, v in fused.state_dict().items() if k.startswith("pyramid.")})
    with torch.no_grad():
        a, b = both.forward_features(image())[0].chunk(2, 1)
        (found,) = fused.forward_features(image())
    wanted = {"add": a + b, "max": torch.maximum(a, b), "min": torch.minimum(a, b), "avg": (a + b) / 2}[mode]
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_padding_is_zero_in_normalized_pixels_at_right_and_bottom() -> None:
    model = build().eval()
    x = model.normalized(image(shape=(1, 3, 40, 50)))
    padded = torch.zeros(1, 3, 48, 64)
    padded[:, :, :40, :50] = x
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(x), model.forward_features(padded), rtol=0, atol=0)


def test_frozen_stages_freeze_by_name_and_stay_in_evaluation_mode() -> None:
    model = build(frozen_stages=2, **DROPS)
    frozen = {
        name.split(".")[0] + (name.split(".")[1] if "layers" in name[:6] else "")
        for name, p in model.named_parameters()
        if not p.requires_grad
    }
    assert frozen == {"pos_embed", "patch_embed", "layers0", "layers1"}
    assert [block.training for block in model.layers] == [False, False, True, True]
    assert not any(module.training for module in model.layers[1].modules())  # type: ignore[union-attr]


def test_all_frozen_leaves_the_pyramid_to_learn() -> None:
    model = build(frozen_stages=4, **DROPS)
    assert not model.forward_features(image())[0].requires_grad
    sum(y.pow(2).sum() for y in model(image())).backward()  # type: ignore[union-attr]
    learns = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert learns == {"pyramid"}


def test_param_depth() -> None:
    model = build()
    wanted = {
        "pos_embed": 0,
        "patch_embed.projection.weight": 0,
        "layers.0.ln1.weight": 1,
        "layers.3.ln2.bias": 4,
        "ln1.weight": 5,
        "pyramid.levels.0.0.weight": 5,
    }
    assert {name: model.param_depth(name) for name in wanted} == wanted


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = build().eval()
    with torch.no_grad():
        wanted = model(image())
        found = model.to(dtype)(image().to(dtype))
    for a, b in zip(found, wanted):
        assert a.dtype == dtype
        torch.testing.assert_close(a.float(), b, rtol=0.1, atol=1e-4 if dtype == torch.float64 else 0.2)


def test_16_bit_parameters_train_by_plain_autograd() -> None:
    model = build().bfloat16()
    (y,) = model.forward_features(image().bfloat16())
    y.sum().backward()
    assert model.layers[0].ln1.weight.grad is not None  # type: ignore[union-attr]


def test_resize_official() -> None:
    model = RevViT(TINY, img_size=(64, 96), widths=8)
    table = torch.randn(1, 196, 32)
    resized = model.resize_official("pos_embed", table, model.pos_embed.shape)
    assert resized.shape == model.pos_embed.shape == (1, 24, 32)
    constant = model.resize_official("pos_embed", torch.ones(1, 196, 32), model.pos_embed.shape)
    torch.testing.assert_close(constant, torch.ones(1, 24, 32), rtol=0, atol=1e-5)
    with pytest.raises(SpecError, match="pos_embed"):
        model.resize_official("pos_embed", torch.ones(1, 195, 32), model.pos_embed.shape)


def test_slowfast_layout() -> None:
    """The inverse key map of the published record: our entries under SlowFast's names are restored."""
    model = build()
    ours = {key: value for key, value in model.state_dict().items() if not key.startswith("pyramid.")}
    names = {
        "ln1.": "norm.",
        "patch_embed.projection.": "patch_embed.proj.",
        **{f"layers.{i}.ln1.": f"rev_backbone.layers.{i}.F.norm." for i in range(4)},
        **{f"layers.{i}.ln2.": f"rev_backbone.layers.{i}.G.norm." for i in range(4)},
        **{f"layers.{i}.attn.": f"rev_backbone.layers.{i}.F.attn." for i in range(4)},
        **{f"layers.{i}.ffn.layers.0.0.": f"rev_backbone.layers.{i}.G.mlp.fc1." for i in range(4)},
        **{f"layers.{i}.ffn.layers.1.": f"rev_backbone.layers.{i}.G.mlp.fc2." for i in range(4)},
    }
    theirs: dict[str, Tensor] = {"head.projection.weight": torch.zeros(10, 64)}
    for key, value in ours.items():
        start = next((start for start in names if key.startswith(start)), "")
        name = names.get(start, "") + key[len(start) :]
        parts = zip("qkv", value.chunk(3)) if ".attn.qkv." in key else [("qkv", value)]
        theirs.update({name.replace(".qkv.", f".{part}."): piece for part, piece in parts})
    assert "rev_backbone.layers.2.F.attn.k.bias" in theirs and "norm.weight" in theirs
    found = model.convert_official(theirs)
    del found["head.projection.weight"]
    assert found.keys() == ours.keys()
    assert all(torch.equal(found[key], ours[key]) for key in ours)
    assert model.convert_official(ours) == ours


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"arch": "deit-smal"}, "did you mean 'deit-small'"),
        ({"arch": {**TINY, "num_heads": 5}}, "multiples of num_heads"),
        ({"arch": {**TINY, "num_layers": 0}}, "num_layers"),
        ({"fusion_mode": "sum"}, "fusion_mode is 'sum'; allowed: add, max, min, avg, concat"),
        ({"arch": TINY, "frozen_stages": 5}, "frozen_stages is 5; allowed: -1 to 4"),
        ({"arch": TINY, "buffered_layers": [4]}, "buffered_layers holds 4; allowed: 0 to 3"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"patch_size": 14}, "patch_size is 14"),
        ({"strides": (8, 4)}, "must increase"),
        ({"strides": (8, 24), "widths": 8}, "stride 24"),
        ({"widths": (8, 8)}, "2 widths for 4 strides"),
        ({"widths": 0}, r"widths are \[0, 0, 0, 0\]; allowed: integers >= 1"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence) as error, torch.device("meta"):
        RevViT(**arguments)
    assert "\n" not in str(error.value)


def test_pyramid_levels_start_from_the_same_map() -> None:
    pyramid = SimpleFeaturePyramid(16, 16, (4, 8, 16, 32), (4, 5, 6, 7))
    x = torch.randn(1, 16, 5, 7, requires_grad=True)
    outputs = pyramid(x)
    assert [tuple(y.shape[1:]) for y in outputs] == [(4, 20, 28), (5, 10, 14), (6, 5, 7), (7, 3, 4)]
    for y in outputs:
        # Channel-wise norm at the end: fresh weights give zero mean and unit variance over the channels of a cell.
        torch.testing.assert_close(y.mean(1), torch.zeros_like(y[:, 0]), rtol=0, atol=1e-5)
        torch.testing.assert_close(y.var(1, correction=0), torch.ones_like(y[:, 0]), rtol=0, atol=1e-2)
        assert torch.autograd.grad(y.pow(3).sum(), x, retain_graph=True)[0].abs().max() > 0
