"""RevViT: the reversible sequence against plain autograd, under every tool of training."""

from __future__ import annotations

import copy
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from models.backbones.layers import DropPath
from models.backbones.revvit import RevViT
from tests.helpers.small_revvit import DROPS, TINY, build, image

Gradients = dict[str, Tensor | None]


def plain_copy(model: RevViT) -> RevViT:
    twin = copy.deepcopy(model)
    twin.no_custom_backward = True
    return twin


def run(model: RevViT, x: Tensor, seed: int = 5) -> tuple[Tensor, Gradients]:
    """Map and gradients of one training step; the global generator starts from `seed`."""
    model.zero_grad()
    torch.manual_seed(seed)
    (y,) = model.forward_features(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)
    (y * weight).sum().backward()
    return y.detach(), gradients(model)


def gradients(model: nn.Module) -> Gradients:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_equal_gradients(found: Gradients, wanted: Gradients, relative: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        other = found[name]
        assert (value is None) == (other is None), name
        if value is not None and other is not None:
            atol = relative * max(value.abs().max().item(), 1e-3)
            torch.testing.assert_close(other, value, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# ---- equal to plain autograd ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        DROPS,
        {"qkv_bias": False, "final_norm": False},
        {"buffered_layers": [0, 2]},
        {"buffered_layers": [1, 3], **DROPS},
        {"fusion_mode": "add"},
        {"fusion_mode": "max"},
        {"fusion_mode": "min"},
        {"fusion_mode": "avg", **DROPS},
        {"frozen_stages": 0},
        {"frozen_stages": 2, **DROPS},
        {"frozen_stages": 3},
    ],
    ids=str,
)
def test_gradients_equal_plain_autograd(options: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    model = build(**options).to(dtype).train()
    x = image().to(dtype)
    y, found = run(model, x)
    wanted_y, wanted = run(plain_copy(model), x)
    torch.testing.assert_close(y, wanted_y, rtol=0, atol=0)
    assert_equal_gradients(found, wanted, tolerance)
    untouched = {name for name, p in model.named_parameters() if not p.requires_grad or name.startswith("pyramid.")}
    assert {name for name, value in found.items() if value is None} == untouched


def test_gradient_reaches_what_comes_before_frozen_blocks() -> None:
    model = build().double()
    for block in list(model.layers)[1:3]:
        block.requires_grad_(False)
    x = image().double().requires_grad_()
    _, found = run(model, x)
    assert x.grad is not None
    first, x.grad = x.grad, None
    _, wanted = run(plain_copy(model), x)
    assert_equal_gradients(found, wanted, 1e-10)
    torch.testing.assert_close(first, x.grad, rtol=0, atol=1e-10)
    assert found["layers.0.attn.qkv.weight"] is not None and found["layers.1.attn.qkv.weight"] is None


def test_deep_sequence_recomputes_its_inputs_exactly_enough() -> None:
    model = build(arch={**TINY, "num_layers": 24})
    _, found = run(model, image())
    _, wanted = run(plain_copy(model), image())
    assert_equal_gradients(found, wanted, 1e-5)


def test_buffered_layers_keep_rounding_from_adding_up() -> None:
    """Large residuals: recomputing through 24 blocks costs a digit of float32, which buffers restore."""
    model = build(arch={**TINY, "num_layers": 24})
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("attn.proj.weight", "ffn.layers.1.weight")):
                value.mul_(4)
    _, exact = run(plain_copy(model).double(), image().double())
    errors = []
    for buffered in ((), range(0, 24, 4)):
        model.buffered_layers = frozenset(buffered)
        _, found = run(model, image())
        errors.append(relative_error(found, exact))
    assert errors[1] < 0.3 * errors[0] < 1e-5


@pytest.mark.parametrize("options", [{}, DROPS], ids=["plain", "drops"])
def test_two_forward_passes_before_a_backward(options: dict[str, Any]) -> None:
    def both(model: RevViT) -> Gradients:
        torch.manual_seed(3)
        (a,), (b,) = model.forward_features(image(1).double()), model.forward_features(image(2).double())
        (a.pow(2).sum() + b.pow(3).sum()).backward()
        return gradients(model)

    model = build(**options).double()
    assert_equal_gradients(both(model), both(plain_copy(model)), 1e-10)


def test_change_to_eval_between_forward_and_backward() -> None:
    model = build(**DROPS).double()
    twin = plain_copy(model)
    for m in (model, twin):
        torch.manual_seed(3)
        (y,) = m.forward_features(image().double())
        m.eval()
        y.pow(2).sum().backward()
        assert not any(module.training for module in m.modules())
    assert_equal_gradients(gradients(model), gradients(twin), 1e-10)


# ---- random numbers -------------------------------------------------------------------------------------------------


def test_generator_goes_on_as_with_plain_autograd() -> None:
    """Neither the forward nor the backward pass may re-seed or rewind the global generator."""
    draws = []
    model = build(**DROPS)
    for m in (model, plain_copy(model)):
        torch.manual_seed(11)
        (y,) = m.forward_features(image())
        between = torch.rand(3)
        y.sum().backward()
        draws.append(torch.cat((between, torch.rand(3))))
    torch.testing.assert_close(draws[0], draws[1], rtol=0, atol=0)
    assert draws[0].unique().numel() == 6


def test_evaluation_draws_no_random_numbers_and_drops_nothing() -> None:
    model = build(**DROPS).eval()
    before = torch.get_rng_state()
    with torch.no_grad():
        (a,), (b,) = model.forward_features(image()), model.forward_features(image())
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    model.train()
    (c,), (d,) = model.forward_features(image()), model.forward_features(image())
    assert not torch.equal(c, d)
    assert max(m.drop_prob for m in model.modules() if isinstance(m, DropPath)) == pytest.approx(0.4)


def test_train_and_eval_return_the_model() -> None:
    model = build(frozen_stages=1)
    assert model.train() is model and model.eval() is model and model.train(False) is model


# ---- the tools of training ------------------------------------------------------------------------------------------


def test_hooks_on_parameters_run_once() -> None:
    model = build().double()
    twin = plain_copy(model)
    calls: list[str] = []
    for m in (model, twin):
        for name, p in m.named_parameters():
            p.register_hook(lambda g, n=name: (calls.append(n), 2 * g)[1])
    _, found = run(model, image().double())
    assert sorted(calls) == sorted(n for n, _ in model.named_parameters() if not n.startswith("pyramid."))
    assert_equal_gradients(found, run(twin, image().double())[1], 1e-10)


def test_autograd_grad() -> None:
    model = build().double()
    twin = plain_copy(model)

    def some(m: RevViT) -> tuple[Tensor, ...]:
        wanted = [m.layers[1].attn.qkv.weight, m.layers[3].ffn.layers[1].bias, m.pos_embed]  # type: ignore[union-attr]
        (y,) = m.forward_features(image().double())
        return torch.autograd.grad(y.pow(2).sum(), wanted)  # type: ignore[arg-type]

    for a, b in zip(some(model), some(twin)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert all(p.grad is None for p in model.parameters())


def test_gradient_scaling() -> None:
    model = build()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    (y,) = model.forward_features(image())
    scaler.scale(y.pow(2).mean()).backward()
    scaler.unscale_(optimizer)
    found = gradients(model)
    model.zero_grad()
    (y,) = model.forward_features(image())
    y.pow(2).mean().backward()
    assert_equal_gradients(found, gradients(model), 1e-5)


@pytest.mark.parametrize("options", [{}, DROPS], ids=["plain", "drops"])
def test_autocast_error_is_that_of_plain_autocast(options: dict[str, Any]) -> None:
    """bf16: the error against float32, summed over all parameters, is no larger than that of plain autograd."""
    model = build(arch={**TINY, "num_layers": 12}, **options)
    twin = plain_copy(model)
    _, exact = run(twin, image())
    with torch.autocast("cpu", torch.bfloat16):
        y, found = run(model, image())
        _, plain = run(twin, image())
    assert y.dtype == torch.float32  # the streams and the norm after them
    assert relative_error(plain, exact) > 1e-3  # the comparison is meaningful
    assert relative_error(found, exact) < 1.02 * relative_error(plain, exact)
    name = "layers.0.attn.qkv.weight"
    assert relative_error({name: found[name]}, exact) < 1.05 * relative_error({name: plain[name]}, exact)


def relative_error(found: Gradients, exact: Gradients) -> float:
    pairs = [(value, exact[name]) for name, value in found.items() if value is not None]
    error = sum((a - b).pow(2).sum().item() for a, b in pairs if b is not None)
    return (error / sum(b.pow(2).sum().item() for _, b in pairs if b is not None)) ** 0.5


def test_recomputation_replays_autocast_when_backward_runs_outside_it() -> None:
    model = build()
    results = []
    for inside in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.forward_features(image())[0].pow(2).sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        results.append(gradients(model))
    assert_equal_gradients(results[0], results[1], 0.0)


def test_autocast_leaves_no_gradient_free_weights_in_its_cache() -> None:
    model = build()
    twin = plain_copy(model)
    with torch.autocast("cpu", torch.bfloat16):
        model.forward_features(image())
        model.no_custom_backward = True
        model.forward_features(image())[0].sum().backward()
        twin.forward_features(image())[0].sum().backward()
    assert_equal_gradients(gradients(model), gradients(twin), 0.0)


def test_deepcopy_trains_on_its_own() -> None:
    model = build(**DROPS)
    run(model, image())
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    (a,) = ema.forward_features(image())
    (b,) = model.eval().forward_features(image())
    assert not a.requires_grad and not torch.equal(a, b)


def test_parameters_changed_before_backward_are_an_error() -> None:
    """As with plain autograd: recomputation with other weights would give silently wrong gradients."""
    model = build()
    (y,) = model.forward_features(image())
    with torch.no_grad():
        model.layers[0].ln1.weight.add_(1.0)  # type: ignore[union-attr, operator]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_kept_bytes_do_not_grow_with_depth() -> None:
    def kept(depth: int, **options: Any) -> int:
        model = build(arch={**TINY, "num_layers": depth}, **options)
        own = {p.data_ptr() for p in model.parameters()}
        tensors: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            if t.data_ptr() not in own:
                tensors[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outputs = model.forward_features(image())
        assert outputs[0].requires_grad
        return sum(tensors.values())

    assert kept(12) == kept(3)
    assert kept(12, no_custom_backward=True) > 2.5 * kept(3, no_custom_backward=True)


def test_saved_tensors_may_be_moved_away() -> None:
    model = build(**DROPS).double()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        _, found = run(model, image().double())
    assert_equal_gradients(found, run(plain_copy(model), image().double())[1], 1e-10)


def _distributed_step(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = build(strides=(8, 16)).double()
    wrapped = nn.parallel.DistributedDataParallel(model)
    x = image(shape=(4, 3, 64, 64)).double()[2 * rank : 2 * rank + 2]
    sum(y.pow(2).sum() for y in wrapped(x)).backward()
    torch.save(gradients(model), Path(folder) / f"{rank}.pt")
    dist.barrier()  # a process that exits during communication breaks the other one
    del wrapped
    dist.destroy_process_group()


def test_distributed_data_parallel(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_distributed_step, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    model = plain_copy(build(strides=(8, 16)).double())
    (sum(y.pow(2).sum() for y in model(image(shape=(4, 3, 64, 64)).double())) / 2).backward()  # type: ignore[union-attr]
    assert_equal_gradients(first, second, 0.0)
    assert_equal_gradients(first, gradients(model), 1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "amp"])
def test_dropout_replay_on_a_gpu(amp: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = build(**DROPS).cuda()
    x = image().cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=amp):
        y, found = run(model, x)
        state = torch.cuda.get_rng_state()
        wanted_y, wanted = run(plain_copy(model), x)
    assert torch.equal(state, torch.cuda.get_rng_state())
    torch.testing.assert_close(y, wanted_y, rtol=0, atol=0)
    assert_equal_gradients(found, wanted, 3e-2 if amp else 1e-4)
