"""Run folders, atomic writes, look-ups."""

from __future__ import annotations

import os
import time

import pytest

from utils.errors import ConfigError, DataError, did_you_mean
from utils.files import atomic_path, download, find_file, increment_path, make_folder, newest_weights


def test_increment_path(tmp_path):
    assert increment_path(tmp_path / "exp") == tmp_path / "exp"
    (tmp_path / "exp").mkdir()
    assert increment_path(tmp_path / "exp") == tmp_path / "exp2"
    (tmp_path / "exp7").mkdir()
    (tmp_path / "exp_other").mkdir()
    (tmp_path / "expose9").mkdir()
    assert increment_path(tmp_path / "exp") == tmp_path / "exp8"
    assert increment_path(tmp_path / "exp", exist_ok=True) == tmp_path / "exp"


def test_atomic_path_keeps_the_old_file_on_failure(tmp_path):
    final = tmp_path / "sub" / "a.txt"
    with atomic_path(final) as part:
        part.write_text("one")
    with pytest.raises(RuntimeError, match="boom"), atomic_path(final) as part:
        part.write_text("half")
        raise RuntimeError("boom")
    assert final.read_text() == "one"
    assert os.listdir(final.parent) == ["a.txt"]


def test_atomic_path_follows_the_umask(tmp_path):
    (tmp_path / "plain").write_text("")
    with atomic_path(tmp_path / "ours") as part:
        part.write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_make_folder_refuses_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot create this folder"):
        make_folder(tmp_path / "file" / "sub")


def test_find_file_names_the_nearest(tmp_path):
    (tmp_path / "yolov5n.yaml").write_text("")
    assert find_file("yolov5n", tmp_path).name == "yolov5n.yaml"
    assert find_file(tmp_path / "yolov5n.yaml").name == "yolov5n.yaml"
    with pytest.raises(ConfigError, match="did you mean 'yolov5n.yaml'"):
        find_file("yolo5n.yaml", tmp_path)


def test_newest_weights(tmp_path):
    assert newest_weights(tmp_path) is None
    for i, name in enumerate(("exp", "exp2", "exp3")):
        path = tmp_path / name / "weights" / "best.pt"
        path.parent.mkdir(parents=True)
        path.write_text("")
        os.utime(path, (time.time() + (5 if name == "exp2" else i),) * 2)
    assert newest_weights(tmp_path).parts[-3] == "exp2"


def test_download_checks_the_hash(tmp_path):
    source = tmp_path / "source.bin"
    source.write_bytes(b"abc")
    good = "ba7816bf"
    assert download(source.as_uri(), tmp_path / "good.bin", good).read_bytes() == b"abc"
    with pytest.raises(DataError, match="SHA-256"):
        download(source.as_uri(), tmp_path / "bad.bin", "0000")
    with pytest.raises(DataError, match="put it at"):
        download((tmp_path / "nowhere").as_uri(), tmp_path / "none.bin")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good.bin", "source.bin"]


@pytest.mark.parametrize(
    ("found", "expected"),
    [("C33", "; did you mean 'C3'?"), ("zzzzzz", ""), ("sppf", "; did you mean 'SPPF'?")],
)
def test_did_you_mean(found, expected):
    assert did_you_mean(found, ["C3", "SPPF", "Concat"]) == expected
