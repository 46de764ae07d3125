"""The contract of backbones, tested for each one in the table, for a few timm models, and for your own:

    pytest tests/test_backbone_contract.py --backbone my_module:MyBackbone

Large architectures run with `-m slow`.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
import pickle
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine.train.optimizer import parameter_groups
from models.backbones import BACKBONES, Backbone, FeatureLevel, backbone_class, create_backbone
from utils.errors import SpecError

SMALL = ("riformer_s12", "revvit_small", "repmlp_t224", "nextvit_small")
TIMM = ("timm/convnext_atto", "timm/repvgg_a0", "timm/vit_tiny_patch16_224")
MORE_TIMM = (
    "timm/resnet18",
    "timm/swin_tiny_patch4_window7_224",
    "timm/mobilenetv3_small_050",
    "timm/maxvit_rmlp_pico_rw_256",
)

Factory = Callable[[], Backbone]


@cache  # one class object for all tests: pickle compares it with the module's
def _user_class(text: str) -> type[Backbone]:
    module_name, _, class_name = text.rpartition(":")
    if not module_name:
        raise pytest.UsageError(f"--backbone {text}: give MODULE:CLASS, as in my_module:MyBackbone")
    if module_name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
        if spec is None or spec.loader is None or not Path(module_name).is_file():
            raise pytest.UsageError(f"--backbone {text}: no such file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # pickle looks classes up there
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(module_name)
    if not hasattr(module, class_name):
        raise pytest.UsageError(f"--backbone {text}: {module_name} has no class {class_name}")
    return getattr(module, class_name)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "factory" not in metafunc.fixturenames:
        return
    users = metafunc.config.getoption("--backbone")
    if users:
        metafunc.parametrize("factory", [_user_class(text) for text in users], ids=users)
        return
    names = [*SMALL, *TIMM, *(n for n in BACKBONES if n not in SMALL), *MORE_TIMM]
    params = [
        pytest.param(
            lambda name=name: create_backbone(name), id=name, marks=() if i < len(SMALL + TIMM) else pytest.mark.slow
        )
        for i, name in enumerate(names)
    ]
    metafunc.parametrize("factory", params)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def image_for(backbone: Backbone, height: int = 2, width: int = 3, batch: int = 1) -> Tensor:
    """Pixels in [0, 1]; sides are multiples of size_divisor, at least 64 and 96 pixels."""
    step = -(-32 // backbone.size_divisor) * backbone.size_divisor
    return torch.rand(batch, 3, height * step, width * step)


def randomized(backbone: Backbone) -> Backbone:
    """Move everything off its initial value: statistics, norms, layer scales; otherwise equalities verify little."""
    generator = torch.Generator().manual_seed(1)

    def noise(like: Tensor, low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(like.shape, generator=generator)).to(like.dtype)

    with torch.no_grad():
        for name, value in backbone.state_dict().items():
            if name.endswith("running_var"):
                value.copy_(noise(value, 0.5, 1.5))
            elif name.endswith("running_mean"):
                value.copy_(noise(value, -0.2, 0.2))
            elif value.is_floating_point() and value.ndim == 1:
                scale = name.rsplit(".", 1)[-1] != "bias"
                value.copy_(noise(value, 0.6, 1.4) if scale else noise(value, -0.2, 0.2))
            elif value.is_floating_point() and value.numel() == max(value.shape, default=0):
                value.add_(noise(value, -0.5, 0.5))
    return backbone


def outputs_of(backbone: Backbone, image: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return backbone(image)


def assert_same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], relative: float = 0.0) -> None:
    """Equal within `relative` times the standard deviation of each map."""
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=0, atol=relative * float(b.float().std()))


def test_declaration_is_whole(factory: Factory) -> None:
    backbone = factory()
    assert isinstance(backbone, Backbone)
    assert isinstance(backbone.levels, tuple) and all(isinstance(level, FeatureLevel) for level in backbone.levels)
    strides = [level.stride for level in backbone.levels]
    assert strides == sorted(set(strides)) and all(s & (s - 1) == 0 for s in strides)
    assert backbone.size_divisor % strides[-1] == 0
    assert backbone.train() is backbone and backbone.eval() is backbone


def test_construction_runs_nothing_through_batch_norm(factory: Factory) -> None:
    for name, module in factory().named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            assert int(module.num_batches_tracked) == 0, name
            torch.testing.assert_close(module.running_mean, torch.zeros_like(module.running_mean), rtol=0, atol=0)


def test_returned_levels_are_the_declared_ones(factory: Factory) -> None:
    backbone = factory().eval()
    for height, width, batch in ((2, 2, 1), (2, 3, 2), (4, 1, 1)):
        image = image_for(backbone, height, width, batch)
        before = image.clone()
        outputs = outputs_of(backbone, image)
        expected = [
            (batch, v.channels, image.shape[2] // v.stride, image.shape[3] // v.stride) for v in backbone.levels
        ]
        assert isinstance(outputs, tuple)
        assert [tuple(o.shape) for o in outputs] == expected
        assert all(o.dtype == torch.float32 and torch.isfinite(o).all() for o in outputs)
        torch.testing.assert_close(image, before, rtol=0, atol=0)


def test_every_parameter_gets_a_gradient(factory: Factory) -> None:
    backbone = randomized(factory()).train()
    outputs = backbone(image_for(backbone, batch=2))
    sum((o * torch.randn_like(o)).mean() for o in outputs).backward()
    without = [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    broken = [n for n, p in backbone.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    assert broken == []


def test_every_parameter_is_in_one_optimizer_group(factory: Factory) -> None:
    backbone = factory()
    grouped = [id(p) for group in parameter_groups(nn.Sequential(backbone), 5e-4) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in backbone.parameters())


def test_copies_compute_the_same(factory: Factory) -> None:
    backbone = randomized(factory()).eval()
    image = image_for(backbone)
    wanted = outputs_of(backbone, image)
    assert_same(outputs_of(copy.deepcopy(backbone), image), wanted)
    assert_same(outputs_of(pickle.loads(pickle.dumps(backbone)), image), wanted)


def test_state_dict_round_trip(factory: Factory) -> None:
    backbone = randomized(factory()).eval()
    file = io.BytesIO()
    torch.save(backbone.state_dict(), file)
    file.seek(0)
    other = factory().eval()
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    image = image_for(backbone)
    assert_same(outputs_of(other, image), outputs_of(backbone, image))
    assert not any("pixel_" in key for key in backbone.state_dict())


def test_reparameterized_form_computes_the_same(factory: Factory) -> None:
    backbone = randomized(factory()).double().eval()
    image = image_for(backbone).double()
    wanted = outputs_of(backbone, image)
    backbone.reparameterize()
    assert not backbone.training
    assert_same(outputs_of(backbone, image), wanted, relative=1e-7)
    once = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone.reparameterize()
    assert list(backbone.state_dict()) == list(once)
    for key, value in backbone.state_dict().items():
        torch.testing.assert_close(value, once[key], rtol=0, atol=0, msg=lambda m, key=key: f"{key}: {m}")


def test_evaluation_leaves_random_numbers_and_state_alone(factory: Factory) -> None:
    backbone = randomized(factory()).eval()
    image = image_for(backbone)
    state = {key: value.clone() for key, value in backbone.state_dict().items()}
    random_state = torch.get_rng_state()
    first = outputs_of(backbone, image)
    torch.testing.assert_close(torch.get_rng_state(), random_state, rtol=0, atol=0)
    assert_same(outputs_of(backbone, image), first)
    for key, value in backbone.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)


def test_input_normalization_can_be_switched_off(factory: Factory) -> None:
    backbone = randomized(factory()).eval()
    image = image_for(backbone)
    mean, std = backbone.pixel_mean, backbone.pixel_std
    assert mean.numel() == std.numel() == 3 and (std > 0).all()
    wanted = outputs_of(backbone, image)
    backbone.normalize = False
    assert_same(outputs_of(backbone, (image - mean) / std), wanted, relative=1e-4)


def test_depth_of_parameters_starts_at_the_stem(factory: Factory) -> None:
    backbone = factory()
    depths = {name: backbone.param_depth(name) for name, _ in backbone.named_parameters()}
    assert all(isinstance(depth, int) and depth >= 0 for depth in depths.values())
    assert min(depths.values()) == 0
    if type(backbone).param_depth is not Backbone.param_depth:
        assert max(depths.values()) > 1, "all parameters have one depth"


def test_freezing_by_stage_and_holding_the_norms(factory: Factory) -> None:
    backbone = randomized(factory())
    stages = {name: backbone.stage_of(name) for name, p in backbone.named_parameters() if p.requires_grad}
    assert min(stages.values()) == 0 and max(stages.values()) <= backbone.num_stages + 1
    with pytest.raises(SpecError, match=f"frozen_stages is {backbone.num_stages + 1}; allowed: -1 to"):
        backbone.hold(backbone.num_stages + 1)
    last = backbone.num_stages // 2
    backbone.hold(last, norm_eval=True)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    outputs = backbone.train()(image_for(backbone, batch=2))
    assert backbone.training
    if last < max(stages.values()):
        sum(o.square().mean() for o in outputs).backward()  # type: ignore[union-attr]
    learned = {name for name, p in backbone.named_parameters() if p.grad is not None}
    assert learned == {name for name, stage in stages.items() if stage > last}
    for key, value in backbone.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, msg=f"{key} moved")


def test_autocast_gives_finite_maps(factory: Factory) -> None:
    backbone = randomized(factory()).eval()
    image = image_for(backbone)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = outputs_of(backbone, image)
    assert all(torch.isfinite(o).all() for o in outputs)


@pytest.mark.parametrize("name", list(BACKBONES))
def test_every_class_tells_its_architectures(name: str) -> None:
    cls = backbone_class(name)
    table = importlib.import_module(cls.__module__).ARCHITECTURES
    assert BACKBONES[name].arguments["arch"] in table
