"""Downloads: digests, safe archives, conversion of VOC, nothing outside the dataset."""

from __future__ import annotations

import gzip
import hashlib
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from data import download
from data.config import load_data_config
from data.labels.labels import load_annotations
from tests.helpers.archives import archive, write
from utils.errors import DataError


def jpeg(height: int = 60, width: int = 80) -> bytes:
    return cv2.imencode(".jpg", np.full((height, width, 3), 99, np.uint8))[1].tobytes()


def annotation(width: int, height: int, objects: list[tuple[str, tuple[float, float, float, float], int]]) -> bytes:
    items = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, (x1, y1, x2, y2), difficult in objects
    )
    return f"<annotation><size><width>{width}</width><height>{height}</height></size>{items}</annotation>".encode()


def voc_files() -> dict[str, bytes]:
    first = [
        ("cat", (9, 11, 29, 31), 0),
        ("dog", (1, 1, 80, 60), 1),
        ("cow", (1, 1, 5, 5), 0),
        ("dog", (5, 5, 5, 5), 0),
    ]
    return {
        "kit/V/ImageSets/Main/train.txt": b"one\n",
        "kit/V/ImageSets/Main/val.txt": b"two 1\n\n",
        "kit/V/JPEGImages/one.jpg": jpeg(),
        "kit/V/JPEGImages/two.jpg": jpeg(),
        "kit/V/Annotations/one.xml": annotation(80, 60, first),
        "kit/V/Annotations/two.xml": annotation(80, 60, [("dog", (71, 1, 90, 61), 0)]),
    }


def voc_yaml(folder: Path, data: bytes, extra: str = "", kind: str = "tar", digest: str = "") -> Path:
    source = folder / f"kit.{kind}"
    source.write_bytes(data)
    md5 = digest or hashlib.md5(data).hexdigest()
    return write(
        folder / "d.yaml",
        f"""path: set
train: images/train
val: images/val
names: [cat, dog]
download:
  files: [{{url: "{source.as_uri()}", md5: "{md5}"}}]
  voc:
    {extra}
    sets:
      - {{folder: kit/V, list: train, split: train}}
      - {{folder: kit/V, list: val, split: val}}
""",
    )


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_download_and_voc_conversion(tmp_path: Path, kind: str) -> None:
    config = load_data_config(voc_yaml(tmp_path, archive(kind, voc_files()), "keep_difficult: false", kind))
    (train,) = config.split("train")
    root = tmp_path / "set"
    assert (root / "labels/train/one.txt").read_text() == "0 0.237500 0.350000 0.250000 0.333333\n"
    assert (
        root / "labels/val/two.txt"
    ).read_text() == "1 0.943750 0.508333 0.112500 0.983333\n"  # clipped to the image
    assert (root / "images/val/two.jpg").read_bytes() == voc_files()["kit/V/JPEGImages/two.jpg"]
    assert sorted(path.name for path in root.iterdir()) == ["images", "labels"]
    assert not (tmp_path / "set.download").exists()
    assert load_annotations([train], 2, progress=False).report.boxes == 1


def test_voc_corner_base_and_difficult(tmp_path: Path) -> None:
    data = archive("tar", voc_files())
    load_data_config(voc_yaml(tmp_path, data, "corner_base: 1\n    keep_difficult: true")).split("train")
    rows = (tmp_path / "set/labels/train/one.txt").read_text().splitlines()
    # (8 + 28) / 2 / 80, (10 + 30) / 2 / 60: the center moves by one pixel, the size stays
    assert rows == ["0 0.225000 0.333333 0.250000 0.333333", "1 0.493750 0.491667 0.987500 0.983333"]


def test_wrong_digest_is_refused(tmp_path: Path) -> None:
    config = load_data_config(voc_yaml(tmp_path, archive("tar", voc_files()), digest="0" * 32))
    with pytest.raises(DataError, match="md5 is .*, expected 0000"):
        config.split("train")
    assert not (tmp_path / "set").exists() and list((tmp_path / "set.download").iterdir()) == []


def test_interrupted_download_leaves_no_dataset_and_resumes(tmp_path: Path) -> None:
    files = voc_files()
    del files["kit/V/Annotations/two.xml"]
    config = load_data_config(voc_yaml(tmp_path, archive("tar", files)))
    with pytest.raises(DataError, match=r"two\.xml: cannot be read"):
        config.split("train")
    assert not (tmp_path / "set").exists()
    assert [path.name for path in (tmp_path / "set.download").iterdir()] == ["kit.tar"]  # the next try uses it


def test_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "set/notes.txt", "mine")
    config = load_data_config(voc_yaml(tmp_path, archive("tar", voc_files())))
    with pytest.raises(DataError, match="is not empty, but does not hold all"):
        config.split("train")
    assert (tmp_path / "set/notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "change",
    [
        ("folder: kit/V", "folder: {outside}"),
        ("folder: kit/V", "folder: ../outside"),
        ("folder: kit/V", "folder: ."),
        ("split: train", "split: ../../outside"),
        ("list: train", "list: ../../../../outside/x"),
        ("unpack: .", "unpack: {outside}"),
    ],
)
def test_paths_of_a_download_stay_inside_the_dataset(tmp_path: Path, change: tuple[str, str]) -> None:
    kept = write(tmp_path / "outside/x.txt", "mine")
    text = (
        "path: set\ntrain: images/train\nnames: [a]\ndownload:\n"
        f"  files: [{{url: 'file://{tmp_path}/kit.tar', unpack: .}}]\n"
        "  voc: {sets: [{folder: kit/V, list: train, split: train}]}\n"
    )
    (tmp_path / "kit.tar").write_bytes(archive("tar", voc_files()))
    assert change[0] in text
    file = write(tmp_path / "d.yaml", text.replace(change[0], change[1].format(outside=tmp_path / "outside")))
    with pytest.raises(DataError, match=r"leads out of the folder|a folder below the dataset's is needed"):
        load_data_config(file)
    assert kept.read_text() == "mine" and not (tmp_path / "set").exists()


def test_fetch_keeps_foreign_files_of_its_work_folder(tmp_path: Path) -> None:
    kept = write(tmp_path / "set.download/mine.txt", "mine")
    load_data_config(voc_yaml(tmp_path, archive("tar", voc_files()))).split("train")
    assert [path.name for path in kept.parent.iterdir()] == ["mine.txt"]


def test_archive_that_would_fill_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("a.txt", bytes(2**27))
    with pytest.raises(DataError, match="would become"):
        download.unpack(path, tmp_path / "out")


@pytest.mark.parametrize(("at", "value"), [(8, 1), (10, 99)])  # encrypted; an unknown method
def test_archive_that_cannot_be_decoded(tmp_path: Path, at: int, value: int) -> None:
    path = tmp_path / "x.zip"
    data = bytearray(archive("zip", {"a.txt": b"x"}))
    data[data.find(b"PK\x01\x02") + at] = value
    path.write_bytes(data)
    with pytest.raises(DataError, match="cannot be unpacked"):
        download.unpack(path, tmp_path / "out")


@pytest.mark.parametrize("left", [512, -3])  # of a .tar: its member without the end marker; of .tar.gz: no checksum
def test_truncated_tar_is_refused(tmp_path: Path, left: int) -> None:
    data = archive("tar", {"a.txt": b"", "b.txt": b""})
    path = tmp_path / ("x.tar" if left > 0 else "x.tgz")
    path.write_bytes(data[:left] if left > 0 else gzip.compress(data)[:left])
    with pytest.raises(DataError, match=r"cannot be unpacked: (truncated|Compressed file ended)"):
        download.unpack(path, tmp_path / "out")


def test_no_network_is_one_line(tmp_path: Path) -> None:
    text = "path: set\ntrain: t\nnames: [x]\ndownload: {files: [{url: 'http://127.0.0.1:9/x.zip'}]}\n"
    config = load_data_config(write(tmp_path / "d.yaml", text))
    with pytest.raises(DataError, match=r"x\.zip: cannot be fetched .*by hand") as caught:
        config.split("train")
    assert "\n" not in str(caught.value) and not (tmp_path / "set").exists()


@pytest.mark.parametrize("name", ["../evil.txt", "/tmp/evil.txt", "a/../../evil.txt", "C:/evil.txt", "a\\..\\evil.txt"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archive_cannot_write_outside(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    path.write_bytes(archive(kind, {name: b"x"}))
    with pytest.raises(DataError, match="leads out of the folder"):
        download.unpack(path, tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("evil.txt"))


@pytest.mark.parametrize(
    ("strip", "names", "expected"),
    [
        (0, ["s/a.txt", "s/b/c.txt"], {"s/a.txt", "s/b/c.txt"}),
        (1, ["s/a.txt", "s/b/c.txt", "readme"], {"a.txt", "b/c.txt"}),
        (-1, ["s/a.txt", "s/b/c.txt"], {"a.txt", "b/c.txt"}),
        (-1, ["s/a.txt", "t/c.txt"], {"s/a.txt", "t/c.txt"}),
        (-1, ["a.txt"], {"a.txt"}),
        (-1, ["."], set()),
    ],
)
def test_leading_folders(tmp_path: Path, strip: int, names: list[str], expected: set[str]) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(archive("zip", dict.fromkeys(names, b"x")))
    download.unpack(path, tmp_path / "out", strip)
    assert {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.txt")} == expected


def test_unpack_refuses_a_damaged_archive(tmp_path: Path) -> None:
    path = write(tmp_path / "x.zip", "no archive")
    with pytest.raises(DataError, match="cannot be unpacked"):
        download.unpack(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("https://example.org/a/coco8.zip", True),
        (" https://example.org/a.tar.gz \n", True),
        ("https://example.org/page", False),
        ("bash data/scripts/get_coco.sh", False),
        ("curl https://example.org/a.zip", False),
        ("file:///etc/a.zip", False),
    ],
)
def test_only_the_address_of_an_archive_is_a_recipe(text: str, found: bool) -> None:
    assert (download.recipe_from_url(text) is not None) == found
