"""The loss: gains, devices, precision, determinism, gradients."""

from __future__ import annotations

import math

import pytest
import torch

from models.losses.anchor_based import DetectionLoss, LossConfig, _Read, build_targets
from utils.errors import UserError

ANCHORS = [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]]
STRIDES = [8, 16, 32]
HYP = {"box": 0.05, "obj": 1.0, "cls": 0.5, "obj_pw": 1.0, "cls_pw": 1.0, "anchor_t": 4.0, "fl_gamma": 0.0}
TARGETS = torch.tensor([[0, 0, 0.52, 0.33, 0.2, 0.31], [0, 2, 0.25, 0.71, 0.11, 0.09], [1, 1, 0.4, 0.48, 0.55, 0.6]])


def criterion(**changes):
    return DetectionLoss(ANCHORS, STRIDES, LossConfig(**changes))


def raw_outputs(seed=0, batch=2, classes=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, 3, side, side, 5 + classes) for side in (32, 16, 8)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def perfect_outputs(targets, classes=3, sharpness=12.0):
    """Raw outputs that equal the targets: exact boxes and confidences close to 0 or 1."""
    anchors = torch.tensor(ANCHORS, dtype=torch.float32).view(3, 3, 2) / torch.tensor(STRIDES).view(3, 1, 1)
    levels = build_targets(targets, anchors, [(32, 32), (16, 16), (8, 8)], 4.0)
    raw = [torch.full((2, 3, s, s, 5 + classes), -sharpness) for s in (32, 16, 8)]
    for level, rows in zip(raw, levels):
        offset = torch.logit((rows.box[:, :2] + 0.5) / 2)
        sides = torch.logit((rows.box[:, 2:] / rows.anchor_wh).sqrt() / 2)
        scores = torch.full((len(rows.cls), classes), -sharpness).scatter_(1, rows.cls[:, None], sharpness)
        row = torch.cat((offset, sides, torch.full((len(offset), 1), sharpness), scores), 1)
        level[rows.image, rows.anchor, rows.gy, rows.gx] = row
    return raw


def test_perfect_outputs_cost_nothing():
    assert criterion()(perfect_outputs(TARGETS), TARGETS).parts.max() < 1e-3
    assert criterion()(raw_outputs(), TARGETS).parts.min() > 1e-2


@pytest.mark.parametrize(("part", "gain"), [(0, "box"), (1, "obj"), (2, "cls")])
def test_each_gain_scales_its_part(part, gain):
    one, two = (criterion(**{gain: value})(raw_outputs(), TARGETS).parts for value in (1.0, 2.0))
    assert two[part] == pytest.approx(2 * one[part].item(), rel=1e-6)


def test_total_is_the_sum_times_the_images():
    output = criterion()(raw_outputs(), TARGETS)
    assert output.total.shape == () and output.parts.shape == (3,)
    assert not output.parts.requires_grad
    assert output.total.item() == pytest.approx(2 * output.parts.sum().item(), rel=1e-6)


SCALED = [
    # levels, classes, side, expected box, obj, cls
    (3, 80, 640, 0.05, 1.0, 0.5),
    (3, 3, 320, 0.05, 0.25, 0.5 * 3 / 80),
    (4, 80, 1280, 0.05 * 0.75, 4 * 0.75, 0.5 * 0.75),
    (2, 1, 640, 0.05 * 1.5, 1.5, 0.5 / 80 * 1.5),
]


@pytest.mark.parametrize(("levels", "classes", "side", "box", "obj", "cls"), SCALED)
def test_gains_of_a_file_are_scaled(levels, classes, side, box, obj, cls):
    config = LossConfig.from_hyp(HYP, num_levels=levels, num_classes=classes, imgsz=side, label_smoothing=0.1)
    assert (config.box, config.obj, config.cls) == pytest.approx((box, obj, cls))
    assert config.label_smoothing == 0.1 and not config.autobalance


def test_no_targets_leave_only_objectness():
    raw = raw_outputs()
    output = criterion()(raw, torch.zeros(0, 6))
    assert output.parts[0] == 0 and output.parts[2] == 0 and output.parts[1] > 0
    output.total.backward()
    for level in raw:
        assert level.grad[..., 4].abs().min() > 0
        assert not level.grad[..., :4].any() and not level.grad[..., 5:].any()


def test_last_of_equal_cells_wins_whatever_the_order():
    twins = torch.tensor([[0, 0, 0.51, 0.51, 0.2, 0.2], [0, 0, 0.51, 0.51, 0.1, 0.3]])
    raw = raw_outputs(batch=1)
    anchors = criterion().anchors
    forward, backward = (build_targets(t, anchors, [(32, 32), (16, 16), (8, 8)], 4.0) for t in (twins, twins.flip(0)))
    assert all(len(a.image) == len(b.image) for a, b in zip(forward, backward))
    assert criterion()(raw, twins).parts[1] != criterion()(raw, twins.flip(0)).parts[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_outputs_are_computed_in_float32(dtype):
    low = raw_outputs(dtype=dtype)
    full = [level.detach().float() for level in low]
    with torch.autocast("cpu", torch.bfloat16):
        output = criterion()(low, TARGETS)
    expected = criterion()(full, TARGETS)
    assert output.total.dtype == torch.float32
    torch.testing.assert_close(output.parts, expected.parts, rtol=1e-6, atol=0)
    output.total.backward()
    assert all(level.grad.dtype == dtype and level.grad.isfinite().all() for level in low)


def test_autobalance_moves_in_training_only():
    loss = criterion(autobalance=True)
    before = loss.balance.clone()
    loss.eval()
    loss(raw_outputs(), TARGETS)
    torch.testing.assert_close(loss.balance, before, rtol=0, atol=0)
    loss.train()
    loss(raw_outputs(), TARGETS)
    assert loss.balance[1] == 1 and loss.balance[0] != before[0]


def test_four_and_seven_levels_have_weights():
    for levels in (1, 2, 4, 5, 7):
        strides = [8 * 2**k for k in range(levels)]
        loss = DetectionLoss([[10, 13]] * levels, strides, LossConfig())
        assert len(loss.balance) == levels and loss.balance[0] == 4


def test_flat_and_nested_anchors_are_the_same():
    nested = torch.tensor(ANCHORS, dtype=torch.float32).view(3, 3, 2)
    raw = raw_outputs()
    a, b = DetectionLoss(ANCHORS, STRIDES, LossConfig()), DetectionLoss(nested, torch.tensor(STRIDES), LossConfig())
    assert a(raw, TARGETS).total == b(raw, TARGETS).total


@pytest.mark.parametrize(
    ("anchors", "strides", "changes", "words"),
    [
        (ANCHORS[:2], STRIDES, {}, "anchors of 2 levels for 3 strides"),
        (ANCHORS, [4, 8, 32], {"autobalance": True}, "stride 16"),
    ],
)
def test_wrong_heads(anchors, strides, changes, words):
    with pytest.raises(UserError, match=words):
        DetectionLoss(anchors, strides, LossConfig(**changes))


# ---- assignment -----------------------------------------------------------------------------------------------------

CLAIMS = [
    # center in cells of an 8 x 8 map, cells (x, y) claimed, what it is
    ((3.5 + 1e-3, 3.5 + 1e-3), {(3, 3), (4, 3), (3, 4)}, "right and lower half"),
    ((3.25, 3.25), {(3, 3), (2, 3), (3, 2)}, "left and upper half"),
    ((0.25, 3.25), {(0, 3), (0, 2)}, "no neighbor beyond the left border"),
    ((7.75, 7.75), {(7, 7)}, "no neighbor beyond the corner"),
    ((1.0, 3.25), {(1, 3), (1, 2)}, "exactly one cell away is not more than one"),
    ((8.0, 3.25), {(7, 3), (7, 2)}, "on the right border: limited to the map"),
]


@pytest.mark.parametrize(("center", "cells", "text"), CLAIMS)
def test_claimed_cells(center, cells, text):
    targets = torch.tensor([[0, 0, center[0] / 8, center[1] / 8, 0.25, 0.25]])
    (rows,) = build_targets(targets, torch.tensor([[[2.0, 2.0]]]), [(8, 8)], 4.0)
    assert set(zip(rows.gx.tolist(), rows.gy.tolist())) == cells
    corner = torch.stack((rows.gx, rows.gy), 1)
    torch.testing.assert_close(rows.box[:, :2] + corner, torch.tensor([center] * len(corner)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("side", "matches"), [(2.0, True), (7.99, True), (8.0, False), (0.51, True), (0.5, False)])
def test_anchor_ratio_is_strict(side, matches):
    targets = torch.tensor([[0, 0, 0.55, 0.55, side / 8, 2 / 8]])
    (rows,) = build_targets(targets, torch.tensor([[[2.0, 2.0]]]), [(8, 8)], 4.0)
    assert bool(len(rows.image)) == matches


def test_gradient_of_a_matched_cell_is_that_of_finite_differences():
    """Boxes are left out: their IoU is also the objectness target, which is held constant."""
    raw = raw_outputs()
    loss = criterion(fl_gamma=1.5, label_smoothing=0.1)
    loss(raw, TARGETS).total.backward()
    rows = build_targets(TARGETS, loss.anchors, [(32, 32), (16, 16), (8, 8)], 4.0)[1]
    cell = (rows.image[0], rows.anchor[0], rows.gy[0], rows.gx[0])
    for channel in (4, 5, 6):
        values = []
        for step in (-0.05, 0.05):
            moved = [level.detach().clone() for level in raw]
            moved[1][(*cell, channel)] += step
            values.append(loss(moved, TARGETS).total.item())
        slope = raw[1].grad[(*cell, channel)].item()
        assert abs(slope) > 1e-5
        assert math.isclose((values[1] - values[0]) / 0.1, slope, rel_tol=0.03), channel


@pytest.mark.gpu
@pytest.mark.parametrize("targets_on", ["cpu", "cuda"])
def test_cuda_agrees_with_cpu_and_with_itself(targets_on):
    generator = torch.Generator().manual_seed(1)
    targets = torch.rand(300, 6, generator=generator) * 0.4 + 0.1
    targets[:, 0] = torch.randint(0, 2, (300,), generator=generator)
    targets[:, 1] = torch.randint(0, 3, (300,), generator=generator)
    raw = raw_outputs()
    expected = criterion()(raw, targets)
    runs = []
    for _ in range(3):
        on_gpu = [level.detach().cuda().requires_grad_() for level in raw]
        output = criterion()(on_gpu, targets.to(targets_on))
        output.total.backward()
        runs.append((output.parts.cpu(), on_gpu[0].grad.cpu()))
    torch.testing.assert_close(runs[0][0], expected.parts, rtol=1e-4, atol=1e-6)
    for parts, gradient in runs[1:]:
        assert torch.equal(parts, runs[0][0]) and torch.equal(gradient, runs[0][1])


@pytest.mark.parametrize("gamma", [0.0, 1.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_multiply_the_terms_of_their_class(gamma, smoothing):
    """The loss is linear in the weights: that of (a, b, c) is a, b and c times those of one class alone."""
    options = {"fl_gamma": gamma, "label_smoothing": smoothing, "cls_pw": 1.3}
    single = [tuple(row) for row in torch.eye(3).tolist()]
    alone = [criterion(class_weights=row, **options)(raw_outputs(), TARGETS).parts for row in single]
    mixed = criterion(class_weights=(0.5, 2.0, 0.0), **options)(raw_outputs(), TARGETS).parts
    assert mixed[2].item() == pytest.approx(0.5 * alone[0][2].item() + 2 * alone[1][2].item(), rel=1e-5)
    assert min(part[2] for part in alone) > 0
    plain = criterion(**options)(raw_outputs(), TARGETS).parts
    assert sum(part[2].item() for part in alone) == pytest.approx(plain[2].item(), rel=1e-5)
    torch.testing.assert_close(mixed[:2], plain[:2], rtol=0, atol=0)  # box and objectness do not depend on classes


def test_a_class_of_weight_zero_learns_nothing():
    raw = raw_outputs()
    criterion(class_weights=(1.0, 0.0, 3.0))(raw, TARGETS).total.backward()
    for level in raw:
        assert not level.grad[..., 6].any()
    assert any(level.grad[..., 5].any() and level.grad[..., 7].any() for level in raw)


def test_without_class_weights_nothing_changes():
    assert criterion().class_weights is None and "class_weights" not in criterion().state_dict()
    assert "class_weights" not in criterion(class_weights=(1.0, 2.0, 3.0)).state_dict()
    one = criterion(class_weights=(1.0, 1.0, 1.0))(raw_outputs(), TARGETS)
    torch.testing.assert_close(one.parts, criterion()(raw_outputs(), TARGETS).parts, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", [0.13, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [10.0, 17.5, 30.0, 200.0])
def test_focal_gradients_of_certain_outputs_are_finite(gamma, size):
    """A saturated output, correct or incorrect, has a gradient for every exponent."""
    raw = [torch.zeros(1, 3, n, n, 8) for n in (8, 4, 2)]
    for level, sign in zip(raw, (1, -1, 1)):
        level[..., 4:] = sign * size
        level.requires_grad_()
    loss = criterion(fl_gamma=gamma)(raw, torch.tensor([[0, 1, 0.5, 0.5, 0.2, 0.3]]))
    loss.total.backward()
    assert torch.isfinite(loss.total).all() and all(torch.isfinite(level.grad).all() for level in raw)


@pytest.mark.parametrize("channels_last", [True, False])
def test_values_are_read_with_the_gradient_of_indexing(channels_last: bool) -> None:
    maps = torch.randn(2, 3 * 7, 4, 5, dtype=torch.float64)
    maps = maps.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    flat = torch.tensor([0, 119, 7, 7, 60])  # one of them twice
    cell = torch.stack(torch.unravel_index(flat, (2, 3, 4, 5)))

    def level(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, 3, 7, 4, 5).permute(0, 1, 3, 4, 2)

    given = maps.clone(memory_format=torch.preserve_format).requires_grad_()
    scores, rows = _Read.apply(level(given), cell)
    plain = maps.clone().requires_grad_()
    assert torch.equal(scores, level(plain)[..., 4].reshape(-1))
    assert torch.equal(rows, level(plain).reshape(-1, 7)[flat])
    weights = torch.randn_like(scores), torch.randn_like(rows)
    ((scores * weights[0]).sum() + (rows * weights[1]).sum()).backward()
    same = level(plain)
    ((same[..., 4].reshape(-1) * weights[0]).sum() + (same.reshape(-1, 7)[flat] * weights[1]).sum()).backward()
    assert given.grad is not None and given.grad.stride() == given.stride()  # no copy to another memory format
    torch.testing.assert_close(given.grad, plain.grad)
    assert torch.autograd.gradcheck(lambda x: _Read.apply(level(x), cell), (given,))
