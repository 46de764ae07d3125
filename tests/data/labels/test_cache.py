"""The label cache: same result, changes noticed, damage and races harmless."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from data import images
from data.formats import yolo
from data.labels import cache as label_cache
from data.labels import scan
from data.labels.labels import load_annotations
from data.labels.table import Entry
from tests.helpers.label_files import GOOD, MIXED, image, load, make_set, same
from utils.errors import DataError
from utils.files import read_text


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of the images that are verified while the test runs."""
    names: list[str] = []
    original = scan.verify

    def verify(image: Path, *rest: object) -> Entry:
        names.append(image.stem)
        return original(image, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(scan, "verify", verify)
    return names


def test_cache_gives_the_same_without_verifying(tmp_path: Path, verified: list[str]) -> None:
    source = make_set(tmp_path, MIXED)
    first = load(source)
    assert sorted(verified) == sorted(MIXED)
    verified.clear()
    assert same(first, load(source)) and verified == []
    cache = tmp_path / "labels" / "train.cache.npz"
    with np.load(cache, allow_pickle=False) as archive:  # fails if anything in it were pickled
        assert all(archive[name].dtype != object for name in archive.files)
        assert json.loads(archive["header"].tobytes())["version"] == label_cache.VERSION


def change_label(root: Path) -> set[str]:
    (root / "labels/train/a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    return {"a"}


def same_size_other_time(root: Path) -> set[str]:
    path = root / "labels/train/a.txt"
    before = path.stat()
    path.write_text(path.read_text().replace("0.25", "0.26"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    return {"a"}


def change_image(root: Path) -> set[str]:
    image(root / "images/train/b.jpg", (50, 70))
    return {"b"}


def add_image(root: Path) -> set[str]:
    image(root / "images/train/new.jpg")
    return {"new"}


def add_label(root: Path) -> set[str]:
    (root / "labels/train/c.txt").write_text(GOOD)
    return {"c"}


def remove_label(root: Path) -> set[str]:
    (root / "labels/train/a.txt").unlink()
    return {"a"}


def remove_image(root: Path) -> set[str]:
    (root / "images/train/a.jpg").unlink()
    return set()


@pytest.mark.parametrize(
    "change",
    [change_label, same_size_other_time, change_image, add_image, add_label, remove_label, remove_image],
)
def test_cache_notices_changes(tmp_path: Path, verified: list[str], change) -> None:
    source = make_set(tmp_path, MIXED)
    load(source)
    verified.clear()
    expected = change(tmp_path)
    after = load(source)
    assert set(verified) == expected
    (tmp_path / "labels" / "train.cache.npz").unlink()
    assert same(after, load(source))  # as by a fresh verification
    verified.clear()
    assert same(after, load(source)) and verified == []


def test_files_that_could_not_be_read_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verified: list[str]
) -> None:
    source = make_set(tmp_path, {"a": GOOD, "b": GOOD, "c": GOOD, "d": "0 2 2 2 2\n", "e": GOOD})
    image(source / "c.jpg", (99, 99))
    read = scan.probe

    def probe(path: Path) -> tuple[int, int]:
        if path.stem == "a":  # a network drive that hangs up
            raise DataError(f"{path}: cannot be read") from OSError(5, "Input/output error")
        return read(path)

    def read_labels(path: Path) -> str:
        raise DataError(f"{path}: cannot be read") from PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(images, "MAX_PIXELS", 99 * 98)
        patch.setattr(scan, "probe", probe)
        patch.setattr(yolo, "read_text", lambda path: read_labels(path) if path.stem == "b" else read_text(path))
        assert load(source).report.corrupt == 4
        stamp = (tmp_path / "labels/train.cache.npz").stat().st_mtime_ns
        verified.clear()
        assert load(source).report.corrupt == 4 and sorted(verified) == ["a", "b", "c"]
        assert (tmp_path / "labels/train.cache.npz").stat().st_mtime_ns == stamp  # nothing new to write
    verified.clear()
    assert load(source).report.corrupt == 1 and sorted(verified) == ["a", "b", "c"]
    verified.clear()
    assert load(source).report.corrupt == 1 and verified == []


def test_cache_forgets_what_is_gone(tmp_path: Path) -> None:
    source = make_set(tmp_path, MIXED)
    load(source)
    remove_image(tmp_path)
    load(source)
    cache = tmp_path / "labels" / "train.cache.npz"
    assert {Path(name).stem for name in label_cache.read(cache)[0]} == set(MIXED) - {"a"}


@pytest.mark.parametrize("damage", ["garbage", "cut", "version", "empty", "pickle"])
def test_unusable_cache_is_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verified: list[str], damage: str
) -> None:
    source = make_set(tmp_path, MIXED)
    first = load(source)
    cache = tmp_path / "labels" / "train.cache.npz"
    data = cache.read_bytes()
    verified.clear()
    if damage == "version":
        monkeypatch.setattr(label_cache, "VERSION", label_cache.VERSION + 1)
    elif damage == "pickle":
        np.savez(cache, header=np.array([{}], object))
    else:
        cache.write_bytes({"garbage": b"x" * 99, "cut": data[: len(data) // 2], "empty": b""}[damage])
    assert same(first, load(source)) and sorted(verified) == sorted(MIXED)
    verified.clear()
    assert same(first, load(source)) and verified == []


def test_cache_that_cannot_be_written_is_only_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = make_set(tmp_path, MIXED)
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level("INFO"):
        assert load(source, cache_folder=tmp_path / "file").report.images == len(MIXED)
    assert "labels are not cached" in caplog.text


def test_folder_marked_as_read_only_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = make_set(tmp_path, MIXED)
    (tmp_path / "labels").chmod(0o555)
    with caplog.at_level("INFO"):
        assert load(source).report.images == len(MIXED)  # for root too
    (tmp_path / "labels").chmod(0o755)
    assert "read-only" in caplog.text and not list((tmp_path / "labels").glob("*.npz"))


def test_several_writers_leave_a_whole_cache(tmp_path: Path, verified: list[str]) -> None:
    source = make_set(tmp_path, MIXED)
    threads = [threading.Thread(target=load, args=(source,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    verified.clear()
    load(source)
    assert verified == []
    assert [path.name for path in (tmp_path / "labels").iterdir()] != [] and not list((tmp_path / "labels").glob(".*"))


def test_sets_that_share_their_first_folder_have_their_own_cache(tmp_path: Path, verified: list[str]) -> None:
    first = make_set(tmp_path, MIXED)
    second = image(tmp_path / "images" / "z" / "x.jpg").parent
    load(first)
    load_annotations([first, second], 3, progress=False)
    verified.clear()
    load(first)
    load_annotations([first, second], 3, progress=False)
    assert verified == [] and len(list((tmp_path / "labels").glob("*.npz"))) == 2


def test_every_damaged_byte_of_the_cache_is_noticed(tmp_path: Path) -> None:
    source = make_set(tmp_path, {"a": GOOD, "b": "0 0.1 0.1 0.3 0.1 0.3 0.4\n"})
    load(source)
    (cache,) = tmp_path.rglob("*.cache.npz")
    data = cache.read_bytes()
    for at in range(0, len(data), 37):
        cache.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
        assert not label_cache.read(cache)[0]
    cache.write_bytes(data)
    assert len(label_cache.read(cache)[0]) == 2
