"""Comparisons end to end at small sizes: files, failures, stored results, processes."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import psutil
import pytest
import yaml

import compare as compare_script
from data.config import load_data_config
from engine.compare.candidates import Candidate
from engine.compare.config import CompareConfig
from engine.compare.context import Context
from engine.compare.results import CandidateResult
from engine.compare.runner import exclusive, require_candidates
from engine.compare.worker.jobs import CandidateJobs
from engine.compare.worker.process import CRASH, MEMORY, JobFailedError, Worker
from engine.compare.worker.setting import Setting
from models.checkpoint.io import read_checkpoint
from models.summary import PARTS
from models.yolo import DetectionModel
from tests.helpers import detectors
from tests.helpers.training import interrupt_at
from utils.errors import ConfigError
from utils.files import ROOT

TINY = """
nc: 80
depth_multiple: 0.33
width_multiple: {width}
anchors:
  - [10,13, 16,30, 33,23]
  - [30,61, 62,45, 59,119]
backbone:
  - [-1, 1, Conv, [32, 6, 2, 2]]
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 1, Conv, [128, 3, 2]]
head:
  - [[2, 3], 1, Detect, [nc, anchors]]
"""
FILES = {"pareto.png", "latency.png", "memory.png", "results.json", "results.csv", "results.md", "report.html"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset of a few images, two small models, and an invalid one."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "data.yaml").write_text(
        "path: set\ntrain: images/train\nval: images/val\nnames: {0: circle, 1: square, 2: cross}\n"
        "generate: {kind: shapes, train: 8, val: 4, test: 1, imgsz: 96, seed: 3}\n"
    )
    (folder / "tiny.yaml").write_text(TINY.format(width=0.125))
    (folder / "small.yaml").write_text(TINY.format(width=0.25))
    (folder / "broken.yaml").write_text(TINY.format(width=0.25).replace("Conv, [64", "Konv, [64"))
    return folder


def options(place: Path, *names: str, **more) -> dict:
    base = {
        "cfg": [str(place / f"{name}.yaml") for name in names], "data": str(place / "data.yaml"), "imgsz": 64,
        "device": "cpu", "threads": 1, "rounds": 3, "seconds": 0.0, "workers": 1, "project": str(place / "runs"),
    }  # fmt: skip
    return {**base, **more}


class Page(HTMLParser):
    """Counts the elements of a report and collects external resources."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href") and value]


def test_compare_two_models_and_an_invalid_one(place, monkeypatch):
    found = compare_script.run(**options(place, "small", "broken", "tiny", max_params_m=0.008))
    assert {p.name for p in found.folder.iterdir()} == FILES
    rows = {row.label: row for row in found.rows}
    assert rows["broken"].failure is not None
    assert "broken.yaml:10: row 1 (Konv): unknown module 'Konv'; did you mean 'Conv'?" in rows["broken"].failure
    assert (found.pick.label, found.pick.front) == (None, ("tiny",))
    assert "no accuracy was measured" in found.pick.reason
    assert found.pick.misses["small"][0].startswith("parameters 0.0")

    content = json.loads((found.folder / "results.json").read_text())
    small = next(c for c in content["candidates"] if c["label"] == "small")
    parts = small["structure"]["parts"]
    assert sum(parts[name]["parameters"] for name in PARTS) == small["structure"]["parameters"]
    assert [latency["form"] for latency in small["latencies"]] == ["deployed", "training"]
    for latency in small["latencies"]:
        assert set(latency["times"]) == {"preprocess", "forward", "nms", "total"}
        assert len(latency["times"]["total"]["values"]) == 3
        assert latency["peak_mb"] > latency["baseline_mb"] > 0
    assert small["training_memory"]["kept_mb"] > 0 and small["training_step_ms"]["middle"] > 0
    assert small["structure"]["levels"] == [[8, 16], [16, 32]] and small["structure"]["strides"] == [8, 16]
    with open(found.folder / "results.csv") as stream:
        assert [line["status"] for line in csv.DictReader(stream)] == ["measured", "failed", "measured"]
    page = Page()
    page.feed((found.folder / "report.html").read_text())
    assert page.tags.count("img") == 3 and "script" in page.tags
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)  # nothing is fetched

    monkeypatch.setattr(Context, "worker", None)  # nothing is measured again
    again = compare_script.run(**options(place, "small", "tiny", max_params_m=0.008))
    figures = [row.latencies[0].total.values for row in found.rows if row.failure is None]
    assert [row.latencies[0].total.values for row in again.rows if row.failure is None] == figures
    assert not (place / "runs/cache/initial").exists() and not (place / "runs/cache/exports").exists()


@pytest.mark.slow
def test_compare_trains_every_model_with_every_head(place, tmp_path):
    more = {"head": ["anchor", "free"], "epochs": 2, "seeds": [0, 1], "batch_size": 4, "project": str(tmp_path)}
    found = compare_script.run(**options(place, "tiny", "small", **more))
    labels = ["tiny (anchor)", "tiny (free)", "small (anchor)", "small (free)"]
    assert [(row.label, row.failure, row.notes) for row in found.rows] == [(label, None, []) for label in labels]
    heads = [read_checkpoint(row.weights).spec["head"][-1][2] for row in found.rows]
    assert heads == ["Detect", "AnchorFreeDetect"] * 2
    assert {p.name for p in found.folder.iterdir()} == FILES | {"effects.csv"}
    with open(found.folder / "effects.csv") as stream:
        assert [line["level"] for line in csv.DictReader(stream)] == ["anchor", "free", "tiny", "small"]
    page = (found.folder / "report.html").read_text()
    assert "hyp.scratch-low.yaml, SGD, lr0 0.01, 2 epochs at 64 pixels, batch 4" in page
    assert page.count('<use href="#sample0"/>') == 4  # every candidate's detections on the same image
    assert page.count('alt="EigenCAM of tiny (free), P3"') == page.count('alt="EigenCAM of tiny (free), P4"') == 2


def test_require_candidates_gives_all_reasons():
    rows = [CandidateResult(Candidate(n, n, Path(n), None, n), failure=f"{n}.yaml:3: no") for n in ("a", "b")]
    with pytest.raises(
        ConfigError, match="^none of the 2 candidate.* can be measured: a: a.yaml:3: no; b: b.yaml:3: no$"
    ):
        require_candidates(rows)
    require_candidates([*rows, CandidateResult(Candidate("c", "c", Path("c"), None, "c"))])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"cfg": ["yolov5q"]}, "--cfg yolov5q: unknown; allowed: a model YAML.*did you mean 'yolov5"),
        ({"cfg": ["timm/convnxt_atto"]}, "did you mean 'timm/convnext_atto'"),
        ({"cfg": ["no.yaml", "no2.yaml"]}, "no.yaml: no such file.*no2.yaml: no such file"),
        ({"cfg": [], "weights": ["no.pt"]}, "no.pt: no such file"),
        ({"data": "no.yaml"}, "no.yaml: no such file"),
        ({"project": "/proc/no"}, "/proc/no: cannot create this folder"),
        ({"hyp": "no.yaml"}, "no.yaml: no such file"),
        ({"hyp": ""}, "--hyp: is empty; .*name it"),
        ({"device": "7"}, "--device 7: not available"),
    ],
)
def test_mistakes_are_one_line(place, tmp_path, capfd, more, words):
    given = options(place, "tiny", **{"project": str(tmp_path / "runs"), **more})
    argv = []
    for name, value in given.items():
        values = [str(v) for v in value] if isinstance(value, list) else [str(value)]
        argv += [f"--{name.replace('_', '-')}", *values] if values else []
    status = compare_script.run_main(CompareConfig, "compare.py", "", compare_script.work, argv)
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("compare.py: error: ")]
    assert status == 2 and len(errors) == 1
    assert re.search(words, errors[0]), errors[0]
    assert not list(tmp_path.rglob("exp*"))


def test_compare_refuses_weights_of_other_classes(place, tmp_path):
    model = detectors.build("yolov5")
    model.names = {0: "circle", 1: "square", 2: "cat"}
    path = detectors.save(model, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="class 2 is 'cross', in .*other.pt it is 'cat'; give the data"):
        compare_script.run(**options(place, weights=[str(path)], cfg=[]))


@pytest.mark.slow
def test_compare_names_the_missing_main_guard(place, tmp_path):
    given = options(place, "tiny", project=str(tmp_path / "runs"))
    (tmp_path / "script.py").write_text(f"import compare\ncompare.run(**{given!r})")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert 'compare.run: a script has to call it under if __name__ == "__main__":' in done.stderr


def test_exclusive_refuses_a_second_comparison(tmp_path):
    refused = pytest.raises(ConfigError, match="b: in use by another compare.py")
    with exclusive(tmp_path / ".lock", "a"), refused, exclusive(tmp_path / ".lock", "b"):
        pass
    with exclusive(tmp_path / ".lock", "c"):
        pass


def worker(path: Path, folder: Path, memory: float = float("inf")) -> Worker:
    return Worker(Setting(path, {0: "a"}, "cpu", 1, memory), folder / "log.txt")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the memory limit needs Linux")
def test_worker_survives_out_of_memory_and_ends_with_its_connection(place, tmp_path):
    text = TINY.format(width=10).replace("[64, 3, 2]", "[640, 3, 2]").replace("[128, 3, 2]", "[1280, 3, 2]")
    (tmp_path / "huge.yaml").write_text(text)
    with worker(tmp_path / "huge.yaml", tmp_path, memory=2e9) as process:
        for _ in range(2):
            with pytest.raises(JobFailedError, match="^out of memory .*MB more") as error:
                process.run("write_initial", checkpoint=str(tmp_path / "a.pt"))
            assert error.value.kind == MEMORY
        assert process.is_alive
        process._connection.close()
        process._process.join(10)
        assert process._process.exitcode == 0


def test_worker_reports_a_killed_process(place, tmp_path):
    with worker(place / "tiny.yaml", tmp_path) as process:
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(JobFailedError, match="SIGKILL"):
            process.run("close")


BLOCKING_PLUGIN = """
import os, signal, subprocess, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path(__file__).with_name("pids.txt").write_text(f"{os.getpid()} {child.pid}")
time.sleep(600)
"""


def test_worker_kills_its_process_group_on_timeout(place, tmp_path, caplog):
    (tmp_path / "blocking.py").write_text(BLOCKING_PLUGIN)
    setting = Setting(place / "tiny.yaml", {0: "a"}, "cpu", 1, float("inf"), (str(tmp_path / "blocking.py"),))

    def interrupt_once_started() -> None:
        if (tmp_path / "pids.txt").is_file():
            raise KeyboardInterrupt

    with Worker(setting, tmp_path / "log.txt") as worker:
        with pytest.raises(KeyboardInterrupt):
            worker.run("close", tick=interrupt_once_started)
        os.kill(worker.pid, signal.SIGINT)  # ignored: Ctrl-C is handled by the parent
        worker.stop(0.5)
        assert worker.is_alive and "did not end within 0.5 s" in caplog.text
        assert os.getpgid(worker.pid) == worker.pid != os.getpgrp()
    for pid in map(int, (tmp_path / "pids.txt").read_text().split()):
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_crash_is_reported_with_the_last_stderr_line(place, tmp_path):
    (tmp_path / "crash.py").write_text(
        "import os, sys\nprint('no such device', file=sys.stderr, flush=True)\nos.abort()"
    )
    setting = Setting(place / "tiny.yaml", {0: "a"}, "cpu", 1, float("inf"), (str(tmp_path / "crash.py"),))
    with Worker(setting, tmp_path / "log.txt") as worker, pytest.raises(JobFailedError) as error:
        worker.run("close")
    assert error.value.kind == CRASH and "SIGABRT" in error.value.reason and "last stderr line: " in error.value.reason


@pytest.mark.slow
def test_ctrl_c_saves_the_training_and_ends_all_processes(place, tmp_path):
    words = ["--cfg", str(place / "tiny.yaml"), "--data", str(place / "data.yaml"), "--imgsz", "64", "--epochs", "500"]
    words += ["--workers", "1", "--batch-size", "4", "--device", "cpu", "--project", str(tmp_path)]
    with open(tmp_path / "log.txt", "w") as stream:
        process = subprocess.Popen([sys.executable, str(ROOT / "compare.py"), *words], stderr=stream)
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("cache/trainings/*/weights/last.pt")):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log.txt").read_text()
            time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    text = (tmp_path / "log.txt").read_text()
    assert "the same command continues from here" in text and "compare.py: interrupted" in text
    assert "Traceback" not in text and children
    assert psutil.wait_procs(children, timeout=10)[1] == []
    (last,) = tmp_path.glob("cache/trainings/*/weights/last.pt")
    assert read_checkpoint(last).train is not None


def test_stored_validation_depends_on_the_batch_size(place, tmp_path):
    """Rectangular batches of other images have other sizes, so the accuracy of a checkpoint differs."""

    def key(**more):
        config = CompareConfig.from_keywords(**options(place, "tiny", project=str(tmp_path), **more))
        return Context.prepare(config, load_data_config(config.data)).validation_key

    assert key(batch_size=2) == key(batch_size=2, workers=0) != key(batch_size=3)


def test_interrupted_training_continues_with_plugin_and_own_options(place, tmp_path, monkeypatch):
    """A resumed run takes them from its checkpoint, except for plug-ins, which it refuses unless they are given."""
    plugin, cfg = tmp_path / "own.py", place / "tiny.yaml"
    plugin.touch()
    recipe = {
        "cfg": str(cfg), "data": str(place / "data.yaml"), "imgsz": 64, "epochs": 2, "batch_size": 4,
        "device": "cpu", "workers": 1, "cache": None, "noplots": True, "plugin": [str(plugin)],
    }  # fmt: skip
    jobs, folder = CandidateJobs(Setting(cfg, {0: "circle", 1: "square", 2: "cross"})), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 1)
        jobs.train(recipe, str(folder))
    assert jobs.train({**recipe, "workers": 0, "cache": "ram"}, str(folder)) == str(folder / "weights/best.pt")
    used = yaml.safe_load((folder / "opt.yaml").read_text())
    assert (used["workers"], used["cache"]) == (0, "ram")
    assert len((folder / "results.csv").read_text().splitlines()) == 3


def test_train_py_shows_the_parts():
    text = str(DetectionModel(ROOT / "models/yolov5n.yaml", nc=3).info(64))
    first, second = text.splitlines()
    assert first.endswith("GFLOPs") and second.startswith("backbone ") and "; neck " in second and "; head " in second


@pytest.mark.slow
def test_compare_continues_after_a_kill(place, tmp_path):
    """Two models, two seeds, ONNX: killed in the second training, resumed, and not repeated in a third run."""
    words = ["--cfg", str(place / "tiny.yaml"), str(place / "small.yaml"), "--data", str(place / "data.yaml")]
    words += [
        "--imgsz", "64", "--epochs", "6", "--seeds", "0", "1", "--runtimes", "onnx", "pytorch", "--batch", "1", "2",
        "--rounds", "3", "--seconds", "0",
    ]  # fmt: skip
    words += ["--workers", "1", "--batch-size", "4", "--device", "cpu", "--project", str(tmp_path)]
    own = tmp_path / "project"  # a copy: a change of the sources would trigger another training
    for name in ("models", "data", "engine", "utils"):
        shutil.copytree(ROOT / name, own / name, ignore=shutil.ignore_patterns("__pycache__", "*.cache.npz"))
    shutil.copy(ROOT / "compare.py", own)
    command = [sys.executable, str(own / "compare.py"), *words]
    log = tmp_path / "first.txt"
    with open(log, "w") as stream:
        first = subprocess.Popen(command, stderr=stream)
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("cache/trainings/small-seed0-*/weights/last.pt")):
            assert first.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        children = psutil.Process(first.pid).children(recursive=True)
        first.kill()
        first.wait()
    assert children and psutil.wait_procs(children, timeout=20)[1] == [], "processes end with their parent"
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert "1/4 tiny, training, seed 0: stored, not repeated" in second.stderr
    assert "2/4 small, training, seed 0: continues after" in second.stderr
    content = json.loads((tmp_path / "exp/results.json").read_text())
    for candidate in content["candidates"]:
        assert candidate["notes"] == [] and candidate["accuracy"]["seeds"] == [0, 1]
        assert len(candidate["accuracy"]["results"]) == 2 and candidate["accuracy"]["map"]["deviation"] is not None
        phases = {(x["runtime"], x["form"], x["batch"]) for x in candidate["latencies"]}
        assert phases == {(r, f, b) for r, f in (("onnx", "deployed"), ("pytorch", "deployed"), ("pytorch", "training"))
                          for b in (1, 2)}  # fmt: skip
    third = subprocess.run(command, capture_output=True, text=True)
    assert third.stderr.count("stored, not repeated") == 4
    again = json.loads((tmp_path / "exp2/results.json").read_text())
    assert [c["latencies"] for c in again["candidates"]] == [c["latencies"] for c in content["candidates"]]
