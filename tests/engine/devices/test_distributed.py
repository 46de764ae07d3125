"""Training with several processes: data sharding, gradients, validation, and exits."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data import shapes
from data.config import load_data_config
from data.labels import cache as label_cache
from data.labels.labels import load_annotations
from data.loading import image_cache as image_store
from data.loading.dataset import DetectionDataset
from data.loading.loader import DetectionLoader
from data.loading.order import shard
from engine.cli.config import Hyperparameters, TrainConfig
from engine.devices import distributed
from engine.devices.distributed import (
    World,
    broadcast,
    gather,
    main_first,
    process_group,
    with_gradients,
    world_from_environment,
)
from engine.devices.sync_bn import convert_sync_batchnorm
from engine.evaluate import evaluator
from engine.evaluate.evaluator import EvalOptions, EvalResult, conclude, evaluate, measure
from engine.runtimes.pytorch import PyTorchRuntime
from engine.train import trainer as trainer_module
from engine.train.setup import build_loss
from engine.train.stopping import StopRequest
from engine.train.trainer import train
from models.checkpoint.io import read_checkpoint
from models.losses.base import LossOutput
from models.yolo import DetectionModel
from tests.helpers.detection_data import NAMES, write_data
from tests.helpers.detectors import build
from tests.helpers.processes import next_group, run_processes
from tests.helpers.training import config, detection_loss, rows, train_step, write_project
from utils import log
from utils.errors import ConfigError, DataError
from utils.files import ROOT

CPU = torch.device("cpu")
# ---- shares of the data ---------------------------------------------------------------------------------------------


def loader_of(folder: Path, batch_size: int, world: World, *, rect: bool = False, **options: Any) -> DetectionLoader:
    records = load_annotations(load_data_config(folder / "set.yaml").split("val"), 3, progress=False).records
    dataset = DetectionDataset(records, 64, rect=rect, batch_size=batch_size)
    return DetectionLoader(dataset, batch_size, rank=world.rank, world_size=world.size, **options)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a dataset of six images of different shapes."""
    folder = tmp_path_factory.mktemp("images")
    write_data(folder)
    return folder


@pytest.mark.parametrize(
    "options", [{"shuffle": True}, {"image_weights": [1.0, 5, 2, 0, 3, 1]}], ids=["plain", "weights"]
)
@pytest.mark.parametrize("size", [2, 3])
def test_the_ranks_batches_of_a_step_are_the_batch_of_one_process(images, size, options) -> None:
    one = loader_of(images, size, World(), seed=5, **options)
    ranks = [loader_of(images, 1, World(rank, rank, size), seed=5, **options) for rank in range(size)]
    for epoch in range(3):
        for loader in (one, *ranks):
            loader.set_epoch(epoch)
        shares = [loader.batches() for loader in ranks]
        assert [[key for share in step for key in share] for step in zip(*shares)] == one.batches()


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_validation_batch_belongs_to_one_rank(images, size) -> None:
    whole = loader_of(images, 2, World(), rect=True).batches()
    ranks = [loader_of(images, 2, World(k, k, size), rect=True, repeat=False) for k in range(size)]
    assert [len(loader) for loader in ranks] == [len(loader.batches()) for loader in ranks]
    found = {rank + turn * size: batch for rank in range(size) for turn, batch in enumerate(ranks[rank].batches())}
    assert [found[number] for number in range(len(found))] == whole


def test_shares_with_and_without_repetition() -> None:
    assert [shard(7, rank, 3).tolist() for rank in range(3)] == [[0, 3, 6], [1, 4, 0], [2, 5, 1]]
    assert [shard(7, rank, 3, repeat=False).tolist() for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    assert shard(1, 1, 2, repeat=False).tolist() == []


# ---- validation -----------------------------------------------------------------------------------------------------


class Coarse(PyTorchRuntime):
    """A detector with few distinct confidences, so that the order of the images matters."""

    def with_raw(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        decoded, raw = super().with_raw(images)
        decoded[..., 4:] = (decoded[..., 4:] * 24).round().clamp(max=8) / 8
        return decoded, raw


def judge() -> tuple[Coarse, Any]:
    model = build("yolov5", seed=3)
    return Coarse.from_model(model, CPU), detection_loss(model)


def same_results(a: EvalResult, b: EvalResult) -> None:
    """Raise AssertionError unless all metrics except the speeds are bit-equal."""
    for f in fields(EvalResult):
        if f.name != "speeds":
            x, y = getattr(a, f.name), getattr(b, f.name)
            if f.name == "curves":
                x, y = (np.concatenate([np.ravel(v) for v in c]) for c in (x, y))
            np.testing.assert_array_equal(x, y, err_msg=f.name)


@pytest.mark.parametrize("size", [2, 5], ids="{} ranks".format)
def test_parts_of_a_validation_give_the_metrics_of_the_whole(images, tmp_path, monkeypatch, size) -> None:
    runtime, criterion = judge()
    monkeypatch.setattr("engine.evaluate.plots.draw_charts", lambda *_: None)
    seen: dict[str, list[str]] = {"whole": [], "parts": []}

    def options(name: str) -> EvalOptions:
        (tmp_path / name).mkdir()
        return EvalOptions(NAMES, folder=tmp_path / name, plots=True, sinks=(lambda o: seen[name].append(o.path),))

    whole = evaluate(runtime, loader_of(images, 2, World(), rect=True), options("whole"), criterion)
    assert 0.001 < whole.map50 < 0.9 and min(whole.losses) > 0
    assert whole.confusion is not None and whole.confusion[:3].sum() > 9
    chosen = options("parts")
    parts = []
    for rank in range(size):
        world = World(rank, rank, size)
        loader = loader_of(images, 2, world, rect=True, repeat=False)
        parts.append(copy.deepcopy(measure(runtime, loader, chosen, criterion, world)))
    same_results(conclude(parts, chosen), whole)
    assert len(seen["whole"]) == 6 and seen["parts"] == seen["whole"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "parts").glob("*.jpg")} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").glob("*.jpg")
    }


# ---- two processes --------------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    """A model in float64 with any input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.double()

    def forward(self, images: Tensor) -> Any:
        return self.model(images.double())


def squares(raw: Sequence[Tensor], targets: Tensor) -> LossOutput:
    """A float64 sum over the images; the detection loss computes in float32."""
    return LossOutput(sum((level.tanh() - 0.1).square().sum() for level in raw), torch.zeros(3))  # type: ignore[arg-type]


GRADIENTS = {
    # family, batch statistics, loss, relative tolerance
    "frozen": ("yolov5", "frozen", "squares", 1e-10),
    "group norm": ("riformer", "frozen", "squares", 1e-10),
    "sync": ("yolov5", "sync", "squares", 1e-10),
    "sync, backbone": ("nextvit", "sync", "squares", 1e-10),
    "detection": ("yolov5", "frozen", "detection", 1e-5),
    "free": ("yolov5", "frozen", "free", 1e-4),
    "accumulated": ("yolov5", "frozen", "squares", 1e-10),
}


def step(case: str, world: World) -> dict[str, Tensor]:
    """Return gradients and batch statistics of a training step; each rank has half of the batch."""
    family, statistics, loss, _ = GRADIENTS[case]
    model = build(family, seed=4)
    if loss == "free":
        torch.manual_seed(4)
        model = DetectionModel(model.yaml, head="free")
        hyp = Hyperparameters.from_yaml(ROOT / "data/hyps/hyp.auto.yaml")
        criterion: Any = build_loss(model, hyp, TrainConfig(imgsz=64), world=world)
    else:
        criterion = detection_loss(model) if loss == "detection" else squares
    network = Doubled(model)
    network.train()
    if statistics == "frozen":
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    elif world.size > 1:
        convert_sync_batchnorm(network, world, CPU)
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    # The loss is a mean over the matches of each process; with equal halves of targets it is the mean over all.
    boxes = torch.tensor([[0, 1, 0.5, 0.5, 0.4, 0.4], [1, 2, 0.3, 0.6, 0.2, 0.5]])
    if loss == "free" and world.rank == 1:
        boxes = boxes[:1]  # the ranks' sums of soft targets differ
    half = slice(2 * world.rank, 2 * world.rank + 2) if world.size > 1 else slice(None)
    second = boxes[:1] if loss == "free" else boxes
    targets = boxes if world.size > 1 else torch.cat((boxes, second + torch.tensor([2.0, 0, 0, 0, 0, 0])))
    stepper = train_step(network, criterion, world)
    if case == "accumulated":
        stepper.backward(images[half].flip(1), targets, (0, 0), average=False)
    stepper.backward(images[half], targets, (0, 0))
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return gradients | {name: b for name, b in network.named_buffers() if "running" in name}


def joined() -> World:
    return with_gradients(world_from_environment(), CPU)


WRITERS = {"shapes": (shapes, "generate"), "labels": (label_cache, "write"), "images": (image_store, "atomic_path")}


def watch(project: Any, name: str) -> list[Any]:
    """Return a list that records the arguments of all further calls of a function."""
    calls: list[Any] = []
    original = getattr(project, name)

    def watched(*arguments: Any) -> Any:
        calls.append(arguments)
        return original(*arguments)

    setattr(project, name, watched)
    return calls


def pair(folder: Path) -> None:
    """Work of the two processes for the tests below; each writes its results."""
    rank = world_from_environment().rank
    log.LINGER = 0.5
    found: dict[str, Any] = {}
    with process_group(world_from_environment()):
        world = joined()
        found["steps"] = {case: step(case, world) for case in GRADIENTS}
        runtime, criterion = judge()
        loader = loader_of(folder / "images", 4, world, rect=True, repeat=False)
        parts = gather(measure(runtime, loader, EvalOptions(NAMES), criterion, world), world)
        found["result"] = conclude(parts, EvalOptions(NAMES)) if parts else None
        model = build("yolov5", seed=rank)
        distributed.copy_from_main(model, world)
        found["copied"] = model.state_dict()
        with distributed.file_from_main(folder / f"file{rank}", world) as path:  # as if each had its own disk
            found["file"] = path.read_text() if path is not None else None
    next_group()
    weights = watch(DetectionLoader, "set_image_weights")
    wrote = {word: watch(project, name) for word, (project, name) in WRITERS.items()}
    options = {"noplots": False, "sync_bn": True, "image_weights": True, "cache": "disk", "batch_size": 4}
    options |= {"freeze": ["2"], "freeze_epochs": 1, "save_period": 1}
    thawed = watch(trainer_module, "unfreeze")
    trained = train(config(folder, epochs=2, amp="off", **options))
    found |= {"weights": [given[1] for given in weights], "wrote": {word: len(calls) for word, calls in wrote.items()}}
    found |= {"trained": trained.metrics, "run": trained.folder}
    (model, frozen) = thawed[0]
    found |= {"weights after": model.state_dict(), "thawed": frozen.unfreeze}
    next_group()
    try:
        with process_group(world_from_environment()), main_first(world_from_environment()):
            if rank == 0:
                raise DataError("a mistake")
            found["entered"] = True
    except (DataError, SystemExit) as error:
        found["ended"] = repr(error)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
    next_group()
    with process_group(world_from_environment()):
        if rank == 1:
            raise DataError("a mistake on another machine")
        broadcast(None, world_from_environment())


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread as the other processes: sums and initial weights depend on it in the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of the two processes of `pair`; [2] are their exit codes, [3] their folder."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "images").mkdir()
    write_data(folder / "images")
    write_project(folder, val=9)
    (folder / "file0").write_text("of rank zero")
    codes = run_processes(pair, folder)
    results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    return [*results, {"codes": codes}, {"folder": folder}]


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_are_those_of_one_process_with_the_double_batch(found, case) -> None:
    first, second = (f["steps"][case] for f in found[:2])
    wanted = step(case, World())
    assert first.keys() == second.keys() == wanted.keys() and len(wanted) > 20
    tolerance = GRADIENTS[case][-1]
    largest = max(float(value.abs().max()) for value in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, msg=name)
        size = max(float(value.abs().max()), 1e-6 * largest)  # a bias before a norm: only rounding
        torch.testing.assert_close(first[name], value, rtol=tolerance, atol=tolerance * size, msg=name)


def test_the_validation_of_two_processes_is_that_of_one(found) -> None:
    runtime, criterion = judge()
    loader = loader_of(found[3]["folder"] / "images", 4, World(), rect=True)
    same_results(found[0]["result"], evaluate(runtime, loader, EvalOptions(NAMES), criterion))
    assert found[1]["result"] is None


def test_a_training_reports_what_one_process_measures(found, tmp_path) -> None:
    folder = found[0]["run"]
    assert folder == found[1]["run"] and sorted(p.name for p in folder.parent.iterdir()) == ["exp"]
    assert [row[0] for row in rows(folder)] == [0, 1]
    loader = validation_loader(found[3]["folder"])
    best = folder / "weights/best.pt"
    options = EvalOptions(read_checkpoint(best).names, folder=tmp_path, plots=True)
    same_results(found[0]["trained"], evaluate(PyTorchRuntime([best], CPU), loader, options))
    assert found[1]["trained"] is None
    written = {p.name for p in folder.iterdir()}
    assert {"report.html", "results.png", "val_batch0_pred.jpg", "confusion_matrix.png", "opt.yaml"} <= written
    shown = [(tmp_path / f"val_batch{k}_pred.jpg").read_bytes() for k in (0, 1)]  # one batch of each rank
    assert shown == [(folder / f"val_batch{k}_pred.jpg").read_bytes() for k in (0, 1)]


def validation_loader(folder: Path) -> DetectionLoader:
    """The validation loader of `pair`: twice the batch of a process."""
    records = load_annotations(load_data_config(folder / "data.yaml").split("val"), 3, progress=False).records
    dataset = DetectionDataset(records, 64, rect=True, batch_size=4, stride=32, pad=0.5)
    return DetectionLoader(dataset, 4)


def test_thawed_parameters_are_averaged_over_the_processes(found) -> None:
    """`--freeze-epochs`: the set of trained parameters changes, so the model is wrapped again."""
    first, second = (f["weights after"] for f in found[:2])
    assert found[0]["thawed"] == found[1]["thawed"] and len(found[0]["thawed"]) == 6
    checkpoint = read_checkpoint(found[0]["run"] / "weights/epoch0.pt")
    initial = checkpoint.train["model"]
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0, msg=name)
    for name in found[0]["thawed"]:
        assert not torch.equal(first[name], initial[name]), name


def test_all_draw_by_the_same_image_weights(found) -> None:
    first, second = (f["weights"] for f in found[:2])
    assert len(first) == len(second) == 2
    for a, b in zip(first, second):
        np.testing.assert_array_equal(a, b)


def test_data_and_caches_are_written_by_one_process(found) -> None:
    assert found[0]["wrote"] == {"shapes": 1, "labels": 2, "images": 19}
    assert found[1]["wrote"] == {"shapes": 0, "labels": 0, "images": 0}


def test_values_and_files_of_rank_zero_reach_the_others(found) -> None:
    wanted = build("yolov5", seed=0).state_dict()
    for one in found[:2]:
        assert one["file"] == "of rank zero"
        for name, value in wanted.items():
            torch.testing.assert_close(one["copied"][name], value, rtol=0, atol=0, msg=name)


def test_a_mistake_of_rank_zero_ends_all_and_is_reported_once(found) -> None:
    assert found[0]["ended"] == "DataError('a mistake')"
    assert found[1]["ended"] == "SystemExit(2)" and "entered" not in found[1]


def test_a_mistake_of_another_rank_ends_all(found) -> None:
    assert found[2]["codes"] == [1, 1]  # rank zero silently, rank 1 with an error


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "local_rank", "wanted"), [("", 1, "1"), ("2,3", 0, "2"), ("2,3", 1, "3"), ("cpu", 1, "cpu")]
)
def test_each_process_takes_a_gpu_of_its_own(monkeypatch, text, local_rank, wanted) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert distributed.rank_device(text, World(local_rank, local_rank, 2)) == wanted


def test_environment_of_another_launcher_is_named(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in distributed.TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(
        ConfigError, match="WORLD_SIZE is 2, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set.*torchrun"
    ):
        distributed.world_from_environment()


def test_too_few_gpus_are_named(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="--device 0: 1 GPU"):
        distributed.rank_device("0", World(1, 1, 2))
    assert distributed.rank_device("0", World()) == "0"


def test_the_progress_bar_is_rank_zeros(images, monkeypatch) -> None:
    shown = []
    monkeypatch.setattr(evaluator, "tqdm", lambda loader, *, disable, **_: (shown.append(not disable), loader)[1])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        world = World(rank, rank, 2)
        measure(judge()[0], loader_of(images, 4, world, rect=True, repeat=False), EvalOptions(NAMES), world=world)
    assert shown == [True, False]


def test_a_repeated_sigterm_does_not_interrupt_saving() -> None:
    """torchrun and a scheduler may both send one."""
    with StopRequest() as stop:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
