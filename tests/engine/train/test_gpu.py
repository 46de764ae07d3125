"""Training and validation on a CUDA device: `pytest -m gpu`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from engine.cli.config import TrainConfig
from engine.devices.distributed import World
from engine.devices.prefetch import prefetch
from engine.runtimes.pytorch import PyTorchRuntime
from engine.runtimes.registry import open_runtime
from engine.train.autobatch import choose_batch
from engine.train.ema import ModelEma
from engine.train.freeze import Frozen
from engine.train.optimizer import build_optimizer, load_optimizer, parameter_groups
from engine.train.setup import ModelParts
from engine.train.step import TrainStep
from engine.train.trainer import Trainer, train
from models.checkpoint.io import read_checkpoint
from tests.helpers.detectors import build, save
from tests.helpers.training import config, detection_loss, interrupt_at, poison, rows
from utils.errors import ConfigError
from utils.structures import Batch

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


def finite_rows(folder: Path) -> torch.Tensor:
    found = torch.tensor(rows(folder))
    assert torch.isfinite(found).all()
    return found


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize(("amp", "word"), [("auto", "float16"), ("bf16", "bfloat16"), ("off", "float32")])
def test_an_epoch_in_each_precision(amp, word, optimizer, project: Path, caplog) -> None:
    """Finite values, losses close to those of the CPU in float32, weights saved in float32."""
    with caplog.at_level("INFO"):
        result = train(config(project, device="0", amp=amp, optimizer=optimizer, name="gpu", workers=2))
    assert f"Precision: {word} (--amp {amp})" in caplog.text
    found = finite_rows(result.folder)
    wanted = torch.tensor(rows(train(config(project, amp="off", optimizer=optimizer, name="cpu")).folder))
    torch.testing.assert_close(found[0, 1:4], wanted[0, 1:4], rtol=0.05, atol=1e-3)  # box, objectness, class
    state = read_checkpoint(result.last).state
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in state.values() if v.is_floating_point())


def test_resume(project: Path, monkeypatch) -> None:
    """Loss scale, momentum and generators are restored; equal up to rounding, since GPU sums have no fixed order."""
    whole = finite_rows(train(config(project, device="0", epochs=3, name="whole")).folder)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(config(project, device="0", epochs=3, name="cut"))
    resumed = train(TrainConfig.from_keywords(resume=str(project / "runs/cut/weights/last.pt")))
    torch.testing.assert_close(finite_rows(resumed.folder)[:, 1:4], whole[:, 1:4], rtol=0.02, atol=1e-3)


def test_a_bad_batch_costs_its_step(project: Path, monkeypatch, caplog) -> None:
    poison(monkeypatch, {(1, 1)})
    with caplog.at_level("WARNING"):
        result = train(config(project, device="0", epochs=3))
    assert "step skipped" in caplog.text
    finite_rows(result.folder)
    assert all(v.float().isfinite().all() for v in read_checkpoint(result.last).state.values())


def test_batch_by_memory(project: Path) -> None:
    model = build("yolov5").to(GPU)
    before = copy.deepcopy(model.state_dict())
    chosen = choose_batch(model, 640, GPU, torch.float16, 10**6)
    assert chosen >= 1 and choose_batch(model, 640, GPU, torch.float16, 3) == min(chosen, 3)
    assert not model.training and all(p.grad is None for p in model.parameters())
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    result = train(config(project, device="0", epochs=1, batch_size=-1))
    finite_rows(result.folder)
    assert 1 <= yaml.safe_load((result.folder / "opt.yaml").read_text())["batch_size"] <= 10, "images"


def test_batch_by_memory_of_a_network_that_needs_two_images() -> None:
    model = build("yolov5").to(GPU)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model.train()(torch.zeros(1, 3, 32, 32, device=GPU))
    assert choose_batch(model, 32, GPU, None, 10**6) >= 2


@pytest.mark.parametrize(("multi_scale", "size"), [(False, 64), (True, 96)])
def test_batch_by_memory_is_measured_at_the_largest_size(multi_scale, size, project: Path, monkeypatch) -> None:
    sizes = []

    def choose(model: Any, imgsz: int, *_: Any) -> int:
        sizes.append(imgsz)
        return 4

    monkeypatch.setattr("engine.train.setup.choose_batch", choose)
    train(config(project, device="0", epochs=1, batch_size=-1, multi_scale=multi_scale, noval=True))
    assert sizes == [size]


@pytest.mark.slow
def test_compile(project: Path) -> None:
    plain = finite_rows(train(config(project, device="0", epochs=1, amp="off", name="plain")).folder)
    compiled = train(config(project, device="0", epochs=1, amp="off", compile=True, name="compiled"))
    torch.testing.assert_close(finite_rows(compiled.folder)[:, 1:4], plain[:, 1:4], rtol=0.02, atol=1e-3)
    assert not any("_orig_mod" in key for key in read_checkpoint(compiled.last).state)


@pytest.mark.parametrize("family", ["yolov5", "riformer", "revvit", "repmlp", "nextvit", "nextvit-xca"])
def test_detection_in_each_precision(family, tmp_path: Path) -> None:
    weights = str(save(build(family), tmp_path / "x.pt"))
    images = torch.randint(0, 256, (2, 3, 128, 160), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    wanted, wanted_raw = PyTorchRuntime([weights], torch.device("cpu")).with_raw(images)
    for options, share in (({}, 0.01), ({"amp": "fp16"}, 0.02), ({"half": True}, 0.02), ({"amp": "bf16"}, 0.06)):
        runtime = open_runtime([weights], GPU, **options)
        assert isinstance(runtime, PyTorchRuntime)
        runtime.warmup((2, 3, 128, 160))
        found, raw = runtime.with_raw(images)
        assert found.dtype == torch.float32 and found.device.type == "cuda" and found.shape == wanted.shape
        for a, b in zip(raw, wanted_raw, strict=True):
            assert float((a.float().cpu() - b).std()) < share * float(b.std()), options
        moved = (found[..., :2].cpu() - wanted[..., :2]).abs()
        assert float(moved.median()) < 0.5, options  # centers, in pixels


def test_images_arrive_whole() -> None:
    """Copies on a separate stream from page-locked memory, while the device processes the previous batch."""
    made = [torch.full((4, 3, 256, 256), k, dtype=torch.uint8) for k in range(8)]
    batches = [Batch(images, torch.zeros(0, 6), ("",) * 4, (None,) * 4).pin_memory() for images in made]
    assert all(batch.images.is_pinned() for batch in batches)
    busy = torch.rand(2048, 2048, device=GPU)
    sums = []
    for _, images in prefetch(iter(batches), GPU):
        busy = busy @ busy / busy.norm()
        assert images.device == GPU
        sums.append(images.float().mean())
    assert [float(s) for s in sums] == [float(k) for k in range(8)]


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_fused_optimizer_steps_as_the_plain_one(name) -> None:
    """With frozen parameters, empty groups, and channels_last weights."""
    moved = []
    for device in (torch.device("cpu"), GPU):
        model = build("nextvit").to(device, memory_format=torch.channels_last).train()
        model.model[0].requires_grad_(False)
        optimizer = build_optimizer(name, parameter_groups(model, 5e-4), 0.01, 0.9)
        assert bool(optimizer.defaults["fused"]) is (device == GPU)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter).copy_(noise)
            optimizer.step()
        moved.append({key: value.cpu() for key, value in model.state_dict().items()})
    for key, value in moved[0].items():
        torch.testing.assert_close(moved[1][key], value, rtol=1e-4, atol=1e-5)


def test_gradients_are_unscaled_before_clipping() -> None:
    """A float16 step moves the weights as a float32 step does; clipping scaled gradients would shrink it by 65536."""
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.4, 0.4], [1, 2, 0.3, 0.6, 0.2, 0.5]])
    moved = []
    for amp in ("off", "fp16"):
        model = build("yolov5", seed=4).to(GPU).train()
        before = [p.detach().clone() for p in model.parameters()]
        parts = ModelParts(model, ModelEma(model), Frozen(), detection_loss(model), 32)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        step = TrainStep(parts, optimizer, TrainConfig(imgsz=64, amp=amp), 10.0, GPU, World())
        step.backward(images.to(GPU), targets, (0, 0))
        step.step()
        moved.append(torch.cat([(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]))
    assert float(moved[0].norm()) > 1e-3
    assert float((moved[1] - moved[0]).norm()) < 0.1 * float(moved[0].norm())


def test_search_for_the_loss_scale_is_no_warning(caplog) -> None:
    """The first float16 steps often overflow; that is how GradScaler finds the largest scale that does not."""
    model = build("yolov5", seed=4).to(GPU).train()
    parts = ModelParts(model, ModelEma(model), Frozen(), detection_loss(model), 32)
    optimizer = build_optimizer("SGD", [{"params": list(model.parameters())}], 0.01, 0.9)
    step = TrainStep(parts, optimizer, TrainConfig(imgsz=64, amp="fp16"), 10.0, GPU, World())
    step.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**36, backoff_factor=2.0**-10)
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.4, 0.4]])
    before = {key: value.cpu() for key, value in model.state_dict().items() if "running" not in key}
    with caplog.at_level("INFO"):
        for number in range(3):
            step.backward(torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=GPU), targets, (0, number))
            step.step()
    skipped = [record for record in caplog.records if "loss scale reduced" in record.message]
    assert step.skipped == len(skipped) > 0 and {record.levelname for record in skipped} == {"INFO"}
    after = model.state_dict()
    assert not all(torch.equal(after[key].cpu(), value) for key, value in before.items()), "no step succeeded"
    assert all(value.isfinite().all() for value in after.values())


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("amp", ["auto", "bf16", "off"])
@pytest.mark.parametrize(("start", "end"), [("cpu", "0"), ("0", "cpu")], ids=["to GPU", "to CPU"])
def test_resume_on_another_device(start, end, amp, optimizer, project: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(config(project, device=start, epochs=2, amp=amp, optimizer=optimizer, noval=True, name="cut"))
    last = project / "runs/cut/weights/last.pt"
    before = read_checkpoint(last).train["optimizer"]
    with monkeypatch.context() as patch:
        seen = _optimizers(patch)
        result = train(TrainConfig.from_keywords(resume=str(last), device=end))
    assert finite_rows(result.folder).shape[0] == 2
    assert {group["fused"] for group in seen[0].param_groups} == {True if end == "0" else None}
    if optimizer == "AdamW":
        (steps,) = {float(entry["step"]) for entry in seen[0].state.values()}
        assert steps > float(before["state"][0]["step"]) > 0, "counting continues"


def _optimizers(patch: pytest.MonkeyPatch) -> list[torch.optim.Optimizer]:
    """Return a list that collects the optimizer of each started training."""
    seen: list[torch.optim.Optimizer] = []
    original = Trainer.load_state_dict

    def load_state_dict(self: Trainer, state: Mapping[str, Any]) -> None:
        original(self, state)
        seen.append(self.optimizer)

    patch.setattr(Trainer, "load_state_dict", load_state_dict)
    return seen


def test_loss_scale_and_random_numbers_of_the_device_are_resumed(project: Path, monkeypatch) -> None:
    """Drop path and dropout draw from the device's generator."""
    states = []
    original = Trainer._train_epoch

    def train_epoch(self: Trainer, epoch: int) -> Any:
        if epoch == 1 and not states:
            self.stepper.scaler.update(128.0)
        if epoch == 1:
            states.append((self.stepper.scaler.get_scale(), torch.cuda.get_rng_state(GPU)))
            if len(states) == 1:
                self._save(0)
                raise KeyboardInterrupt
        torch.rand(5, device=GPU)
        return original(self, epoch)

    monkeypatch.setattr(Trainer, "_train_epoch", train_epoch)
    with pytest.raises(KeyboardInterrupt):
        train(config(project, device="0", amp="fp16", name="cut"))
    torch.cuda.manual_seed(77)
    train(TrainConfig.from_keywords(resume=str(project / "runs/cut/weights/last.pt")))
    (scale, generator), (resumed_scale, resumed_generator) = states
    assert scale == resumed_scale == 128.0
    assert torch.equal(generator, resumed_generator)


@pytest.mark.parametrize(("amp", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("off", torch.float32)])
def test_network_computes_in_the_precision_and_the_loss_in_float32(amp, dtype) -> None:
    model = build("yolov5", seed=4).to(GPU).train()
    parts = ModelParts(model, ModelEma(model), Frozen(), detection_loss(model), 32)
    step = TrainStep(
        parts, torch.optim.SGD(model.parameters(), 0.01), TrainConfig(imgsz=64, amp=amp), 10.0, GPU, World()
    )
    seen = []
    handle = model.register_forward_hook(lambda *arguments: seen.extend(arguments[-1]))
    total, components = step.loss(torch.rand(1, 3, 64, 64, device=GPU), torch.tensor([[0, 1, 0.5, 0.5, 0.4, 0.4]]))
    handle.remove()
    assert {level.dtype for level in seen} == {dtype}
    assert step.scaler.is_enabled() == (amp == "fp16")
    assert total.dtype == components.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_float16_of_a_gpu_is_resumed_on_a_cpu_with_another_precision(project: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(config(project, device="0", amp="fp16", name="cut"))
    last = str(project / "runs/cut/weights/last.pt")
    with pytest.raises(ConfigError, match="--amp fp16: not supported on a CPU"):
        train(TrainConfig.from_keywords(resume=last, device="cpu"))
    finite_rows(train(TrainConfig.from_keywords(resume=last, device="cpu", amp="off")).folder)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_frozen_rows_are_trained_later(optimizer, project: Path, dirty_memory) -> None:
    """`--freeze-epochs`: the unfrozen parameters join groups of a fused optimizer that has state already."""
    result = train(config(project, device="0", freeze=["2"], freeze_epochs=1, optimizer=optimizer))
    finite_rows(result.folder)


def sgd_on_gpu(*values: float) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """Return parameters of four equal values each, on the device, and the trainer's SGD over them."""
    parameters = [torch.nn.Parameter(torch.full((4,), value, device=GPU)) for value in values]
    group = {"params": parameters, "weight_decay": 5e-4}
    return parameters, build_optimizer("SGD", [group], 0.1, 0.9)


def expected_sgd(value: float, gradients: list[float]) -> float:
    """Compute SGD with Nesterov momentum 0.9, learning rate 0.1 and weight decay 5e-4 in plain Python."""
    momentum = 0.0
    for gradient in gradients:
        gradient += 5e-4 * value
        momentum = 0.9 * momentum + gradient
        value -= 0.1 * (gradient + 0.9 * momentum)
    return value


def test_a_skipped_first_step_leaves_no_uninitialized_momentum(dirty_memory) -> None:
    """The first float16 step often overflows; fused SGD allocates its momentum then, and returns before writing it."""
    (weight,), optimizer = sgd_on_gpu(1.0)
    scaler = torch.amp.GradScaler("cuda")
    for gradient in (float("inf"), 1.0, 0.5):
        weight.grad = scaler.scale(torch.full((4,), gradient, device=GPU))
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(weight.detach().cpu(), torch.full((4,), expected_sgd(1.0, [1.0, 0.5])))


def test_thawed_parameters_join_a_group_that_has_momentum(dirty_memory) -> None:
    (frozen, weight), optimizer = sgd_on_gpu(2.0, 1.0)
    weight.grad = torch.ones(4, device=GPU)
    optimizer.step()
    for parameter in (frozen, weight):
        parameter.grad = torch.full((4,), 0.5, device=GPU)
    optimizer.step()
    torch.testing.assert_close(weight.detach().cpu(), torch.full((4,), expected_sgd(1.0, [1.0, 0.5])))
    torch.testing.assert_close(frozen.detach().cpu(), torch.full((4,), expected_sgd(2.0, [0.5])))


def test_momentum_of_a_run_without_it_starts_at_zero(dirty_memory) -> None:
    """The state of a run that has not stepped yet has no momentum."""
    (weight,), optimizer = sgd_on_gpu(1.0)
    load_optimizer(optimizer, {"state": {}, "param_groups": optimizer.state_dict()["param_groups"]})
    scaler = torch.amp.GradScaler("cuda")
    for gradient in (float("inf"), 1.0):
        weight.grad = scaler.scale(torch.full((4,), gradient, device=GPU))
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(weight.detach().cpu(), torch.full((4,), expected_sgd(1.0, [1.0])))
