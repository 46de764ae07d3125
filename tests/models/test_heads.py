"""The anchor-free head: structure, priors, decoding, and its YAMLs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from models.build.spec import load_model_spec
from models.heads import AnchorFreeDetect
from models.losses.base import LossOptions
from models.yolo import DetectionModel, scaled_image
from utils.errors import SpecError
from utils.files import ROOT
from utils.nms import non_max_suppression

FREE_YAMLS = sorted(path.name for path in (ROOT / "models").glob("*-free.yaml"))
STRIDES = (8, 16, 32)


def test_every_family_has_a_free_form():
    families = ("n", "s", "m", "l", "x", "-riformer", "-revvit", "-repmlp", "-nextvit", "-timm")
    assert sorted(f"yolov5{family}-free.yaml" for family in families) == FREE_YAMLS


@pytest.mark.parametrize("name", FREE_YAMLS)
def test_a_free_yaml_equals_its_anchor_form_with_head_free(name):
    written = load_model_spec(ROOT / "models" / name).to_dict()
    assert load_model_spec(ROOT / "models" / name.replace("-free", "")).with_head("free").to_dict() == written


def test_free_yaml_builds_the_same_weights_as_head_free():
    models = []
    for cfg, head in (("yolov5n-free.yaml", None), ("yolov5n.yaml", "free")):
        torch.manual_seed(0)
        models.append(DetectionModel(cfg, nc=3, head=head).state_dict())
    assert models[0].keys() == models[1].keys()
    torch.testing.assert_close(models[0], models[1], rtol=0, atol=0)


def test_head_anchor_restores_an_anchor_head():
    model = DetectionModel("yolov5n-free.yaml", nc=3, head="anchor")
    assert model.head.kind == "anchor"
    assert model.head.anchor_sizes.shape == (3, 3, 2)
    assert DetectionModel(model.yaml).head.kind == "anchor"


MISTAKES = [
    ("Detect, [nc, anchors]", "the file has no key 'anchors'; add it, or use AnchorFreeDetect"),
    ("AnchorFreeDetect, [nc, {reg_mx: 8}]", "unknown argument 'reg_mx'; allowed: reg_max; did you mean 'reg_max'?"),
    ("AnchorFreeDetect, [nc, {reg_max: 0}]", "reg_max is 0; allowed: integers from 1 to 64"),
    ("AnchorFreeDetect, [nc, 8, 9]", "3 arguments are given"),
    ("AnchorFreeDetect, [7]", "argument 1 (nc) is 7; the model has 80 classes"),
    ("AnchorFreeDetect, []", "argument 1 (nc) is missing"),
]


@pytest.mark.parametrize(("row", "message"), MISTAKES)
def test_mistakes_in_the_row_are_reported_with_their_line(row, message, tmp_path):
    text = (ROOT / "models/yolov5n-free.yaml").read_text().replace("AnchorFreeDetect, [nc]", row)
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(SpecError) as error:
        DetectionModel(tmp_path / "my.yaml")
    assert message in str(error.value)
    assert f"my.yaml:{len(text.splitlines())}: row 24" in str(error.value)


def test_head_needs_a_head_row(tmp_path):
    text = (ROOT / "models/yolov5n.yaml").read_text().splitlines()
    (tmp_path / "my.yaml").write_text("\n".join(text[:-1]))
    with pytest.raises(SpecError, match=r"--head free: the last row is C3, not a head \(Detect, AnchorFreeDetect\)"):
        DetectionModel(tmp_path / "my.yaml", head="free")


@pytest.mark.parametrize(("bins", "cells"), [(16, 1.54), (8, 1.40), (1, 2.13)])
def test_biases_start_with_the_priors(bins, cells):
    head = AnchorFreeDetect(4, (8, 16, 32), STRIDES, bins).eval()
    for parameter in head.parameters():
        parameter.data.mul_(parameter.ndim == 1)  # constant outputs: biases alone
    for module in (*head.box, *head.cls):
        torch.nn.init.zeros_(module[-1].weight)
    decoded, _ = head([torch.rand(1, c, 64 // s, 64 // s) for c, s in zip((8, 16, 32), STRIDES)])
    per_level = [(64 // s) ** 2 for s in STRIDES]
    for rows, stride in zip(decoded[0].split(per_level), STRIDES):
        torch.testing.assert_close(rows[:, 2:4] / stride, torch.full_like(rows[:, 2:4], 2 * cells), rtol=0.01, atol=0)
        prior = math.log(5 / 4 / (640 / stride) ** 2)
        torch.testing.assert_close(rows[:, 4], torch.full_like(rows[:, 4], prior).sigmoid())


def test_decode_follows_the_equations():
    generator = torch.Generator().manual_seed(0)
    head = AnchorFreeDetect(3, (8, 16, 32), STRIDES, 16)
    raw = [torch.randn(2, 1, 48 // s or 1, 64 // s, 67, generator=generator) for s in STRIDES]
    decoded = head.decode(raw)
    row = 0
    for level, stride in zip(raw, STRIDES):
        for y in range(level.shape[2]):
            for x in range(level.shape[3]):
                z = level[1, 0, y, x].double()
                left, top, right, bottom = (z[:64].view(4, 16).softmax(1) * torch.arange(16)).sum(1) * stride
                px, py, s = (x + 0.5) * stride, (y + 0.5) * stride, z[64:].sigmoid()
                box = torch.stack((px + (right - left) / 2, py + (bottom - top) / 2, left + right, top + bottom))
                torch.testing.assert_close(decoded[1, row, :4].double(), box, rtol=1e-5, atol=1e-4)
                torch.testing.assert_close(decoded[1, row, 4].double(), s.max(), rtol=1e-5, atol=0)
                torch.testing.assert_close((decoded[1, row, 4] * decoded[1, row, 5:]).double(), s, rtol=1e-5, atol=0)
                row += 1
    assert decoded.shape == (2, row, 8)


def test_confidences_that_underflow_stay_finite():
    head = AnchorFreeDetect(2, (8,), (8,), 16)
    raw = torch.full((1, 1, 2, 2, 66), -200.0)
    decoded = head.decode([raw])
    assert torch.isfinite(decoded).all()
    assert (decoded[..., 5:] <= 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_confidences_of_any_logits(dtype, monkeypatch):
    """Also if a runtime computes in float16, where exp overflows above 11.1 and is 0 below -17.4."""
    promote = torch.promote_types
    monkeypatch.setattr(torch, "promote_types", lambda a, b: dtype if a == dtype else promote(a, b))
    head = AnchorFreeDetect(3, (8,), (8,), 1)
    classes = torch.cartesian_prod(*[torch.tensor([-14.0, -11.5, -5.0, 0.0, 6.0, 13.0, 16.0])] * 3).to(dtype)
    raw = torch.cat((classes.new_zeros(len(classes), 4), classes), 1).view(1, 1, 7, 49, 7)
    decoded = head.decode([raw])[0].float()
    rtol, atol = (2e-6, 0) if dtype == torch.float32 else (0.03, 0.01)
    expected = classes.double().sigmoid()
    torch.testing.assert_close((decoded[:, 4:5] * decoded[:, 5:]).double(), expected, rtol=rtol, atol=atol)
    assert (decoded[:, 4:] <= 1).all() and (decoded[:, 5:].amax(1) > 0.99).all()


@pytest.mark.parametrize("name", ["yolov5n.yaml", "yolov5n-free.yaml"])
def test_boxes_are_float32_under_autocast(name):
    torch.manual_seed(0)
    head = DetectionModel(name, nc=3).head.eval()
    raw = [level.bfloat16() for level in head.raw([torch.randn(1, c, 8, 8) for c in (64, 128, 256)])]
    head.raw = lambda features: raw
    plain, _ = head([])
    with torch.autocast("cpu", torch.bfloat16):
        under, _ = head([])
    torch.testing.assert_close(under, plain, rtol=0, atol=0)


def test_nms_keeps_the_class_confidences():
    head = AnchorFreeDetect(3, (8,), (8,), 16)
    raw = torch.full((1, 1, 4, 4, 67), -9.0)
    raw[0, 0, 1, 2, 64:] = torch.tensor([0.5, 2.0, -1.0])
    (rows,) = non_max_suppression(head.decode([raw]), conf_thres=0.2, multi_label=True, iou_thres=0.9)
    torch.testing.assert_close(rows[:, 4], torch.tensor([2.0, 0.5, -1.0]).sigmoid(), rtol=1e-5, atol=1e-6)
    assert rows[:, 5].tolist() == [1, 0, 2]


@pytest.mark.parametrize("bins", [16, 8, 1])
def test_every_parameter_gets_a_gradient_without_targets(bins):
    model = DetectionModel(load_model_spec("yolov5n.yaml").with_head("free").to_dict(), nc=2)
    model.model[-1] = AnchorFreeDetect(2, [c[0].conv.in_channels for c in model.head.box], STRIDES, bins)
    loss = model.head.loss({}, LossOptions(64))
    loss(model.train()(torch.rand(2, 3, 64, 64)), torch.zeros(0, 6)).total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []


def test_test_time_augmentation_adds_rows_of_three_scales():
    """The first scale is the image itself without its coarsest level, the third lacks its finest level."""
    torch.manual_seed(0)
    model = DetectionModel("yolov5n-free.yaml", nc=2).eval()
    image = torch.rand(1, 3, 256, 256)
    with torch.no_grad():
        plain, _ = model(image)
        augmented, _ = model(image, augment=True)
        second, _ = model(scaled_image(image.flip(3), 0.83, 32))
    fine = 32**2 + 16**2
    assert plain.shape[1] == fine + 8**2
    torch.testing.assert_close(augmented[:, :fine], plain[:, :fine], rtol=0, atol=0)
    middle = augmented[:, fine : fine + second.shape[1]]
    torch.testing.assert_close(middle[..., 0], 256 - second[..., 0] / 0.83, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(middle[..., 1:4], second[..., 1:4] / 0.83, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(middle[..., 4:], second[..., 4:], rtol=0, atol=0)
    assert augmented.shape[1] > fine + second.shape[1]


def test_fused_model_gives_equal_outputs():
    torch.manual_seed(0)
    model = DetectionModel("yolov5n-free.yaml", nc=2)
    with torch.no_grad():
        model.train()(torch.rand(4, 3, 64, 64))  # statistics that are not 0 and 1
        image = torch.rand(1, 3, 64, 96)
        before, _ = model.eval()(image)
        after, _ = model.fuse()(image)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


def test_yaml_of_a_path_is_read(tmp_path: Path):
    text = (ROOT / "models/yolov5n-free.yaml").read_text().replace("[nc]", "[nc, {reg_max: 8}]")
    (tmp_path / "eight.yaml").write_text(text)
    model = DetectionModel(tmp_path / "eight.yaml", nc=2)
    assert model.head.reg_max == 8
    assert DetectionModel(model.yaml).head.reg_max == 8
