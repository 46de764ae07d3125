"""timm networks as backbones: every kind of layout, size and level; weights; frozen parameters."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.backbones import FeatureLevel, backbone_from_row, create_backbone
from models.backbones import timm_backbone as module
from models.backbones.timm_backbone import TimmBackbone
from models.backbones.timm_measure import create_features, measure
from utils.errors import CheckpointError, SpecError

# name, strides, size_divisor: one of every way to feed a network
KINDS = [
    ("resnet18", (2, 4, 8, 16, 32), 32),
    ("convnext_atto", (4, 8, 16, 32), 32),
    ("vgg11", (2, 4, 8, 16, 32), 32),  # its stride 1 is left out
    ("efficientvit_m0", (16, 32), 32),  # its stride 64 is left out
    ("mambaout_femto", (4, 8, 16, 32), 32),  # NHWC
    ("swin_tiny_patch4_window7_224", (4, 8, 16, 32), 32),  # NHWC, native size only unless freed
    ("test_maxvit", (2, 4, 8, 16, 32), 160),  # multiples of its native size
    ("test_vit", (8, 16, 32), 32),  # plain: one stride, through the pyramid
    ("mvitv2_tiny", (4, 8, 16, 32), 224),  # indexes beyond its tables on larger images: tiles
    ("visformer_tiny", (8, 16, 32), 224),  # its native size only: tiles
    ("pit_ti_224", (8, 16, 32), 224),
    ("convmixer_768_32", (8, 16, 32), 32),  # stride 7, plain
]


@pytest.mark.parametrize(("name", "strides", "divisor"), KINDS, ids=[k[0] for k in KINDS])
def test_kinds(name: str, strides: tuple[int, ...], divisor: int) -> None:
    backbone = TimmBackbone(name).eval()
    assert tuple(level.stride for level in backbone.levels) == strides
    assert backbone.size_divisor == divisor
    height, width = (divisor, 2 * divisor) if divisor > 64 else (64, 128)
    with torch.no_grad():
        outputs = backbone(torch.rand(2, 3, height, width))
    for level, output in zip(backbone.levels, outputs):
        assert tuple(output.shape) == (2, level.channels, height // level.stride, width // level.stride)


def test_channels_last_maps_are_turned() -> None:
    torch.manual_seed(0)
    backbone = TimmBackbone("mambaout_femto", normalize=False).eval()
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        raw = backbone.network(image)
        outputs = backbone(image)
    for a, b in zip(raw, outputs):
        torch.testing.assert_close(b, a.permute(0, 3, 1, 2), rtol=0, atol=0)


def test_maps_are_those_of_timm_on_its_native_size() -> None:
    torch.manual_seed(0)
    backbone = TimmBackbone("swin_tiny_patch4_window7_224", normalize=False).eval()
    plain = create_features("swin_tiny_patch4_window7_224", {"always_partition": True}).eval()
    plain.load_state_dict(backbone.network.state_dict())
    image = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        for a, b in zip(plain(image), backbone(image)):
            torch.testing.assert_close(b, a.permute(0, 3, 1, 2), rtol=0, atol=1e-6)


def test_tiles_are_independent_and_in_place() -> None:
    torch.manual_seed(0)
    backbone = TimmBackbone("visformer_tiny").eval()
    image = torch.rand(2, 3, 448, 672)
    with torch.no_grad():
        whole = backbone(image)
        for row in range(2):
            for column in range(3):
                tile = image[:, :, 224 * row : 224 * (row + 1), 224 * column : 224 * (column + 1)]
                for level, a, b in zip(backbone.levels, whole, backbone(tile)):
                    n = 224 // level.stride
                    part = a[:, :, n * row : n * (row + 1), n * column : n * (column + 1)]
                    torch.testing.assert_close(part, b, rtol=1e-4, atol=1e-4)


def test_strides_of_seven_pixels_take_a_shrunk_image() -> None:
    found = measure("pit_b_224")  # strides 7, 14, 28, and 224 pixels only: tiles of 256 pixels, shrunk to 224
    assert (found.strides, found.size_divisor, found.tile, found.shrink) == ((8, 16, 32), 256, 256, 0.875)


def test_a_larger_tile_is_an_argument() -> None:
    backbone = create_backbone("timm/visformer_tiny", model_args={"img_size": 320}).eval()
    assert backbone.size_divisor == 320
    with torch.no_grad():
        assert backbone(torch.rand(1, 3, 320, 320))[0].shape[2:] == (40, 40)


def test_missing_levels_are_made_only_if_asked() -> None:
    assert [level.stride for level in TimmBackbone("efficientvit_m0").levels] == [16, 32]
    backbone = TimmBackbone("efficientvit_m0", extra_levels=True).train()
    assert backbone.levels == (FeatureLevel(32, 8), FeatureLevel(64, 16), FeatureLevel(128, 32))
    outputs = backbone(torch.rand(2, 3, 64, 96))
    assert [tuple(o.shape[1:]) for o in outputs] == [(32, 8, 12), (64, 4, 6), (128, 2, 3)]
    coarser = TimmBackbone("nest_tiny", extra_levels=True)
    assert coarser.levels[-1] == FeatureLevel(384, 32)
    assert [level.stride for level in coarser.levels] == [4, 8, 16, 32]


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("resnet18", {"strides": [8, 32]}, [(128, 8), (512, 32)]),
        ("test_vit", {"strides": [4, 64], "widths": 24}, [(24, 4), (24, 64)]),
        ("test_vit", {"strides": [4, 8], "widths": [8, 16]}, [(8, 4), (16, 8)]),
        ("efficientvit_m0", {"strides": [8, 16], "extra_levels": True}, [(32, 8), (64, 16)]),
        ("efficientvit_m0", {"strides": [4, 16, 32], "extra_levels": True}, [(16, 4), (32, 8), (64, 16), (128, 32)]),
    ],
)
def test_strides_are_an_argument(name: str, arguments: dict[str, Any], expected: list[tuple[int, int]]) -> None:
    backbone = TimmBackbone(name, **arguments).train()
    assert [(level.channels, level.stride) for level in backbone.levels] == expected
    outputs = backbone(torch.rand(2, 3, 64, 128))
    assert [(o.shape[1], 64 // o.shape[2]) for o in outputs if o.shape[2] > 1] == [e for e in expected if e[1] < 64]
    sum(o.square().mean() for o in outputs).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []


def test_parts_beyond_the_levels_are_not_built() -> None:
    """An unused stage of stride 64 would have parameters without gradients."""
    backbone = TimmBackbone("efficientvit_m0").train()
    sum(o.square().mean() for o in backbone(torch.rand(2, 3, 64, 64))).backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


def test_construction_moves_no_statistics_and_no_random_numbers() -> None:
    measure.__globals__["_measure"].cache_clear()
    torch.manual_seed(3)
    measure("resnet18")
    after = torch.rand(1)
    torch.manual_seed(3)
    torch.testing.assert_close(after, torch.rand(1), rtol=0, atol=0)
    for m in TimmBackbone("resnet18").modules():
        if isinstance(m, nn.BatchNorm2d):
            assert int(m.num_batches_tracked) == 0 and float(m.running_mean.abs().sum()) == 0
            assert (m.eps, m.momentum) == (1e-5, 0.1)


def test_normalization_is_timms() -> None:
    backbone = TimmBackbone("mixer_s32_224")
    assert backbone.pixel_mean.flatten().tolist() == [0.5, 0.5, 0.5]
    own = TimmBackbone("mixer_s32_224", mean=(0.1, 0.2, 0.3), std=(1, 1, 1))
    torch.testing.assert_close(own.pixel_mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))


def test_depth_of_parameters_follows_the_network() -> None:
    backbone = TimmBackbone("convnext_atto")
    order = ["network.stem_0.weight", "network.stages_0.blocks.1.gamma", "network.stages_2.blocks.0.gamma"]
    order += ["network.stages_2.blocks.5.norm.weight", "network.stages_3.blocks.1.mlp.fc2.bias"]
    depths = [backbone.param_depth(name) for name in order]
    assert depths == sorted(set(depths)) and depths[0] == 0
    vit = TimmBackbone("test_vit")
    assert vit.param_depth("pyramid.levels.0.0.weight") > vit.param_depth("network.model.blocks.5.attn.qkv.weight")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["repvit_m1", "efficientvit_m0", "repvgg_a0"])
def test_fusing_works_in_every_precision(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    backbone = TimmBackbone(name).to(dtype).eval()
    for m in backbone.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    image = torch.rand(1, 3, 64, 64, dtype=dtype)
    count = sum(p.numel() for p in backbone.parameters())
    with torch.no_grad():
        before = backbone(image)
        backbone.reparameterize()
        after = backbone(image)
    assert {p.dtype for p in backbone.parameters()} == {dtype} and torch.get_default_dtype() == torch.float32
    assert sum(p.numel() for p in backbone.parameters()) < count
    share = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.3}[dtype]
    for a, b in zip(before, after):
        torch.testing.assert_close(b, a, rtol=0, atol=share * float(a.double().std()))


# ---- weights --------------------------------------------------------------------------------------------------------


def full_state(name: str) -> dict[str, torch.Tensor]:
    import timm

    torch.manual_seed(1)
    return timm.create_model(name).state_dict()


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "test_vit", "mobilenetv3_small_050"])
def test_a_file_of_timm_loads(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = full_state(name)
    torch.save(state, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO):
        backbone = backbone_from_row(f"timm/{name}", {"weights": str(tmp_path / "w.pth")})
    spelled = {key.replace("_", "."): value for key, value in state.items()}
    for key, value in backbone.state_dict().items():
        if key.startswith("network."):
            wanted = spelled[key.removeprefix("network.").removeprefix("model.").replace("_", ".")]
            torch.testing.assert_close(value, wanted, rtol=0, atol=0)
    assert "Transferred" in caplog.messages[-1]


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    torch.save(full_state("resnet34"), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="another architecture"):
        create_backbone("timm/resnet18", weights=tmp_path / "w.pth")
    torch.save(full_state("resnet10t"), tmp_path / "w.pth")
    with pytest.raises(CheckpointError):
        create_backbone("timm/resnet18", weights=tmp_path / "w.pth")


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_zero_asks_for_pretrained_weights(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    asked: list[dict[str, Any]] = []

    def create(name: str, arguments: dict[str, Any]) -> nn.Module:
        asked.append(dict(arguments))
        return create_features(name, {k: v for k, v in arguments.items() if k != "pretrained"})

    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(module, "create_features", create)
    monkeypatch.setattr(module, "_check_reachable", lambda hub_id: None)
    backbone_from_row("convnext_atto", ["pretrained"])
    assert [bool(arguments.get("pretrained")) for arguments in asked] == [rank == 0]


def test_no_network_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(CheckpointError) as caught:
        backbone_from_row("timm/resnet18", [True])
    text = str(caught.value)
    assert "timm/resnet18: pretrained weights not available (http://127.0.0.1:9" in text
    assert "fetch https://huggingface.co/timm/resnet18.a1_in1k/resolve/main/model.safetensors" in text
    assert "--backbone-weights <path>" in text and "\n" not in text


@pytest.mark.parametrize(
    ("name", "args", "sentence"),
    [
        ("timm/resnet5O", [], "timm/resnet5O: timm "),
        ("timm/resnet5O", [], "has no model of this name; did you mean 'resnet50'?"),
        ("timm/resnet50.a1_in2k", [], "resnet50 has no weights tagged 'a1_in2k'; allowed: a1_in1k"),
        ("timm/resnet18", {"model_args": {"foo": 1}}, "unexpected keyword argument 'foo'"),
        ("timm/resnet18", {"drop_path_rate": 1.5}, "drop_path_rate is 1.5"),
        (
            "timm/efficientvit_m0",
            {"strides": [8, 16]},
            "its maps have strides [16, 32, 64], none of [8]; extra_levels: true",
        ),
        ("timm/resnet18", {"strides": [3]}, "strides are [3]; allowed: (2, 4, 8, 16, 32)"),
        ("timm/resnet18", {"pretraind": True}, "unknown argument 'pretraind'; allowed: "),
        ("timm/resnet18", ["s12"], "argument 's12' is not allowed, the name says the architecture"),
        ("timm/crossvit_9_240", [], "gives no feature maps that a detector can use (strides of 18.3 and 22.9 pixels"),
    ],
)
def test_errors(name: str, args: Any, sentence: str) -> None:
    with pytest.raises(SpecError) as caught:
        backbone_from_row(name, args)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
