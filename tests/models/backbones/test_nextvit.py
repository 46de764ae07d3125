"""Next-ViT: mixers, folding, options, errors."""

from __future__ import annotations

import copy
import itertools
import re
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones import create_backbone
from models.backbones.base import FeatureLevel
from models.backbones.layers import DropPath
from models.backbones.nextvit import ARCHITECTURES, NCB, NTB, NextViT
from models.backbones.nextvit_attention import EMHSA, MIXERS, XCA, AttentionOptions, EMHSA2d
from models.checkpoint.state_dict import load_state
from utils.errors import SpecError

TINY = {"depths": [1, 1, 2, 1], "conv_channels": [32, 32, 64, 64], "out_channels": [32, 64, 96, 128]}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Parameters and statistics away from the zeros and ones of their initialization."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("running_var"):
                noise = 0.5 + noise.abs()
            elif value.ndim > 1 and not name.endswith("temperature"):
                noise = noise / value[0].numel() ** 0.5
            else:
                noise = 0.3 * noise + (0.0 if name.endswith(("bias", "mean")) else 1.0)
            value.copy_(noise)


def build(**options: Any) -> NextViT:
    model = NextViT(options.pop("arch", TINY), **options)
    randomize(model)
    return model


def image(shape: tuple[int, ...] = (2, 3, 64, 96)) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


# ---- mixers ---------------------------------------------------------------------------------------------------------


def reference_mixer(mixer: EMHSA | XCA, x: Tensor) -> Tensor:
    """The three mixers written out head by head and window by window, float64."""
    batch, channels, height, width = x.shape
    r = mixer.reduction
    if isinstance(mixer, (EMHSA2d, XCA)):
        cells = [x[:, :, i : i + r, j : j + r].mean((2, 3)) for i in range(0, height, r) for j in range(0, width, r)]
    else:
        flat = x.flatten(2)
        cells = [flat[:, :, i * r * r : (i + 1) * r * r].mean(2) for i in range(height * width // (r * r))]
    pooled = torch.stack(cells, 2)
    if r > 1:
        norm = mixer.norm
        assert isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        pooled = (pooled - norm.running_mean[:, None]) * scale[:, None] + norm.bias[:, None]
    tokens, pooled = x.flatten(2).transpose(1, 2), pooled.transpose(1, 2)
    heads = []
    for n in range(channels // 32):
        rows = slice(32 * n, 32 * n + 32)

        def project(layer: nn.Linear, t: Tensor, rows: slice = rows) -> Tensor:
            return t @ layer.weight[rows].T + layer.bias[rows]

        if isinstance(mixer, XCA):
            k_rows = slice(channels + rows.start, channels + rows.stop)
            q, k, v = project(mixer.qk, pooled), project(mixer.qk, pooled, k_rows), project(mixer.v, tokens)
            q, k = q / q.norm(dim=1, keepdim=True), k / k.norm(dim=1, keepdim=True)
            weights = torch.einsum("bmi,bmj->bij", q, k) * mixer.temperature[n]
            heads.append(torch.einsum("bij,blj->bli", weights.softmax(2), v))
        else:
            q, k, v = project(mixer.q, tokens), project(mixer.k, pooled), project(mixer.v, pooled)
            heads.append((q @ k.transpose(1, 2) / 32**0.5).softmax(2) @ v)
    y = torch.cat(heads, 2) @ mixer.proj.weight.T + mixer.proj.bias
    return y.transpose(1, 2).reshape(batch, channels, height, width)


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (4, 4)], ids=str)
@pytest.mark.parametrize("reduction", [1, 2, 4])
@pytest.mark.parametrize("name", MIXERS)
def test_mixers_compute_what_they_say(name: str, reduction: int, size: tuple[int, int]) -> None:
    mixer = MIXERS[name](64, reduction, AttentionOptions())
    randomize(mixer)
    mixer = mixer.double().eval()
    x = torch.randn(2, 64, *size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), reference_mixer(mixer, x), rtol=0, atol=1e-12)


def test_mixers_share_their_weights() -> None:
    """Published weights fit each mixer; only cross-covariance attention has something new."""
    published = build().state_dict()
    for name in MIXERS:
        model = build(mixer=name)
        new = model.state_dict().keys() ^ model.convert_official(published).keys()
        assert len(new) == (3 if name == "xca" else 0) and all(key.endswith(".e_mhsa.temperature") for key in new)


def test_published_pooling_drops_the_tail_and_mixes_rows() -> None:
    mixer = EMHSA(32, 2, AttentionOptions())
    x = torch.arange(15.0).view(1, 1, 3, 5).expand(1, 32, 3, 5)
    assert mixer.pooled(x)[0, 0].tolist() == [1.5, 5.5, 9.5]  # token 4 of row 0 is averaged with row 1; 12 to 14 go
    assert EMHSA2d(32, 2, AttentionOptions()).pooled(x)[0, 0].tolist() == [3.0, 5.0, 6.5, 10.5, 12.5, 14.0]


# ---- re-parameterized model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mixer", MIXERS)
def test_reparameterize(mixer: str, dtype: torch.dtype) -> None:
    model = build(mixer=mixer).to(dtype).eval()
    x = image((1, 3, 70, 96)).to(dtype)
    with torch.no_grad():
        before = model(x)
        model.reparameterize()
        after = model(x)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        model.reparameterize()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in model.modules())
    relative = {torch.float64: 1e-13, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}[dtype]
    for a, b in zip(before, after):
        assert b.dtype == dtype
        torch.testing.assert_close(b, a, rtol=0, atol=relative * a.abs().max().item())


def test_deployed_weights_cannot_be_loaded_into_the_training_form() -> None:
    trained = build()
    deployed = copy.deepcopy(trained)
    deployed.reparameterize()
    with pytest.raises(RuntimeError, match="Missing key"):
        trained.load_state_dict(deployed.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        deployed.load_state_dict(trained.state_dict())


def test_reparameterized_form_learns_on() -> None:
    model = build().train()
    model.reparameterize()
    sum(y.pow(2).mean() for y in model(image())).backward()  # type: ignore[union-attr]
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.requires_grad] == []


# ---- levels, options, errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str) -> None:
    with torch.device("meta"):
        model = NextViT(name)
    assert model.levels == tuple(FeatureLevel(c, s) for c, s in zip((96, 256, 512, 1024), (4, 8, 16, 32)))
    kinds = ["T" if hasattr(block, "e_mhsa") else "C" for block in model.features]
    thirds = {"small": 2, "base": 4, "large": 6}[name]
    assert "".join(kinds) == "CCC" + "CCCT" + thirds * "CCCCT" + "CCT"
    reductions = [block.e_mhsa.reduction for block in model.features if hasattr(block, "e_mhsa")]  # type: ignore
    assert reductions == [4] + thirds * [2] + [1]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        ((64, 96), [(16, 24), (8, 12), (4, 6), (2, 3)]),
        ((32, 32), [(8, 8), (4, 4), (2, 2), (1, 1)]),
        ((50, 71), [(13, 18), (7, 9), (4, 5), (2, 3)]),
    ],
)
def test_output_sizes(mixer: str, size: tuple[int, int], sizes: list[tuple[int, int]]) -> None:
    model = build(mixer=mixer).eval()
    with torch.no_grad():
        outputs = model(image((1, 3, *size)))
    assert [tuple(y.shape[1:]) for y in outputs] == [(c, *s) for c, s in zip((32, 64, 96, 128), sizes)]


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_parameter_learns(mixer: str) -> None:
    model = build(mixer=mixer, drop_rate=0.1, attn_drop_rate=0.1).train()
    sum(y.pow(2).mean() for y in model(image())).backward()  # type: ignore[union-attr]
    still = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    # A softmax is invariant to a constant added to all its logits: the key bias has no gradient.
    assert [name for name in still if not name.endswith(".k.bias")] == []


def test_drop_path_rises_and_stops_in_evaluation() -> None:
    model = build(drop_path_rate=0.4)
    blocks = [block for block in model.features if isinstance(block, (NCB, NTB))]
    rates = [[m.drop_prob for m in block.modules() if isinstance(m, DropPath)] for block in blocks]
    full = [0, 0.1, 0.2, 0.3, 0.4]
    expected = [[rate] if isinstance(b, NCB) else [0.75 * rate, 0.25 * rate, rate] for b, rate in zip(blocks, full)]
    for found, want in zip(rates, expected, strict=True):
        assert found == pytest.approx(want)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(image()), model(image()), rtol=0, atol=0)


def test_frozen_stages_and_norm_eval() -> None:
    model = build(frozen_stages=1, norm_eval=True)
    assert model.train() is model and model.training
    frozen = {".".join(n.split(".")[:2]) for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"stem.0", "stem.1", "stem.2", "stem.3", "features.0"}
    before = {key: value.clone() for key, value in model.state_dict().items() if "running" in key}
    model(image())[-1].sum().backward()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert not any(m.training for m in model.features[0].modules())
    assert model.features[1].mlp.training and not model.features[1].norm2.training  # type: ignore[union-attr]
    loose = build(frozen_stages=1).train()
    loose(image())
    moved = {key for key, value in before.items() if not torch.equal(loose.state_dict()[key], value)}
    assert moved == {key for key in before if not key.startswith(("stem.", "features.0."))}


def test_batch_norms_keep_the_published_settings() -> None:
    norms = [m for m in NextViT(TINY).modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-5, 0.1)}


def test_output_norms_are_not_part_of_the_stem() -> None:
    model = build(frozen_stages=2, with_extra_norm=True).train()
    assert model.extra_norm_list[0].training and model.get_parameter("extra_norm_list.0.weight").requires_grad
    assert model.stage_of("extra_norm_list.0.weight") == model.num_stages + 1


def test_param_depth() -> None:
    model = build()
    wanted = {"stem.3.norm.bias": 0, "features.0.mlp.conv1.weight": 1, "features.4.e_mhsa.q.weight": 5}
    assert {name: model.param_depth(name) for name in wanted} == wanted
    assert all(name in dict(model.named_parameters()) for name in wanted)


def test_input_is_normalized() -> None:
    model = build().eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        by_hand = model.forward_features((image() - mean.view(3, 1, 1)) / std.view(3, 1, 1))
        torch.testing.assert_close(model(image()), by_hand, rtol=1e-5, atol=1e-5)


def test_attention_is_the_fused_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fused = F.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args[0].shape)
        return fused(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    with torch.no_grad():
        build()(image())
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"arch": "smal"}, "did you mean 'small'"),
        ({"arch": {"depth": [1, 1, 1, 1]}}, "did you mean 'depths'"),
        ({"arch": {}}, "arch lacks depths"),
        ({"arch": {"depths": [1, 1, 1]}}, r"depths of arch is \[1, 1, 1\]; allowed: 4 integers"),
        ({"arch": {**TINY, "out_channels": [32, 64, 96, 100]}}, "multiples of 32"),
        ({"arch": {**TINY, "out_channels": [64, 64, 96, 128]}}, "they must be equal"),
        ({"arch": {**TINY, "out_channels": [32, 32, 96, 128]}}, "at least 64"),
        ({"mixer": "conv"}, "mixer is 'conv'; allowed: emhsa, emhsa2d, xca"),
        ({"drop_path_rate": -0.1}, "drop_path_rate is -0.1"),
        ({"frozen_stages": 5}, "frozen_stages is 5; allowed: -1 to 4"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence) as error, torch.device("meta"):
        NextViT(**arguments)
    assert "\n" not in str(error.value)


def timm_twin(model: NextViT, **options: Any) -> nn.Module:
    """timm's Next-ViT with the weights of `model`."""
    twin = timm.create_model("nextvit_small", features_only=True, **options)
    ours = model.state_dict()
    starts = [0, *itertools.accumulate(model.arch.depths)]
    state = {}
    for key in twin.state_dict():
        parts = re.sub(r"^(stages|stem)_(\d)\.", r"\1.\2.", key).split(".")
        if parts[0] == "stages":
            parts = ["features", str(starts[int(parts[1])] + int(parts[3])), *parts[4:]]
        name = ".".join(parts).replace(".mlp.fc1.", ".mlp.conv1.").replace(".mlp.fc2.", ".mlp.conv2.")
        state[key] = ours[name]
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize(
    "rates",
    [{}, {"drop_path_rate": 0.5}, {"attn_drop_rate": 0.4}, {"drop_path_rate": 0.3, "attn_drop_rate": 0.2}],
    ids=str,
)
def test_training_mode_equals_timm(rates: dict[str, float]) -> None:
    """Seeded outputs and gradients in training mode: drop path, dropout of attention, batch statistics.

    `drop_rate` is left out: timm applies it once in an MLP, the reference twice.
    """
    torch.manual_seed(0)
    rates = {"drop_path_rate": 0.0, **rates}  # timm's default is 0.1
    ours = NextViT("small", **rates).train()
    theirs = timm_twin(ours, **rates).train()
    x = image((4, 3, 64, 64))
    results = []
    for model in (ours.forward_features, theirs):
        torch.manual_seed(7)
        outputs = model((x - 0.5) / 0.25)
        sum(y.square().mean() for y in outputs).backward()
        results.append(outputs)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in (
        (ours.stem[0].conv, theirs.stem_0.conv),
        (ours.features[-1].mlp.conv1, theirs.stages_3.blocks[-1].mlp.fc1),
    ):
        assert a.weight.grad.abs().max() > 0
        torch.testing.assert_close(a.weight.grad, b.weight.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("layers", [("q", "k", "v"), ("qk", "v"), ("qkv",)], ids=str)
def test_published_layouts_load_into_each_mixer(mixer: str, layers: tuple[str, ...]) -> None:
    """1x1 convolutions, with queries, keys and values separate or fused."""
    model = build(mixer=mixer)
    separate, state = build().state_dict(), {}
    for key, value in separate.items():
        head, _, name = key.rpartition(".e_mhsa.")
        layer, _, kind = name.rpartition(".")
        if not head or layer not in "qkv":
            state[key] = value
        elif together := next((name for name in layers if name[0] == layer), None):
            parts = torch.cat([separate[f"{head}.e_mhsa.{part}.{kind}"] for part in together])
            state[f"{head}.e_mhsa.{together}.{kind}"] = parts[..., None, None] if kind == "weight" else parts
    assert len(state) == len(separate) - 3 * 2 * (3 - len(layers))  # weights and biases of three blocks
    report = load_state(model, model.convert_official(state), allow_new=model.NEW_KEYS)
    assert not report.unexpected and all(key.endswith("temperature") for key in report.missing)
    loaded = model.state_dict()
    for block, kind in itertools.product((1, 3, 4), ("weight", "bias")):
        found, expected = (
            torch.cat([weights[f"features.{block}.e_mhsa.{name}.{kind}"] for name in names])
            for weights, names in ((loaded, MIXERS[mixer].PROJECTIONS), (separate, "qkv"))
        )
        assert torch.equal(found, expected), (block, kind)


def test_published_arguments() -> None:
    model = create_backbone(
        "NextViT", arch={**TINY, "head_dim": 16}, stem_chs=[32, 16, 32], path_dropout=0.2, attn_drop=0.1, drop=0.1,
        strides=[1, 2, 2, 1], sr_ratios=[4, 2, 1, 1], qkv_bias=False, qk_scale=0.5, with_extra_norm=True,
        use_checkpoint=True,
    )  # fmt: skip
    assert [level.stride for level in model.levels] == [4, 8, 16] and model.levels[-1].channels == 128
    outputs = model.train()(image())
    assert [tuple(y.shape[1:]) for y in outputs] == [(32, 16, 24), (64, 8, 12), (128, 4, 6)]
    sum(y.square().mean() for y in outputs).backward()
    assert model.get_parameter("stem.0.conv.weight").grad is not None
    with pytest.raises(SpecError, match="'num_classes' is not supported: the classifier is not built"):
        create_backbone("NextViT", num_classes=10)


def test_use_checkpoint_gives_equal_gradients_and_statistics() -> None:
    gradients, statistics = [], []
    for use_checkpoint in (False, True):
        model = build(drop_path_rate=0.3, use_checkpoint=use_checkpoint).train()
        torch.manual_seed(3)
        sum(y.square().mean() for y in model(image())).backward()
        gradients.append([p.grad for p in model.parameters()])
        statistics.append(dict(model.named_buffers()))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(*statistics)  # recomputed blocks update theirs once


def test_deploy_builds_the_reparameterized_model() -> None:
    trained = build()
    trained.reparameterize()
    deployed = NextViT(TINY, deploy=True)
    deployed.load_state_dict(trained.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(deployed.eval()(image()), trained.eval()(image()))
