"""Names, rows, plugins; published weights: finding, fetching, loading with a report."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models.backbones as table
from models.backbones import (
    BACKBONES,
    Backbone,
    FeatureLevel,
    backbone_from_row,
    create_backbone,
    is_backbone_name,
    list_backbones,
    register_backbone,
)
from models.backbones import published as published_module
from models.backbones.published import find_weights, load_published, published_for, published_table
from models.backbones.riformer import RIFormer
from tests.parity import rules
from tests.parity.backbone_cases import state_by_rule
from utils.errors import CheckpointError, SpecError

TINY = {"layers": [1, 1, 2, 1], "embed_dims": [8, 16, 24, 32]}


@pytest.fixture
def clean_table() -> Iterator[None]:
    before = dict(table._PLUGINS)
    yield
    table._PLUGINS.clear()
    table._PLUGINS.update(before)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


class Small(Backbone):
    """A user's backbone."""

    levels = (FeatureLevel(4, 8),)
    size_divisor = 8

    def __init__(self, width: int = 4, normalize: bool = True) -> None:
        super().__init__(normalize)
        self.levels = (FeatureLevel(width, 8),)
        self.conv = nn.Conv2d(3, width, 8, 8)

    def forward_features(self, image: Tensor) -> tuple[Tensor, ...]:
        return (self.conv(image),)


# ---- names and rows -------------------------------------------------------------------------------------------------


def test_registered_names_are_those_agreed() -> None:
    expected = [f"riformer_{a}" for a in ("s12", "s24", "s36", "m36", "m48")]
    expected += ["revvit_small", "revvit_base"]
    expected += [f"repmlp_{a}" for a in ("t224", "b224", "t256", "b256", "d256", "l256")]
    expected += ["nextvit_small", "nextvit_base", "nextvit_large"]
    assert list(BACKBONES) == expected
    assert list_backbones()[: len(expected)] == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("riformer_s12", True),
        ("RIFormer", True),
        ("RevViT", True),
        ("RepMLPNet", True),
        ("NextViT", True),
        ("timm/resnet50", True),
        ("resnet50", True),
        ("resnet50.a1_in1k", True),
        ("resnet50.a1_in1kk", False),
        ("resnet5O", False),
        ("convnext_tiny", True),
        ("C3", False),
        ("Conv", False),
        ("nn.Upsample", False),
        ("nn.conv2d", False),
        ("riformr_s12", False),
    ],
)
def test_what_is_a_backbone(name: str, expected: bool) -> None:
    assert is_backbone_name(name) is expected


@pytest.mark.parametrize(
    ("name", "args", "blocks", "dims"),
    [
        ("RIFormer", [], 12, 64),
        ("RIFormer", [False], 12, 64),
        ("RIFormer", [None], 12, 64),
        ("RIFormer", {}, 12, 64),
        ("RIFormer", ["s24"], 24, 64),
        ("RIFormer", ["s24", False], 24, 64),
        ("RIFormer", {"arch": "m36", "weights": None}, 36, 96),
        ("RIFormer", [{"arch": TINY, "drop_path_rate": 0.1}], 5, 8),
        ("riformer_s24", [], 24, 64),
        ("riformer_s12", {"drop_path_rate": 0.1, "layer_scale_init_value": 1.0}, 12, 64),
    ],
)
def test_rows(name: str, args: Any, blocks: int, dims: int) -> None:
    with torch.device("meta"):
        backbone = backbone_from_row(name, args)
    assert isinstance(backbone, RIFormer)
    assert sum(len(stage) for stage in backbone.network if isinstance(stage, nn.Sequential)) == blocks
    assert backbone.levels[0] == FeatureLevel(dims, 4)


@pytest.mark.parametrize(
    ("name", "args", "sentence"),
    [
        ("RIFormr", [], "unknown backbone 'RIFormr'; allowed: RIFormer"),
        ("RIFormr", [], "did you mean 'RIFormer'?"),
        ("resnt50", [], "did you mean 'resnet50'?"),
        ("RIFormer", ["s13"], "unknown arch 's13'; allowed: s12"),
        ("RIFormer", {"drop_path": 0.1}, "unknown argument 'drop_path'; allowed: weights,"),
        ("RIFormer", {"drop_path": 0.1}, "did you mean 'drop_path_rate'?"),
        ("RIFormer", [12], "argument 12 is not allowed"),
        ("RIFormer", ["s12", "s24"], "'arch' is given twice: 's12' and 's24'"),
        ("RIFormer", [True, {"weights": "x.pth"}], "'weights' is given twice"),
        ("RIFormer", {1: 2}, "1 is not the name of an argument"),
        ("riformer_s12", ["s24"], "argument 's24' is not allowed, the name says the architecture"),
        ("timm/resnet5O", [], "did you mean 'resnet50'?"),
        ("RIFormer", {"drop_path_rate": "a"}, "RIFormer: drop_path_rate is 'a'; allowed: a number"),
        ("RevViT", {"strides": 8}, "RevViT: strides is 8; allowed: a list of numbers"),
        ("RevViT", {"widths": "a"}, "RevViT: widths is 'a'; allowed: an integer or a list of numbers"),
        ("NextViT", {"frozen_stages": None}, "NextViT: frozen_stages is None; allowed: an integer"),
        ("NextViT", {"arch": 3}, "NextViT: arch is 3; allowed: a string or a mapping"),
    ],
)
def test_wrong_rows(name: str, args: Any, sentence: str) -> None:
    with pytest.raises(SpecError) as caught:
        backbone_from_row(name, args)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- plugins --------------------------------------------------------------------------------------------------------


def test_a_class_of_ones_own(clean_table: None) -> None:
    register_backbone(Small)
    register_backbone("small_wide")(Small)
    assert list_backbones()[-2:] == ["Small", "small_wide"]
    assert is_backbone_name("Small")
    assert backbone_from_row("Small", {"width": 6}).levels == (FeatureLevel(6, 8),)
    register_backbone("Small")(Small)  # its file may be loaded twice
    with pytest.raises(SpecError, match="unknown argument 'widht'; allowed: .*did you mean 'width'"):
        create_backbone("small_wide", widht=3)


@pytest.mark.parametrize("name", ["riformer_s12", "RIFormer", "taken"])
def test_a_taken_name(clean_table: None, name: str) -> None:
    class Other(Small):
        pass

    register_backbone("taken")(Small)
    with pytest.raises(SpecError, match=f"'{name}' is registered already"):
        register_backbone(name)(Other)


def test_no_backbone_is_refused(clean_table: None) -> None:
    with pytest.raises(SpecError, match="is not a subclass of models.backbones.Backbone"):
        register_backbone("linear")(nn.Linear)


class NoLevels(Backbone):
    def forward_features(self, image: Tensor) -> tuple[Tensor, ...]:
        return (image,)


class ListLevels(NoLevels):
    levels = [8, 16]  # type: ignore[assignment]


class FallingStrides(NoLevels):
    levels = (FeatureLevel(3, 16), FeatureLevel(3, 8))


class OddStride(NoLevels):
    levels = (FeatureLevel(3, 12),)


class SmallDivisor(NoLevels):
    levels = (FeatureLevel(3, 32),)
    size_divisor = 16


class NoForward(Backbone):
    levels = (FeatureLevel(3, 8),)


@pytest.mark.parametrize(
    ("cls", "sentence"),
    [
        (NoLevels, "its levels are None; a backbone declares levels = (FeatureLevel(channels, stride), ...)"),
        (ListLevels, "its levels are [8, 16]"),
        (FallingStrides, "its strides are [16, 8]; increasing powers of two are needed"),
        (OddStride, "its strides are [12]"),
        (SmallDivisor, "its size_divisor is 16; a multiple of its largest stride 32 is needed"),
        (NoForward, "it defines neither forward_features(image) nor forward(image)"),
    ],
)
def test_an_invalid_class_raises_what_it_lacks(clean_table: None, cls: type[Backbone], sentence: str) -> None:
    register_backbone("wrong")(cls)
    with pytest.raises(SpecError) as caught:
        create_backbone("wrong")
    assert sentence in str(caught.value)


# ---- published weights ----------------------------------------------------------------------------------------------


def test_the_table_holds_what_was_published() -> None:
    record = rules.backbone("published")["checkpoints"]
    by_file = {row.file: row for row in published_table().values()}
    named = [entry for entry in record if entry["file"]]
    assert len(named) == 20
    for entry in named:
        row = by_file[entry["file"]]
        assert (row.top1, row.top5, row.resolution) == (entry["top1"], entry.get("top5"), entry["resolution"])
        assert row.params == pytest.approx(entry["params"] / 1e6, abs=0.006)
        if "url_dir" in entry:
            assert row.url == f"https://{entry['url_dir']}{entry['file']}"
        if entry["layout"] == "mmpretrain":
            assert row.sha256 == entry["file"].removesuffix(".pth").rsplit("-", 1)[1]
    timm_names = [entry["timm_name"] for entry in record if "timm_name" in entry]
    assert all(published_table()[name].layout == "timm" for name in timm_names) and len(timm_names) == 12
    assert {row.backbone for row in published_table().values()} == set(BACKBONES)


def test_every_backbone_has_published_weights() -> None:
    files = [row.file for row in published_table().values()]
    assert len(files) == len(set(files))
    for name in BACKBONES:
        assert published_for(name), name


def riformer_file(
    path: Path, wrapper: str = "state_dict", prefix: str = "backbone.", arch: str = "riformer_s12"
) -> Path:
    """A file as mmpretrain publishes it: no norm0, norm2, norm4, and a classifier."""
    record = rules.backbone(arch)
    state = state_by_rule([(k, s) for k, s in record["manifest"] if not k.startswith(("norm0", "norm2", "norm4"))])
    state = {prefix + key: value for key, value in state.items()}
    state |= {"head.fc.weight": torch.zeros(1000, 512), "head.fc.bias": torch.zeros(1000)}
    content: Any = {"meta": {"epoch": 600}, wrapper: state} if wrapper else state
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [("state_dict", "backbone."), ("model", ""), ("", "backbone."), ("", ""), ("model", "module.")],
)
def test_official_files_load_and_the_report_says_what_became_of_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, wrapper: str, prefix: str
) -> None:
    path = riformer_file(tmp_path / "s12.pth", wrapper, prefix)
    with caplog.at_level(logging.INFO):
        backbone = create_backbone("RIFormer", weights=path)
    for key, value in backbone.state_dict().items():
        if not key.startswith(("norm0", "norm2", "norm4")):
            wanted = torch.from_numpy(rules.backbone_weight(key, tuple(value.shape)))
            torch.testing.assert_close(value, wanted, rtol=0, atol=0)
    text = caplog.messages[-1]
    assert text.startswith("riformer_s12: s12.pth: Transferred 154/160 items")
    assert "6 new: norm0.weight" in text
    assert "2 of the file not used: head.fc.weight (not needed), head.fc.bias (not needed)" in text


def test_a_file_of_a_deeper_network_is_refused_in_both_directions(tmp_path: Path) -> None:
    torch.save(RIFormer({**TINY, "layers": [2, 2, 4, 2]}).state_dict(), tmp_path / "deep.pth")
    torch.save(RIFormer(TINY).state_dict(), tmp_path / "flat.pth")
    with pytest.raises(CheckpointError, match=r"are not in RIFormer .*another architecture"):
        create_backbone("RIFormer", weights=tmp_path / "deep.pth", arch=TINY)
    with pytest.raises(CheckpointError, match=r"holds \d+ of the \d+ entries"):
        create_backbone("RIFormer", weights=tmp_path / "flat.pth", arch={**TINY, "layers": [2, 2, 4, 2]})
    create_backbone(
        "RIFormer", weights=tmp_path / "flat.pth", partial_weights=True, arch={**TINY, "layers": [2, 2, 4, 2]}
    )


def test_a_file_of_another_width_is_refused(tmp_path: Path) -> None:
    torch.save(RIFormer({**TINY, "embed_dims": [12, 16, 24, 32]}).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(CheckpointError, match="has shape .*, RIFormer needs"):
        create_backbone("RIFormer", weights=tmp_path / "wide.pth", arch=TINY)
    report = load_published(RIFormer(TINY), tmp_path / "wide.pth", None, partial=True)
    assert report is not None and report.mismatched and report.matched


def test_a_deployed_file_is_refused(tmp_path: Path) -> None:
    deployed = RIFormer(TINY)
    deployed.reparameterize()
    torch.save(deployed.state_dict(), tmp_path / "deployed.pth")
    with pytest.raises(
        CheckpointError,
        match=r"a re-parameterized model \(network.0.0.norm_reparam.weight, .* required: the training-time model",
    ):
        create_backbone("RIFormer", weights=tmp_path / "deployed.pth", arch=TINY)


def test_a_truncated_file(tmp_path: Path) -> None:
    path = riformer_file(tmp_path / "s12.pth")
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(CheckpointError) as caught:
        create_backbone("riformer_s12", weights=path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        (
            "nowhere.pth",
            "'nowhere.pth' is not a file, URL or published name; published for riformer_s12: riformer-s12_in1k",
        ),
        ("riformer-s12_in1", "did you mean 'riformer-s12_in1k'?"),
        ("riformer-s24_in1k", "'riformer-s24_in1k' are for riformer_s24, not riformer_s12; allowed: riformer-s12_in1k"),
    ],
)
def test_wrong_names_of_weights(weights: str, sentence: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        find_weights(weights, "riformer_s12")
    assert sentence in str(caught.value)


def test_custom_architectures_have_no_published_weights() -> None:
    with pytest.raises(CheckpointError, match="no published weights for this architecture; give a path or a URL"):
        create_backbone("RIFormer", weights=True, arch=TINY)


def test_a_url_is_fetched_once_into_the_cache(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "tiny.pth"
    torch.save(RIFormer(TINY).state_dict(), source)
    url = source.as_uri()
    create_backbone("RIFormer", weights=url, arch=TINY)
    assert (cache / "tiny.pth").read_bytes() == source.read_bytes()
    source.unlink()
    create_backbone("RIFormer", weights=url, arch=TINY)


def published_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sha256: str | None) -> None:
    """Replace the published file of s12 by a local one."""
    source = riformer_file(tmp_path / "source.pth")
    row = published_table()["riformer-s12_in1k"]
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:8]
    changed = published_module.PublishedWeights(
        **{**vars(row), "url": source.as_uri(), "file": "s12-fetched.pth", "sha256": sha256 or digest}
    )
    monkeypatch.setattr(published_module, "published_table", lambda: {row.name: changed})


@pytest.mark.parametrize("args", [[True], ["s12", True], ["pretrained"], {"weights": "riformer-s12_in1k"}])
def test_the_published_default(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: Any) -> None:
    published_row(tmp_path, monkeypatch, None)
    backbone = backbone_from_row("RIFormer", args)
    wanted = torch.from_numpy(rules.backbone_weight("norm6.weight", (512,)))
    torch.testing.assert_close(backbone.state_dict()["norm6.weight"], wanted, rtol=0, atol=0)
    assert (cache / "s12-fetched.pth").is_file()


def test_a_wrong_hash_leaves_nothing_behind(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published_row(tmp_path, monkeypatch, "00000000")
    with pytest.raises(CheckpointError, match="expected 00000000"):
        create_backbone("riformer_s12", weights=True)
    assert list(cache.iterdir()) == []


def test_no_network_says_where_to_put_the_file(cache: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        create_backbone("RIFormer", weights="http://127.0.0.1:9/tiny.pth", arch=TINY)
    assert f"put it at {cache / 'tiny.pth'}" in str(caught.value)
    assert list(cache.iterdir()) == []


def test_only_rank_zero_reads_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert load_published(RIFormer(TINY), "nowhere.pth", None) is None


def test_safetensors(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    torch.manual_seed(0)
    source = RIFormer(TINY)
    path = tmp_path / "tiny.safetensors"
    save_file(source.state_dict(), path)
    loaded = create_backbone("RIFormer", weights=path, arch=TINY)
    for key, value in source.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, rtol=0, atol=0)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        create_backbone("RIFormer", weights=path, arch=TINY)
