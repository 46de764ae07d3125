"""Run folders, atomic writes, file look-up."""

from __future__ import annotations

import http.server
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from utils.errors import ConfigError, DataError, did_you_mean
from utils.files import (
    atomic_path,
    download,
    find_file,
    folder_names,
    increment_path,
    is_vacant,
    make_folder,
    make_run_folder,
    new_folder,
    newest_weights,
    read_text,
    url_file_name,
)


def test_increment_path(tmp_path):
    assert increment_path(tmp_path / "exp") == tmp_path / "exp"
    (tmp_path / "exp").mkdir()
    assert increment_path(tmp_path / "exp") == tmp_path / "exp2"
    (tmp_path / "exp7").mkdir()
    (tmp_path / "exp_other").mkdir()
    (tmp_path / "expose9").mkdir()
    assert increment_path(tmp_path / "exp") == tmp_path / "exp8"
    assert increment_path(tmp_path / "exp", exist_ok=True) == tmp_path / "exp"


@pytest.mark.parametrize("exist_ok", [False, True])
def test_run_folders_of_processes_that_start_together_differ(tmp_path, monkeypatch, exist_ok):
    """Each of the first three finds `exp` free, and another process creates it first."""
    names = iter(["exp", "exp", "exp2"])

    def faster(path, exist_ok):
        folder = path if exist_ok else path.with_name(next(names))
        (folder.parent / "exp").mkdir(exist_ok=True)
        return folder

    monkeypatch.setattr("utils.files.increment_path", faster)
    assert make_run_folder(tmp_path / "runs/exp", exist_ok).name == ("exp" if exist_ok else "exp2")


def test_run_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "exp").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"exp: cannot create this folder"):
        make_run_folder(tmp_path / "exp")


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


def test_find_file_does_not_search_by_the_last_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"; did you mean models/hub/yolov5n6\.yaml\?"):
        find_file("models/yolov5n6.yaml", "models", "models/hub")
    for name in ("mien/yolov5n.yaml", "/nowhere/yolov5n.yaml", "./yolov5n.yaml/x"):
        with pytest.raises(ConfigError, match="no such file"):
            find_file(name, "models")
    assert find_file("models/yolov5n.yaml") == find_file("yolov5n", "models")
    (tmp_path / "yolov5n.yaml").write_text("mine")
    assert find_file("yolov5n.yaml", "models").read_text() == "mine"


def test_find_file_logs_what_it_chose(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO"):
        find_file("yolov5n", "models")
    assert "yolov5n: using " in caplog.text and "models/yolov5n.yaml" in caplog.text


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "~nosuchuser/x", "fifo", "loop"])
def test_find_file_refuses_what_is_no_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    os.symlink("loop", "loop")
    with pytest.raises(ConfigError):
        find_file(name, "models")


def test_read_text_skips_the_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa")
    assert read_text(tmp_path / "a.txt") == "a"


@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "socket"])
def test_read_text_refuses_special_files(tmp_path, kind):
    path = tmp_path / "a"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path = Path("/tmp") / f"socket-{os.getpid()}"
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(path))
    try:
        with pytest.raises(DataError, match=f"(?i)is a {kind}"):
            read_text(path)
    finally:
        if kind == "socket":
            server.close()
            path.unlink()


class _Reply(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/gone":
            self.send_error(404)
            return
        if self.path == "/status":
            self.wfile.write(b"HTTP/1.1 none\r\n\r\n")
            return
        self.send_response(200)
        self.send_header("Content-Length", "10" if self.path != "/odd" else "ten")
        self.end_headers()
        self.wfile.write(b"0123456789"[: 4 if self.path == "/cut" else 10])

    def log_message(self, *_):
        pass


def test_download_refuses_truncated_and_odd_replies(tmp_path):
    server = http.server.HTTPServer(("127.0.0.1", 0), _Reply)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        base = f"http://127.0.0.1:{server.server_port}"
        assert download(f"{base}/whole", tmp_path / "whole").read_bytes() == b"0123456789"
        assert download(f"{base}/odd", tmp_path / "odd").read_bytes() == b"0123456789"
        with pytest.raises(DataError, match="4 of 10 bytes|cannot be fetched"):
            download(f"{base}/cut", tmp_path / "cut")
        with pytest.raises(DataError, match=r"cannot be fetched \(HTTP Error 404: Not Found\)"):
            download(f"{base}/gone", tmp_path / "gone")
        with pytest.raises(DataError, match="cannot be fetched .*by hand"):  # on one line
            download(f"{base}/status", tmp_path / "status")
    finally:
        server.shutdown()
        server.server_close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["odd", "whole"]


@pytest.mark.parametrize(
    "url", ["http://[::1/x", "x", "http://127.0.0.1:99999/x", "http://a b/x", "http://u:secret@127.0.0.1:1/x"]
)
def test_download_of_an_odd_address_is_one_line(tmp_path, url):
    with pytest.raises(DataError) as caught:
        download(url, tmp_path / "x")
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a\0", "\ud800", "x" * 300])
def test_folder_with_a_name_that_none_can_have(name):
    with pytest.raises(DataError, match="cannot be read"):
        folder_names(name)


def test_url_file_name():
    assert url_file_name("http://h/a/b%20c.jpg?x=1") == "b c.jpg" and url_file_name("http://h") == ""
    with pytest.raises(DataError, match=r"http://\[::1: Invalid"):
        url_file_name("http://[::1")


def test_new_folder_appears_when_it_is_complete(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with new_folder(tmp_path / name) as build:
            (build / "a").touch()
            assert not (tmp_path / name / "a").exists()
        assert (tmp_path / name / "a").exists()
    with pytest.raises(OSError, match="not empty"), new_folder(tmp_path / "new"):
        pass
    with pytest.raises(RuntimeError), new_folder(tmp_path / "other"):
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new"]


def test_vacant_is_nothing_or_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    found = {name: is_vacant(tmp_path / name) for name in ("none", "empty", "file", "link", "")}
    assert found == {"none": True, "empty": True, "file": False, "link": False, "": False}

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(DataError, match="empty: cannot be read: Permission denied"):
        is_vacant(tmp_path / "empty")
