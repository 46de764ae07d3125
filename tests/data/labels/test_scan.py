"""Verification by processes: the same result as in this process, and its errors."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from data.formats.detect_format import recognize
from data.formats.voc import UnknownClassError
from data.labels import scan
from data.labels.labels import load_annotations
from data.labels.table import Entry
from tests.helpers.annotation_files import voc_object, voc_set
from tests.helpers.label_files import MIXED, load, make_set, same
from tests.helpers.processes import ends
from utils.errors import TrainingError

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


@pytest.fixture
def by_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "MANY", 1)
    monkeypatch.setattr(scan, "_CHUNK", 2)
    monkeypatch.setattr(scan, "processors", lambda: 3)


@needs_fork
def test_processes_give_the_same(tmp_path: Path, by_processes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_set(tmp_path, MIXED)
    here = os.getpid()
    original = scan.verify

    def verify(image: Path, *rest: object) -> Entry:
        assert os.getpid() != here
        return original(image, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(scan, "verify", verify)
    found = load(source)
    monkeypatch.undo()
    assert same(found, load(source))  # from the cache
    (tmp_path / "labels/train.cache.npz").unlink()
    assert same(found, load(source))  # from this process


@needs_fork
def test_errors_of_a_process(tmp_path: Path, by_processes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    root = voc_set(tmp_path, a=[voc_object("dog", 6, 4, 18, 12)], b=[])
    with pytest.raises(UnknownClassError, match="dog"):
        load_annotations([recognize(root, ["cat"])], 1, progress=False)
    monkeypatch.setattr(scan, "verify", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(TrainingError, match="was killed; out of memory"):
        load(make_set(tmp_path, MIXED))


def _scan_slowly(source: Path, pids: Path) -> None:
    def verify(*_: object) -> None:
        (pids / str(os.getpid())).touch()
        time.sleep(0.2)
        if len(list(pids.iterdir())) == 3:
            os.kill(parent, signal.SIGKILL)

    parent = os.getpid()
    scan.verify = verify  # type: ignore[assignment]
    load(source)


@needs_fork
def test_processes_end_with_a_killed_parent(tmp_path: Path, by_processes: None) -> None:
    source, pids = make_set(tmp_path, MIXED), tmp_path / "pids"
    pids.mkdir()
    process = multiprocessing.get_context("fork").Process(target=_scan_slowly, args=(source, pids))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert all([ends(int(path.name), seconds=20) for path in pids.iterdir()])
