"""Hyperparameter search. Trainings are mocked, except in the last test."""

from __future__ import annotations

import contextlib
import csv
import itertools
import math
import re
import shutil
import sqlite3
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import cv2
import pytest
import torch

import train as train_script
from engine.cli.config import Hyperparameters, TrainConfig
from engine.loggers.run_logger import CsvLog
from engine.train.trainer import TrainResult
from engine.tune import outputs
from engine.tune import search as evolve_module
from engine.tune import study as studies
from engine.tune.outputs import TrialRow, best_of
from engine.tune.search import MOST_FAILED, evolve
from engine.tune.space import inside, point_of, population, space_for, widened
from models.build.spec import HEADS
from tests.helpers.training import TINY
from utils.device import out_of_memory
from utils.errors import ConfigError, DataError, TrainingError
from utils.yaml_lines import load_yaml

pytest.importorskip("optuna", reason="optuna is not installed")
HYPS = Path(__file__).resolve().parents[3] / "data/hyps"
START = HYPS / "hyp.scratch-low.yaml"
SPACE = space_for("SGD", "Detect")


class Trainings:
    """Mock of `engine.train.trainer.train` that records its calls; lower `scale` is better.

    Attributes:
        hyps: hyperparameters by trial number.
        events: by trial number an exception to raise, the fitness to reach, or that of each epoch.
    """

    def __init__(self) -> None:
        self.hyps: dict[int, Hyperparameters] = {}
        self.configs: dict[int, TrainConfig] = {}
        self.events: dict[int, BaseException | float | list[float]] = {}
        self.always: BaseException | None = None

    def __call__(self, config, on_epoch):
        folder = Path(config.project) / config.name
        number = int(folder.name.removeprefix("trial"))
        self.configs[number], self.hyps[number] = config, Hyperparameters.from_yaml(config.hyp)
        event = self.events.get(number, self.always)
        if isinstance(event, BaseException):
            raise event
        best = 0.0
        (folder / "weights").mkdir()
        (folder / "weights/last.pt").write_bytes(b"0")
        log = CsvLog(folder)
        top = event if event is not None else 1 - self.hyps[number].scale
        for epoch in range(config.epochs):
            value = top[epoch] if isinstance(top, list) else top * (epoch + 1) / config.epochs
            best = max(best, value)
            log.add([epoch, 0, 0, 0, 0.5, 0.25, value, value, 0, 0, 0, 0, 0, 0])
            if on_epoch(epoch, value):
                break
        reached = top if isinstance(top, float) and math.isnan(top) else best
        return TrainResult(folder, None, folder / "weights/last.pt", None, epoch + 1, reached)

    def points(self) -> list[tuple[float, ...]]:
        return [tuple(point_of(h, SPACE, "").values()) for _, h in sorted(self.hyps.items())]


@pytest.fixture
def trainings(monkeypatch) -> Trainings:
    stand_in = Trainings()
    monkeypatch.setattr(evolve_module, "train", stand_in)
    monkeypatch.setattr(evolve_module, "POLL", 0.2)
    return stand_in


def config(place: Path, **options) -> TrainConfig:
    base = {"project": str(place / "runs"), "evolve": 3, "epochs": 3, "noplots": True, "cfg": "models/yolov5n.yaml"}
    return TrainConfig.from_keywords(**{**base, **options})


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "evolve.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def test_search_writes_its_results(tmp_path, trainings, monkeypatch):
    monkeypatch.setattr(outputs, "IMPORTANCE_FROM", 3)
    result = evolve(config(tmp_path, noplots=False, batch_size=8))
    folder = tmp_path / "runs/exp"
    assert (result.folder, result.trials) == (folder, 3)
    start = Hyperparameters.from_yaml(START)
    assert trainings.hyps[0] == start, "the first trial is the given file itself"
    assert len(set(trainings.points())) == 3
    rows = table(folder)
    assert [r["trial"] for r in rows] == [str(i) for i in range(3)]
    assert {r["state"] for r in rows} <= {"complete", "pruned"}
    best = max((r for r in rows if r["state"] == "complete"), key=lambda r: float(r["fitness"]))
    assert (int(best["trial"]), float(best["fitness"])) == (result.best_trial, pytest.approx(result.fitness, rel=1e-5))
    assert float(best["metrics/mAP_0.5:0.95"]) == pytest.approx(result.fitness, rel=1e-4)
    assert float(best["metrics/recall"]) == 0.25
    assert result.hyp == folder / "hyp_evolve.yaml"
    assert Hyperparameters.from_yaml(result.hyp) == trainings.hyps[result.best_trial]
    head = result.hyp.read_text().split("lr0:")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    for word in (f"trial {result.best_trial}", f"fitness {result.fitness:.3f}", "--evolve 3", "--batch-size 8"):
        assert word in head
    for name in ("evolve.png", "importance.png"):
        image = cv2.imread(str(folder / name))
        assert image.shape[0] > 300 and image.std() > 10
    assert not list(folder.glob("trial*/weights")), "weights of trials are not kept"
    for number, made in trainings.configs.items():
        assert (made.evolve, made.resume_evolve, made.batch_size) == (None, None, 8)
        assert Path(made.hyp) == folder / f"trial{number}/hyp.yaml"


def test_values_stay_within_bounds_and_the_rest_as_given(tmp_path, trainings):
    given = load_yaml(START) | {"degrees": 170.0, "weight_decay": 0.0, "clip_norm": 3.0, "anchors": 4}
    (tmp_path / "hyp.yaml").write_text("".join(f"{k}: {v}\n" for k, v in given.items()))
    evolve(config(tmp_path, hyp=str(tmp_path / "hyp.yaml")))
    rows = {row.key: row for row in SPACE}
    for number, hyp in trainings.hyps.items():
        assert (hyp.clip_norm, hyp.anchors, hyp.iou_t) == (3.0, 4, 0.2)
        for key, value in point_of(hyp, SPACE, "").items():
            high = 170.0 if key == "degrees" else rows[key].high
            assert rows[key].low <= value <= high, (number, key, value)
    assert trainings.hyps[0].degrees == 170.0, "bounds hold the starting values"
    assert trainings.hyps[0].weight_decay == rows["weight_decay"].low, "zero is not on a log scale"


def test_resumed_search_tries_the_same_points(tmp_path, trainings):
    evolve(config(tmp_path, evolve=3, seed=7))
    whole, trainings.hyps = trainings.points(), {}
    evolve(config(tmp_path, evolve=2, seed=7, name="cut"))
    evolve(config(tmp_path, evolve=3, seed=7, resume_evolve=tmp_path / "runs/cut"))
    assert trainings.points() == whole and len(set(whole)) == 3
    trainings.hyps = {}
    evolve(config(tmp_path, evolve=2, seed=8, name="other"))
    assert trainings.points()[1] != whole[1], "--seed counts"


def test_resume_needs_only_the_folder(tmp_path, trainings):
    evolve(config(tmp_path, evolve=2, batch_size=4, single_cls=True))
    again = evolve(TrainConfig.from_keywords(resume_evolve=tmp_path / "runs/exp/study.db", device="cpu"))
    assert again.trials == 2 and len(trainings.hyps) == 2, "there was nothing left to do"
    train_script.run(resume_evolve=tmp_path / "runs/exp", evolve=3, device="cpu")
    last = trainings.configs[2]
    assert (last.batch_size, last.single_cls, last.epochs, last.device) == (4, True, 3, "cpu")


@pytest.mark.parametrize("event", [KeyboardInterrupt(), SystemExit(143), DataError("the disk is full")])
def test_interrupted_trial_is_repeated(tmp_path, trainings, event):
    trainings.events = {1: event}
    with pytest.raises(type(event)):
        evolve(config(tmp_path))
    assert [r["state"] for r in table(tmp_path / "runs/exp")] == ["complete"]
    result = evolve(TrainConfig.from_keywords(resume_evolve=tmp_path / "runs/exp", noplots=True))
    assert [r["state"] for r in table(result.folder)] == ["complete", "interrupted", "complete", "complete"]
    assert trainings.hyps[2] == trainings.hyps[1]
    assert trainings.hyps[3] not in (trainings.hyps[1], trainings.hyps[0])


def test_killed_trial_is_found_by_its_missing_heartbeat(tmp_path, trainings, monkeypatch):
    monkeypatch.setattr(studies, "HEARTBEAT", 1)
    monkeypatch.setattr(studies, "GRACE", 1)
    evolve(config(tmp_path, evolve=1))
    with studies.quiet_optuna():
        study, plan = studies.load(tmp_path / "runs/exp/study.db")
        study.set_user_attr("target", 2)
        trial = study.ask()  # a process killed here leaves the trial running
        killed = [trial.suggest_float(r.key, r.low, r.high, log=r.log) for r in plan.space]
        study._storage.record_heartbeat(trial._trial_id)
    (tmp_path / "runs/exp/trial1/weights").mkdir(parents=True)
    begin = time.time()
    result = evolve(TrainConfig.from_keywords(resume_evolve=tmp_path / "runs/exp", noplots=True))
    assert time.time() - begin > 1, "a running trial counts: its process may still be alive"
    assert [r["state"] for r in table(result.folder)] == ["complete", "interrupted", "complete"]
    assert list(point_of(trainings.hyps[2], SPACE, "").values()) == killed
    assert not (tmp_path / "runs/exp/trial1/weights").exists()


def test_failed_trials_do_not_end_the_search(tmp_path, trainings):
    trainings.events = {0: TrainingError("diverged\nfar"), 2: float("nan")}
    result = evolve(config(tmp_path, evolve=2))
    assert [r["state"] for r in table(result.folder)] == ["failed", "complete", "failed", "complete"]
    assert table(result.folder)[0]["fitness"] == ""
    assert result.trials == 2
    trainings.always, trainings.events = TrainingError("diverged"), {}
    with pytest.raises(
        TrainingError, match=r"5 trials in a row failed, the last one with: diverged; .*--resume_evolve"
    ):
        evolve(config(tmp_path, name="bad"))
    assert len(table(tmp_path / "runs/bad")) == MOST_FAILED == 5


@pytest.mark.parametrize("message", ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"])
def test_trial_that_runs_out_of_memory_does_not_end_the_search(tmp_path, trainings, message):
    """A training reports it as an error of its options."""
    error = torch.OutOfMemoryError if "CUDA" in message else RuntimeError
    with pytest.raises(ConfigError) as caught, out_of_memory((16, 3, 640, 640), "a smaller --batch-size"):
        raise error(message)
    trainings.events = {1: caught.value}
    result = evolve(config(tmp_path, evolve=2))
    assert [r["state"] for r in table(result.folder)] == ["complete", "failed", "complete"]


def test_trials_behind_the_median_are_pruned(tmp_path, trainings, monkeypatch):
    monkeypatch.setattr(studies, "PRUNE_AFTER", 2)
    trainings.events = {0: 0.6, 1: 0.6, 2: 0.1, 3: 0.9, 4: [0.5, 0.5, 0.5]}
    result = evolve(config(tmp_path, evolve=5))
    rows = table(result.folder)
    assert [r["state"] for r in rows] == ["complete", "complete", "pruned", "complete", "complete"]
    assert [r["epochs"] for r in rows] == ["3", "3", "2", "3", "3"], "not in the first third, nor after the last epoch"
    assert (result.trials, result.best_trial) == (5, 3)


@pytest.fixture
def shapes(tmp_path) -> Path:
    """A dataset YAML: 8 training images, 3 classes."""
    (tmp_path / "data.yaml").write_text(
        "path: set\ntrain: images/train\nval: images/val\nnames: {0: circle, 1: square, 2: cross}\n"
        "generate: {kind: shapes, train: 8, val: 4, test: 1, imgsz: 64, seed: 3}\n"
    )
    return tmp_path / "data.yaml"


@pytest.mark.parametrize("options", [{"head": "free"}, {"optimizer": "auto"}])
def test_auto_recipe_is_resolved_once_and_its_values_are_varied(tmp_path, shapes, trainings, options):
    result = evolve(config(tmp_path, data=str(shapes), **options))
    first, second = trainings.hyps[0], trainings.hyps[1]
    assert (first.optimizer, first.lr0, first.momentum) == ("AdamW", pytest.approx(0.002 * 5 / 7, abs=1e-6), 0.9)
    assert second.lr0 != first.lr0 and second.momentum != first.momentum
    assert {made.optimizer for made in trainings.configs.values()} == {"AdamW"}
    assert Hyperparameters.from_yaml(result.hyp).optimizer == "AdamW"
    has_free_head = "head" in options
    assert (second.free_box != first.free_box) == has_free_head and (second.obj != first.obj) != has_free_head
    again = evolve(config(tmp_path, data=str(shapes), evolve=4, resume_evolve=tmp_path / "runs/exp", **options))
    assert again.trials == 4 and trainings.configs[3].optimizer == "AdamW"


@pytest.mark.parametrize(("optimizer", "named"), [("SGD", None), ("Adam", "Adam")])
def test_result_names_an_optimizer_other_than_the_default(tmp_path, trainings, optimizer, named):
    """`--hyp hyp_evolve.yaml` alone would train with SGD at learning rates found for Adam."""
    result = evolve(config(tmp_path, optimizer=optimizer))
    assert {made.optimizer for made in trainings.configs.values()} == {optimizer}
    assert Hyperparameters.from_yaml(result.hyp).optimizer == named


def test_auto_recipe_needs_a_batch_size(tmp_path, trainings):
    with pytest.raises(ConfigError, match="--optimizer auto depends on the number of iterations: give --batch-size"):
        evolve(config(tmp_path, optimizer="auto", batch_size=-1))
    assert not list(tmp_path.rglob("exp"))


def test_best_of_returns_the_first_of_equals():
    rows = [
        TrialRow(0, "pruned", 9.0, (), 1, {}),
        TrialRow(1, "complete", 1.0, (), 1, {}),
        TrialRow(2, "complete", 1.0, (), 1, {}),
    ]
    assert best_of(rows) == rows[1]
    assert best_of(rows[:1]) is None


def test_population_is_tried_first(tmp_path, trainings, caplog):
    people = tmp_path / "people"
    people.mkdir()
    for name in ("hyp.scratch-high.yaml", "hyp.quick.yaml", "hyp.scratch-low.yaml"):
        shutil.copy(HYPS / name, people)
    evolve(config(tmp_path, evolve_population=people))
    assert trainings.hyps[0] == Hyperparameters.from_yaml(START)
    high = Hyperparameters.from_yaml(people / "hyp.scratch-high.yaml")
    assert point_of(trainings.hyps[1], SPACE, "") == point_of(high, SPACE, "")
    assert "made for AdamW, not SGD" in caplog.text
    assert trainings.hyps[2].optimizer is None and len(set(trainings.points())) == 3, "none is tried twice"
    (people / "hyp.bad.yaml").write_text("lr0: 1\n")
    with pytest.raises(ConfigError, match=r"hyp.bad.yaml: missing"):
        population(people, "SGD", SPACE)


def test_options_at_their_default_values_are_given(tmp_path, trainings, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    shutil.copytree(HYPS, tmp_path / "data/hyps")
    evolve(config(tmp_path, evolve=2, evolve_population="data/hyps", project="runs/train"))
    assert (tmp_path / "runs/train/exp/study.db").is_file()
    first = min(path for path in HYPS.glob("*.yaml") if path != START)
    assert point_of(trainings.hyps[1], SPACE, "") == point_of(Hyperparameters.from_yaml(first), SPACE, "")
    trainings.hyps.clear()
    evolve(TrainConfig.from_keywords(cfg="yolov5n.yaml", evolve=1, epochs=1, noplots=True))
    assert (tmp_path / "runs/evolve/exp/study.db").is_file()


@pytest.mark.parametrize("value", [0.04, 0.4])
def test_search_below_the_floor_names_no_best(tmp_path, trainings, caplog, value):
    caplog.set_level("INFO")
    trainings.events = {0: value, 1: value / 2}
    result = evolve(config(tmp_path, evolve=2))
    assert ("not trained long enough to rank" in caplog.text) == (value < 0.05)
    assert ("not trained long enough to rank" in result.hyp.read_text()) == (value < 0.05)
    titles = []
    monkey = pytest.MonkeyPatch()
    monkey.setattr(outputs, "save_figure", lambda figure, path, dpi: titles.append(figure.get_suptitle()))
    with monkey.context():
        outputs.plot_trials(tmp_path / "x.png", outputs.rows_of(studies.load(result.folder / "study.db")[0]), SPACE)
    monkey.undo()
    assert ("star" in titles[0]) == (value >= 0.05)


def test_bounds_include_the_recipes():
    names = {f.name for f in fields(Hyperparameters)}
    for optimizer, form in itertools.product(("SGD", "AdamW"), HEADS.values()):
        for row in space_for(optimizer, form.module):
            assert row.key in names and row.low < row.high and (row.low > 0 or not row.log), row
    for path in HYPS.glob("*.yaml"):
        hyp = Hyperparameters.from_yaml(path)
        for form in HEADS.values():
            space = space_for(hyp.optimizer or "SGD", form.module)
            assert widened([point_of(hyp, space, "")], space) == space, path.name
    wide = widened([{row.key: row.high * 2 for row in SPACE}], SPACE)
    assert [row.high for row in wide] == [row.high * 2 for row in SPACE]
    assert inside({row.key: 1e9 for row in SPACE}, SPACE) == {row.key: row.high for row in SPACE}
    with pytest.raises(ConfigError, match=r"lr0: a finite number"):
        point_of(replace(Hyperparameters.from_yaml(START), lr0=float("inf")), SPACE, "x")


def test_documented_bounds_are_those_in_use():
    text = (HYPS.parents[1] / "docs/tuning.md").read_text()
    found = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \| (by ratio)?", text, re.MULTILINE)
    rows = dict.fromkeys(row for form in HEADS.values() for row in space_for("SGD", form.module))
    assert [(k, float(a), float(b), bool(r)) for k, a, b, r in found] == [(r.key, r.low, r.high, r.log) for r in rows]


def test_two_processes_never_take_the_same_trial(tmp_path, trainings):
    """The first process to request a waiting trial gets it, even without the lock."""
    evolve(config(tmp_path, evolve=1))
    path = tmp_path / "runs/exp/study.db"
    with studies.quiet_optuna():
        study, _ = studies.load(path)
        for number in range(8):
            study.enqueue_trial({"lr0": 0.01 + number / 1000})
        own = [studies.load(path)[0] for _ in range(2)]
        taken: list[int] = []
        barrier = threading.Barrier(2)

        def take(mine) -> None:
            for _ in range(4):
                barrier.wait()
                taken.append(mine.ask().number)

        threads = [threading.Thread(target=take, args=(mine,)) for mine in own]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(taken) == list(range(1, 9))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a hyperparameter search of one trial, a text file and another database."""
    place = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evolve_module, "train", Trainings())
        evolve(config(place, evolve=1))
    (place / "text.db").write_text("lr0: 1\n")
    with contextlib.closing(sqlite3.connect(place / "other.db")) as connection:
        connection.execute("CREATE TABLE x (y)")
        connection.commit()
    return place


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"resume": "last.pt"}, ["--evolve: cannot be combined with --resume"]),
        ({"resume_evolve": "nowhere"}, ["--resume_evolve nowhere: no such study", "study.db"]),
        ({"resume_evolve": "text.db"}, ["text.db: is not the study of a hyperparameter search"]),
        ({"resume_evolve": "other.db"}, ["other.db: is not the study of a hyperparameter search"]),
        ({"resume_evolve": "runs/exp", "epochs": 9, "seed": 1},
         ["--epochs is 9, the study was started with 3", "--seed is 1, the study was started with 0"]),
        # an option at its default value counts as given
        ({"resume_evolve": "runs/exp", "epochs": 100}, ["--epochs is 100, the study was started with 3"]),
        ({"evolve_population": "nowhere"}, ["--evolve_population nowhere: no such folder"]),
        ({"evolve_population": "runs"}, ["contains no *.yaml file"]),
        ({"hyp": "nowhere.yaml"}, ["nowhere.yaml: no such file"]),
        ({"exist_ok": True}, ["runs/exp holds a hyperparameter search", "--resume_evolve"]),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(finished, trainings, monkeypatch, options, words):
    monkeypatch.chdir(finished)
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError) as caught:
        evolve(config(Path(), **options))
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)
    assert before == {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} and not trainings.hyps


def test_passwords_are_given_again_and_not_stored(tmp_path, trainings, caplog):
    caplog.set_level("INFO")
    url, hidden = "https://h/w.pth?token=SECRET", "https://h/w.pth?token=***"
    trainings.events[1] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        evolve(config(tmp_path, backbone_weights=url))
    folder = tmp_path / "runs/exp"
    assert f"--resume_evolve {folder} --backbone-weights '{hidden}'" in caplog.text
    trainings.events.clear()
    for given in ({}, {"backbone_weights": hidden}):
        with pytest.raises(ConfigError) as caught:
            evolve(TrainConfig.from_keywords(resume_evolve=str(folder), **given))
        assert str(caught.value).endswith(f"give again, with the password: --backbone-weights {hidden}")
    with pytest.raises(ConfigError, match="the study was started with https://h/w.pth"):
        evolve(TrainConfig.from_keywords(resume_evolve=str(folder), backbone_weights="https://h/v.pth?token=SECRET"))
    result = evolve(TrainConfig.from_keywords(resume_evolve=str(folder), backbone_weights=url))
    assert result.trials == 3
    assert {made.backbone_weights for made in trainings.configs.values()} == {url}
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert folder / "study.db" in files and not [path for path in files if b"SECRET" in path.read_bytes()]


def test_torchrun_is_refused(tmp_path, monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="does not run under torchrun; start .* --resume_evolve FOLDER"):
        evolve(config(tmp_path))


def test_evolve_names_the_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match="pip install optuna"):
        evolve(config(tmp_path))


@pytest.mark.parametrize("exist_ok", [False, True])
def test_evolve_leaves_nothing_when_the_first_training_cannot_start(tmp_path, trainings, exist_ok):
    if exist_ok:
        (tmp_path / "runs/exp").mkdir(parents=True)
        (tmp_path / "runs/exp/mine.txt").write_text("x")
    trainings.always = DataError("set.yaml: no such file")
    with pytest.raises(DataError):
        evolve(config(tmp_path, exist_ok=exist_ok))
    left = [p.name for p in (tmp_path / "runs").rglob("*")]
    assert left == (["exp", "mine.txt"] if exist_ok else [])


def test_real_trainings(tmp_path):
    (tmp_path / "data.yaml").write_text(
        "path: set\ntrain: images/train\nval: images/val\nnames: {0: circle, 1: square, 2: cross}\n"
        "generate: {kind: shapes, train: 8, val: 4, test: 1, imgsz: 64, seed: 3}\n"
    )
    (tmp_path / "tiny.yaml").write_text(TINY)
    result = train_script.run(
        cfg=tmp_path / "tiny.yaml", data=tmp_path / "data.yaml", imgsz=64, epochs=2, batch_size=4, workers=0,
        noplots=True, project=tmp_path / "runs", device="cpu", evolve=2,
    )  # fmt: skip
    assert result.trials == 2
    assert [r["epochs"] for r in table(result.folder)] == ["2", "2"]
    found = Hyperparameters.from_yaml(result.hyp)
    assert found == Hyperparameters.from_yaml(result.folder / f"trial{result.best_trial}/hyp.yaml")
