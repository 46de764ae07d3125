"""Entry points of hubconf.py, loaded by torch.hub from any folder."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import hubconf
from engine.hub.model import HubModel
from tests.helpers import detectors
from utils.errors import CheckpointError, ConfigError, SpecError
from utils.files import ROOT, find_file


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return detectors.save(detectors.build("yolov5"), tmp_path_factory.mktemp("weights") / "tiny.pt")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0).integers(0, 256, (2, 60, 80, 3), np.uint8)
    paths = [folder / f"{number}.png" for number in range(2)]
    for path, image in zip(paths, noise, strict=True):
        cv2.imwrite(str(path), image)
    return paths


def test_hubconf_has_function_for_every_yaml():
    stems = {p.stem for p in (ROOT / "models").glob("*.yaml")} | {f"yolov5{size}6" for size in "nsmlx"}
    assert {"yolov5s", "yolov5x6", "yolov5-riformer", "yolov5n-free"} <= stems
    public = {name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")}
    assert public == {"custom", *(stem.replace("-", "_") for stem in stems)}
    for stem in stems:
        doc = getattr(hubconf, stem.replace("-", "_")).__doc__
        assert f"{stem}.yaml, with random weights unless" in doc
        assert find_file(f"{stem}.yaml", "models", "models/hub").is_relative_to(ROOT / "models")


def test_hub_network_by_name(caplog):
    model = torch.hub.load(str(ROOT), "yolov5n", source="local", classes=4, device="cpu")
    assert "random weights: its detections are meaningless" in caplog.text
    assert isinstance(model, HubModel) and len(model.names) == 4
    assert model(np.zeros((64, 64, 3), np.uint8), size=64).n == 1
    caplog.clear()
    bare = torch.hub.load(str(ROOT), "yolov5n", source="local", channels=1, autoshape=False, _verbose=False)
    assert bare.model[0].conv.in_channels == 1 and bare.nc == 80 and "means nothing" not in caplog.text
    with pytest.raises(ConfigError, match="images have 3"):
        torch.hub.load(str(ROOT), "yolov5n", source="local", channels=1)
    with pytest.raises(ConfigError, match=r"nothing is downloaded.*path='yolov5s6.pt'"):
        torch.hub.load(str(ROOT), "yolov5s6", True, source="local")


def test_hub_network_by_name_with_weights(weights):
    official = ROOT / "tests/parity/data/official_checkpoint/yolov5n_bccd.pt"
    model = torch.hub.load(str(ROOT), "yolov5n", source="local", path=official, device="cpu")
    own = torch.hub.load(str(ROOT), "custom", path=official, source="local", device="cpu", autoshape=False)
    assert model.names == own.names
    for (key, value), other in zip(model.model.state_dict().items(), own.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=0, msg=key)
    with pytest.raises(CheckpointError):
        torch.hub.load(str(ROOT), "yolov5n", source="local", path=weights, device="cpu")
    with pytest.raises((CheckpointError, SpecError)):
        torch.hub.load(str(ROOT), "yolov5n", source="local", path=weights.with_name("nowhere.pt"))


def test_hub_works_from_another_folder_with_declared_dependencies(weights, files, tmp_path):
    """torch.hub removes the project from the import path after loading: nothing may be imported later."""
    code = f"""
import json, sys
sys.path = [p for p in sys.path if p not in ("", {str(ROOT)!r})]
import torch
model = torch.hub.load({str(ROOT)!r}, "custom", path={str(weights)!r}, source="local", device="cpu")
ours = ("utils", "data", "models", "engine", "hubconf")
mine = {{n: m.__file__ for n, m in sys.modules.items() if n.split(".")[0] in ours and getattr(m, "__file__", None)}}
model.conf = 0.05
results = model([{str(files[0])!r}, {str(files[1])!r}], size=96)
results.save(); results.crop(); results.render(); results.print(); results.tolist(); repr(results)
late = [n for n in sys.modules if n.split(".")[0] in ours and n not in mine]
print(json.dumps([mine, late]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    mine, late = json.loads(done.stdout.splitlines()[-1])
    assert late == []
    needed = set()
    for file in mine.values():
        for node in ast.parse(Path(file).read_text()).body:  # imports that happen when a module is imported
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            needed |= {n.split(".")[0] for n in names}
    needed -= {*sys.stdlib_module_names, "utils", "data", "models", "engine"}
    assert needed <= set(hubconf.dependencies), needed - set(hubconf.dependencies)


@pytest.mark.parametrize("name", ["utils", "models"])
def test_hub_names_imported_module_of_caller(weights, tmp_path, name):
    """Folders of the caller do not matter, but its imported modules do."""
    for other in ("utils", "models"):
        (tmp_path / f"{other}.py").write_text("helper = 1\n")
    load = f"torch.hub.load({str(ROOT)!r}, 'custom', path={str(weights)!r}, source='local', device='cpu')"
    code = f"""
import torch
import {name}
try:
    {load}
except ImportError as error:
    print(error)
del __import__("sys").modules[{name!r}]
{load}
"""
    (tmp_path / "mine.py").write_text(code)
    done = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if "already imported" in line]
    assert f"module '{name}' is already imported from {tmp_path / name}.py" in line and "package" in line


def test_hubconf_imports_project_lazily():
    code = "import sys, hubconf; print([m for m in sys.modules if m.split('.')[0] in ('engine', 'models', 'torch')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
