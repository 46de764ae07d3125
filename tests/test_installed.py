"""The project installed into a fresh environment: one command, which works in any folder."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

import yolov5_backbones
from tests.helpers.training import write_project
from utils.files import ROOT

FOREIGN = "raise ImportError('the utils of another project')\n"
INSTALL = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--editable")
Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of another project, with a module `utils`, a dataset and a model."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "utils.py").write_text(FOREIGN)
    return write_project(folder)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, elsewhere: Path) -> Command:
    """Install a copy of the project and return a function that runs its command in the folder `elsewhere`."""
    pytest.importorskip("setuptools", reason="pip installs the project with setuptools")
    folder = tmp_path_factory.mktemp("installed")
    for path in ROOT.iterdir():
        if path.name in ("utils", "data", "models", "engine"):
            shutil.copytree(path, folder / "project" / path.name, dirs_exist_ok=True)
        elif path.suffix in (".py", ".toml", ".md"):
            (folder / "project").mkdir(exist_ok=True)
            shutil.copy(path, folder / "project")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv/bin/python"
    packages = next((folder / "venv/lib").glob("python*/site-packages"))
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    done = subprocess.run([python, *INSTALL, folder / "project"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        words = [python.with_name("yolov5-backbones"), *arguments]
        variables = {**os.environ, "PYTHONPATH": str(elsewhere)}  # its `utils` would be found first
        return subprocess.run(words, cwd=elsewhere, env=variables, capture_output=True, text=True)

    return run


def test_installed_command_trains_in_another_folder(command: Command, elsewhere: Path) -> None:
    options = "--cfg tiny.yaml --data data.yaml --imgsz 64 --epochs 1 --batch-size 4 --device cpu --noplots --workers 2"
    done = command("train", *options.split())
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "runs/train/exp/weights/best.pt").is_file()
    done = command("backbones", "riformer_s12", "--imgsz", "64")
    assert done.returncode == 0 and "64@4 128@8 320@16 512@32" in done.stdout


@pytest.mark.parametrize("name", yolov5_backbones.COMMANDS)
def test_every_command_exists(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["yolov5-backbones", name, "--help"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match="0"):
        yolov5_backbones.main()
    assert capsys.readouterr().out.startswith("usage: ") and name in yolov5_backbones.HELP


def test_mistakes_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    for words, status in (([], 0), (["--help"], 0), (["trian"], 2)):
        monkeypatch.setattr(sys, "argv", ["yolov5-backbones", *words])
        assert yolov5_backbones.main() == status
    error = capsys.readouterr().err
    assert "unknown command 'trian'" in error and "did you mean 'train'?" in error and error.count("\n") == 1
