"""RIFormer beyond the reference values: construction, options, folding in every precision, depth of parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.backbones.riformer import ARCHITECTURES, DeployedRIFormerBlock, RIFormer, RIFormerBlock
from utils.errors import SpecError

TINY = {"layers": [1, 1, 2, 1], "embed_dims": [8, 16, 24, 32]}


def tiny(**arguments: object) -> RIFormer:
    torch.manual_seed(0)
    model = RIFormer(TINY, **arguments)
    with torch.no_grad():  # away from the initial values: folding an identity would verify nothing
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


# parameters of the re-parameterized model as published, without the classifier of 1000 classes and without norm0,
# norm2, norm4
@pytest.mark.parametrize(
    ("arch", "published"),
    [("s12", 11_915_000), ("s24", 21_389_000), ("s36", 30_863_000), ("m36", 56_173_000), ("m48", 73_473_000)],
)
def test_parameter_count_is_the_published_one(arch: str, published: int) -> None:
    with torch.device("meta"):
        model = RIFormer(arch)
    mixers = 2 * sum(d * w for d, w in zip(ARCHITECTURES[arch].layers, ARCHITECTURES[arch].embed_dims))
    own_norms = 2 * sum(ARCHITECTURES[arch].embed_dims[:3])
    classifier = 1001 * ARCHITECTURES[arch].embed_dims[3] + 1000 - ARCHITECTURES[arch].embed_dims[3]
    count = sum(p.numel() for p in model.parameters()) - mixers - own_norms + classifier
    assert round(count / 1e3) == published / 1e3


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (225, 331), (65, 130)])
def test_any_size(size: tuple[int, int]) -> None:
    outputs = tiny()(torch.rand(2, 3, *size))
    height, width = ((s + 4 - 7) // 4 + 1 for s in size)  # the stem: 7x7, stride 4, padding 2
    for level, output in enumerate(outputs):
        assert tuple(output.shape) == (2, TINY["embed_dims"][level], height, width)
        height, width = (height - 1) // 2 + 1, (width - 1) // 2 + 1  # 3x3, stride 2, padding 1


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.float16, 0.1), (torch.bfloat16, 0.6)]
)
def test_folding_in_every_precision(dtype: torch.dtype, atol: float) -> None:
    model = tiny().to(dtype)
    image = torch.rand(1, 3, 64, 96, dtype=dtype)
    with torch.no_grad():
        before = model(image)
        model.reparameterize()
        after = model(image)
    assert {p.dtype for p in model.parameters()} == {dtype}
    for a, b in zip(before, after):
        torch.testing.assert_close(b, a, rtol=0, atol=atol)


def test_folding_changes_the_structure_once() -> None:
    model = tiny()
    model.reparameterize()
    assert not any(isinstance(m, RIFormerBlock) for m in model.modules())
    assert sum(isinstance(m, DeployedRIFormerBlock) for m in model.modules()) == sum(TINY["layers"])
    blocks = [id(m) for m in model.modules()]
    model.reparameterize()
    assert [id(m) for m in model.modules()] == blocks


def test_folding_keeps_the_mode_and_the_frozen_state_of_shared_parts() -> None:
    model = tiny().train()
    model.requires_grad_(False)
    model.reparameterize()
    assert all(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())


def test_drop_path_rises_linearly_and_works_on_samples() -> None:
    model = RIFormer(TINY, drop_path_rate=0.4)
    rates = [m.drop_path.drop_prob for m in model.modules() if isinstance(m, RIFormerBlock)]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4]))
    drop = model.network[6][0].drop_path.train()
    torch.manual_seed(0)
    x = torch.ones(2000, 3, 1, 1)
    y = drop(x)
    assert {round(v, 4) for v in y.unique().tolist()} == {0.0, round(1 / 0.6, 4)}
    assert (y.amax((1, 2, 3)) == y.amin((1, 2, 3))).all(), "a sample is dropped as a whole"
    assert abs(float(y.mean()) - 1) < 0.05
    drop.eval()
    assert drop(x) is x


@pytest.mark.parametrize("value", [1e-5, 0.5])
def test_layer_scale_starts_at_the_given_value(value: float) -> None:
    model = RIFormer(TINY, layer_scale_init_value=value)
    scales = [p for name, p in model.named_parameters() if "layer_scale" in name]
    assert len(scales) == 2 * sum(TINY["layers"])
    for p in scales:
        torch.testing.assert_close(p, torch.full_like(p, value), rtol=0, atol=0)


def test_only_the_wanted_maps_have_norms() -> None:
    model = RIFormer(TINY, strides=[8, 32])
    assert [(level.channels, level.stride) for level in model.levels] == [(16, 8), (32, 32)]
    assert {name for name, _ in model.named_children()} == {"patch_embed", "network", "norm2", "norm6"}
    whole = RIFormer(TINY)
    whole.load_state_dict(model.state_dict(), strict=False)
    image = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(model(image), whole(image)[1::2], rtol=0, atol=0)


def test_depth_counts_blocks() -> None:
    model = RIFormer(TINY)
    depths = {
        "patch_embed.proj.weight": 0,
        "network.0.0.norm1.weight": 1,
        "network.1.proj.bias": 2,
        "network.2.0.layer_scale_1": 2,
        "network.3.proj.weight": 3,
        "network.4.1.mlp.fc1.weight": 4,
        "network.5.proj.weight": 5,
        "network.6.0.mlp.fc2.bias": 5,
        "norm0.weight": 6,
        "norm6.bias": 6,
    }
    assert {name: model.param_depth(name) for name in depths} == depths


def test_norms_are_those_of_the_publication() -> None:
    norms = [m for m in RIFormer(TINY).modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == 2 * 5 + 4
    assert {(m.num_groups, m.eps) for m in norms} == {(1, 1e-5)}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"arch": "s13"}, "unknown arch 's13'; allowed: s12, s24, s36, m36, m48; did you mean"),
        ({"arch": 12}, "arch is 12; allowed: a name (s12"),
        ({"arch": {"layers": [1, 1, 1, 1]}}, "arch lacks embed_dims"),
        ({"arch": {**TINY, "layer": [1]}}, "unknown field 'layer' of arch; allowed: layers, embed_dims, mlp_ratios"),
        ({"arch": {**TINY, "layers": [1, 1, 1]}}, "layers of arch is [1, 1, 1]; allowed: 4 integers >= 1"),
        ({"arch": {**TINY, "layers": "2222"}}, "layers of arch is '2222'"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0; allowed: 0 <= drop_path_rate < 1"),
        ({"drop_rate": -0.1}, "drop_rate is -0.1"),
        ({"strides": [32, 8]}, "strides are [32, 8]; allowed: some of [4, 8, 16, 32], increasing"),
        ({"strides": [2, 8]}, "strides are [2, 8]"),
        ({"strides": []}, "strides are []"),
    ],
)
def test_invalid_arguments_are_reported(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(SpecError) as caught:
        RIFormer(**arguments)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
