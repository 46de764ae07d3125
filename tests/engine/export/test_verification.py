"""Verification: equal forms pass, injected faults in folding do not."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm.utils.model
import torch
from timm.models.byobnet import RepVggBlock
from torch import nn

import models.backbones.nextvit as nextvit
import models.backbones.repmlp as repmlp
import models.backbones.riformer as riformer
import models.fuse as fuse
from engine.export.samples import SHIPPED, ImageSource, find_images, random_images
from engine.export.verification import (
    TOLERANCES,
    NmsRule,
    Verification,
    choose_conf,
    compare_boxes,
    compare_rows,
    match,
    verification_inputs,
)
from engine.export.wrapper import GraphShape, reparameterized_copy
from tests.helpers.detectors import build
from utils.errors import DataError, ExportError

CPU = torch.device("cpu")
SHAPE = GraphShape(1, 96, 128, False, 32)
FP32 = TOLERANCES["float32"]
IMAGES = ImageSource("shipped", tuple(sorted(SHIPPED.glob("*.jpg"))))


def verified(model):
    return Verification(model, reparameterized_copy(model), verification_inputs(IMAGES, SHAPE), "shipped", CPU)


@pytest.mark.parametrize("family", ["yolov5", "riformer", "repmlp", "revvit", "nextvit", "timm-repvgg"])
def test_verification_passes_and_keeps_model(family):
    model = build(family)
    before = copy.deepcopy(model.state_dict())
    verification = verified(model)
    assert not verification.deployment.problems
    assert verification.deployment.reference >= 20  # enough boxes to compare
    assert verification.deployment.row_px < 0.02 and verification.deployment.row_score < 1e-4
    after = model.state_dict()
    assert list(before) == list(after)
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=0)


# ---- injected faults ------------------------------------------------------------------------------------------------

RIGHT_FOLDED = fuse.fused_weights
RIGHT_FC3 = repmlp.folded_fc3


def wrong_sign(conv, norm):
    flipped = copy.deepcopy(norm)
    flipped.running_mean.neg_()
    return RIGHT_FOLDED(conv, flipped)


def wrong_eps(conv, norm):
    other = copy.deepcopy(norm)
    other.eps = 1e-5  # instead of 1e-3
    return RIGHT_FOLDED(conv, other)


def fc3_without_the_largest_branch(block):
    poorer = copy.deepcopy(block)
    poorer.kernels = poorer.kernels[:-1]
    return RIGHT_FC3(poorer)


def fc3_with_wrong_eps(block):
    other = copy.deepcopy(block)
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3  # instead of 1e-5
    return RIGHT_FC3(other)


def norm_forgotten(norm, *layers):
    return nn.Identity()


def affine_sign(model):
    """Flip the sign of the affine mixer's shift."""
    for module in model.modules():
        if isinstance(module, riformer.AffineMixer):
            module.affine.bias.data.neg_()


BREAKS = [
    ("yolov5", fuse, "fused_weights", wrong_sign),
    ("yolov5", fuse, "fused_weights", wrong_eps),
    ("riformer", fuse, "fused_weights", wrong_eps),
    ("revvit", fuse, "fused_weights", wrong_sign),
    ("timm", fuse, "fused_weights", wrong_eps),
    ("repmlp", repmlp, "folded_fc3", fc3_without_the_largest_branch),
    ("repmlp", repmlp, "folded_fc3", fc3_with_wrong_eps),
    ("nextvit", nextvit, "fold_norm_before", norm_forgotten),
]


@pytest.mark.parametrize(
    ("family", "module", "name", "broken"), BREAKS, ids=[f"{b[0]}-{b[3].__name__}" for b in BREAKS]
)
def test_verification_detects_faulty_fold(monkeypatch, family, module, name, broken):
    model = build(family)
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(ExportError, match="stage 1, training model -> re-parameterized model"):
        verified(model)


def test_verification_detects_faulty_riformer_fold(monkeypatch):
    model = build("riformer")
    right = riformer.RIFormer.reparameterize

    def broken(self):
        affine_sign(self)
        right(self)

    monkeypatch.setattr(riformer.RIFormer, "reparameterize", broken)
    with pytest.raises(ExportError, match="stage 1"):
        verified(model)


def test_verification_detects_skipped_branch_of_timm(monkeypatch):
    """RepVGG's identity branch is skipped when a block is fused."""
    model = build("timm-repvgg")
    right = timm.utils.model.reparameterize_model

    def poorer(network, inplace):
        skipped = [m for m in network.modules() if isinstance(m, RepVggBlock) and m.identity is not None]
        assert skipped
        for block in skipped:
            block.identity = None
        return right(network, inplace=inplace)

    monkeypatch.setattr(timm.utils.model, "reparameterize_model", poorer)
    with pytest.raises(ExportError, match="stage 1"):
        verified(model)


# ---- comparison -----------------------------------------------------------------------------------------------------


def rows(count=60, seed=0):
    """Return (1, count, 8): boxes on a grid without overlap, confidences 0.3 ... 0.9."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.zeros(1, count, 8)
    index = torch.arange(count)
    out[0, :, 0], out[0, :, 1] = (index % 10) * 40 + 20, (index // 10) * 40 + 20
    out[0, :, 2:4] = 20 + 8 * torch.rand(count, 2, generator=generator)
    out[0, :, 4] = torch.linspace(0.9, 0.3, count)
    out[0, index, 5 + index % 3] = 1
    return out


def moved(r):
    r[0, 7, 0] += 0.2


def rescored(r):
    r[0, 7, 4] += 0.002


def not_a_number(r):
    r[0, 7, 2] = float("nan")


def other_class(r):
    r[0, 7, 5:] = r[0, 7, 5:].roll(1)


def vanished(r):
    r[0, 7, 4] = 0


def on_the_threshold(r):
    r[0, 59, 4] = 0.3 - 1e-5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: None, ""),
        (on_the_threshold, ""),
        (moved, "0.2 px apart"),
        (rescored, "scores are up to 0.002"),
        (not_a_number, "not finite"),
        (other_class, "no match"),
        (vanished, "no match"),
    ],
)
def test_compare_rows(change, words):
    found = rows()
    change(found)
    problems = " ".join(compare_rows("x", [rows()], [found], FP32, conf=0.3).problems)
    assert (words in problems) if words else not problems, problems


def test_compare_rows_reports_shapes():
    assert "shapes" in compare_rows("x", [rows(60)], [rows(59)], FP32, conf=0.3).problems[0]


def boxes(*lines):
    return torch.tensor(lines, dtype=torch.float32).reshape(-1, 6)


def row(box):
    """Return the row of a box: xyxy, confidence, class."""
    x1, y1, x2, y2, score, label = box
    hot = [float(k == label) for k in range(3)]
    return [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, score, *hot]


A = [10, 10, 30, 30, 0.8, 0]
NEAR_A = [14, 10, 34, 30, 0.79999, 0]  # IoU 2/3 with A, nearly the same confidence: NMS may keep either
WEAKER = [14, 10, 34, 30, 0.5, 0]
FAR = [50, 50, 70, 70, 0.6, 1]


@pytest.mark.parametrize(
    ("before", "after", "edge", "same"),
    [
        ([A, FAR], [A, FAR], 0, True),
        ([A, NEAR_A, FAR], [NEAR_A, FAR], 2, True),  # tie: NMS may keep either
        ([A, WEAKER], [A, WEAKER], 0, False),  # NMS was skipped
        ([A, WEAKER], [WEAKER], 0, False),  # the less confident box was kept
        ([A, FAR], [A], 0, False),  # missing
        ([A], [A, FAR], 0, False),  # additional
        ([A], [A, A], 0, False),  # duplicate
    ],
)
def test_compare_boxes(before, after, edge, same):
    reference = torch.tensor([[row(b) for b in before]], dtype=torch.float32)
    found = compare_boxes("x", [reference], [[boxes(*after)]], FP32, NmsRule(0.25))
    assert (not found.problems) == same
    assert found.edge == edge or not same


def test_compare_boxes_matches_boxes_without_height():
    """They have no IoU, not even with themselves; a flat image gives many."""
    thin = [[10 + 30 * k, 20, 35 + 30 * k, 20, 0.9 - 0.1 * k, 0] for k in range(3)]
    reference = torch.tensor([[row(box) for box in thin]], dtype=torch.float32)
    found = boxes(*thin)
    found[:, :4] += 0.01
    assert not compare_boxes("x", [reference], [[found]], FP32, NmsRule(0.25)).problems
    found[1, 1] += 0.2  # a different box
    assert compare_boxes("x", [reference], [[found]], FP32, NmsRule(0.25)).problems


def test_nms_rule_limits():
    """Two boxes per class, three per image."""
    limited = NmsRule(0.25, 0.45, per_class=2, per_image=3).apply(rows(9))[0]
    assert limited[:, 5].tolist() == [0, 1, 2]
    assert len(NmsRule(0.25, 0.45, per_class=2).apply(rows(9))[0]) == 6
    assert len(NmsRule(0.25, 0.45, agnostic=True, per_class=2).apply(rows(9))[0]) == 2
    many = torch.zeros(1, 1200, 6)
    many[0, :, 0] = 10 * torch.arange(1200)
    many[..., 2:] = 1
    assert len(NmsRule(0.25, per_class=1100, per_image=1100).apply(many)[0]) == 1100
    assert len(NmsRule(0.25).apply(many)[0]) == 1000


def test_match_is_one_to_one():
    a, b = match(boxes(A), boxes(A, A), FP32)
    assert a.sum() == b.sum() == 1


def test_choose_conf_keeps_enough_rows():
    r = rows(400)
    assert choose_conf([r]) == 0.25  # more than a hundred are above
    r[..., 4] *= 0.1
    assert 0 < choose_conf([r]) < 0.1


# ---- inputs ---------------------------------------------------------------------------------------------------------


def test_random_images_have_statistics_of_real_images():
    samples = IMAGES.load(4, 96, 128)
    images = random_images(8, samples, 96, 128)
    expected = torch.from_numpy(samples).reshape(-1, 3).float() / 255
    torch.testing.assert_close(images.mean((0, 2, 3)), expected.mean(0), atol=0.06, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), expected.std(0), atol=0.06, rtol=0)
    assert images.min() >= 0 and images.max() <= 1


def test_verification_inputs_have_several_sizes():
    shapes = [tuple(x.shape) for x in verification_inputs(IMAGES, GraphShape(1, 96, 128, True, 32))]
    assert len({s[2:] for s in shapes}) >= 4 and {s[0] for s in shapes} >= {1, 2, 3}
    assert any(h == w for _, _, h, w in shapes) and any(h != w for _, _, h, w in shapes)


def test_find_images_prefers_dataset(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "set.yaml").write_text("path: .\nval: val\ntrain: val\nnames: [a]\n")
    data = str(tmp_path / "set.yaml")
    with pytest.raises(DataError, match="no images"):
        find_images(data, {})
    assert find_images("", {"data": data}).origin == "data/images (shipped)"
    import cv2

    cv2.imwrite(str(tmp_path / "val/p.png"), np.zeros((20, 30, 3), np.uint8))
    (tmp_path / "val/broken.png").write_bytes(b"no image")
    for source in (
        find_images(data, {}),
        find_images("", {"data": data}),
        find_images("", {"opt": {"data": data}}),
    ):
        assert source.origin == "set.yaml, val"
        assert source.load(4, 32, 64).shape == (1, 32, 64, 3)
    assert find_images("", {"data": str(tmp_path / "gone.yaml")}).origin == "data/images (shipped)"
