"""Arguments and names of the published classes: same, translated, or refused with the reason."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.backbones import backbone_class, backbone_from_row, create_backbone
from models.backbones.repmlp import RepMLPNet
from models.backbones.reversible import ReversibleBlock
from models.backbones.revvit import ARCHITECTURES as REVVIT_ARCHITECTURES
from models.backbones.revvit import RevViT
from models.backbones.riformer import ARCHITECTURES as RIFORMER_ARCHITECTURES
from models.backbones.riformer import RIFormer
from utils.errors import CheckpointError, SpecError

RIFORMER = {"layers": [1, 1, 2, 1], "embed_dims": [8, 16, 24, 32]}
REVVIT = {"embed_dims": 32, "num_layers": 4, "num_heads": 4, "feedforward_channels": 64}
REPMLP = {"channels": [8, 16, 24], "depths": [1, 2, 1], "sharesets_nums": [1, 2, 4], "nominal": 64}

# Parameters of the published constructors: mmpretrain's RIFormer, RevVisionTransformer and RepMLPNet, and Next-ViT's.
SIGNATURES = {
    "RIFormer": (
        "arch in_channels norm_cfg act_cfg in_patch_size in_stride in_pad down_patch_size down_stride down_pad "
        "drop_rate drop_path_rate layer_scale_init_value out_indices frozen_stages deploy init_cfg"
    ),
    "RevVisionTransformer": (
        "arch img_size patch_size in_channels drop_rate drop_path_rate qkv_bias norm_cfg final_norm out_type "
        "with_cls_token frozen_stages interpolate_mode layer_cfgs patch_cfg fusion_mode no_custom_backward init_cfg"
    ),
    "RepMLPNet": (
        "arch img_size in_channels patch_size out_indices reparam_conv_kernels globalperceptron_ratio conv_cfg "
        "norm_cfg patch_cfg final_norm deploy init_cfg"
    ),
    "NextViT": (
        "stem_chs depths path_dropout attn_drop drop num_classes strides sr_ratios head_dim mix_block_ratio "
        "use_checkpoint resume with_extra_norm frozen_stages norm_eval norm_cfg"
    ),
}


def image(channels: int = 3, size: tuple[int, int] = (64, 96)) -> Tensor:
    return torch.rand((2, channels, *size), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SIGNATURES)
def test_every_published_argument_is_accepted_or_refused_by_name(name: str) -> None:
    cls = backbone_class(name)
    own = set(inspect.signature(cls).parameters)
    arguments = SIGNATURES[name].split()
    assert len(arguments) > 10
    for argument in arguments:
        assert cls.ALIASES.get(argument, argument) in own or argument in cls.REFUSED, argument
    for argument, reason in cls.REFUSED.items():
        with pytest.raises(SpecError, match=f"'{argument}' is not supported: {reason[:20]}"):
            create_backbone(name, **{argument: {"x": 1}})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (("riformer", ["S12"]), "RIFormer"),
        (("RIFORMER_S12", []), "RIFormer"),
        (("revvisiontransformer", [{"arch": "DeiT-T"}]), "RevViT"),
        (("RepMLPNet", ["b"]), "RepMLPNet"),
        (("nextvit", ["Small", ""]), "NextViT"),
    ],
)
def test_names_ignore_case(row: tuple[str, list[Any]], expected: str) -> None:
    with torch.device("meta"):
        assert type(backbone_from_row(*row)).__name__ == expected


def test_second_string_of_a_row_is_weights() -> None:
    with pytest.raises(CheckpointError, match=r"'nowhere\.pth' is not a file, URL or published name"):
        backbone_from_row("RIFormer", ["s12", "nowhere.pth"])
    with torch.device("meta"):
        assert isinstance(backbone_from_row("RIFormer", ["s12", ""]), RIFormer)
        assert isinstance(create_backbone("RIFormer", weights=""), RIFormer)


def test_revvisiontransformer_has_the_published_default() -> None:
    with torch.device("meta"):
        assert create_backbone("RevVisionTransformer").arch == REVVIT_ARCHITECTURES["base"]
        for alias, name in (("s", "small"), ("h", "huge"), ("deit-t", "deit-tiny"), ("deit-b", "deit-base")):
            assert RevViT(alias).arch == REVVIT_ARCHITECTURES[name]


# ---- RIFormer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "value"), [("s12", 1e-5), ("s24", 1e-5), ("s36", 1e-6), ("m36", 1e-6), ("m48", 1e-6)])
def test_riformer_layer_scale_is_the_published_one(arch: str, value: float) -> None:
    fresh = RIFormer({**RIFORMER, "layer_scale_init_value": value})
    scales = [p for name, p in fresh.named_parameters() if "layer_scale" in name]
    assert len(scales) == 10 and all(torch.equal(p, torch.full_like(p, value)) for p in scales)
    assert (RIFORMER_ARCHITECTURES[arch].layer_scale_init_value or 1e-5) == value


@pytest.mark.parametrize(
    ("out_indices", "levels"),
    [
        (-1, [(32, 32)]),
        (6, [(32, 32)]),
        ([0, 2, 4, 6], [(8, 4), (16, 8), (24, 16), (32, 32)]),
        ([1, 3, 6], [(16, 8), (24, 16), (32, 32)]),
        ([-7, -2], [(8, 4), (32, 32)]),
    ],
)
def test_riformer_out_indices(out_indices: int | list[int], levels: list[tuple[int, int]]) -> None:
    model = RIFormer(RIFORMER, out_indices=out_indices).eval()
    assert [(level.channels, level.stride) for level in model.levels] == levels
    shapes = [tuple(y.shape[1:]) for y in model(image())]
    assert shapes == [(c, 64 // s, 96 // s) for c, s in levels]


@pytest.mark.parametrize(("out_indices", "message"), [([1, 2], "strides"), ([7], "allowed: -7 to 6"), ([], "allowed")])
def test_riformer_refuses_out_indices(out_indices: list[int], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        RIFormer(RIFORMER, out_indices=out_indices)


def test_riformer_patch_arguments_and_channels() -> None:
    model = RIFormer(
        RIFORMER, in_channels=4, in_patch_size=3, in_stride=2, in_pad=1, down_patch_size=2, down_pad=0,
        norm_cfg={"type": "GN", "num_groups": 1, "eps": 1e-4}, act_cfg={"type": "ReLU"},
    ).eval()  # fmt: skip
    assert [level.stride for level in model.levels] == [2, 4, 8, 16]
    assert model.norm0.eps == 1e-4 and isinstance(model.network[0][0].mlp.act, nn.ReLU)
    assert [tuple(y.shape[2:]) for y in model(image(4))] == [(32, 48), (16, 24), (8, 12), (4, 6)]
    with pytest.raises(SpecError, match="norm_cfg is .*allowed: {type: GN, num_groups: 1}"):
        RIFormer(RIFORMER, norm_cfg={"type": "BN"})
    with pytest.raises(SpecError, match="did you mean 'ReLU'"):
        RIFormer(RIFORMER, act_cfg={"type": "RELU"})


def test_riformer_downsamples_only_where_widths_differ() -> None:
    model = RIFormer({"layers": [1, 1, 1, 1], "embed_dims": [8, 8, 16, 16]}).eval()
    assert len(model.network) == 5
    assert [(level.channels, level.stride) for level in model.levels] == [(8, 4), (16, 8)]
    assert [tuple(y.shape[1:]) for y in model(image())] == [(8, 16, 24), (16, 8, 12)]
    assert [model.param_depth(f"network.{i}.0.norm1.weight") for i in (0, 1, 3, 4)] == [1, 2, 3, 4]


def test_deployed_files_load_into_the_deployed_form(tmp_path: Any) -> None:
    trained = RIFormer(RIFORMER).eval()
    with torch.no_grad():
        for p in trained.parameters():
            p.add_(0.1 * torch.randn_like(p))
    torch.save(trained.state_dict(), tmp_path / "train.pth")
    before = trained(image())
    trained.reparameterize()
    torch.save(trained.state_dict(), tmp_path / "deploy.pth")
    deployed = create_backbone("RIFormer", weights=tmp_path / "deploy.pth", arch=RIFORMER, deploy=True).eval()
    for a, b in zip(deployed(image()), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(CheckpointError, match="build the backbone with deploy: true"):
        create_backbone("RIFormer", weights=tmp_path / "deploy.pth", arch=RIFORMER)
    with pytest.raises(CheckpointError, match="training-time model; the backbone is built with deploy: true"):
        create_backbone("RIFormer", weights=tmp_path / "train.pth", arch=RIFORMER, deploy=True)


# ---- RevViT ---------------------------------------------------------------------------------------------------------


def revvit(**options: Any) -> RevViT:
    torch.manual_seed(0)
    return RevViT(options.pop("arch", REVVIT), img_size=options.pop("img_size", 64), widths=8, **options)


@pytest.mark.parametrize(
    ("out_type", "shape"),
    [("featmap", (2, 64, 4, 6)), ("raw", (2, 25, 64)), ("cls_token", (2, 64)), ("avg_featmap", (2, 64))],
)
def test_revvit_out_type(out_type: str, shape: tuple[int, ...]) -> None:
    model = revvit(out_type=out_type, with_cls_token=True).eval()
    assert model.pos_embed.shape == (1, 17, 32)
    (y,) = model.forward_features(image())
    assert y.shape == shape
    assert [tuple(y.shape[2:]) for y in model(image())] == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_revvit_drop_path_is_shared_by_both_branches() -> None:
    """As published; a block is skipped as a whole, or with `shared_drop_path=False` branch by branch."""
    for shared in (True, False):
        model = revvit(drop_path_rate=0.5, shared_drop_path=shared).train()
        block = model.layers[-1]
        assert isinstance(block, ReversibleBlock)
        torch.manual_seed(1)
        mask_F, mask_G = block.drop_path_masks(torch.zeros(512, 1, 1))
        assert mask_F is not None and mask_G is not None
        assert set(mask_F.unique().tolist()) == {0.0, 2.0}
        assert torch.equal(mask_F, mask_G) is shared
        assert 0.4 < float((mask_F == 0).float().mean()) < 0.6


def test_revvit_initialization_is_the_published_one() -> None:
    model = revvit(arch={**REVVIT, "embed_dims": 256, "feedforward_channels": 1024})
    block = model.layers[0]
    assert isinstance(block, ReversibleBlock)
    linear = block.ffn.layers[0][0]
    assert linear.weight.abs().max() <= (bound := (6 / (256 + 1024)) ** 0.5)
    assert linear.weight.abs().max() > 0.95 * bound
    assert 0.5e-6 < linear.bias.std() < 2e-6
    bound = 256**-0.5  # nn.Linear's default: uniform within 1 / sqrt(inputs)
    assert 0.95 * bound < block.attn.qkv.weight.abs().max() <= bound and block.attn.qkv.bias.abs().max() > 0


def test_revvit_frozen_stages_freezes_above_zero() -> None:
    assert all(p.requires_grad for p in revvit(frozen_stages=0).parameters())
    frozen = {name.split(".")[0] for name, p in revvit(frozen_stages=1, with_cls_token=True).named_parameters()
              if not p.requires_grad}  # fmt: skip
    assert frozen == {"pos_embed", "cls_token", "patch_embed", "layers"}


@pytest.mark.parametrize("img_size", [96, (64, 128), (32, 64)], ids=str)
def test_revvit_state_dict_of_another_image_size_is_resized(img_size: Any) -> None:
    source, target = revvit(img_size=64), revvit(img_size=img_size)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.layers[2].ln1.weight, source.layers[2].ln1.weight)
    same = revvit(img_size=img_size)
    back = revvit(img_size=(128, 256) if img_size == (32, 64) else img_size)
    back.load_state_dict(same.state_dict())  # a non-square grid of the same aspect ratio


def test_revvit_checkpoint_with_a_class_token_loads() -> None:
    source, target = revvit(with_cls_token=True), revvit()
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.pos_embed, source.pos_embed[:, 1:])
    state = source.state_dict()
    assert "cls_token" in state  # the caller's dictionary is not changed


def test_revvit_layer_cfgs_and_activation() -> None:
    model = revvit(layer_cfgs={"num_fcs": 3, "act_cfg": {"type": "ReLU"}, "norm_cfg": {"type": "LN", "eps": 1e-5}},
                   patch_cfg={"kernel_size": 16, "stride": 16}, interpolate_mode="bilinear")  # fmt: skip
    block = model.layers[0]
    assert isinstance(block, ReversibleBlock)
    kinds = [type(m).__name__ for m in block.ffn.modules() if not list(m.children())]
    assert kinds == ["Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear", "Dropout"]
    assert block.ln1.eps == 1e-5
    sum(y.sum() for y in model.train()(image())).backward()
    for options, message in (
        ({"layer_cfgs": {"num_fc": 3}}, "did you mean 'num_fcs'"),
        ({"patch_cfg": {"stride": 8}}, "squares whose stride equals their size"),
        ({"out_type": "map"}, "out_type is 'map'"),
        ({"out_type": "cls_token"}, "with_cls_token is needed"),
    ):
        with pytest.raises(SpecError, match=message):
            revvit(**options)


# ---- RepMLPNet ------------------------------------------------------------------------------------------------------


def test_repmlp_stages_and_partitions() -> None:
    model = RepMLPNet(REPMLP, img_size=128, patch_size=8, reparam_conv_kernels=[1, 5], in_channels=5).eval()
    assert [(level.channels, level.stride) for level in model.levels] == [(8, 8), (16, 16), (24, 32)]
    assert model.stages[0][0].repmlp_block.partition == (16, 16)
    assert model.stages[0][0].repmlp_block.kernels == (1, 5)
    assert [tuple(y.shape[1:]) for y in model(image(5))] == [(8, 8, 12), (16, 4, 6), (24, 2, 3)]


@pytest.mark.parametrize(
    ("options", "levels"),
    [
        ({"out_indices": -1}, [(24, 16)]),
        ({"out_indices": [0, 2]}, [(8, 4), (24, 16)]),
        ({"strides": [8]}, [(16, 8)]),
        ({"after_downsampling": True}, [(16, 8), (24, 16)]),
        ({"after_downsampling": True, "out_indices": [0, 2], "final_norm": True}, [(16, 8), (24, 16)]),
    ],
    ids=str,
)
def test_repmlp_outputs(options: dict[str, Any], levels: list[tuple[int, int]]) -> None:
    model = RepMLPNet(REPMLP, **options).eval()
    assert [(level.channels, level.stride) for level in model.levels] == levels
    assert [tuple(y.shape[1:]) for y in model(image())] == [(c, 64 // s, 96 // s) for c, s in levels]


def test_repmlp_global_perceptron_is_rounded_as_published() -> None:
    wide = {**REPMLP, "channels": [80, 160, 320]}
    widths = [RepMLPNet(wide, **o).stages[0][0].repmlp_block.gp.fc1.out_channels
              for o in ({}, {"globalperceptron_ratio": 4}, {"globalperceptron_ratio": 2})]  # fmt: skip
    assert widths == [20, 24, 40]


@pytest.mark.parametrize("method", ["local_inject", "switch_to_deploy", "reparameterize"])
def test_repmlp_deploys_under_every_name(method: str) -> None:
    model = RepMLPNet(REPMLP).eval()
    before = model(image())
    getattr(model, method)()
    deployed = RepMLPNet(REPMLP, deploy=True)
    deployed.load_state_dict(model.state_dict())
    for a, b in zip(deployed.eval()(image()), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- training mode against references written from the papers ------------------------------------------------------


def keep_mask(rate: float, batch: int) -> Tensor:
    """Factors of stochastic depth (https://arxiv.org/abs/1603.09382): 0, or 1 / (1 - rate)."""
    return torch.empty(batch, 1, 1, 1).bernoulli_(1 - rate) / (1 - rate)


def test_riformer_training_mode_equals_reference() -> None:
    """x = x + DropPath(ls_1 (a y + c - y)), y = norm1(x); x = x + DropPath(ls_2 MLP(norm2(x))); rates 0 ... rate."""
    torch.manual_seed(0)
    model = RIFormer(RIFORMER, drop_path_rate=0.5, layer_scale_init_value=0.7).train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    x = image()
    torch.manual_seed(3)
    found = model.forward_features(x)
    sum(y.square().mean() for y in found).backward()
    gradient = model.network[0][0].layer_scale_1.grad.clone()
    model.zero_grad()
    torch.manual_seed(3)
    z, outputs, rates = model.patch_embed(x), [], iter(torch.linspace(0, 0.5, 5).tolist())
    for index, stage in enumerate(model.network):
        if index % 2:
            z = stage.proj(z)
            continue
        for block in stage:
            rate = next(rates)
            y = block.norm1(z)
            affine = block.token_mixer.affine
            mixed = affine.weight.view(-1, 1, 1) * y + affine.bias.view(-1, 1, 1) - y
            z = z + block.layer_scale_1.view(-1, 1, 1) * mixed * (keep_mask(rate, 2) if rate else 1)
            y = block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(z))))
            z = z + block.layer_scale_2.view(-1, 1, 1) * y * (keep_mask(rate, 2) if rate else 1)
        outputs.append(getattr(model, f"norm{index}")(z))
    for a, b in zip(found, outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    sum(y.square().mean() for y in outputs).backward()
    torch.testing.assert_close(model.network[0][0].layer_scale_1.grad, gradient, rtol=1e-4, atol=1e-6)


def test_revvit_training_mode_equals_reference() -> None:
    """y_1 = x_1 + m F(x_2), y_2 = x_2 + m G(y_1) with one mask m per block; rates 0 ... rate."""
    model = revvit(drop_path_rate=0.5).train()
    x = image(size=(64, 64))
    torch.manual_seed(4)
    (found,) = model.forward_features(x)
    found.square().mean().backward()
    gradient = model.patch_embed.projection.weight.grad.clone()
    model.zero_grad()
    torch.manual_seed(4)
    tokens = model.patch_embed.projection(x).flatten(2).transpose(1, 2) + model.pos_embed
    x_1 = x_2 = tokens
    for block, rate in zip(model.layers, torch.linspace(0, 0.5, 4).tolist(), strict=True):
        m = keep_mask(rate, 2)[..., 0] if rate else 1
        y = block.ln1(x_2)
        q, k, v = block.attn.qkv(y).reshape(2, 16, 3, 4, 8).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1)
        x_1 = x_1 + m * block.attn.proj((weights @ v).transpose(1, 2).reshape(2, 16, 32))
        first, second = block.ffn.layers[0][0], block.ffn.layers[1]
        x_2 = x_2 + m * second(nn.functional.gelu(first(block.ln2(x_1))))
    y = model.ln1(torch.cat((x_1, x_2), -1))
    torch.testing.assert_close(found, y.transpose(1, 2).reshape(2, 64, 4, 4), rtol=1e-4, atol=1e-5)
    y.square().mean().backward()
    torch.testing.assert_close(model.patch_embed.projection.weight.grad, gradient, rtol=1e-3, atol=1e-6)


def test_repmlp_training_mode_equals_reference() -> None:
    """One partition: (BN(FC3 x) + sum of BN(conv_k x)) * sigmoid(fc2 relu fc1 mean(x)), with batch statistics."""
    torch.manual_seed(0)
    model = RepMLPNet({**REPMLP, "nominal": 16}).train()
    x = torch.rand(4, 3, 16, 16)
    found = model.forward_features(x)
    sum(y.square().mean() for y in found).backward()
    gradient = model.conv_embedding.conv.weight.grad.clone()
    model.zero_grad()
    z, outputs = nn.functional.relu(model.conv_embedding.bn(model.conv_embedding.conv(x))), []
    for index, stage in enumerate(model.stages):
        for unit in stage:
            y, block = unit.prebn1(z), unit.repmlp_block
            b, c, h, w = y.shape
            s = block.share_sets
            p = y.reshape(b * c // s, s, h, w)
            matrix = block.fc3.weight.reshape(s, h * w, h * w)
            out = block.fc3_bn(torch.einsum("soi,nsi->nso", matrix, p.flatten(2)).reshape(p.shape))
            for k in (1, 3):
                branch = block.get_submodule(f"repconv{k}")
                out = out + branch.bn(nn.functional.conv2d(p, branch.conv.weight, padding=k // 2, groups=s))
            gate = block.gp.fc2(nn.functional.relu(block.gp.fc1(y.mean((2, 3), keepdim=True)))).sigmoid()
            z = z + out.reshape(b, c, h, w) * gate
            ffn = unit.ffn_block
            y = nn.functional.gelu(ffn.ffn_fc1.bn(ffn.ffn_fc1.conv(unit.prebn2(z))))
            z = z + ffn.ffn_fc2.bn(ffn.ffn_fc2.conv(y))
        outputs.append(z)
        if index < len(model.embeds):
            z = nn.functional.relu(model.embeds[index].bn(model.embeds[index].conv(z)))
    for a, b in zip(found, outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    sum(y.square().mean() for y in outputs).backward()
    torch.testing.assert_close(model.conv_embedding.conv.weight.grad, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "valid"),
    [
        ({"mean": [0, 0, 0], "std": [1, 1, 1]}, True),
        ({"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}, False),  # for pixels up to 255
        ({"mean": [123.675, 116.28, 103.53]}, False),
        ({"std": [0, 1, 1]}, False),
        ({"std": [float("nan"), 1, 1]}, False),
        ({"std": [0, 1, 1], "normalize": False}, True),
        ({"in_channels": 1, "mean": [20.0], "std": [5.0]}, True),  # not pixels
    ],
)
def test_mean_and_std_are_for_pixels_from_0_to_1(arguments: dict[str, Any], valid: bool) -> None:
    if valid:
        channels = arguments.get("in_channels", 3)
        maps = create_backbone("RIFormer", arch=RIFORMER, **arguments)(torch.rand(1, channels, 64, 64))
        assert all(bool(y.isfinite().all()) for y in maps)
    else:
        with pytest.raises(SpecError, match=r"allowed: values for pixels in \[0, 1\]"):
            create_backbone("RIFormer", arch=RIFORMER, **arguments)
