"""Training end to end on a small generated dataset: output files, resuming, user errors."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import train as train_script
from data.config import load_data_config
from engine.cli.config import TrainConfig
from engine.devices.distributed import World
from engine.loggers.run_logger import CsvLog
from engine.train import trainer as trainer_module
from engine.train.setup import build_parts
from engine.train.step import multi_scale
from engine.train.trainer import duration, train
from models.checkpoint.io import read_checkpoint
from tests.helpers.training import TINY, assert_equal_runs, config, interrupt_at, rows
from tests.parity import rules
from utils.errors import CheckpointError, ConfigError, DataError, SpecError, UserError


def test_a_run_writes_the_files_of_yolov5(project):
    result = train(config(project, noplots=False, epochs=1))
    written = {p.name for p in result.folder.iterdir()} | {p.name for p in (result.folder / "weights").iterdir()}
    expected = {
        "hyp.yaml", "opt.yaml", "results.csv", "results.png", "labels.jpg", "train_batch0.jpg", "train_batch1.jpg",
        "train_batch2.jpg", "report.html", "val_batch0_labels.jpg", "val_batch0_pred.jpg", "best.pt", "last.pt",
    }  # fmt: skip
    assert expected <= written, expected - written
    assert any(name.startswith("events.out.tfevents") for name in written)
    header = (result.folder / "results.csv").read_text().splitlines()[0]
    record = rules.yolov5("checkpoint")["results_csv"]["columns"]
    assert [h.strip() for h in header.split(",")] == record
    assert all(len(cell) >= 20 for cell in header.split(","))
    assert len(rows(result.folder)) == 1


def test_checkpoints_are_plain_data(project):
    result = train(config(project, epochs=1))
    for name in ("best.pt", "last.pt"):
        path = result.folder / "weights" / name
        torch.load(path, weights_only=True)
        found = read_checkpoint(path)
        assert found.names == {0: "circle", 1: "square", 2: "cross"}
        assert found.train is None, "a finished run has no training state"
        assert all(v.dtype == torch.float32 for v in found.state.values() if v.is_floating_point())


@pytest.mark.parametrize("options", [{}, {"optimizer": "AdamW", "cos_lr": True}], ids=["sgd", "adamw"])
def test_resume_is_bit_equal(project, monkeypatch, options):
    whole = train(config(project, epochs=4, name="whole", **options))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(config(project, epochs=4, name="cut", **options))
    last = project / "runs/cut/weights/last.pt"
    assert read_checkpoint(last).epoch == 1
    resumed = train(TrainConfig.from_keywords(resume=str(last)))
    assert resumed.folder.resolve() == (project / "runs/cut").resolve()
    assert rows(resumed.folder) == rows(whole.folder)
    a, b = (read_checkpoint(r.folder / "weights/last.pt").state for r in (whole, resumed))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0, msg=key)


# Keys of `train` in a last.pt of version 0.1, written after a finished epoch. "others": one dict per further rank.
KEYS_OF_0_1 = {
    "model", "optimizer", "ema_updates", "scaler", "skipped", "data_hash", "best_fitness", "best_epoch", "last_step",
    "class_maps", "options", "hyp", "rng", "balance", "others",
}  # fmt: skip


@pytest.mark.parametrize("missing", [set(), {"skipped", "others"}], ids=["finished epoch", "optional keys"])
def test_resume_from_state_of_version_0_1(project, monkeypatch, missing):
    whole = train(config(project, epochs=3, name="whole"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(config(project, epochs=3, name="cut"))
    last = project / "runs/cut/weights/last.pt"
    content = torch.load(last, weights_only=True)
    assert set(content["train"]) >= KEYS_OF_0_1
    content["train"] = {key: content["train"][key] for key in KEYS_OF_0_1 - missing}
    torch.save(content, last)
    resumed = train(TrainConfig.from_keywords(resume=str(last)))
    assert_equal_runs(whole.folder, resumed.folder)


def test_rows_of_epochs_done_again_are_replaced(project):
    log = CsvLog(project)
    for epoch in range(3):
        log.add([epoch, *[0.5] * 13])
    log.drop_from(1)
    log.add([1, *[0.7] * 13])
    assert [r[:2] for r in rows(project)] == [[0, 0.5], [1, 0.7]]


def test_nothing_to_resume(project, monkeypatch):
    monkeypatch.chdir(project)
    with pytest.raises(CheckpointError, match="there is no runs/train"):
        train(config(project, resume=True))
    result = train(config(project, epochs=1))
    with pytest.raises(CheckpointError, match="holds no training state"):
        train(config(project, resume=str(result.last)))


def test_same_seed_same_weights_and_other_seed_other_weights(project):
    states = [read_checkpoint(train(config(project, epochs=1, seed=s)).last).state for s in (1, 1, 2)]
    key = next(k for k in states[0] if k.endswith("conv.weight"))
    torch.testing.assert_close(states[0][key], states[1][key], rtol=0, atol=0)
    assert not torch.equal(states[0][key], states[2][key])


def test_freeze_leaves_frozen_rows_unchanged(project):
    result = train(config(project, epochs=1, freeze=["1"], seed=5))
    torch.manual_seed(0)
    before = read_checkpoint(result.last).state
    again = train(config(project, epochs=2, freeze=["1"], seed=5))
    after = read_checkpoint(again.last).state
    frozen = [k for k in before if k.startswith("model.0.")]
    assert frozen
    for key in frozen:
        torch.testing.assert_close(after[key], before[key], rtol=1e-6, atol=1e-7)
    assert not torch.equal(after["model.1.conv.weight"], before["model.1.conv.weight"])


def test_weights_of_a_run_start_another(project, caplog):
    first = train(config(project, epochs=1))
    with caplog.at_level("INFO"):
        second = train(config(project, cfg="", weights=str(first.best), epochs=1, name="second"))
    total = len(read_checkpoint(first.best).state)
    assert f"Transferred {total}/{total}" in caplog.text
    assert second.best is not None


def test_validation_split_without_objects_trains(project, caplog):
    load_data_config(project / "data.yaml").split("val")  # generates the dataset
    for label in (project / "set/labels/val").iterdir():
        label.write_text("")
    result = train(config(project, epochs=1))
    assert result.epochs == 1 and "the validation split has no objects: mAP is undefined" in caplog.text


def test_early_stopping(project, monkeypatch):
    values = iter([0.5, *[0.1] * 8])
    monkeypatch.setattr(trainer_module, "fitness", lambda metrics: next(values))
    result = train(config(project, epochs=9, patience=2))
    assert result.epochs == 3


MISTAKES = [
    ({"cfg": ""}, ConfigError, "give a model YAML"),
    ({"cfg": "nowhere.yaml"}, ConfigError, "no such file"),
    ({"data": "nowhere.yaml"}, DataError, "nowhere.yaml"),
    ({"hyp": "hyp.scrach-low.yaml"}, ConfigError, "did you mean 'hyp.scratch-low.yaml'"),
    ({"weights": "nowhere.pt"}, CheckpointError, "no such file"),
    ({"freeze": ["77"]}, ConfigError, "no row 6"),
    ({"device": "7"}, ConfigError, "not available"),
    ({"plugin": ["nowhere.py"]}, ConfigError, "no such file"),
    ({"batch_size": 0}, ConfigError, "batch-size"),
]


@pytest.mark.parametrize(("options", "error", "message"), MISTAKES, ids=lambda v: str(v)[:24])
def test_user_errors_leave_no_run_folder(project, options, error, message):
    with pytest.raises(error, match=message) as caught:
        train(config(project, **options))
    assert isinstance(caught.value, UserError)
    assert not (project / "runs").exists() or not any((project / "runs").iterdir())


def test_model_error_has_its_line(project):
    (project / "tiny.yaml").write_text(TINY.replace("Conv, [64, 3, 2]", "Cnv, [64, 3, 2]", 1))
    with pytest.raises(SpecError, match=r"tiny\.yaml:11: .*'Cnv'.*did you mean 'Conv'"):
        train(config(project))


def test_run_from_python(project):
    options = {k: v for k, v in config(project, epochs=1).to_dict().items()}
    assert train_script.run(**options).epochs == 1


@pytest.mark.parametrize("imgsz", [case["imgsz"] for case in rules.yolov5("recipe")["multi_scale"]])
def test_multi_scale_draws_every_size_of_the_reference(imgsz):
    case = next(c for c in rules.yolov5("recipe")["multi_scale"] if c["imgsz"] == imgsz)
    image = torch.zeros(1, 1, imgsz, 32)
    seen = {multi_scale(image, imgsz, case["stride"], np.random.default_rng(i)).shape[2] for i in range(400)}
    assert seen == set(case["sizes"])


def test_model_of_gray_images_is_refused_before_training(project, capsys):
    text = (project / "tiny.yaml").read_text()
    (project / "gray.yaml").write_text(f"ch: 1\n{text}")
    with pytest.raises(SpecError, match=r"gray.yaml:1: ch is 1; images are read with 3 channels"):
        train(config(project, cfg=str(project / "gray.yaml"), epochs=1))


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.4, "4 s"), (59.6, "1 min 00 s"), (158, "2 min 38 s"), (3725, "1 h 02 min 05 s")]
)
def test_duration_names_hours_minutes_seconds(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("head", ["anchor", "free"])
def test_console_fits_80_columns(project, capsys, caplog, head):
    caplog.set_level("INFO")
    train(config(project, epochs=1, head=head))
    bars = [part for part in re.split(r"[\r\n]", capsys.readouterr().err) if re.search(r"\d% ?[|0-9]", part)]
    lines = [line for record in caplog.records for line in record.getMessage().split("\n")]
    tables = [line for line in lines if line.split()[:1] in (["Epoch"], ["all"], ["circle"])]
    shown = [bar for bar in bars if not bar.startswith(("drawing", "verifying"))] + tables
    assert any("%|" in bar for bar in bars) and any("mAP50-95" in bar for bar in bars) and len(tables) >= 3
    assert max(map(len, shown)) < 80
    losses = "box_loss  obj_loss" if head == "anchor" else "box_loss  cls_loss  dfl_loss"
    assert any(losses in line for line in tables)


def test_training_that_learned_nothing_says_why(project, caplog):
    train(config(project, epochs=1))
    assert "learned nothing yet" in caplog.text and "too few steps (1 epoch of 3 batches" in caplog.text


def test_time_after_a_resume_counts_the_epochs_of_this_session(project, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(config(project, epochs=3, name="cut"))
    caplog.set_level("INFO")
    train(TrainConfig.from_keywords(resume=str(project / "runs/cut/weights/last.pt")))
    assert "2 epochs (of 3; resumed after 1) in " in caplog.text


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_head_without_anchors_gets_fitted_ones_even_without_the_check(project, monkeypatch):
    monkeypatch.setattr("data.anchors.trange", lambda count, **_: range(min(count, 20)))
    model_yaml = TINY.replace(TINY[TINY.index("anchors:") : TINY.index("backbone:")], "").replace(
        "Detect, [nc, anchors]", "AnchorFreeDetect, [nc]"
    )
    (project / "free.yaml").write_text(model_yaml)
    options = config(project, cfg=str(project / "free.yaml"), head="anchor", noautoanchor=True)
    sizes = build_parts(options, None, torch.device("cpu"), World()).model.model.head.anchor_sizes
    assert sizes is not None and bool((sizes > 0).all())
