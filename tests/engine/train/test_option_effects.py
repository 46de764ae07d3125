"""Every option of train.py has an observable effect: one row per field of `TrainConfig`.

A row asserts the effect of its options. It runs twice: with the options, and with the options dropped, where its
assertion must fail; a row that passes without its options tests nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import train as train_script
from engine.cli.config import Hyperparameters, TrainConfig
from engine.devices.distributed import World
from engine.train import setup, trainer
from engine.train.options import resolve_run
from engine.train.setup import TrainingParts, build_parts
from engine.train.step import TrainStep
from engine.train.trainer import Trainer, TrainResult
from models.checkpoint.io import read_checkpoint
from models.yolo import DetectionModel
from tests.helpers.training import TINY, config, interrupt_at
from utils.errors import ConfigError
from utils.files import ROOT

PLUGIN = "from pathlib import Path\nPath(__file__).with_suffix('.imported').touch()\n"


class Run:
    """A project folder and the options of a row, or none of them."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, dropped: bool) -> None:
        self.folder, self.patch, self.dropped = folder, patch, dropped

    def config(self, **options: Any) -> TrainConfig:
        """Return the options of a short training; those of the row are left out in the second run."""
        return config(self.folder, **({} if self.dropped else options))

    def parts(self, **options: Any) -> TrainingParts:
        """Build the parts of a training."""
        return build_parts(self.config(**options), None, torch.device("cpu"), World())

    def train(self, **options: Any) -> TrainResult:
        """Train to the end."""
        return trainer.train(self.config(**options))

    def count(self, owner: object, name: str, value: object = None) -> list[tuple[Any, ...]]:
        """Replace a function by one that returns `value`, or calls the original; return the list of its arguments."""
        original, calls = getattr(owner, name), []

        def record(*args: Any, **keywords: Any) -> Any:
            calls.append(args)
            return original(*args, **keywords) if value is None else value

        self.patch.setattr(owner, name, record)
        return calls


def first_batch(parts: TrainingParts) -> torch.Tensor:
    """Images (B, 3, H, W) of the first training batch."""
    return next(iter(parts.data.loader)).images


def weights(result: TrainResult) -> torch.Tensor:
    """First convolution of the final checkpoint."""
    return read_checkpoint(result.last).state["model.0.conv.weight"]


def crop_images(folder: Path) -> None:
    """Generate the dataset and cut its images to half their height."""
    build_parts(config(folder), None, torch.device("cpu"), World())
    files = sorted((folder / "set/images").rglob("*.*"))
    assert files
    for file in files:
        image = cv2.imread(str(file))
        if image is not None:
            cv2.imwrite(str(file), image[: len(image) // 2])
    for cache in (folder / "set").rglob("*.cache"):
        cache.unlink()


def check_weights(run: Run) -> None:
    first = trainer.train(config(run.folder, epochs=1, seed=7))
    parts = run.parts(weights=str(first.last))
    assert torch.equal(parts.model.model.state_dict()["model.0.conv.weight"], weights(first))


def check_cfg(run: Run) -> None:
    (run.folder / "wide.yaml").write_text(TINY.replace("width_multiple: 0.125", "width_multiple: 0.25"))
    assert run.parts(cfg=str(run.folder / "wide.yaml")).model.model.spec.width_multiple == 0.25


def check_data(run: Run) -> None:
    text = (run.folder / "data.yaml").read_text().replace("val: images/val", "val: images/test")
    (run.folder / "other.yaml").write_text(text)
    assert len(run.parts(data=str(run.folder / "other.yaml")).data.val_loader.dataset) == 1


def check_hyp(run: Run) -> None:
    text = (ROOT / "data/hyps/hyp.scratch-low.yaml").read_text().replace("lr0: 0.01", "lr0: 0.005")
    (run.folder / "hyp.yaml").write_text(text)
    assert run.parts(hyp=str(run.folder / "hyp.yaml")).optimizer.defaults["lr"] == 0.005


def check_head(run: Run) -> None:
    parts = run.parts(head="free")
    assert parts.model.model.head.kind == "free"
    assert DetectionModel(parts.model.model.yaml).head.kind == "free"  # as a checkpoint stores it
    assert Path(parts.run.config.hyp).name == "hyp.auto.yaml"
    assert isinstance(parts.optimizer, torch.optim.AdamW)


def check_epochs(run: Run) -> None:
    assert run.train(epochs=1).epochs == 1


def check_batch_size(run: Run) -> None:
    assert len(first_batch(run.parts(batch_size=5))) == 5


def check_imgsz(run: Run) -> None:
    assert first_batch(run.parts(imgsz=96)).shape[2:] == (96, 96)


def check_rect(run: Run) -> None:
    crop_images(run.folder)
    height, width = first_batch(run.parts(rect=True)).shape[2:]
    assert height < width


def check_resume(run: Run) -> None:
    with run.patch.context() as patch:
        interrupt_at(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(config(run.folder, name="cut"))
    _, resumed = resolve_run(run.config(resume=str(run.folder / "runs/cut/weights/last.pt")))
    assert resumed is not None and resumed.epoch == 0


def check_nosave(run: Run) -> None:
    interrupt_at(run.patch, 1)
    with pytest.raises(KeyboardInterrupt):
        run.train(nosave=True)
    assert not list(run.folder.rglob("last.pt"))


def check_noval(run: Run) -> None:
    calls = run.count(Trainer, "_validate")
    run.train(noval=True)
    assert len(calls) == 1  # the final epoch


def check_noautoanchor(run: Run) -> None:
    calls = run.count(setup, "check_anchors")
    run.parts(noautoanchor=True)
    assert not calls


def check_noplots(run: Run) -> None:
    result = run.train(noplots=False, epochs=1)  # `config` of the tests sets noplots
    assert (result.folder / "labels.jpg").is_file()
    assert (result.folder / "labels_correlogram.jpg").is_file()


def check_cache(run: Run) -> None:
    parts = run.parts(cache="ram", noval=True)
    for record in parts.data.loader.dataset.records:
        record.path.unlink()
    try:
        first_batch(parts)
        loaded = True
    except Exception:  # noqa: BLE001 (any failure to read the deleted images)
        loaded = False
    assert loaded


def check_image_weights(run: Run) -> None:
    calls = run.count(trainer, "labels_to_image_weights")
    run.train(image_weights=True)
    assert len(calls) == 2


def check_device(run: Run) -> None:
    refused = False
    try:
        run.train(device="7", epochs=1)
    except ConfigError:
        refused = True
    assert refused


def check_multi_scale(run: Run) -> None:
    calls = run.count(TrainStep, "loss")
    run.train(multi_scale=True, epochs=4)
    assert len({tuple(images.shape[2:]) for _, images, _ in calls}) > 1


def check_single_cls(run: Run) -> None:
    assert run.parts(single_cls=True).data.names == {0: "item"}


def check_optimizer(run: Run) -> None:
    assert isinstance(run.parts(optimizer="Adam").optimizer, torch.optim.Adam)


def check_workers(run: Run) -> None:
    assert run.parts(workers=1).data.loader.workers == 1


def check_project(run: Run) -> None:
    assert run.parts(project=str(run.folder / "other")).run.folder.parent.name == "other"


def check_name(run: Run) -> None:
    assert run.parts(name="cfg").run.folder.name == "tiny"


def check_exist_ok(run: Run) -> None:
    first = build_parts(config(run.folder), None, torch.device("cpu"), World()).run.folder
    assert run.parts(exist_ok=True).run.folder == first


def check_quad(run: Run) -> None:
    assert first_batch(run.parts(quad=True)).shape == (1, 3, 128, 128)


def check_cos_lr(run: Run) -> None:
    schedule = run.parts(cos_lr=True, epochs=4).schedule
    expected = 0.01 * ((1 - np.cos(np.pi / 4)) / 2 * (0.01 - 1) + 1)
    assert schedule.at(9999, 1).lr[0] == pytest.approx(expected)


def check_label_smoothing(run: Run) -> None:
    def loss(parts: TrainingParts) -> float:
        torch.manual_seed(0)
        raw = [torch.randn(1, 3, side, side, 8) for side in (8, 4, 2)]
        targets = torch.tensor([[0, 1, 0.5, 0.5, 0.4, 0.4]])
        return float(parts.model.criterion(raw, targets)[1][2])

    plain = build_parts(config(run.folder), None, torch.device("cpu"), World())
    assert loss(run.parts(label_smoothing=0.2)) != pytest.approx(loss(plain))


def check_patience(run: Run) -> None:
    values = iter([0.5, *[0.1] * 8])
    run.patch.setattr(trainer, "fitness", lambda _: next(values))
    options = {} if run.dropped else {"patience": 1}
    assert trainer.train(config(run.folder, epochs=5, **options)).epochs == 2


def check_freeze(run: Run) -> None:
    model = run.parts(freeze=["1"]).model.model
    assert [p.requires_grad for p in model.model[0].parameters()] == [False] * 3
    assert all(p.requires_grad for p in model.model[1].parameters())


def check_freeze_epochs(run: Run) -> None:
    calls = run.count(trainer, "unfreeze")
    trainer.train(config(run.folder, freeze=["1"], **({} if run.dropped else {"freeze_epochs": 1})))
    assert len(calls) == 1


def check_backbone_lr(run: Run) -> None:
    groups = run.parts(backbone_lr=0.5).optimizer.param_groups
    assert {group["lr_scale"] for group in groups} == {0.5, 1.0}


def check_layer_decay(run: Run) -> None:
    groups = run.parts(layer_decay=0.5).optimizer.param_groups
    assert {group["lr_scale"] for group in groups} == {1.0, *(0.5**i for i in range(1, 6))}


def check_close_mosaic(run: Run) -> None:
    dataset, plain = (
        parts.data.loader.dataset
        for parts in (run.parts(close_mosaic=1), build_parts(config(run.folder), None, torch.device("cpu"), World()))
    )
    assert np.array_equal(dataset[(0, 0)].image, plain[(0, 0)].image)
    assert not np.array_equal(dataset[(1, 0)].image, plain[(1, 0)].image)


def check_verbose(run: Run) -> None:
    tables = run.count(DetectionModel, "layer_table")
    run.parts(verbose=True)
    assert tables[0][1] is None  # no width: nothing is cut


def check_channels_last(run: Run) -> None:
    strides = {}
    for choice in ("auto", "off"):
        model = run.parts(channels_last=choice).model
        strides[choice] = model.model.get_parameter("model.1.conv.weight").stride()
        assert (model.memory_format == torch.channels_last) is (choice == "auto")
    assert strides["auto"] != strides["off"]


def check_compile(run: Run) -> None:
    calls = run.count(torch, "compile", value=torch.nn.Identity())
    Trainer(run.parts(compile=True))
    assert len(calls) == 1


def check_save_period(run: Run) -> None:
    assert (run.train(save_period=1).folder / "weights/epoch1.pt").is_file()


def check_seed(run: Run) -> None:
    plain = build_parts(config(run.folder), None, torch.device("cpu"), World()).model.model.state_dict()
    other = run.parts(seed=1).model.model.state_dict()
    assert not torch.equal(other["model.0.conv.weight"], plain["model.0.conv.weight"])


def check_amp(run: Run) -> None:
    assert Trainer(run.parts(amp="bf16")).stepper.amp is torch.bfloat16


def check_plugin(run: Run) -> None:
    plugin = run.folder / "plugin_of_options.py"
    plugin.write_text(PLUGIN)
    run.train(plugin=[str(plugin)], epochs=1)
    assert plugin.with_suffix(".imported").is_file()


def check_evolve(run: Run) -> None:
    calls: list[TrainConfig] = []
    run.patch.setattr("engine.tune.search.evolve", calls.append)
    train_script.start(run.config(evolve=1, epochs=1))
    assert len(calls) == 1


def check_resume_evolve(run: Run) -> None:
    calls: list[TrainConfig] = []
    run.patch.setattr("engine.tune.search.evolve", calls.append)
    train_script.start(run.config(resume_evolve="study", epochs=1))
    assert len(calls) == 1


EFFECTS: dict[str, Callable[[Run], None]] = {
    name.removeprefix("check_"): function for name, function in list(globals().items()) if name.startswith("check_")
}
# Options whose effect other modules test: option -> file and test.
ELSEWHERE = {
    "evolve_population": ("tests/engine/tune/test_search.py", "test_population_is_tried_first"),
    "sync_bn": (
        "tests/engine/devices/test_distributed.py",
        "test_gradients_are_those_of_one_process_with_the_double_batch",
    ),
    "logger": ("tests/engine/loggers/test_run_logger.py", "test_logs_report_a_run_from_start_to_end"),
    "entity": ("tests/engine/loggers/test_run_logger.py", "test_check_loggers_refuses_unknown_names"),
    "backbone_weights": ("tests/models/test_yolo.py", "test_backbone_weights_go_into_the_backbone_row"),
    "partial_weights": ("tests/models/test_transfer.py", "test_partial_transfer_takes_the_rows_that_agree"),
}  # fmt: skip
REFUSED = {"bucket": "x", "upload_dataset": True, "bbox_interval": 3}
IGNORED = {"local_rank"}  # given by torch.distributed.launch of older versions


def test_every_option_has_a_row() -> None:
    names = {f.name for f in fields(TrainConfig)}
    assert {*EFFECTS, *ELSEWHERE, *REFUSED, *IGNORED} == names
    assert len(EFFECTS) + len(ELSEWHERE) + len(REFUSED) + len(IGNORED) == len(names)


@pytest.mark.parametrize("option", ELSEWHERE)
def test_tests_elsewhere_exist(option: str) -> None:
    path, name = ELSEWHERE[option]
    tree = ast.parse((ROOT / path).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("option", REFUSED)
def test_unavailable_options_are_refused(option: str) -> None:
    with pytest.raises(ConfigError, match="not available"):
        TrainConfig.from_keywords(**{option: REFUSED[option]})


@pytest.mark.parametrize("option", EFFECTS)
def test_option_has_its_effect(option: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    EFFECTS[option](Run(project, monkeypatch, dropped=False))


@pytest.mark.parametrize("option", EFFECTS)
def test_effect_is_absent_without_the_option(option: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        EFFECTS[option](Run(project, monkeypatch, dropped=True))


def test_defaults_of_the_anchor_head_are_the_official_ones(project: Path) -> None:
    parts = build_parts(config(project), None, torch.device("cpu"), World())
    official = Hyperparameters.from_yaml(ROOT / "data/hyps/hyp.scratch-low.yaml")
    assert parts.run.hyp == official
    assert type(parts.optimizer) is torch.optim.SGD
