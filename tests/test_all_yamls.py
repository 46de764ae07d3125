"""Every model YAML with a backbone row builds, learns for a step, validates a rectangular image, and detects."""

from __future__ import annotations

import pytest
import torch

from engine.cli.config import Hyperparameters
from engine.train.optimizer import build_optimizer, parameter_groups
from models.fuse import reparameterize
from models.losses.base import LossOptions
from models.yolo import DetectionModel
from utils.files import ROOT
from utils.nms import non_max_suppression

BACKBONE_YAMLS = sorted(p.name for p in (ROOT / "models").glob("yolov5-*.yaml"))
# one of each family in the default run; the wider necks change nothing but the widths
QUICK = {"yolov5-riformer.yaml", "yolov5-revvit.yaml", "yolov5-nextvit.yaml", "yolov5-timm.yaml"}


def test_every_family_is_there():
    assert set(BACKBONE_YAMLS) >= QUICK
    for family in ("riformer", "revvit", "repmlp", "nextvit"):
        assert {f"yolov5-{family}.yaml", f"yolov5-{family}-s.yaml"} <= set(BACKBONE_YAMLS)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in BACKBONE_YAMLS]
)
def test_step_validation_and_detection(name):
    torch.manual_seed(0)
    model = DetectionModel(ROOT / "models" / name, nc=3)
    hyp = Hyperparameters.from_yaml(ROOT / "data/hyps/hyp.scratch-low.yaml").to_dict()
    criterion = model.head.loss(hyp, LossOptions(96))
    optimizer = build_optimizer("SGD", parameter_groups(model, 5e-4), 0.01, 0.9)

    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.4, 0.4], [1, 2, 0.3, 0.6, 0.2, 0.5]])
    total, parts = criterion(model.train()(torch.rand(2, 3, 96, 96)), targets)
    total.backward()
    assert torch.isfinite(parts).all()
    # RIFormer normalizes each output separately, and these necks do not read its stride-4 one
    unread = ("model.0.norm0.",) if "riformer" in name else ()
    read = {n: p.grad for n, p in model.named_parameters() if not n.startswith(unread)}
    assert [n for n, grad in read.items() if grad is None or not torch.isfinite(grad).all()] == []
    optimizer.step()

    model.eval()
    image = torch.rand(1, 3, 64, 128)
    with torch.no_grad():
        decoded, raw = model(image)
        deployed, _ = reparameterize(model.fuse())(image)
    cells = sum((64 // s) * (128 // s) for s in model.stride.int().tolist())
    assert decoded.shape == (1, raw[0].shape[1] * cells, 8)
    torch.testing.assert_close(deployed, decoded, rtol=1e-3, atol=5e-3)
    (rows,) = non_max_suppression(decoded, conf_thres=0.0001)
    assert rows.shape[1] == 6 and torch.isfinite(rows).all()
