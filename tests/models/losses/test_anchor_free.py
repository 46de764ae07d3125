"""Assignment and loss of the anchor-free head against a dense reference in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from models.losses.anchor_free import (
    AnchorFreeLoss,
    AnchorFreeLossConfig,
    assign,
    find_candidates,
    paired_ciou,
    prepare,
)
from models.points import distances
from utils.boxes import bbox_iou

STRIDES = (8, 16, 32)
CLASSES = 3
CASES = {
    "all sizes": [(0, 1, 64, 64, 100, 90), (0, 2, 30, 90, 20, 9), (1, 0, 100, 40, 14, 60)],
    "1 pixel": [(0, 1, 63.3, 60.7, 1, 1), (1, 2, 20.2, 20.9, 1, 30)],
    "crowded": [(0, i % 3, 50 + 3.3 * i, 60 + 2.1 * i, 40 + i, 37 - i) for i in range(12)],
    "one image without targets": [(1, 1, 64.5, 63.1, 50, 20)],
    "no targets": [],
    "outside the borders": [(0, 1, 2, 126, 60, 44), (1, 2, 140, 150, 70, 80), (0, 0, 200, 200, 10, 10)],
}


def as_targets(rows):
    """(image, class, center x, center y, width, height in pixels) of 128 x 128 images to normalized targets."""
    targets = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    targets[:, 2:] /= 128
    return targets


def raw_levels(bins, seed=0, dtype=torch.float32):
    """Random raw outputs whose classes are rarely confident."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 1, 128 // s, 128 // s, 4 * bins + CLASSES) for s in STRIDES]
    return [(torch.randn(shape, generator=generator) - 0.5).to(dtype).requires_grad_() for shape in shapes]


def criterion(bins, **config):
    return AnchorFreeLoss(STRIDES, CLASSES, bins, AnchorFreeLossConfig(**config))


def reference_iou(a, b):
    """CIoU of two xyxy boxes, paper equations 4 to 11, with the eps of utils.boxes."""
    eps = 1e-7
    width, height = a[2] - a[0], (a[3] - a[1]).clamp(min=eps)
    other_width, other_height = b[2] - b[0], b[3] - b[1]
    x = (torch.min(a[2], b[2]) - torch.max(a[0], b[0])).clamp(min=0)
    y = (torch.min(a[3], b[3]) - torch.max(a[1], b[1])).clamp(min=0)
    iou = x * y / (width * height + other_width * other_height - x * y + eps)
    hull_x, hull_y = torch.max(a[2], b[2]) - torch.min(a[0], b[0]), torch.max(a[3], b[3]) - torch.min(a[1], b[1])
    distance = ((a[0] + a[2] - b[0] - b[2]) ** 2 + (a[1] + a[3] - b[1] - b[3]) ** 2) / 4
    v = 4 / math.pi**2 * (torch.atan(other_width / other_height) - torch.atan(width / height)) ** 2
    alpha = (v / (v - iou + 1 + eps)).detach()
    return iou - distance / (hull_x**2 + hull_y**2 + eps) - alpha * v


def reference_points():
    """(x, y, stride) of all points in the order level, y, x."""
    return [
        ((x + 0.5) * s, (y + 0.5) * s, s)
        for s in STRIDES
        for y, x in itertools.product(range(128 // s), range(128 // s))
    ]


def reference_distances(logits, bins):
    if bins == 1:
        return F.softplus(logits)
    return torch.stack([(side.softmax(0) * torch.arange(bins)).sum() for side in logits.view(4, bins)])


def reference_boxes(flat, bins):
    """Decode (B, N, ...) one by one to lists of xyxy."""
    boxes = []
    for image in flat:
        row = []
        for (x, y, s), prediction in zip(reference_points(), image, strict=True):
            left, top, right, bottom = reference_distances(prediction[: 4 * bins], bins) * s
            row.append(torch.stack((x - left, y - top, x + right, y + bottom)))
        boxes.append(row)
    return boxes


def reference_assignment(flat, boxes, targets, bins):
    """Soft targets {(image, point): (target, weight)} by loops over all targets and points."""
    chosen = []  # target, image, point, log t, u
    for m, (image, label, cx, cy, w, h) in enumerate(targets):
        half_w, half_h = max(w, 8) / 2, max(h, 8) / 2
        inside = []
        for n, (x, y, _) in enumerate(reference_points()):
            if abs(x - cx) < half_w and abs(y - cy) < half_h:
                box = torch.tensor([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], dtype=torch.float64)
                u = max(float(reference_iou(boxes[int(image)][n], box)), 0)
                score = float(flat[int(image), n, 4 * bins + int(label)].sigmoid())
                inside.append((m, int(image), n, 0.5 * math.log(score) + 6 * math.log(max(u, 1e-9)), u))
        chosen += sorted(inside, key=lambda row: -row[3])[:10]
    owner = {}
    for row in chosen:
        place = row[1:3]
        if place not in owner or row[4] > owner[place][4]:
            owner[place] = row
    weights = {}
    for place, (m, _, _, metric, _) in owner.items():
        own = [row for row in owner.values() if row[0] == m]
        largest, best = max(row[3] for row in own), max(row[4] for row in own)
        weights[place] = m, math.exp(metric - largest) * best
    return weights


def reference_loss(raw, targets, bins, gains=(7.5, 0.5, 1.5)):
    """Dense loss in float64 with binary cross-entropy over all classes of all points."""
    flat = torch.cat([level.flatten(1, 3) for level in raw], 1).double()
    pixels = [[row[0], row[1], *(128 * v for v in row[2:])] for row in targets.double().tolist()]
    boxes = reference_boxes(flat, bins)
    weights = reference_assignment(flat.detach(), [[b.detach() for b in row] for row in boxes], pixels, bins)
    wanted = torch.zeros(*flat.shape[:2], CLASSES, dtype=torch.float64)
    box = dfl = torch.zeros((), dtype=torch.float64)
    for (image, n), (m, weight) in weights.items():
        _, label, cx, cy, w, h = pixels[m]
        x, y, s = reference_points()[n]
        wanted[image, n, int(label)] = weight
        target = torch.tensor([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], dtype=torch.float64)
        box = box + weight * (1 - reference_iou(boxes[image][n], target))
        if bins > 1:
            sides = (x - target[0], y - target[1], target[2] - x, target[3] - y)
            for side, logits in zip(sides, flat[image, n, : 4 * bins].view(4, bins), strict=True):
                at = min(max(float(side) / s, 0), bins - 1.01)
                low = int(at)
                log_p = logits.log_softmax(0)
                dfl = dfl - weight * ((low + 1 - at) * log_p[low] + (at - low) * log_p[low + 1]) / 4
    cls = F.binary_cross_entropy_with_logits(flat[..., 4 * bins :], wanted, reduction="sum")
    z = max(sum(weight for _, weight in weights.values()), 1)
    parts = torch.stack((box, cls, dfl)) * torch.tensor(gains) / z
    return parts, parts.sum() * len(flat)


@pytest.mark.parametrize("bins", [16, 8, 1])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_the_dense_reference(name, bins):
    targets = as_targets(CASES[name])
    raw, same = raw_levels(bins), raw_levels(bins)
    output = criterion(bins)(raw, targets)
    parts, total = reference_loss(same, targets, bins)
    output.total.backward()
    total.backward()
    torch.testing.assert_close(output.parts.double(), parts.detach(), rtol=2e-5, atol=1e-6)
    for mine, other in zip(raw, same, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=2e-5)


def random_targets(count, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(count, 6, generator=generator)
    columns = (values[:, :1] * 2, values[:, 1:2] * CLASSES)
    return torch.cat((*(c.floor() for c in columns), values[:, 2:4], 0.01 + 0.6 * values[:, 4:] ** 2), 1)


@pytest.mark.parametrize("seed", range(3))
def test_random_targets_equal_the_dense_reference(seed):
    targets = random_targets(20, seed)
    parts, _ = reference_loss(raw_levels(16, seed), targets, 16)
    result = criterion(16)(raw_levels(16, seed), targets).parts.double()
    torch.testing.assert_close(result, parts.detach(), rtol=2e-5, atol=1e-6)


def test_order_and_repetition_of_targets_have_no_effect():
    targets = random_targets(30, 5)
    targets = torch.cat((targets, targets[3:5], targets[:1].clone().index_fill_(1, torch.tensor([1]), 2)))
    loss = criterion(16)
    first = loss(raw_levels(16), targets).parts
    for seed in range(3):
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(loss(raw_levels(16), targets[order]).parts, first, rtol=0, atol=0)


def soft_targets(raw, rows):
    """Assign targets (M, 6) in pixels: {(image, point): (target, soft target)}."""
    candidates = find_candidates(rows, [(128 // s, 128 // s) for s in STRIDES], STRIDES)
    pairs, _ = prepare(candidates, (raw.shape[0], raw.shape[1]), 16, raw.device)
    flat = raw.flatten(0, 1)
    ltrb = distances(flat[pairs.place, :64], torch.arange(16.0))
    iou = paired_ciou(torch.addcmul(pairs.center, ltrb, pairs.stride), pairs)
    weight = assign(iou, flat[pairs.place, 64 + pairs.cls], pairs, len(rows), len(flat))
    columns = zip(candidates.image, candidates.point, candidates.target, weight, strict=True)
    return {(int(i), int(n)): (int(m), float(w)) for i, n, m, w in columns if w > 0}


def test_assignment_of_an_image_does_not_depend_on_the_batch():
    targets = random_targets(24, 2)
    raw = torch.cat([level.detach().flatten(1, 3) for level in raw_levels(16)], 1)

    def soft(images, rows):
        boxes = torch.cat((rows[:, 2:4] - rows[:, 4:] / 2, rows[:, 2:4] + rows[:, 4:] / 2), 1) * 128
        found = soft_targets(images, torch.cat((rows[:, :2], boxes), 1))
        return {place: weight for place, (_, weight) in found.items()}

    together = soft(raw, targets)
    own = targets[targets[:, 0] == 1] * torch.tensor([0, 1, 1, 1, 1, 1])
    alone = soft(raw[1:], own)
    assert alone == {(0, n): w for (image, n), w in together.items() if image == 1}
    assert len(alone) > 20


def test_small_targets_get_positives_at_the_first_step():
    rows = as_targets([(0, 1, 8 * i + 5.2, 8 * i + 2.9, 3, 3) for i in range(10)])
    pixels = torch.cat((rows[:, :2], (rows[:, 2:4] - rows[:, 4:] / 2) * 128, (rows[:, 2:4] + rows[:, 4:] / 2) * 128), 1)
    sizes = [(128 // s, 128 // s) for s in STRIDES]
    level = torch.cat(((-0.5 * torch.arange(16)).repeat(4), torch.full((CLASSES,), -7.0)))
    raw = level.expand(1, sum(h * w for h, w in sizes), -1)
    assert {target for target, _ in soft_targets(raw, pixels).values()} == set(range(10))


@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (8, 16, 32), (16, 32)])
def test_every_target_has_a_candidate(strides):
    """Boxes of whole pixels: those of 8 pixels around a grid line have their nearest points on their borders."""
    sides = torch.cartesian_prod(*[torch.tensor([1.0, 2, 7, 8, 9, 16, 17])] * 2)
    first = torch.cartesian_prod(*[torch.arange(0.0, 47, 3)] * 2)
    boxes = torch.cat((first.repeat_interleave(len(sides), 0), sides.repeat(len(first), 1)), 1)
    boxes[:, 2:] += boxes[:, :2]
    boxes = boxes[(boxes[:, :2] + boxes[:, 2:]).amax(1) <= 2 * 64]
    targets = torch.cat((torch.zeros(len(boxes), 2), boxes), 1)
    candidates = find_candidates(targets, [(64 // s, 64 // s) for s in strides], strides)
    assert len(boxes) > 10_000 and len(candidates.target.unique()) == len(boxes)


def test_bfloat16_outputs_are_computed_in_float32():
    targets = random_targets(12, 3)
    half = raw_levels(16, dtype=torch.bfloat16)
    output = criterion(16)(half, targets)
    same = criterion(16)([level.detach().float() for level in half], targets)
    torch.testing.assert_close(output.parts, same.parts, rtol=1e-6, atol=0)
    output.total.backward()
    assert all(level.grad.dtype == torch.bfloat16 for level in half)


def test_gradients_are_bit_equal_in_a_second_call():
    targets = random_targets(60, 4)
    gradients = []
    for _ in range(2):
        raw = raw_levels(16, dtype=torch.bfloat16)
        criterion(16)(raw, targets).total.backward()
        gradients.append([level.grad for level in raw])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize(("part", "gain"), [(0, "box"), (1, "cls"), (2, "dfl")])
def test_each_gain_scales_its_part(part, gain):
    targets = random_targets(6, 1)
    one, two = (criterion(16, **{gain: value})(raw_levels(16), targets).parts for value in (1.0, 2.0))
    assert two[part] == pytest.approx(2 * one[part].item(), rel=1e-6)


def test_gains_of_a_hyperparameter_file_have_defaults():
    hyp = {"box": 0.05, "cls": 0.3, "obj": 1.0, "free_cls": 0.7}
    assert AnchorFreeLossConfig.from_hyp(hyp) == AnchorFreeLossConfig(box=7.5, cls=0.7, dfl=1.5)


def test_class_weights_scale_the_class_loss_of_positives_only():
    targets = as_targets([(0, 1, 64, 64, 100, 90)])
    plain, other, own = (
        criterion(16, class_weights=weights)(raw_levels(16), targets).parts
        for weights in (None, (3.0, 1.0, 3.0), (1.0, 3.0, 1.0))
    )
    torch.testing.assert_close(other, plain, rtol=0, atol=0)
    assert own[1] > plain[1]
    torch.testing.assert_close(own[[0, 2]], plain[[0, 2]], rtol=0, atol=0)


@pytest.mark.parametrize("count", [0, 1, 40])
def test_two_processes_equal_one_with_the_whole_batch(count):
    """Sums over the batch are divided by one normalizer, also where the soft targets sum to less than 1."""
    targets, raw = random_targets(count, 1), raw_levels(16)
    sums = []

    def loss(image, mean):
        own = targets[targets[:, 0] == image] * torch.tensor([0, 1, 1, 1, 1, 1])
        criterion = AnchorFreeLoss(STRIDES, CLASSES, 16, AnchorFreeLossConfig(), mean, processes=2)
        return criterion([level[image : image + 1] for level in raw], own)

    for image in (0, 1):
        loss(image, lambda total: sums.append(total) or total)
    mean = torch.stack(sums).mean()
    total = sum(loss(image, lambda _: mean).total for image in (0, 1))
    assert (2 * mean < 1) == (count < 40)
    torch.testing.assert_close(total, criterion(16)(raw, targets).total, rtol=1e-5, atol=0)


def test_normalizer_of_processes_is_for_training_only():
    targets = random_targets(10, 1)
    loss = AnchorFreeLoss(STRIDES, CLASSES, 16, AnchorFreeLossConfig(), lambda total: 50 * total, processes=2).eval()
    torch.testing.assert_close(
        loss(raw_levels(16), targets).parts, criterion(16)(raw_levels(16), targets).parts, rtol=0, atol=0
    )


@pytest.mark.gpu
@pytest.mark.parametrize("weights", [None, (3.0, 1.0, 2.0)])
def test_gpu_equals_cpu_with_targets_on_the_cpu(weights):
    """On a GPU the gradient is that of one pass over all pairs, on a CPU that of the positives alone."""
    targets = random_targets(30, 6)
    cpu, gpu = raw_levels(16), [level.detach().cuda().requires_grad_() for level in raw_levels(16)]
    expected, result = (criterion(16, class_weights=weights)(raw, targets) for raw in (cpu, gpu))
    torch.testing.assert_close(result.parts.cpu(), expected.parts, rtol=1e-4, atol=1e-5)
    expected.total.backward()
    result.total.backward()
    for mine, other in zip(gpu, cpu, strict=True):
        torch.testing.assert_close(mine.grad.cpu(), other.grad, rtol=1e-4, atol=2e-5)


def test_paired_ciou_and_its_gradient_equal_bbox_iou():
    rows = random_targets(40, 7)
    boxes = torch.cat((rows[:, 2:4] - rows[:, 4:] / 2, rows[:, 2:4] + rows[:, 4:] / 2), 1) * 128
    candidates = find_candidates(torch.cat((rows[:, :2], boxes), 1), [(16, 16)], [8])
    pairs, _ = prepare(candidates, (2, 256), 16, torch.device("cpu"))
    side = torch.rand(len(pairs.target), 4, generator=torch.Generator().manual_seed(0)) * 60
    corners, same = ((pairs.center + side).requires_grad_() for _ in range(2))
    sign = torch.tensor([-1, -1, 1, 1])
    iou, expected = paired_ciou(corners, pairs), bbox_iou(same * sign, pairs.corners * sign, xywh=False, CIoU=True)
    torch.testing.assert_close(iou, expected, rtol=1e-5, atol=1e-5)
    iou.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(corners.grad, same.grad, rtol=1e-4, atol=1e-5)


def test_loss_under_autocast_is_that_in_float32():
    targets = random_targets(12, 3)
    plain = criterion(16)(raw_levels(16), targets).parts
    with torch.autocast("cpu", torch.bfloat16):
        under = criterion(16)(raw_levels(16), targets).parts
    torch.testing.assert_close(under, plain, rtol=0, atol=0)
