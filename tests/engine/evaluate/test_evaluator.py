"""Tests of validation: metrics of a detector with known detections, output files, tasks, user errors."""

from __future__ import annotations

import json
import logging
import os

import cv2
import numpy as np
import pytest
import torch

import val
from data.config import load_data_config
from data.labels.labels import load_annotations
from engine.cli.config import ValConfig
from engine.cli.parser import run_main
from engine.evaluate.evaluator import EvalOptions, build_loader, evaluate, input_side, validate, warn_without_effect
from engine.evaluate.outputs import TextSink
from engine.evaluate.size_sweep import study
from engine.runtimes.base import RawRuntime
from engine.runtimes.pytorch import PyTorchRuntime
from engine.runtimes.registry import choose_weights
from models.checkpoint.io import write_checkpoint
from models.loading import load_detector
from models.losses.anchor_based import DetectionLoss, LossConfig
from models.yolo import DetectionModel
from tests.helpers.detection_data import NAMES, SIZES, boxes_of, write_data
from utils.boxes import xyxy2xywh
from utils.errors import CheckpointError, ConfigError, UserError
from utils.structures import to_unit

SIDE = 64


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A yolov5n checkpoint with random weights that detects something everywhere."""
    torch.manual_seed(0)
    model = DetectionModel("models/yolov5n.yaml", nc=3).eval()
    with torch.no_grad():
        for conv in model.head.m:
            conv.bias.view(3, -1)[:, 4:] += 4
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    content = {"spec": model.yaml, "names": NAMES, "stride": model.stride.tolist(), "state": model.state_dict()}
    write_checkpoint(path, content)
    return path


class Oracle:
    """A runtime with fixed detections: per image (n, 6) xyxy in original pixels, confidence, class."""

    names, stride, imgsz, fixed_batch, device = NAMES, 32, None, None, torch.device("cpu")

    def __init__(self, loader, answers):
        self.batches = iter(list(loader))
        self.answers = answers

    def __call__(self, images):
        batch = next(self.batches)
        assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1
        decoded = torch.zeros(len(images), 20, 8)
        for k, (path, fit) in enumerate(zip(batch.paths, batch.shapes)):
            rows = torch.as_tensor(self.answers(int(path[-5])), dtype=torch.float32).reshape(-1, 6)
            scale, (left, top) = fit.ratio[0], fit.pad
            boxes_xyxy = rows[:, :4] * scale + torch.tensor([left, top, left, top])
            decoded[k, : len(rows), :4] = xyxy2xywh(boxes_xyxy)
            decoded[k, : len(rows), 4] = rows[:, 4]
            decoded[k, torch.arange(len(rows)), 5 + rows[:, 5].long()] = 1
        return decoded

    def warmup(self, shape):
        pass


def truth(number):
    """Return the labels of an image as detections with confidence 0.9."""
    height, width = SIZES[number]
    found = []
    for label, cx, cy, w, h in boxes_of(number):
        x, y, w, h = cx * width, cy * height, w * width, h * height
        found.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2, 0.9, label])
    return np.array(found).reshape(-1, 6)


def moved(number):
    """Return every box shifted by a fifth of its width: IoU 2 / 3."""
    found = truth(number)
    found[:, [0, 2]] += 0.2 * (found[:, 2:3] - found[:, :1])
    return found


def wrong_class(number):
    found = truth(number)
    found[:, 5] = (found[:, 5] + 1) % 3
    return found


def loader_for(data_file, **changes):
    config = ValConfig(data=str(data_file), imgsz=SIDE, batch_size=4, workers=0, **changes)
    annotations = load_annotations(load_data_config(data_file).split("val"), 3, progress=False)
    return build_loader(config, annotations, Oracle([], None), rect=True)


def judged(data_file, answers, **options):
    loader = loader_for(data_file)
    return evaluate(Oracle(loader, answers), loader, EvalOptions(names=NAMES, **options))


# ---- metrics --------------------------------------------------------------------------------------------------------

FIGURES = [
    # answers, mAP50, mAP50-95, recall, what it shows
    (truth, 0.995, 0.995, 1.0, "boxes and labels are matched in original pixels, for any shape"),
    (moved, 0.995, 0.995 * 4 / 10, 1.0, "IoU 2 / 3 counts at 0.5, 0.55, 0.6 and 0.65"),
    (wrong_class, 0.0, 0.0, 0.0, "correct boxes of another class are FP"),
    (lambda n: truth(n)[:0], 0.0, 0.0, 0.0, "nothing found"),
    (lambda n: truth(n)[: n % 2 * 9], None, None, None, "some images without detections"),
]


@pytest.mark.parametrize(("answers", "map50", "mean_ap", "recall", "text"), FIGURES)
def test_metrics_of_known_answers(data_file, answers, map50, mean_ap, recall, text):
    result = judged(data_file, answers)
    assert result.images == 6 and result.nt.tolist() == [5, 5, 5]
    assert result.classes.tolist() == [0, 1, 2] and len(result.class_maps) == 3
    if map50 is None:
        assert 0 < result.map50 < 0.9
        return
    assert (result.map50, result.mr) == pytest.approx((map50, recall), abs=2e-3)
    assert result.map == pytest.approx(mean_ap, abs=0.03)  # rounding to pixels changes IoUs near a threshold
    assert result.losses == (0, 0, 0) and min(result.speeds) > 0


def test_single_class_ignores_the_class(data_file):
    sources = load_data_config(data_file).split("val")
    annotations = load_annotations(sources, 3, single_cls=True, progress=False)
    loader = build_loader(ValConfig(imgsz=SIDE, batch_size=4, workers=0), annotations, Oracle([], None), rect=True)
    result = evaluate(Oracle(loader, wrong_class), loader, EvalOptions(names={0: "item"}, single_cls=True))
    assert result.map50 == pytest.approx(0.995, abs=2e-3)


def test_hybrid_labels_are_found(data_file):
    result = judged(data_file, lambda n: truth(n)[:0], hybrid=True)
    assert result.map50 == pytest.approx(0.995, abs=2e-3)


def test_max_det_cuts_each_image(data_file):
    result = judged(data_file, truth, max_det=1)
    assert result.mr <= 5 / 15 + 0.01


def test_classes_without_labels_get_the_mean(data_file):
    loader = loader_for(data_file)
    result = evaluate(Oracle(loader, truth), loader, EvalOptions(names={**NAMES, 3: "ghost"}))
    assert result.nt.tolist() == [5, 5, 5, 0] and result.class_maps[3] == result.map


def test_table_is_logged(data_file, caplog):
    caplog.set_level(logging.INFO)
    judged(data_file, truth, class_rows=True)
    lines = [line.split() for line in caplog.text.splitlines()]
    rows = [line[-7:] for line in lines if line and line[-1].startswith("0.99")]
    assert [row[0] for row in rows] == ["all", "disc", "bar", "dot"]
    assert rows[0][1:3] == ["6", "15"]


def test_confidence_with_the_best_f1_is_logged(data_file, caplog):
    """Without the rows of classes, as val.py logs from 50 classes on; nothing is logged if F1 is 0 everywhere."""
    caplog.set_level(logging.INFO)
    result = judged(data_file, truth, verbose=True)
    assert 0 < result.best_conf < 1
    assert f"Best F1 at confidence {result.best_conf:.3f}" in caplog.messages
    assert not any("disc" in message for message in caplog.messages)
    caplog.clear()
    assert judged(data_file, lambda n: truth(n)[:0], verbose=True).best_conf is None
    assert not any("Best F1" in message for message in caplog.messages)


def test_images_and_charts(data_file, tmp_path):
    result = judged(data_file, moved, plots=True, folder=tmp_path)
    assert result.confusion.tolist() == (5 * np.eye(4) * [1, 1, 1, 0]).tolist()
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {
        "val_batch0_labels.jpg", "val_batch0_pred.jpg", "val_batch1_labels.jpg", "val_batch1_pred.jpg",
        "PR_curve.png", "P_curve.png", "R_curve.png", "F1_curve.png", "confusion_matrix.png",
    }  # fmt: skip
    assert all(cv2.imread(str(p)) is not None for p in tmp_path.iterdir())


# ---- runtime --------------------------------------------------------------------------------------------------------


def test_losses_come_from_the_raw_outputs(data_file, weights):
    model = load_detector(weights)
    head = model.head
    strides = head.stride.view(-1, 1, 1)
    criterion = DetectionLoss(head.anchors * strides, head.stride, LossConfig(autobalance=True))
    balance = criterion.balance.clone()
    loader = loader_for(data_file)
    runtime = PyTorchRuntime.from_model(model, torch.device("cpu"))
    assert isinstance(runtime, RawRuntime)
    result = evaluate(runtime, loader, EvalOptions(names=NAMES), criterion=criterion)
    expected = torch.stack([criterion.eval()(model(to_unit(b.images))[1], b.targets).parts for b in loader]).mean(0)
    torch.testing.assert_close(torch.tensor(result.losses), expected.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(criterion.balance, balance, rtol=0, atol=0)


def test_criterion_stays_in_training_mode(data_file):
    criterion = DetectionLoss([[10, 13]] * 3, [8, 16, 32], LossConfig()).train()
    with pytest.raises(TypeError, match="raw outputs"):
        evaluate(Oracle([], truth), loader_for(data_file), EvalOptions(names=NAMES), criterion=criterion)
    assert criterion.training


def test_reparameterized_form_gives_the_same_boxes(weights):
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    runtime = PyTorchRuntime([weights], torch.device("cpu"))
    assert not any(k.endswith("running_mean") for k in runtime.models[0].state_dict())
    expected = load_detector(weights)(to_unit(images))[0]
    torch.testing.assert_close(runtime(images), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(runtime(to_unit(images)), runtime(images), rtol=0, atol=0)


def test_a_model_in_training_is_not_changed(weights):
    model = load_detector(weights)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    PyTorchRuntime.from_model(model, torch.device("cpu"), autocast=torch.bfloat16)(torch.zeros(1, 3, 64, 64))
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)
    with pytest.raises(ValueError, match="training mode"):
        PyTorchRuntime.from_model(model.train(), torch.device("cpu"))


def test_ensemble_puts_the_rows_one_after_the_other(weights):
    images = torch.rand(1, 3, 64, 64)
    one, two = (PyTorchRuntime([weights] * k, torch.device("cpu"))(images) for k in (1, 2))
    torch.testing.assert_close(two, torch.cat((one, one), 1))
    torch.testing.assert_close(one, PyTorchRuntime([weights], torch.device("cpu"))(images))


def test_augmentation_adds_rows(weights):
    images = torch.rand(1, 3, 64, 64)
    plain = PyTorchRuntime([weights], torch.device("cpu"))(images)
    augmented = PyTorchRuntime([weights], torch.device("cpu"), augment=True)(images)
    assert augmented.shape[1] > plain.shape[1] and augmented.shape[2] == 8


NO_EFFECT = [
    ({"save_conf": True}, ["save-conf"]),
    ({"save_conf": True, "save_hybrid": True}, []),
    (
        {"task": "speed", "conf_thres": 0.5, "iou_thres": 0.5, "save_json": True},
        ["conf-thres", "iou-thres", "save-json"],
    ),
    ({"task": "study", "imgsz": 96, "save_txt": True, "save_hybrid": True}, ["imgsz", "save-txt", "save-hybrid"]),
    ({"tile": 64, "batch_size": 2, "workers": 0}, ["batch-size", "workers"]),
    ({"batch_size": 2, "workers": 0, "imgsz": 96, "save_json": True, "save_txt": True}, []),
]


@pytest.mark.parametrize(("options", "named"), NO_EFFECT)
def test_options_without_effect_are_named(caplog, options, named):
    warn_without_effect(ValConfig(**options))
    assert [message.split(" has no effect: ")[0] for message in caplog.messages] == [f"--{name}" for name in named]


def test_half_on_a_cpu_is_logged_as_ignored(weights, caplog):
    runtime = PyTorchRuntime([weights], torch.device("cpu"), half=True)
    assert runtime.dtype == torch.float32 and "ignored on a CPU" in caplog.text


def test_ensembles_need_equal_classes(weights, tmp_path):
    model = load_detector(weights)
    content = {"spec": model.yaml, "stride": model.stride.tolist(), "state": model.state_dict()}
    other = write_checkpoint(tmp_path / "other.pt", {**content, "names": {**NAMES, 1: "rod"}})
    with pytest.raises(CheckpointError, match=r"other\.pt: class 1 is 'rod', in .*tiny\.pt class 1 is 'bar'"):
        PyTorchRuntime([weights, other], torch.device("cpu"))


@pytest.mark.parametrize(("wanted", "used"), [(64, 64), (65, 96), (33, 64), (1, 32)])
def test_sides_are_rounded_up_to_the_grid(wanted, used):
    assert input_side(wanted, Oracle([], None)) == used


def test_batches_are_rectangles_with_half_a_stride_of_margin(data_file):
    # Sorted by shape: 50 x 111, 60 x 80 and two squares; then 97 x 71 and 80 x 60, which need 48 + 16 columns.
    shapes = [tuple(b.images.shape) for b in loader_for(data_file)]
    assert shapes == [(4, 3, 96, 96), (2, 3, 96, 64)]
    config = ValConfig(imgsz=128, batch_size=1, workers=0)
    annotations = load_annotations(load_data_config(data_file).split("val"), 3, progress=False)
    loader = build_loader(config, annotations, Oracle([], None), rect=True)
    assert next(tuple(b.images.shape[2:]) for b in loader) == (96, 160)  # 50 x 111: 58 + 16 rows, 128 + 16 columns
    loader = build_loader(config, annotations, Oracle([], None), rect=False)
    assert {tuple(b.images.shape[2:]) for b in loader} == {(128, 128)}


def test_fixed_inputs_decide(data_file):
    fixed = Oracle([], None)
    fixed.imgsz, fixed.fixed_batch = (96, 96), 2
    assert input_side(640, fixed) == 96
    annotations = load_annotations(load_data_config(data_file).split("val"), 3, progress=False)
    loader = build_loader(ValConfig(imgsz=96, workers=0), annotations, fixed, rect=True)
    assert {tuple(b.images.shape) for b in loader} == {(2, 3, 96, 96)}
    fixed.imgsz = (96, 64)
    with pytest.raises(ConfigError, match="96 x 64"):
        input_side(640, fixed)


# ---- val.py ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(data_file, weights, tmp_path):
    """Return a function that runs val.py with small defaults."""

    def go(**options):
        usual = {"data": str(data_file), "weights": [str(weights)], "imgsz": SIDE, "batch_size": 4, "workers": 0}
        return val.run(**{**usual, "project": str(tmp_path / "runs"), "device": "cpu", **options})

    return go


def test_a_whole_run(command, tmp_path):
    result = command(save_txt=True, save_conf=True, save_json=True, conf_thres=0.01)
    assert result.images == 6 and len(result.coco) == 12
    folder = tmp_path / "runs/exp"
    for name in ("PR_curve.png", "val_batch0_pred.jpg", "tiny_predictions.json"):
        assert (folder / name).is_file()
    assert len(list((folder / "labels").iterdir())) == 6
    rows = np.loadtxt(folder / "labels/p0.txt", ndmin=2)
    assert rows.shape[1] == 6 and rows[:, 1:].min() >= 0 and rows[:, 1:].max() <= 1
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["exp"]
    results = json.loads((folder / "tiny_predictions.json").read_text())
    assert {r["image_id"] for r in results} == {1, 2, 3, 4, 5, 6}
    command(name="exp")
    assert (tmp_path / "runs/exp2/F1_curve.png").is_file()


def test_saved_labels_are_found_again(data_file, tmp_path):
    sink = TextSink()
    judged(data_file, truth, sinks=(sink,))
    sink.write(tmp_path)
    for number in range(6):
        text = (tmp_path / f"p{number}.txt").read_text()
        rows = np.array([line.split() for line in text.splitlines()], float).reshape(-1, 5)
        expected = boxes_of(number)
        assert len(rows) == len(expected)
        np.testing.assert_allclose(rows[np.argsort(rows[:, 0])], expected[np.argsort(expected[:, 0])], atol=2e-3)


def test_hybrid_labels_write_files_and_raise_the_metrics(command, tmp_path):
    plain, hybrid = command(), command(save_hybrid=True)
    assert hybrid.map50 > plain.map50 + 0.5
    assert not (tmp_path / "runs/exp/labels").exists() and (tmp_path / "runs/exp2/labels/p0.txt").is_file()


def test_augmented_and_ensembled(command, weights):
    assert command(augment=True, weights=[str(weights)] * 2).images == 6


def test_speed_uses_the_thresholds_of_detection(command, tmp_path):
    (result,) = command(task="speed", save_json=True)
    assert result.confusion is None and result.coco is None
    assert list((tmp_path / "runs/exp").iterdir()) == []


def test_study_writes_a_row_per_size(data_file, weights, tmp_path):
    config = ValConfig(
        data=str(data_file), weights=[str(weights)], batch_size=4, workers=0, project=str(tmp_path), device="cpu"
    )
    (table,) = study(config, (64, 100)).values()
    written = np.loadtxt(tmp_path / "exp/study_set_tiny.txt")
    np.testing.assert_allclose(written, table, rtol=1e-3)
    assert written.shape == (2, 10) and (tmp_path / "exp/study.png").is_file()


def test_the_newest_run_is_taken(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with pytest.raises(CheckpointError, match="--weights: none given"):
        choose_weights([], tmp_path)
    for age, name in ((2, "exp"), (1, "exp2"), (3, "exp3")):
        path = tmp_path / name / "weights/best.pt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    assert choose_weights([], tmp_path) == [str(tmp_path / "exp2/weights/best.pt")]
    assert "exp2/weights/best.pt" in caplog.text
    assert choose_weights(["a.pt"], tmp_path) == ["a.pt"]
    assert choose_weights([str(tmp_path / "exp2"), str(tmp_path / "exp2/weights"), "b"], tmp_path) == [
        str(tmp_path / "exp2/weights/best.pt"), str(tmp_path / "exp2/weights/best.pt"), "b",
    ]  # fmt: skip


MISTAKES = [
    # options, words of the message
    ({"task": "test"}, r"set\.yaml: --task test: has no split 'test:'; it has train, val"),
    ({"weights": ["nowhere.pt"]}, r"nowhere\.pt: no such file$"),
    ({"weights": ["yolov5s.pt"]}, r"yolov5s\.pt: no such file; it is a release file of YOLOv5"),
    ({"weights": ["yolov5n-cls.pt"]}, r"classification is not supported; the detector of that size is yolov5n\.pt"),
    ({"data": "nowhere.yaml"}, r"nowhere\.yaml: no such file"),
    ({"dnn": True}, "--dnn"),
    ({"device": "cuda:99"}, "--device"),
    ({"batch_size": 0}, "--batch-size"),
    ({"conf_thres": 2.0}, "--conf-thres"),
]


@pytest.mark.parametrize(("options", "words"), MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(command, tmp_path, options, words):
    with pytest.raises(UserError, match=words) as caught:
        command(**options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


OTHER_CLASSES = [
    ({0: "disc", 1: "bar"}, r"has 2 classes, .*tiny\.pt was trained for 3 \(disc, bar, dot\)"),
    ({0: "disc", 1: "rod", 2: "dot"}, r"class 1 is 'rod', in .*tiny\.pt it is 'bar'"),
]


@pytest.mark.parametrize(("names", "words"), OTHER_CLASSES)
def test_other_classes_are_refused(command, tmp_path, names, words):
    with pytest.raises(UserError, match=words):
        command(data=str(write_data(tmp_path / "other", names)))


@pytest.mark.parametrize("names", [{0: "Disc", 1: "BAR", 2: "d o t"}, {0: "class0", 1: "class1", 2: "class2"}])
def test_spelling_and_placeholders_are_accepted(command, tmp_path, names):
    assert command(data=str(write_data(tmp_path / "other", names))).images == 6


def test_single_class_accepts_any_classes(command, tmp_path):
    data = str(write_data(tmp_path / "other", {0: "a", 1: "b", 2: "c"}))
    assert command(single_cls=True, data=data).nt.tolist() == [15]


def test_no_labels_is_an_error_unless_files_are_wanted(command, tmp_path, caplog):
    data = str(write_data(tmp_path / "bare", labelled=False))
    with pytest.raises(UserError, match="no labels"):
        command(data=data)
    result = command(data=data, save_json=True)
    assert result.map50 == 0 and result.coco is None
    assert "no labels" in caplog.text


def test_exit_status_and_message(data_file, capsys):
    argv = ["--data", str(data_file), "--task", "test", "--weights", "x.pt"]
    assert run_main(ValConfig, "val.py", "", val.work, argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("val.py: error: ")


@pytest.mark.parametrize(
    ("paths", "stems"),
    [
        (["/d/a/1.jpg", "/d/b/2.png"], ["1", "2"]),
        (["/d/a/1.jpg", "/d/b/1.jpg"], ["a_1", "b_1"]),
        (["/d/1.jpg", "/d/1.png"], ["1", "1_2"]),
        (["/d/a_b/1.jpg", "/d/a/b_1.jpg", "/d/a/1.jpg"], ["a_b_1", "a_b_1_2", "a_1"]),
    ],
)
def test_label_files_of_equal_names_do_not_meet(tmp_path, caplog, paths, stems):
    caplog.set_level("INFO")
    TextSink(lines={path: [path] for path in paths}).write(tmp_path)
    assert [(tmp_path / f"{stem}.txt").read_text() for stem in stems] == [f"{path}\n" for path in paths]
    assert len(list(tmp_path.iterdir())) == len(paths) and f"{len(paths)} label files" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True])
def test_cuda_gives_the_metrics_of_the_cpu(data_file, weights, half):
    results = []
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        runtime = PyTorchRuntime([weights], device, half=half)
        results.append(evaluate(runtime, loader_for(data_file), EvalOptions(names=NAMES)))
    assert results[1].map50 == pytest.approx(results[0].map50, abs=0.02)
    model = load_detector(weights).cuda()
    head = model.head
    criterion = DetectionLoss(head.anchors.cpu() * head.stride.view(-1, 1, 1), head.stride, LossConfig())
    autocast = torch.float16 if half else None
    runtime = PyTorchRuntime.from_model(model, torch.device("cuda", 0), autocast=autocast)
    result = evaluate(runtime, loader_for(data_file), EvalOptions(names=NAMES), criterion=criterion)
    assert result.map50 == pytest.approx(results[0].map50, abs=0.02) and min(result.losses) > 0
    assert all(p.dtype == torch.float32 for p in model.parameters())
    criterion(model.train()(torch.rand(1, 3, 64, 64, device="cuda")), torch.zeros(0, 6)).total.backward()


def test_validate_is_the_function_behind_the_command(command, monkeypatch):
    seen = []
    monkeypatch.setattr("engine.evaluate.evaluator.validate", lambda config, _: seen.append(config) or "done")
    assert command() == "done" and isinstance(seen[0], ValConfig) and validate is not None
