"""What `--source` may name, and what happens to inputs that cannot be read."""

import functools
import http.server
import os
import socket
import sys
import threading
import time

import cv2
import numpy as np
import pytest

from data.sources import streams
from data.sources.files import FileSource, find_files, open_source
from data.sources.streams import StreamSource, parse_screen, stream_name
from tests.helpers.videos import write_video
from utils.errors import DataError, hide_passwords


def write_image(path, value=100, size=(24, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((*size, 3), value, np.uint8))
    return path


def read_all(source):
    with source:
        return [frame for frames in source for frame in frames]


@pytest.fixture
def tree(tmp_path):
    write_image(tmp_path / "in/b.JPG")
    write_image(tmp_path / "in/a.png")
    write_video(tmp_path / "in/c.avi", frames=3)
    write_image(tmp_path / "in/deep/d.bmp")
    write_image(tmp_path / "in/[odd] name.png")
    (tmp_path / "in/notes.md").write_text("no image")
    (tmp_path / "in/.hidden.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("in/a.png", ["a.png"]),
        ("in", ["[odd] name.png", "a.png", "b.JPG", "c.avi", "c.avi", "c.avi"]),
        ("in/*.png", ["[odd] name.png", "a.png"]),
        ("in/**/*.[pb][nm][gp]", ["[odd] name.png", "a.png", "d.bmp"]),
        ("in/[odd] name.png", ["[odd] name.png"]),  # a file takes precedence over a pattern
        ("in/c.avi", ["c.avi"] * 3),
    ],
)
def test_files_folders_and_globs(tree, text, expected):
    source = open_source(str(tree / text))
    frames = read_all(source)
    assert [f.path.name for f in frames] == expected
    assert source.failures == []
    assert {f.total for f in frames} == {len(set(expected))}
    assert [f.number for f in frames] == [sorted(set(expected)).index(n) + 1 for n in expected]


def test_other_files_of_a_folder_are_named(tree, caplog):
    with caplog.at_level("INFO"):
        read_all(open_source(str(tree / "in")))
    assert "notes.md" in caplog.text and ".hidden" not in caplog.text


def test_find_files_of_a_list_prefers_the_folder_of_the_list(tree, monkeypatch):
    monkeypatch.chdir(tree)
    (tree / "in/list.txt").write_text("\ufeffa.png\n\n# remark\n./deep/d.bmp\nin/b.JPG\na.png\n", encoding="utf-8")
    source = open_source("in/list.txt")
    assert [f.path.name for f in read_all(source)] == ["a.png", "d.bmp", "b.JPG"]  # each once
    assert source.failures == []


def test_find_files_of_a_list_reports_missing_files(tree):
    (tree / "list.txt").write_text("in/a.png\nin/gone.png\n")
    source = open_source(str(tree / "list.txt"))
    assert [f.path.name for f in read_all(source)] == ["a.png"]
    assert len(source.failures) == 1 and "gone.png" in source.failures[0]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("in/aa.png", ["aa.png", "no such file", "'a.png'"]),
        ("gone/x.png", ["no such file"]),
        ("empty", ["no images or videos"]),
        ("in/notes.md", ["neither image nor video", ".jpg"]),
        ("in/*.tif", ["no image or video matches"]),
        ("only_deep", ["no images", "**/*.jpg"]),
        ("empty.txt", ["empty list"]),
        ("gone.txt", ["gone.txt", "no such file"]),
        ("bad.txt", ["no usable file", "nothing.png"]),
        ("binary.txt", ["UTF-8"]),
    ],
)
def test_errors_of_files(tree, text, parts):
    (tree / "empty.txt").write_text("\n# nothing\n")
    (tree / "bad.txt").write_text("nothing.png\n")
    (tree / "binary.txt").write_bytes(b"\xff\xfe\x00a.png")
    write_image(tree / "only_deep/deeper/x.png")
    with pytest.raises(DataError) as caught:
        open_source(str(tree / text))
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["--source", "empty"]),
        ("https://www.youtube.com/watch?v=abc", ["yt-dlp"]),
        ("https://youtu.be/abc", ["yt-dlp"]),
        ("youtube.com/watch?v=abc", ["yt-dlp"]),
        ("screen x", ["allowed", "left top width height"]),
        ("screen 1 2 3", ["allowed"]),
        ("screen 0 0 0 10", ["at least 1 pixel"]),
        ("http://127.0.0.1:9/image.jpg", ["cannot be fetched", "; fetch it by hand and name the file"]),
        ("rtsp://user:secret@127.0.0.1:9/x", ["rtsp://***@127.0.0.1", "cannot be opened"]),
        ("99", ["99", "camera number"]),
    ],
)
def test_errors_of_other_sources(text, parts):
    with pytest.raises(DataError) as caught:
        open_source(text)
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_screen_source_needs_mss(monkeypatch):
    monkeypatch.setitem(sys.modules, "mss", None)
    with pytest.raises(DataError, match="pip install mss"):
        open_source("screen")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("screen", (0, None)),
        ("screen 2", (2, None)),
        ("screen 10 20 300 200", (0, (10, 20, 300, 200))),
        ("screen 1 10 20 300 200", (1, (10, 20, 300, 200))),
    ],
)
def test_screen_words(text, expected):
    assert parse_screen(text) == expected


def test_unreadable_files_are_reported_and_the_rest_is_read(tmp_path, caplog):
    write_image(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(b"")
    (tmp_path / "c.png").write_text("text")
    (tmp_path / "d.mp4").write_text("text")
    write_image(tmp_path / "e.png")
    source = open_source(str(tmp_path))
    assert [f.path.name for f in read_all(source)] == ["a.png", "e.png"]
    assert [name in failure for name, failure in zip(("b.jpg", "c.png", "d.mp4"), source.failures, strict=True)]
    assert "b.jpg" in caplog.text and "d.mp4" in caplog.text


@pytest.mark.parametrize(("stride", "positions"), [(1, [1, 2, 3, 4, 5, 6, 7, 8]), (3, [1, 4, 7]), (8, [1]), (100, [1])])
def test_every_nth_frame_of_a_video(tmp_path, stride, positions):
    frames = read_all(open_source(str(write_video(tmp_path / "v.avi")), stride))
    assert [f.frame for f in frames] == positions
    assert [round((f.image.mean() - 20) / 10) + 1 for f in frames] == positions  # the images are those frames
    assert frames[0].frames == 8 and frames[0].kind == "video"
    assert frames[0].fps == pytest.approx(20 / stride)


def test_truncated_video_is_reported(tmp_path):
    whole = write_video(tmp_path / "v.avi", frames=40)
    data = whole.read_bytes()
    whole.write_bytes(data[: len(data) // 2])
    source = open_source(str(whole))
    frames = read_all(source)
    assert 0 < len(frames) < 40
    assert len(source.failures) == 1 and "of 40 frames" in source.failures[0]


def test_http_files_are_fetched_and_removed_afterwards(tmp_path):
    write_image(tmp_path / "served/größe 1.png", value=77)
    handler = functools.partial(QuietHandler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (tmp_path / "served/cut.png").write_bytes(b"no image")
        url = f"http://127.0.0.1:{server.server_port}/"
        source = open_source(f"{url}gr%C3%B6%C3%9Fe%201.png?key=1")
        folder = source.files[0].parent
        (frame,) = read_all(source)
        cut = open_source(f"{url}cut.png")
        assert not read_all(cut) and cut.failures == [f"{url}cut.png: cannot be decoded: no known image format"]
        server.shutdown()
    assert frame.image.mean() == 77 and not folder.exists()
    assert str(frame.path) == "größe 1.png" and frame.origin == f"{url}gr%C3%B6%C3%9Fe%201.png?key=***"


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("0", "0"),
        ("rtsp://user:pa@10.0.0.8:554/live/1", "10.0.0.8_554_live_1"),
        ("http://host/a?b=c&d=../e", "host_a_b_c_d_.._e"),
        ("clips/x.mp4", "clips_x.mp4"),
        ("../..", "stream"),
    ],
)
def test_stream_names_are_file_names(address, name):
    assert stream_name(address) == name


def test_passwords_are_not_shown():
    assert hide_passwords("rtsp://user:secret@host/1") == "rtsp://***@host/1"
    assert hide_passwords("rtsp://host/a@b") == "rtsp://host/a@b"


def test_streams_give_batches_and_end(tmp_path):
    first = write_video(tmp_path / "one/v.avi", frames=6, fps=100)
    second = write_video(tmp_path / "two/v.avi", frames=3, fps=100, size=(32, 32))
    (tmp_path / "list.streams").write_text(f"{first}\n# remark\n{second}\n{first}\n")
    source = open_source(str(tmp_path / "list.streams"))
    assert source.live
    with source:
        batches = list(source)
    assert source.failures == []
    assert len(batches[0]) == 3  # the first one waits for all
    frames = [f for batch in batches for f in batch]
    assert {f.number for f in frames} == {1, 2, 3} and {f.total for f in frames} == {3}
    assert len({str(f.path) for f in frames}) == 3  # the same address twice: two names
    for number in (1, 2, 3):
        order = [f.frame for f in frames if f.number == number]
        assert order == sorted(set(order))  # in order, none twice


def test_stream_source_reports_a_dead_stream(tmp_path):
    good = write_video(tmp_path / "v.avi", frames=3, fps=100)
    (tmp_path / "list.streams").write_text(f"{good}\n{tmp_path}/gone.avi\n")
    source = open_source(str(tmp_path / "list.streams"))
    assert {f.number for f in read_all(source)} == {1}
    assert len(source.failures) == 1 and "gone.avi" in source.failures[0]


class FakeCapture:
    """A camera that numbers its frames; `lives` is how many frames each opening gives before it fails."""

    lives: list[int] = []
    pace = 0.002
    count = 0

    def __init__(self, *_):
        self.left = FakeCapture.lives.pop(0) if FakeCapture.lives else 0

    def isOpened(self):
        return self.left > 0

    def get(self, _):
        return 0.0

    def grab(self):
        time.sleep(self.pace)
        self.left -= 1
        FakeCapture.count += 1
        return self.left >= 0

    def retrieve(self):
        return True, np.full((4, 4, 3), FakeCapture.count % 256, np.uint8)

    def release(self):
        pass


@pytest.fixture
def fake_camera(monkeypatch):
    monkeypatch.setattr(streams.cv2, "VideoCapture", FakeCapture)
    FakeCapture.count = 0
    return FakeCapture


def test_stream_source_gives_the_newest_frame(fake_camera):
    fake_camera.lives = [10**6]
    with StreamSource(["0"]) as source:
        batches = iter(source)
        next(batches)
        time.sleep(0.2)
        before = fake_camera.count
        ((frame,),) = [next(batches)]
        assert before - 3 <= frame.frame and before > 20
    alive = [t for t in threading.enumerate() if isinstance(t, streams.StreamReader)]
    assert alive == []  # ended cleanly


def test_stream_reader_reopens_a_lost_network_stream(fake_camera):
    fake_camera.lives = [3, 0, 4]
    source = StreamSource(["rtsp://host/1"], retry_wait=0.01)
    frames = read_all(source)
    assert frames[-1].frame == 7 and len(frames) >= 2
    assert len(source.failures) == 1 and "lost" in source.failures[0]


def test_stream_reader_ends_with_an_unplugged_camera(fake_camera):
    fake_camera.lives = [3, 5]
    source = StreamSource(["0"], retry_wait=0.01)
    assert read_all(source)[-1].frame == 3
    assert "lost" in source.failures[0]


def test_closing_ends_an_endless_stream_from_another_thread(fake_camera):
    fake_camera.lives = [10**6]
    source = StreamSource(["0"])
    reading = threading.Thread(target=lambda: list(source))
    reading.start()
    source.close()
    reading.join(5)
    assert not reading.is_alive()


def test_video_with_a_name_that_is_not_utf8_is_refused(tmp_path):
    """OpenCV's bindings crash on surrogate escapes (a file name that is not UTF-8)."""
    found = find_files(write_video(tmp_path / "v.avi"))
    found.files[0] = tmp_path / "v\udcff.avi"
    source = FileSource(found)
    assert read_all(source) == [] and "UTF-8" in source.failures[0]


@pytest.mark.parametrize(
    "source", ["²", "x" * 300, "a\0b", "~nosuchuser/x.jpg", "fifo", "fifo.txt", "loop", "folder.jpg/x"]
)
def test_invalid_sources_are_one_line(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    for name in ("fifo", "fifo.txt"):
        os.mkfifo(name)
    os.symlink("loop", "loop")
    with pytest.raises(DataError) as caught:
        open_source(source)
    assert "\n" not in str(caught.value)


def test_dead_stream_of_a_list_times_out(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "OPEN_TIMEOUT_MS", 500)
    video = write_video(tmp_path / "v.avi")
    with socket.socket() as server:  # accepts and never answers
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"http://u:secret@127.0.0.1:{server.getsockname()[1]}/live"
        (tmp_path / "a.streams").write_text(f"{address}\n{video}\n")
        source = open_source(str(tmp_path / "a.streams"))
        frames = read_all(source)
        for text in (address, address.replace("secret", "my secret")):
            with pytest.raises(DataError, match=r"^http://\*\*\*@127[^ ]*: cannot be opened"):
                open_source(text)
    assert {frame.number for frame in frames} == {2}
    assert len(source.failures) == 1 and "cannot be opened" in source.failures[0] and "secret" not in source.failures[0]


def test_special_file_in_a_list_of_streams_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "a.streams").write_text(f"{tmp_path / 'fifo'}\n")
    with pytest.raises(DataError, match="is a FIFO"):
        open_source(str(tmp_path / "a.streams"))


@pytest.mark.parametrize("name", ["", "missing.jpg", "*.jpg"])
def test_unreadable_folder_is_one_line(tmp_path, monkeypatch, name):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(DataError, match=r": cannot be read: Permission denied$"):
        open_source(str(tmp_path / name))


def test_truncated_matroska_video_is_reported(tmp_path):
    path = tmp_path / "v.mkv"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25, (96, 64))
    if not writer.isOpened():
        pytest.skip("this OpenCV cannot write Matroska")
    rng = np.random.default_rng(0)
    for _ in range(80):
        writer.write(rng.integers(0, 255, (64, 96, 3), np.uint8))
    writer.release()
    whole = open_source(str(path))
    assert len(read_all(whole)) == 80 and not whole.failures
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    source = open_source(str(path))
    read_all(source)
    assert len(source.failures) == 1 and "truncated" in source.failures[0]


def test_stream_names_have_no_password():
    names = [
        stream_name(a) for a in ("rtsp://u:p/ss@h/1", "http://h/v?password=p/ss&x=1", "rtsp://h/user=u&password=p/ss")
    ]
    assert names == ["h_1", "h_v_password_x_1", "h_user_password"]


def test_special_files_of_a_folder_are_reported(tmp_path):
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((20, 20, 3), np.uint8))
    for name in ("b.jpg", "c.mp4"):
        os.mkfifo(tmp_path / name)
    with open_source(str(tmp_path)) as source:
        assert [frame.path.name for (frame,) in source] == ["a.jpg"]
    assert len(source.failures) == 2
    for name, text in zip(("b.jpg", "c.mp4"), source.failures):
        assert f"{name}: cannot be read: is a FIFO" in text
