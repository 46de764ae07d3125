"""report.html: contents, no external resources, escaping."""

from __future__ import annotations

import base64
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from jinja2 import UndefinedError

from engine.cli.config import Hyperparameters, TrainConfig
from engine.evaluate.accumulator import ImageOutcome, Tally, summarize
from engine.evaluate.worst_images import ImageErrors, WorstImages, image_errors
from engine.loggers.run_logger import CsvLog
from engine.report.html import digits, embedded, line_chart, render
from engine.train.run_report import RunFacts, collect_facts, environment, git_commit, write_report
from tests.helpers import detectors
from tests.helpers.training import results_row
from utils.files import ROOT

NASTY = "\"><script>alert('x')</script><img src=http://x/y onerror=alert(1)>&amp;"


def outcome(detections, labels, path="a.jpg", shape=(100, 200)) -> ImageOutcome:
    """Return the outcome of detections (xyxy, confidence, class) and labels (class, xyxy) as in the evaluator."""
    detections = torch.tensor(detections, dtype=torch.float32).reshape(-1, 6)
    return Tally(3).add(path, shape, detections, torch.tensor(labels, dtype=torch.float32).reshape(-1, 5))


A, B, FAR = (10, 10, 30, 30), (50, 10, 80, 40), (120, 50, 150, 80)


@pytest.mark.parametrize(
    ("detections", "labels", "expected"),
    [
        pytest.param([], [], (0, 0, 0), id="nothing"),
        pytest.param([], [(0, *A)], (0, 0, 1), id="missed"),
        pytest.param([(*A, 0.9, 0)], [], (0, 1, 0), id="false positive"),
        pytest.param([(*A, 0.9, 0)], [(0, *A)], (1, 0, 0), id="right"),
        pytest.param([(*A, 0.9, 1)], [(0, *A)], (0, 1, 1), id="wrong class"),
        pytest.param([(*A, 0.2, 0)], [(0, *A)], (0, 0, 1), id="below the threshold"),
        pytest.param([(*A, 0.9, 0), (*A, 0.8, 0)], [(0, *A)], (1, 1, 0), id="twice"),
        pytest.param([(10, 10, 30, 19, 0.9, 0)], [(0, *A)], (0, 1, 1), id="too little overlap"),
        pytest.param([(*A, 0.9, 0), (*FAR, 0.5, 2)], [(0, *A), (0, *B)], (1, 1, 1), id="one of each"),
        pytest.param(
            [(*A, 0.9, 0), (*B, 0.9, 1)], [(1, *B), (0, *A), (1, *A)], (2, 0, 1), id="two labels in a project"
        ),
    ],
)
def test_image_errors(detections, labels, expected):
    found = image_errors(outcome(detections, labels))
    assert (len(found.right), len(found.wrong), len(found.missed)) == expected
    assert found.errors == expected[1] + expected[2]
    assert len(found.right) + len(found.missed) == len(labels), "every label is either matched or missed"


def test_errors_agree_with_the_metrics():
    rng = np.random.default_rng(0)
    for _ in range(50):
        center, size = rng.uniform(20, 80, (12, 2)), rng.uniform(10, 30, (12, 2))
        boxes = np.concatenate((center - size / 2, center + size / 2), 1)
        labels = np.concatenate((rng.integers(0, 3, (12, 1)), boxes), 1)
        moved = boxes + rng.normal(0, 3, boxes.shape)
        scores = np.sort(rng.uniform(0, 1, (12, 1)), 0)[::-1]
        looked = outcome(np.concatenate((moved, scores, rng.integers(0, 3, (12, 1))), 1), labels)
        found = image_errors(looked, conf_thres=0.0)
        assert len(found.right) == int(looked.correct[:, 0].sum())
        assert len(found.right) + len(found.missed) == 12


def test_worst_images_are_sorted_by_errors():
    worst = WorstImages(count=3)
    worst(outcome([(*A, 0.9, 0)], [(0, *A)], "good.jpg"))
    worst(outcome([], [(0, *A)], "one.jpg"))
    worst(outcome([(*A, 0.4, 0), (*B, 0.4, 0)], [], "two unsure.jpg"))
    worst(outcome([(*A, 0.9, 0), (*B, 0.4, 0)], [], "two sure.jpg"))
    worst(outcome([(*FAR, 0.9, 0)], [(0, *A), (0, *B)], "three.jpg"))
    assert [Path(f.path).name for f in worst.found()] == ["three.jpg", "two sure.jpg", "two unsure.jpg"]


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; every tag that is opened must be closed."""

    VOID = {"meta", "img", "input", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder of three epochs with images."""
    folder = tmp_path / "exp <7>"
    folder.mkdir()
    log = CsvLog(folder)
    for epoch, value in enumerate((0.1, 0.4, 0.3)):
        log.add(results_row(epoch, value + 0.2, value))
    for name in ("PR_curve.png", "F1_curve.png", "confusion_matrix.png", "labels.jpg", "train_batch0.jpg"):
        assert cv2.imwrite(str(folder / name), np.full((40, 60, 3), 200, np.uint8))
    return folder


def facts(folder: Path, name: str = "disc", **changes) -> RunFacts:
    image = folder / "größe 'x'.png"
    cv2.imencode(".png", np.full((1000, 2000, 3), 90, np.uint8))[1].tofile(image)
    tally = Tally(3)
    boxes = torch.tensor([(*A, 0.9, 0.0), (*FAR, 0.75, 2.0)])
    looked = tally.add(str(image), (1000, 2000), boxes, torch.tensor([(0.0, *A), (1.0, *B)]))
    values = {
        "names": {0: name, 1: "bar", 2: "dot"},
        "options": {"cfg": "models/yolov5n.yaml", "data": "blood.yaml", "imgsz": 320, "note": name},
        "hyp": {"lr0": 0.01},
        "layers": "slot from\n0 <-1>",
        "model": "125 layers",
        "device": "cpu",
        "result": summarize(tally),
        "worst": (image_errors(looked),),
    }
    return RunFacts(**{**values, **changes})


def test_write_report_contains_all_sections(run):
    path = write_report(run, facts(run))
    assert path == run / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    for text in ("exp <7>", "yolov5n.yaml on blood.yaml, 320 pixels", "best epoch", "0 <-1>", "lr0", "125 layers",
                 "1 false positive(s), 1 missed, 1 correct", "größe 'x'.png", "dot 0.75", "PR_curve.png", "disc",
                 "confusion_matrix.png", "Box loss", "Learning rate", torch.__version__.split("+")[0]):  # fmt: skip
        assert text in page.text or ("alt", text) in page.attributes, text
    assert page.tags.count("img") == 6 + 5
    source = path.read_text(encoding="utf-8")
    assert re.search(r"<b>1</b>best epoch", source) and re.search(r"<b>3</b>epochs done", source)
    kinds = {kind: source.count(f'<g class="{kind}">') for kind in ("correct", "wrong", "missed")}
    assert kinds == {"correct": 1, "wrong": 1, "missed": 1}
    box = re.search(r'<g class="missed"><rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', source)
    assert [float(v) for v in box.groups()] == [50, 10, 30, 30], "box B, in pixels of the image"
    assert 'viewBox="0 0 2000 1000"' in source
    cells = re.findall(r'<td class="n">([^<]*)</td>', source)
    assert len(cells) == 5 * 3 and all(re.fullmatch(r"\d+|\d\.\d{3}", cell) for cell in cells), cells
    colors = {k: re.search(rf"\.{k} rect {{[^}}]*stroke: (#\w+)", source)[1] for k in kinds}
    assert len(set(colors.values())) == 3
    assert not list(run.glob(".report*")), "no partial file is left"


def test_a_text_that_would_cross_the_right_border_ends_at_its_box(run):
    missed = torch.tensor([(1.0, 100, 10, 190, 50), (1.0, 195, 60, 205, 90)])  # in an image of 200 pixels
    cut = ImageErrors(str(run / "labels.jpg"), (100, 200), torch.zeros(0, 6), torch.zeros(0, 6), missed)
    source = write_report(run, facts(run, worst=(cut,))).read_text(encoding="utf-8")
    texts = re.findall(r'<text x="([\d.]+)" y="[\d.]+" dx="(\S+)" dy="1em" text-anchor="(\w+)">bar<', source)
    assert texts == [("100.0", ".15em", "start"), ("200.0", "-.15em", "end")]


def test_write_report_loads_nothing(run):
    page = Page(write_report(run, facts(run)).read_text(encoding="utf-8"))
    for name, value in page.attributes:
        if name in ("src", "href"):
            assert value.startswith(("data:image/", "#")), value[:60]
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert ("http-equiv", "Content-Security-Policy") in page.attributes
    assert "url(" not in page.text and "@import" not in page.text


def test_write_report_escapes_text(run):
    plain = Page(write_report(run, facts(run)).read_text(encoding="utf-8"))
    nasty = facts(run, NASTY, layers=NASTY, model=NASTY, device=NASTY, hyp={NASTY: NASTY})
    page = Page(write_report(run, nasty).read_text(encoding="utf-8"))
    assert page.tags == plain.tags, "the same elements"
    assert [name for name, _ in page.attributes] == [name for name, _ in plain.attributes]
    assert page.text.count(NASTY) >= 6


def test_write_report_accepts_file_names_that_are_not_utf8(run):
    odd = ImageErrors("b\udcffd.jpg", (10, 10), torch.zeros(0, 6), torch.zeros(0, 6), torch.zeros(1, 5))
    page = Page(write_report(run, facts(run, worst=(odd,))).read_text(encoding="utf-8"))
    assert "b?d.jpg" in page.text and "cannot be read" in page.text


def test_write_report_of_an_empty_run(tmp_path):
    page = Page(write_report(tmp_path, facts(tmp_path, result=None, worst=())).read_text(encoding="utf-8"))
    for text in ("No epoch was finished", "was not validated", "No images were written", "None: no errors"):
        assert text in page.text
    CsvLog(tmp_path).drop_from(0)
    (tmp_path / "results.csv").write_text("epoch\n")
    assert "No epoch was finished" in write_report(tmp_path, facts(tmp_path)).read_text(encoding="utf-8")


def svg(chart) -> str:
    head, _, content = chart.address.partition(",")
    assert head == "data:image/svg+xml;base64"
    return base64.b64decode(content).decode()


def test_line_chart_plots_finite_values():
    chart = line_chart("t", [0, 1, 2, 3], {"a": [0.0, 1.0, float("nan"), 0.5]}, best=1)
    path = re.search(r'<path d="([^"]+)"[^>]*stroke: #0072b2', svg(chart))[1]
    xy = [tuple(map(float, pair)) for pair in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]
    assert len(xy) == 3 and xy[0][0] < xy[1][0] < xy[2][0]
    assert xy[1][1] < xy[2][1] < xy[0][1], "y grows downwards"
    dashed = re.search(r'<path d="M ([\d.]+) [^"]*"[^>]*stroke-dasharray', svg(chart))[1]
    assert float(dashed) == pytest.approx(xy[1][0], abs=0.01), "the best epoch is marked"
    assert line_chart("t", [], {"a": []}, None) is None is line_chart("t", [1], {"a": [float("nan")]}, None)
    assert "<use" in svg(line_chart("t", [0], {"a": [0.5]}, None)), "a line of one point cannot be seen"
    assert svg(chart) == svg(line_chart("t", [0, 1, 2, 3], {"a": [0.0, 1.0, float("nan"), 0.5]}, best=1))


def test_digits():
    assert [digits(v) for v in (0.123456, 0.00004, float("nan"), 1.0, 7, "a")] == [
        "0.123", "0.000", "-", "1.000", "7", "a",
    ]  # fmt: skip


def test_templates_name_what_is_missing():
    with pytest.raises(UndefinedError, match="'facts' is undefined|is undefined"):
        render("run.html", title="x")


def test_collect_facts():
    model = detectors.build("yolov5")
    hyp = Hyperparameters.from_yaml(ROOT / "data/hyps/hyp.scratch-low.yaml")
    found = collect_facts(TrainConfig(imgsz=64), hyp, model, torch.device("cpu"), None)
    assert found.options["imgsz"] == 64 and found.hyp["lr0"] == 0.01 and found.names == model.names
    assert "Detect" in found.layers and "parameters" in found.model and found.device.startswith("cpu")


@pytest.mark.parametrize(("suffix", "side", "shape"), [(".jpg", 50, (25, 50)), (".png", 500, (60, 120))])
def test_embedded_images(suffix, side, shape):
    image = np.full((60, 120, 3), (10, 20, 200), np.uint8)
    head, _, data = embedded(image, side, suffix).partition(",")
    assert head == f"data:image/{'jpeg' if suffix == '.jpg' else 'png'};base64"
    found = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
    assert found.shape[:2] == shape
    np.testing.assert_allclose(found[0, 0], (10, 20, 200), atol=4)


def test_commit(tmp_path):
    assert git_commit(tmp_path) == ""

    def git(*arguments):
        names = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", "-C", str(tmp_path), *names, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    head = git("rev-parse", "HEAD").stdout.decode().strip()
    assert git_commit(tmp_path) == head
    (tmp_path / "a").write_text("2")
    assert git_commit(tmp_path) == f"{head} (changed)"


def test_environment_names_versions_and_device(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/a/mine.py", "https://h/w.pth?token=secret"])  # a program that calls train.run
    found = environment("some device")
    assert found["command"] == "mine.py 'https://h/w.pth?token=***'"
    assert found["device"] == "some device" and found["numpy"] == np.__version__
    assert bool(found.get("commit")) == (ROOT / ".git").exists()
