"""`--resume` with other options, from another folder, and with plug-ins named in a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from engine.cli.config import TrainConfig
from engine.train.optimizer import lr_scales, parameter_groups
from engine.train.options import resolve_run
from engine.train.step import TrainStep
from engine.train.trainer import train
from models.checkpoint.io import read_checkpoint, write_checkpoint
from models.yolo import DetectionModel
from tests.helpers.checkpoints import XCA_SPEC, separate_queries_and_keys
from tests.helpers.training import assert_equal_runs, config, interrupt_at, rows
from utils.errors import CheckpointError, ConfigError, TrainingError
from utils.yaml_lines import dump_yaml


@pytest.fixture
def last(project, monkeypatch):
    """last.pt of a run of three epochs, interrupted in the second one; the dataset path is relative."""
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
        ({"batch_size": -1, "optimizer": "auto", "close_mosaic": -1}, None),  # resolved by the run
    ],
)
def test_resume_refuses_what_may_not_differ(last, options, message):
    given = TrainConfig.from_keywords(resume=str(last), **options)
    if message is None:
        assert resolve_run(given)[0].imgsz == 64
        return
    with pytest.raises(ConfigError, match=message):
        resolve_run(given)


def test_passwords_are_compared_as_they_are_saved(last):
    content = torch.load(last, weights_only=True)
    content["train"]["options"]["backbone_weights"] = "https://h/w.pth?token=***"
    torch.save(content, last)
    options = {"resume": str(last), "backbone_weights": "https://h/w.pth?token=secret"}
    assert resolve_run(TrainConfig.from_keywords(**options))[1] is not None
    with pytest.raises(ConfigError, match="--backbone-weights 'https://h/v.pth"):
        resolve_run(TrainConfig.from_keywords(**options | {"backbone_weights": "https://h/v.pth?token=secret"}))


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


def _older_layout(last: Path) -> None:
    """Rewrite last.pt in the older layout: separate q and k of cross-covariance attention, in weights and optimizer."""
    tree = torch.load(last, weights_only=True)
    training, options = tree["train"], TrainConfig.from_keywords(**tree["train"]["options"])
    model = DetectionModel(tree["spec"])
    groups = parameter_groups(model, 0.0, lr_scales(model, options.backbone_lr, options.layer_decay))
    names = {parameter: name for name, parameter in model.named_parameters()}
    stored, separate = training["optimizer"]["state"], []
    for index, parameter in enumerate(parameter for group in groups for parameter in group["params"]):
        count = 2 if ".e_mhsa.qk." in names[parameter] else 1
        buffers = {k: v.chunk(count) if v.ndim else (v,) * count for k, v in stored.get(index, {}).items()}
        separate += [{key: parts[number].clone() for key, parts in buffers.items()} for number in range(count)]
    assert len(separate) == sum(len(group["params"]) for group in groups) + 6  # weights and biases of three blocks
    training["optimizer"]["state"] = {index: buffers for index, buffers in enumerate(separate) if buffers}
    training["model"] = separate_queries_and_keys(training["model"])
    torch.save({**tree, "state": separate_queries_and_keys(tree["state"])}, last)


@pytest.mark.parametrize(
    "options",
    [{}, {"optimizer": "AdamW", "layer_decay": 0.7}, {"freeze": ["backbone:2"]}],
    ids=["sgd", "adamw", "frozen"],
)
def test_runs_with_separate_queries_and_keys_resume_bit_equal(project, monkeypatch, options):
    dump_yaml(project / "tiny.yaml", XCA_SPEC)
    whole = train(config(project, epochs=3, name="whole", **options))
    with monkeypatch.context() as patch:
        interrupt_at(patch, epoch=2)
        with pytest.raises(KeyboardInterrupt):
            train(config(project, epochs=3, name="cut", **options))
    last = project / "runs/cut/weights/last.pt"
    _older_layout(last)
    resumed = train(TrainConfig.from_keywords(resume=str(last)))
    assert_equal_runs(whole.folder, resumed.folder)


def _set(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(tree: dict[str, Any]) -> None:
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = value

    return change


def _first_buffer(tree: dict[str, Any]) -> None:
    next(iter(tree["train"]["optimizer"]["state"].values()))["momentum_buffer"] = torch.zeros(1)


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "model missing": lambda tree: tree["train"].pop("model"),
    "hyp missing": lambda tree: tree["train"].pop("hyp"),
    "generator missing": lambda tree: tree["train"]["rng"].pop("torch"),
    "options are a number": _set("train", "options", value=3),
    "options are empty": _set("train", "options", value={}),
    "hyp is a list": _set("train", "hyp", value=[1]),
    "weight of another shape": _set("train", "model", "model.0.bn.bias", value=torch.zeros(3)),
    "weight is not finite": _set("train", "model", "model.0.bn.bias", value=torch.full((8,), float("nan"))),
    "weight is complex": _set("train", "model", "model.0.bn.bias", value=torch.zeros(8, dtype=torch.complex64)),
    "averaged weight missing": lambda tree: tree["state"].pop("model.0.bn.bias"),
    "buffer of another shape": _first_buffer,
    "step is a string": _set("train", "last_step", value="x"),
    "step is a boolean": _set("train", "last_step", value=True),
    "updates are negative": _set("train", "ema_updates", value=-5),
    "fitness is not finite": _set("train", "best_fitness", value=float("nan")),
    "too few classes": _set("train", "class_maps", value=[0.5]),
    "balance is too long": _set("train", "balance", value=[1.0] * 9),
    "generator of another size": _set("train", "rng", "torch", value=torch.zeros(3, dtype=torch.uint8)),
    "epoch beyond the last": _set("epoch", value=10**6),
    "epoch is negative": _set("epoch", value=-10),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_training_state_is_refused_in_one_line(last, damage):
    tree = torch.load(last, weights_only=True)
    DAMAGES[damage](tree)
    torch.save(tree, last)
    csv = (last.parents[1] / "results.csv").read_text()
    with pytest.raises(CheckpointError, match=r"last\.pt: ") as caught:
        train(TrainConfig.from_keywords(resume=str(last)))
    assert "\n" not in str(caught.value)
    assert (last.parents[1] / "results.csv").read_text() == csv


@pytest.mark.parametrize("again", ["resume", "exist_ok"])
def test_training_in_the_same_folder_removes_what_a_killed_process_left(project, last, again):
    left, own = last.parent / ".last.part-ab12_cd3.pt", last.parent / ".editor.settings"
    left.touch()
    own.touch()
    if again == "resume":
        train(TrainConfig.from_keywords(resume=str(last)))
    else:
        train(config(project, epochs=1, name=last.parents[1].name, exist_ok=True))
        assert last.is_file()
    assert not left.exists()
    assert own.exists()


def test_files_of_an_earlier_training_are_reported(project, caplog):
    options = {"epochs": 1, "exist_ok": True, "save_period": 1}
    folder = train(config(project, **options)).folder
    assert "--exist-ok" not in caplog.text
    before = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("opt.yaml", "hyp.yaml")]
    assert train(config(project, **options)).folder == folder
    assert f"--exist-ok: {folder}: {len(before)} file(s) of earlier runs stay unless overwritten" in caplog.text


def test_killed_loader_worker_ends_the_training_in_one_line(project, monkeypatch):
    original = TrainStep.backward

    others = set(psutil.Process().children())  # of earlier tests in this process

    def backward(self: TrainStep, *arguments: Any, **options: Any) -> Any:
        for child in set(psutil.Process().children()) - others:
            child.kill()
        return original(self, *arguments, **options)

    monkeypatch.setattr(TrainStep, "backward", backward)
    monkeypatch.setattr("data.loading.loader.processors", lambda: 2)
    with pytest.raises(TrainingError, match="a loader worker ended .*fewer --workers") as error:
        train(config(project, workers=2, epochs=30))
    assert str(error.value).count("a loader worker ended") == 1
