"""Passwords in URLs are sent to the server, but not written to run files."""

from __future__ import annotations

import functools
import http.server
import shutil
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

import detect
import train
import val
from engine.cli.config import DetectConfig, TrainConfig, ValConfig
from engine.cli.parser import run_main
from models.backbones.published import find_weights
from models.yolo import DetectionModel
from tests.helpers.detection_data import write_data
from tests.helpers.detectors import ANCHORS, BACKBONES, NECK

SECRET = "Zuk4mu2Tok9"


class _Guarded(http.server.SimpleHTTPRequestHandler):
    """Serves files if the request has the password."""

    def send_head(self):  # type: ignore[no-untyped-def]
        return super().send_head() if self.path.endswith(f"?token={SECRET}") else self.send_error(403)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Address of a server of `tmp_path / "www"` that requires a password."""
    (tmp_path / "www").mkdir()
    handler = functools.partial(_Guarded, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a script with the arguments of a command line, in `tmp_path / "work"`."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "work/hub"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    configs = {train: TrainConfig, val: ValConfig, detect: DetectConfig}

    def run(script, *argv: str) -> None:  # type: ignore[no-untyped-def]
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *argv])
        sys.argv += ["--imgsz", "64", "--device", "cpu", *(() if script is detect else ("--workers", "0"))]
        assert run_main(configs[script], sys.argv[0], "", script.work) == 0

    return run


def test_run_files_hold_no_passwords(tmp_path, address, command):
    """Weights of the backbone by option and by YAML, a dataset to download, an image: all by URL with a token."""
    www = tmp_path / "www"
    name, arguments = BACKBONES["riformer"]
    spec = {"nc": 3, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": ANCHORS, "head": NECK}
    for file, more in (("a.yaml", {}), ("b.yaml", {"weights": f"{address}/w.pth?token={SECRET}"})):
        row = [-1, 1, name, {**arguments, **more}]
        (tmp_path / file).write_text(yaml.safe_dump({**spec, "backbone": [row]}))
    torch.save(DetectionModel(tmp_path / "a.yaml").model[0].state_dict(), www / "w.pth")
    text = write_data(tmp_path / "set").read_text()
    with zipfile.ZipFile(www / "data.zip", "w") as archive:
        for path in (tmp_path / "set").rglob("*.*"):
            archive.write(path, Path("data", path.relative_to(tmp_path / "set")))
    (tmp_path / "set.yaml").write_text(
        text.replace("path: .", f'path: work/set\ndownload: "{address}/data.zip?token={SECRET}"')
    )
    shutil.copy(tmp_path / "set/images/val/p0.png", www)
    data = ("--data", str(tmp_path / "set.yaml"))
    training = (*data, "--epochs", "1", "--batch-size", "4")
    command(
        train, "--cfg", str(tmp_path / "a.yaml"), *training, "--backbone-weights", f"{address}/w.pth?token={SECRET}"
    )
    assert "--backbone-weights" in sys.argv and SECRET not in " ".join(sys.argv)  # which hosted trackers record
    (tmp_path / "work/hub/hub/checkpoints/w.pth").unlink()
    command(train, "--cfg", str(tmp_path / "b.yaml"), *training)
    command(val, "--weights", "runs/train/exp", *data, "--save-txt", "--save-json")
    outputs = ("--save-txt", "--save-csv", "--save-crop", "--visualize", "--conf-thres", "0.0001")
    command(detect, "--weights", "runs/train/exp2", "--source", f"{address}/p0.png?token={SECRET}", *outputs)
    files = [path for path in (tmp_path / "work").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"report.html", "opt.yaml", "best.pt", "last.pt", "predictions.csv", "eigencam.png", "w.pth"} <= names
    assert not [path for path in files if SECRET in str(path) or SECRET.encode() in path.read_bytes()]


def test_name_of_a_fetched_file_has_no_password(monkeypatch):
    paths: list[Path] = []
    monkeypatch.setattr("models.backbones.published.download", lambda _url, path, _digest: paths.append(path))
    for url in ("https://h/a/w.pth?token=x/y", "https://u:secret@h/", "https://h/w.pth#token=secret"):
        find_weights(url, None)
    assert [path.name for path in paths] == ["w.pth", "weights.pth", "w.pth"]
