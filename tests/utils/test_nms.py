"""NMS: agreement with plain greedy NMS, order, limits, and cost."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from utils import nms
from utils.errors import UserError
from utils.files import ROOT
from utils.nms import non_max_suppression


def predictions(rows, nc):
    """Return (1, N, 5 + nc) from (cx, cy, w, h, objectness, {class: score})."""
    out = torch.zeros(1, len(rows), 5 + nc)
    for k, (*box, scores) in enumerate(rows):
        out[0, k, :5] = torch.tensor(box)
        for number, score in scores.items():
            out[0, k, 5 + number] = score
    return out


def crowd(seed, images, rows, nc, objects=30):
    """Return clusters of boxes with random confidences, some of them equal."""
    rng = np.random.default_rng(seed)
    center, side = rng.uniform(40, 600, (objects, 2)), rng.uniform(20, 200, (objects, 2))
    which = rng.integers(0, objects, (images, rows))
    xy = center[which] + rng.normal(0, 6, (images, rows, 2))
    wh = side[which] * np.exp(rng.normal(0, 0.1, (images, rows, 2)))
    scores = np.round(rng.uniform(0, 1, (images, rows, 1 + nc)), 2)
    return torch.from_numpy(np.concatenate((xy, wh, scores), 2).astype(np.float32))


def plain_greedy(rows, conf, iou, agnostic, multi_label, max_det):
    """Plain greedy NMS in float64, box by box."""
    found = []
    for cx, cy, w, h, objectness, *scores in rows.tolist():
        if objectness <= np.float32(conf):
            continue
        products = (np.float32(objectness) * np.array(scores, np.float32)).tolist()
        labels = range(len(scores)) if multi_label else [int(np.argmax(products))]
        found += [
            (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2, products[c], c) for c in labels if products[c] > conf
        ]
    kept = []
    for box in sorted(found, key=lambda b: -b[4]):
        if all(overlap(box, other) <= iou or (not agnostic and box[5] != other[5]) for other in kept):
            kept.append(box)
    return np.array(kept[:max_det]).reshape(-1, 6)


def overlap(a, b):
    w = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)


@pytest.mark.parametrize("max_det", [1, 7, 1000])
@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("chunk", [1, 16, 512])
def test_equals_plain_greedy(monkeypatch, max_det, agnostic, multi_label, chunk):
    monkeypatch.setattr(nms, "CPU_CHUNK", chunk)
    prediction = crowd(1, 2, 150, 3)
    output = non_max_suppression(prediction, 0.2, 0.5, None, agnostic, multi_label, (), max_det)
    for rows, got in zip(prediction, output):
        expected = plain_greedy(rows, 0.2, 0.5, agnostic, multi_label, max_det)
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, atol=1e-3)


def test_cost_follows_what_is_kept(monkeypatch):
    compared = []

    def counting(boxes, scores, threshold):
        compared.append(len(boxes))
        return real(boxes, scores, threshold)

    real = nms.suppress
    monkeypatch.setattr(nms, "suppress", counting)
    rows = torch.rand(1, 20000, 7, generator=torch.Generator().manual_seed(0))
    rows[..., :2] *= 6000  # hardly any overlap: the first boxes are enough
    rows[..., 2:4] *= 10
    assert len(non_max_suppression(rows, 0.001, 0.6, multi_label=True)[0]) == 300
    assert sum(compared) < 1000


def test_equal_confidences_keep_the_order_of_rows():
    rows = [(50, 50, 20, 20, 1.0, {0: 0.5}), (52, 50, 20, 20, 1.0, {0: 0.5}), (300, 50, 20, 20, 1.0, {0: 0.5})]
    (out,) = non_max_suppression(predictions(rows, 2), 0.1, 0.5)
    assert out[:, 0].tolist() == [40, 290]


def test_thresholds_are_strict():
    rows = [(50, 50, 20, 20, 0.5, {0: 1.0}), (150, 50, 20, 20, 1.0, {0: 0.5}), (250, 50, 20, 20, 0.75, {0: 0.75})]
    (out,) = non_max_suppression(predictions(rows, 2), 0.5, 0.5)
    assert out[:, 4].tolist() == [0.5625]
    # two boxes with an IoU of exactly one half
    rows = [(50, 50, 100, 100, 1.0, {0: 0.9}), (50, 25, 100, 50, 1.0, {0: 0.8})]
    assert [len(non_max_suppression(predictions(rows, 2), 0.1, t)[0]) for t in (0.49, 0.5)] == [1, 2]


def test_several_classes_of_one_box():
    rows = [(50, 50, 20, 20, 1.0, {0: 0.5, 2: 0.4, 1: 0.05})]
    for multi_label, expected in ((True, [0, 2]), (False, [0])):
        (out,) = non_max_suppression(predictions(rows, 3), 0.1, 0.5, multi_label=multi_label)
        assert out[:, 5].tolist() == expected
    (out,) = non_max_suppression(predictions(rows, 3), 0.1, 0.5, classes=[2], multi_label=True)
    for classes in (2, torch.tensor(2), np.array([2.0]), {2}):
        assert torch.equal(non_max_suppression(predictions(rows, 3), 0.1, 0.5, classes, multi_label=True)[0], out)
    assert out[:, 5].tolist() == [2]
    # without multi_label only the best class counts, whether selected or not
    assert len(non_max_suppression(predictions(rows, 3), 0.1, 0.5, classes=[2])[0]) == 0


def test_certain_labels_win_and_obey_the_class_filter():
    rows = predictions([(50, 50, 20, 20, 1.0, {1: 0.9}), (200, 50, 20, 20, 1.0, {0: 0.9})], 2)
    labels = [torch.tensor([[1, 51, 50, 20, 20], [0, 400, 400, 10, 10]])]
    (out,) = non_max_suppression(rows, 0.25, 0.45, labels=labels)
    assert out[:, 4].tolist() == pytest.approx([1, 1, 0.9])
    assert sorted(out[:2, 0].tolist()) == [41, 395]
    (out,) = non_max_suppression(rows, 0.25, 0.45, classes=[1], labels=labels)
    assert out.tolist() == [[41, 40, 61, 60, 1, 1]]
    (out,) = non_max_suppression(rows * 0, 0.25, 0.45, labels=labels)
    assert len(out) == 2


@pytest.mark.parametrize("shape", [(2, 0, 8), (2, 50, 8), (0, 10, 8)])
def test_nothing_to_keep(shape):
    output = non_max_suppression(torch.zeros(shape))
    assert len(output) == shape[0]
    assert all(rows.shape == (0, 6) and rows.dtype == torch.float32 for rows in output)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_input(dtype):
    prediction = crowd(3, 1, 100, 80).to(dtype)
    (low,), (full,) = non_max_suppression(prediction), non_max_suppression(prediction.float())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, full, rtol=0, atol=0)


def test_more_candidates_than_the_limit(monkeypatch):
    prediction = crowd(4, 1, 300, 2)
    monkeypatch.setattr(nms, "MAX_CANDIDATES", 50)
    (out,) = non_max_suppression(prediction, 0.001, 0.5, multi_label=True)
    scores = (prediction[0, :, 5:] * prediction[0, :, 4:5]).flatten().sort(descending=True).values
    assert 0 < len(out) <= 50 and out[-1, 4] >= scores[49]


def test_first_entry_of_a_model_output_is_taken():
    prediction = crowd(5, 1, 20, 2)
    torch.testing.assert_close(non_max_suppression((prediction, [prediction]))[0], non_max_suppression(prediction)[0])


BAD = [
    # arguments, words of the message
    ({"conf_thres": -0.1}, "conf-thres: -0.1"),
    ({"conf_thres": float("nan")}, "conf-thres: nan"),
    ({"iou_thres": 45}, "iou-thres: 45"),
    ({"max_det": -1}, "max-det: -1"),
    ({"prediction": torch.zeros(2, 5, 5)}, r"\(2, 5, 5\)"),
    ({"prediction": torch.zeros(5, 8)}, r"\(5, 8\)"),
    ({"labels": [torch.zeros(0, 5)]}, "labels of 1 images for 2"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_wrong_arguments(arguments, words):
    with pytest.raises(UserError, match=words):
        non_max_suppression(**{"prediction": torch.zeros(2, 5, 8), **arguments})


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True])
def test_cuda_agrees_with_cpu(half):
    prediction = crowd(6, 4, 6000, 20)
    prediction = prediction.half() if half else prediction
    for multi_label in (False, True):
        on_cpu = non_max_suppression(prediction, 0.01, 0.6, multi_label=multi_label)
        on_gpu = non_max_suppression(prediction.cuda(), 0.01, 0.6, multi_label=multi_label)
        for a, b in zip(on_cpu, on_gpu):
            torch.testing.assert_close(b.cpu(), a, rtol=0, atol=1e-3)


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_package_is_imported_where_its_operator_library_cannot_be_loaded(tmp_path, content):
    if content is not None:
        (tmp_path / "_C.so").write_bytes(content)
    code = f"""
import importlib.util, logging, sys, torch
from types import SimpleNamespace
logging.basicConfig(level=logging.DEBUG)
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: SimpleNamespace(origin={str(tmp_path / "__init__.py")!r})
from utils import nms
importlib.util.find_spec = find_spec
boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8], [5, 5, 9, 9]])
print("torchvision" in sys.modules, nms.suppress(boxes, torch.tensor([0.5, 0.6, 0.4]), 0.5).tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True [1, 2]\n", done.stderr
    assert "importing the package" in done.stderr
    assert ("_C.so: cannot be loaded" in done.stderr) == (content is not None)
