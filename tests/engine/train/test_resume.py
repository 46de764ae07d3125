"""`--resume` with other options, from another place, and plug-ins that a checkpoint names."""

from __future__ import annotations

import shutil

import pytest

from engine.cli.config import TrainConfig
from engine.train.state import resolve_run
from engine.train.trainer import train
from models.checkpoint.io import read_checkpoint, write_checkpoint
from tests.helpers.training import config, interrupt_at, rows
from utils.errors import ConfigError


@pytest.fixture
def last(project, monkeypatch):
    """last.pt of a run of three epochs that was interrupted in the second one; the dataset is given relative."""
    monkeypatch.chdir(project)
    with monkeypatch.context() as patch:
        interrupt_at(patch, epoch=1)
        with pytest.raises(KeyboardInterrupt):
            train(config(project, name="cut", data="data.yaml", epochs=3))
    return project / "runs/cut/weights/last.pt"


def test_resume_applies_what_may_differ(last, caplog):
    caplog.set_level("INFO")
    result = train(TrainConfig.from_keywords(resume=str(last), epochs=4, patience=7, workers=0))
    assert len(rows(result.folder)) == 4
    assert "--epochs is 4, was 3" in caplog.text and "--patience is 7, was 100" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"imgsz": 128, "batch_size": 2}, "--batch-size 2: the run has 4; --imgsz 128: the run has 64"),
        ({"epochs": 2}, "--epochs 2: the run has 3; only a larger number"),
        ({"optimizer": "AdamW"}, "--optimizer 'AdamW': the run has 'SGD'"),
        ({"name": "other"}, "--name other: the run stays in"),
        ({"seed": 0, "name": "cut", "imgsz": 60}, None),  # as in the run: nothing to refuse
    ],
)
def test_resume_refuses_what_may_not_differ(last, options, message):
    given = TrainConfig.from_keywords(resume=str(last), **options)
    if message is None:
        assert resolve_run(given)[0].imgsz == 64
        return
    with pytest.raises(ConfigError, match=message):
        resolve_run(given)


def test_workers_given_at_the_default_value_apply(last):
    assert resolve_run(TrainConfig.from_keywords(resume=str(last)))[0].workers == 0
    assert resolve_run(TrainConfig.from_keywords(resume=str(last), workers=8))[0].workers == 8


def test_resume_from_another_folder_and_with_a_moved_dataset(last, project, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    moved = shutil.copytree(last.parents[1], tmp_path / "moved")
    found, _ = resolve_run(TrainConfig.from_keywords(resume=str(moved / "weights/last.pt")))
    assert found.data == str(project / "data.yaml") and (found.project, found.name) == (str(tmp_path), "moved")
    shutil.copy(project / "data.yaml", tmp_path / "other.yaml")
    given = TrainConfig.from_keywords(resume=str(moved / "weights/last.pt"), data="../other.yaml")
    assert resolve_run(given)[0].data == "../other.yaml"


def test_plugins_named_by_a_checkpoint_are_not_executed(last, tmp_path):
    evil, good = tmp_path / "evil.py", tmp_path / "good.py"
    evil.write_text(f"open({str(tmp_path / 'PWNED')!r}, 'w')")
    good.write_text("")
    content = read_checkpoint(last)
    training = {**content.train, "options": {**content.train["options"], "plugin": [str(evil)]}}
    spread = {k: getattr(content, k) for k in ("spec", "names", "stride", "state", "epoch")}
    write_checkpoint(last, {**spread, "metadata": dict(content.metadata), "train": training})
    with pytest.raises(ConfigError, match="not executed; if you trust them, add: --plugin .*evil.py"):
        resolve_run(TrainConfig.from_keywords(resume=str(last)))
    found, _ = resolve_run(TrainConfig.from_keywords(resume=str(last), plugin=[str(good)]))
    assert found.plugin == [str(good)] and not (tmp_path / "PWNED").exists()
