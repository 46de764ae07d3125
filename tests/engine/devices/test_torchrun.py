"""Trainings of two processes under torchrun: failures, stopping and resuming."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine.cli.config import TrainConfig
from engine.devices.distributed import process_group, with_gradients, world_from_environment
from engine.train.trainer import train
from models.checkpoint.io import read_checkpoint
from models.yolo import DetectionModel
from tests.helpers.detectors import ANCHORS
from tests.helpers.processes import run_processes
from tests.helpers.training import assert_equal_runs, config, detection_loss, rows, signal_at, train_step, write_project
from utils.files import ROOT
from utils.yaml_lines import dump_yaml

BOUND = 60  # seconds for two processes to start, fail and exit
SCRIPT = str(ROOT / "tests/helpers/faulty_train.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a dataset of a few images and a small model that uses random numbers in training."""
    write_project(tmp_path, val=9)
    arch = {"layers": [1, 1, 1, 1], "embed_dims": [8, 8, 16, 16]}
    backbone = [[-1, 1, "RIFormer", {"arch": arch, "drop_path_rate": 0.5}]]
    head = [[["P3", "P4", "P5"], 1, "Detect", ["nc", "anchors"]]]
    spec = {
        "nc": 3,
        "depth_multiple": 1.0,
        "width_multiple": 1.0,
        "anchors": ANCHORS,
        "backbone": backbone,
        "head": head,
    }
    dump_yaml(tmp_path / "tiny.yaml", spec)
    return tmp_path


def command(project: Path, *more: str, epochs: int = 3) -> list[str]:
    given = [
        f"--cfg={project / 'tiny.yaml'}", f"--data={project / 'data.yaml'}", f"--project={project / 'runs'}",
        "--imgsz=64",
        f"--epochs={epochs}", "--batch-size=4", "--workers=0", "--device=cpu", "--noplots", "--amp=off", "--patience=0",
    ]  # fmt: skip
    return [*TORCHRUN, SCRIPT, *given, *more]


def run(arguments: list[str], fault: str = "none:0:0:0") -> tuple[int, str]:
    """Return exit status and standard error of a command."""
    environment = {**os.environ, "FAULT": fault, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=2 * BOUND, env=environment)
    return done.returncode, done.stderr


def own_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("train.py: ")]


# ---- mistakes and faults --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_wrong_data_file_is_one_line(project) -> None:
    status, text = run(command(project, "--data=nowhere.yaml"))
    assert status != 0
    (line,) = own_lines(text)
    assert line.startswith("train.py: error: nowhere.yaml: no such file")
    assert text.count("Traceback") == 1, "torchrun's own"
    assert not (project / "runs").exists()


MISTAKES = [
    (["--imgsz=wide"], "argument --imgsz", "the parser's"),
    (["--optimizer=Sgd"], "--optimizer", "an option out of its range"),
    (["--batch-size=5"], "--batch-size 5: is the total over all processes", "found after the model is built"),
    (["--evolve"], "--evolve: does not run under torchrun", "a task of one process"),
    (["--freeze=77"], "no row 2", "found between two turns"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message", "what"), MISTAKES, ids=lambda v: v[0][2:] if isinstance(v, list) else ""
)
def test_mistakes_are_one_line(project, options, message, what) -> None:
    status, text = run(command(project, *options))
    assert status != 0
    (line,) = own_lines(text)
    assert message in line, what


@pytest.mark.slow
@pytest.mark.parametrize("script", ["val.py", "detect.py"])
def test_commands_of_one_process_say_so(project, script) -> None:
    status, text = run([*TORCHRUN, str(ROOT / script)])
    assert status != 0
    assert [line for line in text.splitlines() if line.startswith(script)] == [
        f"{script}: error: {script}: does not run under torchrun; start python {script} (only train.py shares its work)"
    ]


FAULTS = [
    # fault in rank 1, number of our own lines, tracebacks besides torchrun's
    ("raise", 0, 1),
    ("exit", 1, 0),
    ("kill", 1, 0),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "lines", "traces"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_dying_rank_ends_all_and_leaves_the_checkpoint(project, kind, lines, traces) -> None:
    begin = time.time()
    status, text = run(command(project), f"{kind}:1:2:1")
    assert status != 0 and time.time() - begin < BOUND
    assert len(own_lines(text)) <= lines  # torchrun may end rank zero before it notices
    assert all("rank 0: another process of this training is gone" in line for line in own_lines(text))
    assert text.count("Traceback") == traces + 1 and text.count("KeyError: 'a fault'") == traces
    last = read_checkpoint(project / "runs/exp/weights/last.pt")
    assert last.epoch == 1 and last.train is not None
    assert not list((project / "runs/exp/weights").glob(".*"))


# ---- resuming -------------------------------------------------------------------------------------------------------


def resume(project: Path, name: str) -> list[str]:
    return [
        *TORCHRUN,
        str(ROOT / "tests/helpers/faulty_train.py"),
        "--resume",
        str(project / f"runs/{name}/weights/last.pt"),
    ]


# 10 images in batches of 4 are 3 batches per epoch; in this warm-up the optimizer steps after batches 0, 1, 3 and 6.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "at", "batches", "workers"),
    [("term", 1, 2, 1), ("term-one", 1, 2, 0), ("int", 1, 2, 1), ("term", -1, 3, 0), ("term-one", -1, 3, 1)],
)
def test_a_signal_in_the_middle_of_an_epoch(project, kind, at, batches, workers) -> None:
    """Sent to torchrun, which forwards it, or to one process; in training, or in validation (-1)."""
    assert run(command(project, "--name=whole"))[0] == 0
    status, text = run(command(project, "--name=cut", f"--workers={workers}"), f"{kind}:1:0:{at}")
    assert status != 0 and "Stopped in epoch 0" in text
    saved = read_checkpoint(project / "runs/cut/weights/last.pt")
    assert saved.epoch == -1 and saved.train is not None and saved.train["batches"] == batches
    assert len(saved.train["others"]) == 1
    status, text = run(resume(project, "cut"))
    assert status == 0, text
    assert_equal_runs(project / "runs/whole", project / "runs/cut")


@pytest.mark.slow
def test_another_number_of_processes_resumes(project, monkeypatch) -> None:
    """One process, then two, then one: each run continues the previous one."""
    last = project / "runs/exp/weights/last.pt"
    with monkeypatch.context() as patch:
        signal_at(patch, signal.SIGTERM, (0, 1))
        with pytest.raises(SystemExit):
            train(config(project, epochs=3, amp="off"))
    status, text = run(resume(project, "exp"), "term:1:1:1")
    assert status != 0 and "Stopped in epoch" in text
    result = train(TrainConfig.from_keywords(resume=str(last)))
    assert result.epochs == 3 and [row[0] for row in rows(result.folder)] == [0, 1, 2]


@pytest.mark.slow
def test_kills_of_everything_leave_no_trace(project) -> None:
    """SIGKILL to torchrun and both processes, at random times."""
    epochs = 60
    assert run(command(project, "--name=whole", epochs=epochs))[0] == 0
    last = project / "runs/cut/weights/last.pt"
    draw = random.Random(0)
    for _ in range(3):
        arguments = (
            resume(project, "cut") if last.is_file() else command(project, "--name=cut", "--exist-ok", epochs=epochs)
        )
        before = last.stat().st_mtime_ns if last.is_file() else 0
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        agent = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        while agent.poll() is None and not (last.is_file() and last.stat().st_mtime_ns > before):
            time.sleep(0.01)  # until it trains
        time.sleep(draw.uniform(0, 0.5))
        assert agent.poll() is None, "it exited before it was killed"
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent.pid)], capture_output=True, text=True)
        for number in [agent.pid, *map(int, found.stdout.split())]:
            os.kill(number, signal.SIGKILL)
        agent.wait()
    status, text = run(resume(project, "cut"))
    assert status == 0, text
    assert_equal_runs(project / "runs/whole", project / "runs/cut")


# ---- every model ----------------------------------------------------------------------------------------------------

FAMILIES = {
    "riformer": ["yolov5-riformer", "yolov5-riformer-s"],
    "revvit": ["yolov5-revvit", "yolov5-revvit-s"],
    "repmlp": ["yolov5-repmlp", "yolov5-repmlp-s"],
    "nextvit": ["yolov5-nextvit", "yolov5-nextvit-s"],
    "timm": ["yolov5-timm", "yolov5-timm-resnet50", "yolov5-timm-vit"],
    "yolov5": ["yolov5n", "yolov5s", "yolov5m", "yolov5l", "yolov5x"],
    "yolov5-free": ["yolov5l-free", "yolov5m-free", "yolov5n-free", "yolov5s-free", "yolov5x-free"],
    "families-free": [
        "yolov5-nextvit-free",
        "yolov5-repmlp-free",
        "yolov5-revvit-free",
        "yolov5-riformer-free",
        "yolov5-timm-free",
    ],
}


def test_every_model_file_is_tried() -> None:
    assert sorted(name for names in FAMILIES.values() for name in names) == sorted(
        path.stem for path in (ROOT / "models").glob("*.yaml")
    )


def two_steps(folder: Path) -> None:
    """Run two training steps of every model in models.txt; write problems to a file per rank."""
    problems = []
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.4, 0.4], [1, 2, 0.3, 0.6, 0.2, 0.5]])
    with process_group(world_from_environment()):
        world = with_gradients(world_from_environment(), torch.device("cpu"))
        for name in (folder / "models.txt").read_text().split():
            model = DetectionModel(ROOT / f"models/{name}.yaml", nc=3).train()
            step = train_step(model, detection_loss(model), world)
            before = next(model.head.parameters()).detach().clone()
            try:
                for number in range(2):  # DDP reports unused parameters at the second forward pass
                    step.backward(torch.rand(2, 3, 64, 64), targets, (0, number))
                    step.optimizer.step()
                    step.optimizer.zero_grad()
            except RuntimeError as error:
                problems.append(f"{name}: {error}")
            if torch.equal(next(model.head.parameters()), before):
                problems.append(f"{name}: learns nothing")
        (folder / f"problems{os.environ['RANK']}.txt").write_text("\n".join(problems))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_no_parameter_is_missed_by_data_parallel_training(tmp_path, family) -> None:
    (tmp_path / "models.txt").write_text(" ".join(FAMILIES[family]))
    assert run_processes(two_steps, tmp_path, timeout=400) == [0, 0]
    assert [(tmp_path / f"problems{rank}.txt").read_text() for rank in (0, 1)] == ["", ""]
