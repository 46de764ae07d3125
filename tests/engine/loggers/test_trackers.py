"""W&B and MLflow offline: written values are read back. ClearML and Comet are tested with mocks."""

from __future__ import annotations

import struct
import sys
import types
from unittest.mock import MagicMock

import cv2
import numpy as np
import pytest

from engine.loggers.run_logger import make_logs
from tests.helpers.training import results_row

OPTIONS = {"project": "runs/blood", "entity": None, "epochs": 3, "freeze": ["0"], "cache": None}
HYP = {"lr0": 0.01, "momentum": 0.937}


@pytest.fixture
def folder(tmp_path):
    """A run folder with weights, an image and a report."""
    place = tmp_path / "runs/blood/exp"
    (place / "weights").mkdir(parents=True)
    (place / "weights/best.pt").write_bytes(b"weights")
    (place / "report.html").write_text("<p>")
    assert cv2.imwrite(str(place / "results.png"), np.zeros((8, 8, 3), np.uint8))
    return place


def train(name, folder):
    """Log two epochs, close, resume with a third, and finish."""
    with make_logs([name], folder, OPTIONS, HYP) as logs:
        logs.add(results_row(0, 0.1))
        logs.add(results_row(1, 0.2))
    with make_logs([name], folder, OPTIONS, HYP, start_epoch=2, resumed=True) as logs:
        logs.add(results_row(2, 0.3))
        logs.finish()
        assert logs.hosted, "disabled"


@pytest.mark.slow  # imports for seven seconds
def test_mlflow(folder, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    train("mlflow", folder)
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("blood")
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.run_name for run in runs] == ["exp"], "resumed, not restarted"
    data, info = runs[0].data, runs[0].info
    assert info.status == "FINISHED"
    assert data.params["hyp/momentum"] == "0.937" and data.params["epochs"] == "3"
    history = client.get_metric_history(info.run_id, "metrics/mAP_0.5")
    assert [(m.step, m.value) for m in history] == [(0, 0.1), (1, 0.2), (2, 0.3)]
    assert data.metrics["metrics/mAP_0.5-0.95"] == 0.25 and data.metrics["best/epoch"] == 2
    kept = {f.path for f in client.list_artifacts(info.run_id)}
    assert kept == {"weights", "report.html", "results.csv", "results.png"}
    weights = folder.parent / "mlartifacts" / info.run_id / "artifacts/weights/best.pt"
    assert weights.read_bytes() == b"weights"


def wandb_records(path):
    """Return the records of an offline file: a LevelDB log (32 KiB blocks) of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # complete, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            yield record


def test_wandb(folder, monkeypatch, tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    train("wandb", folder)
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2  # one per process; `wandb sync` joins them by the name of the run
    records = [r for path in files for r in wandb_records(path)]
    runs = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert len({r.run_id for r in runs}) == 1 and runs[0].display_name == "exp" and runs[0].project == "blood"
    config = {u.key: u.value_json for u in runs[0].config.update}
    assert '"momentum":0.937' in config["hyp"].replace(" ", "") and config["epochs"] == "3"
    history = [
        {i.key or "/".join(i.nested_key): i.value_json for i in r.history.item}
        for r in records if r.WhichOneof("record_type") == "history"
    ]  # fmt: skip
    values = [(int(h["_step"]), float(h["metrics/mAP_0.5"])) for h in history if "metrics/mAP_0.5" in h]
    assert values == [(0, 0.1), (1, 0.2), (2, 0.3)]
    assert any("images/results" in key for h in history for key in h)
    exported_files = [r.request.log_artifact.artifact if r.HasField("request") else r.artifact
                 for r in records if r.WhichOneof("record_type") in ("artifact", "request")]  # fmt: skip
    names = {entry.path for a in exported_files for entry in a.manifest.contents}
    assert {"best.pt", "results.csv", "report.html"} <= names, names


@pytest.mark.parametrize("name", ["clearml", "comet"])
def test_mocks_receive_everything(name, folder, monkeypatch):
    """Neither runs without its server: mocks check the calls only."""
    module = "comet_ml" if name == "comet" else name
    package = MagicMock(spec_set=["Task", "start", "ExperimentConfig", "__spec__"])
    package.__spec__ = types.SimpleNamespace(origin="here")
    monkeypatch.setitem(sys.modules, module, package)
    run = package.start.return_value if name == "comet" else package.Task.init.return_value
    run.get_key.return_value = run.id = "id-7"
    train(name, folder)
    calls = run.mock_calls + run.get_logger.return_value.mock_calls
    text = " ".join(map(str, calls))
    if name == "comet":
        started = [c.kwargs for c in package.start.call_args_list]
        assert [s["experiment_key"] for s in started] == [None, "id-7"] and started[0]["project_name"] == "blood"
        assert run.log_model.call_args.args == ("best", str(folder / "weights/best.pt"))
        assert [c.kwargs["step"] for c in run.log_metrics.call_args_list[:3]] == [0, 1, 2]
        assert run.end.call_count == 2
    else:
        started = [c.kwargs for c in package.Task.init.call_args_list]
        assert [s["continue_last_task"] for s in started] == [False, "id-7"] and started[0]["project_name"] == "blood"
        run.set_initial_iteration.assert_called_once_with(0)  # ClearML would add an offset when a run is continued
        scalars = run.get_logger.return_value.report_scalar.call_args_list
        assert [c.kwargs["iteration"] for c in scalars if c.args[1] == "mAP_0.5"] == [0, 1, 2]
        assert run.close.call_count == 2 and not run.mark_failed.called
    for word in ("momentum", "best.pt", "results.png", "results.csv", "report.html", "best/mAP_0.5"):
        assert word in text, word
