"""results.csv, TensorBoard, and life cycle of trackers."""

from __future__ import annotations

import json
import signal
import sys
import types

import pytest

from engine.cli.config import TrainConfig
from engine.loggers import run_logger as hooks
from engine.loggers import trackers as loggers
from engine.loggers.run_logger import (
    COLUMNS,
    CsvLog,
    Logs,
    TensorBoardLog,
    best_epoch,
    make_logs,
    outcome_of,
    project_name,
)
from engine.loggers.trackers import HostedLogger, check_loggers
from engine.train.trainer import train
from tests.helpers.training import config, results_row, signal_at
from utils.errors import ConfigError, DataError

OPTIONS = {"project": "runs/blood", "entity": None, "epochs": 3}


def epochs(folder):
    return [int(line.split(",")[0]) for line in (folder / "results.csv").read_text().splitlines()[1:]]


class Recorder(HostedLogger):
    """A tracker that records its calls."""

    name = "recorder"
    package = pip = "recorder"
    calls: list = []
    broken = ""

    def start(self, run):
        self._note("start", run)
        return "id-1"

    def add(self, epoch, metrics):
        self._note("add", (epoch, metrics))

    def finish(self, outcome):
        self._note("finish", outcome)

    def close(self, failed):
        self._note("close", failed)

    def _note(self, what, value):
        self.calls.append((what, value))
        if what == self.broken:
            raise RuntimeError("no network\nmore lines")


@pytest.fixture
def recorder(monkeypatch):
    package = types.ModuleType("recorder")
    package.__spec__ = types.SimpleNamespace(origin="here")
    monkeypatch.setitem(sys.modules, "recorder", package)
    monkeypatch.setattr(loggers, "HOSTED", {"recorder": Recorder})
    monkeypatch.setattr(hooks, "HOSTED", {"recorder": Recorder})
    Recorder.calls, Recorder.broken = [], ""
    return Recorder


def test_run_interrupted_in_its_first_epoch_continues_in_the_tracker(project, recorder, monkeypatch, caplog):
    caplog.set_level("INFO")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        signal_at(patch, signal.SIGTERM, (0, 0))
        train(config(project, epochs=1, logger=["recorder"]))
    train(TrainConfig.from_keywords(resume=str(project / "runs/exp/weights/last.pt")))
    assert "last.pt: 0 of 1 epochs are finished" in caplog.text  # once "after epoch -1"
    assert [run.resume_id for what, run in recorder.calls if what == "start"] == [None, "id-1"]
    assert [value[0] for what, value in recorder.calls if what == "add"] == [0]


def test_csv_has_a_header_and_a_row_per_epoch(tmp_path):
    log = CsvLog(tmp_path)
    log.add(results_row(0))
    log.add(results_row(1))
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert [c.strip() for c in lines[0].split(",")] == list(COLUMNS)
    assert [float(c) for c in lines[2].split(",")] == results_row(1)


@pytest.mark.parametrize("cut", [1, 12, 25, 270])
def test_csv_log_replaces_repeated_and_truncated_rows(tmp_path, cut):
    whole = CsvLog(tmp_path)
    for epoch in range(4):
        whole.add(results_row(epoch))
    expected = (tmp_path / "results.csv").read_text()
    lines = expected.splitlines(keepends=True)
    (tmp_path / "results.csv").write_text("".join(lines[:4]) + lines[4][:cut])  # a full disk truncated the last row
    whole.drop_from(2)
    assert epochs(tmp_path) == [0, 1]
    whole.add(results_row(2))
    whole.add(results_row(3))
    assert (tmp_path / "results.csv").read_text() == expected


def test_csv_log_drops_a_truncated_row(tmp_path):
    log = CsvLog(tmp_path)
    log.add(results_row(0))
    with open(tmp_path / "results.csv", "a") as stream:
        stream.write(f"{1:20.5g},{0.5:20.5g},   0.")
    log.drop_from(9)
    assert epochs(tmp_path) == [0]


def test_csv_log_keeps_one_row_of_each_epoch(tmp_path):
    log = CsvLog(tmp_path)
    for epoch in (1, 0, float("inf"), 1, 2):
        log.add(results_row(epoch))
    log.drop_from(2)
    assert epochs(tmp_path) == [0, 1]


def test_results_csv_that_cannot_be_written(tmp_path):
    (tmp_path / "results.csv").mkdir()
    with pytest.raises(DataError, match=r"results\.csv: cannot be written"):
        CsvLog(tmp_path).add(results_row(0))


def test_tensorboard_holds_the_numbers_and_forgets_epochs_done_again(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, values in ((0, (0.1, 0.2, 0.3)), (1, (0.7, 0.8))):
        log = TensorBoardLog(tmp_path, start)
        for epoch, value in enumerate(values, start):
            log.add(results_row(epoch, value))
        log.close()
    found = reader.EventAccumulator(str(tmp_path))
    found.Reload()
    assert sorted(found.Tags()["scalars"]) == sorted(COLUMNS[1:])
    scalars = [(e.step, round(e.value, 4)) for e in found.Scalars("metrics/mAP_0.5")]
    assert scalars == [(0, 0.1), (1, 0.7), (2, 0.8)]


@pytest.mark.parametrize(
    ("names", "entity", "message"),
    [
        (["wandbb"], None, r"--logger wandbb: not known; allowed: wandb, mlflow, clearml, comet; did you mean 'wandb'"),
        (["tensorboard"], None, "CSV and TensorBoard are always written"),
        ([], "me", "--entity me: names an account of wandb or comet; add --logger wandb"),
    ],
)
def test_check_loggers_refuses_unknown_names(names, entity, message):
    with pytest.raises(ConfigError, match=message):
        check_loggers(names, entity)


@pytest.mark.parametrize(("name", "pip"), [("wandb", "wandb"), ("mlflow", "mlflow"), ("clearml", "clearml"),
                                           ("comet", "comet_ml")])  # fmt: skip
def test_check_loggers_names_the_pip_command(name, pip, monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=f"--logger {name}: its package is not installed; pip install {pip}$"):
        check_loggers([name])


def test_check_loggers_ignores_plain_folders(tmp_path, monkeypatch):
    (tmp_path / "clearmlx").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(loggers.ClearmlLogger, "package", "clearmlx")
    with pytest.raises(ConfigError, match="not installed"):
        check_loggers(["clearml"])


def test_trackers_are_not_imported_unless_asked():
    import subprocess

    from utils.files import ROOT

    code = "import sys, engine.loggers.run_logger\n"
    code += "print([m for m in ('wandb', 'mlflow', 'clearml', 'comet_ml') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_logs_report_a_run_from_start_to_end(recorder, tmp_path):
    with make_logs(["recorder", "recorder"], tmp_path, OPTIONS, {"lr0": 0.01}) as logs:
        logs.add(results_row(0))
        logs.add(results_row(1))
        (tmp_path / "weights").mkdir()
        (tmp_path / "weights/best.pt").write_bytes(b"x")
        (tmp_path / "results.png").write_bytes(b"x")
        logs.finish()
    assert [what for what, _ in recorder.calls] == ["start", "add", "add", "finish", "close"]
    run, first, outcome, failed = (recorder.calls[i][1] for i in (0, 1, 3, 4))
    assert (run.project, run.options["epochs"], run.hyp, run.resume_id) == ("blood", 3, {"lr0": 0.01}, None)
    assert first == (0, dict(zip(COLUMNS[1:], results_row(0)[1:])))
    assert outcome.best == tmp_path / "weights/best.pt" and not failed
    assert [p.name for p in (*outcome.images, *outcome.files)] == ["results.png", "results.csv"]
    assert epochs(tmp_path) == [0, 1]


def test_make_logs_resumes_under_the_same_id(recorder, tmp_path):
    with make_logs(["recorder"], tmp_path, OPTIONS, {}) as logs:
        logs.add(results_row(0))
    make_logs(["recorder"], tmp_path, OPTIONS, {}, start_epoch=1, resumed=True).close()
    make_logs(["recorder"], tmp_path, OPTIONS, {}).close()  # a new run in the same folder (--exist-ok) has a new name
    assert [run.resume_id for what, run in recorder.calls if what == "start"] == [None, "id-1", None]


def test_logs_report_errors_of_the_training(recorder, tmp_path):
    with pytest.raises(KeyboardInterrupt), make_logs(["recorder"], tmp_path, OPTIONS, {}):
        raise KeyboardInterrupt
    assert recorder.calls[-1] == ("close", True)


@pytest.mark.parametrize("step", ["add", "finish", "close"])
def test_logs_disable_a_tracker_that_fails(recorder, tmp_path, caplog, step):
    recorder.broken = step
    with make_logs(["recorder"], tmp_path, OPTIONS, {}) as logs:
        for epoch in range(3):
            logs.add(results_row(epoch))
        logs.finish()
    assert [what for what, _ in recorder.calls].count(step) == 1
    assert "--logger recorder: disabled: RuntimeError: no network" in caplog.text
    assert epochs(tmp_path) == [0, 1, 2]


def test_make_logs_refuses_a_tracker_that_cannot_start(recorder, tmp_path):
    recorder.broken = "start"
    with pytest.raises(ConfigError, match="--logger recorder: cannot be started: no network$"):
        make_logs(["recorder"], tmp_path, OPTIONS, {})


def test_other_ranks_write_nothing(tmp_path):
    with Logs(tmp_path) as logs:
        logs.add(results_row(0))
        logs.finish()
    assert list(tmp_path.iterdir()) == []


def test_best_epoch_is_that_of_best_pt(tmp_path):
    log = CsvLog(tmp_path)
    for epoch, value in enumerate((0.1, 0.3, 0.3, 0.2)):
        log.add(results_row(epoch, 0.5, value))
    summary, last = best_epoch(tmp_path)
    assert summary == {
        "best/epoch": 2, "best/precision": 0.6, "best/recall": 0.7, "best/mAP_0.5": 0.5, "best/mAP_0.5:0.95": 0.3,
    }  # fmt: skip
    assert last == 3
    assert best_epoch(tmp_path / "nowhere") == ({}, 0)


@pytest.mark.parametrize(
    ("project", "name"), [("runs/train", "detector"), ("runs/blood", "blood"), ("", "detector"), ("x/", "x")]
)
def test_project_name(project, name):
    assert project_name({"project": project}) == name


def test_hidden_and_foreign_files_are_not_handed_over(tmp_path):
    for name in (".results.x.png", "results.png", "notes.txt", "opt.yaml"):
        (tmp_path / name).write_text("")
    outcome = outcome_of(tmp_path)
    assert [p.name for p in (*outcome.images, *outcome.files)] == ["results.png", "opt.yaml"]
    assert outcome.best is None and json.dumps(dict(outcome.summary)) == "{}"
