"""Dataset YAMLs: names, splits, where paths lead, what is refused, and what is fetched or drawn."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from data import download
from data.config import load_data_config
from data.images import read
from data.labels.labels import list_images, load_annotations
from utils.errors import DataError
from utils.files import ROOT
from utils.yaml_lines import load_yaml

OFFICIAL = {"coco": 80, "coco128": 80, "VOC": 20, "bccd": 3, "shapes": 5}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def folders(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)


@pytest.mark.parametrize(("name", "count"), OFFICIAL.items())
@pytest.mark.parametrize("form", ["{}", "{}.yaml", "data/{}.yaml"])
def test_own_sets_are_found_by_name(name: str, count: int, form: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_data_config(form.format(name))
    assert config.file == ROOT / "data" / f"{name}.yaml"
    assert config.num_classes == count and list(config.names) == list(range(count))
    assert {"train", "val"} <= set(config.splits)


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("coco", "person", "toothbrush"),
        ("coco128", "person", "toothbrush"),
        ("VOC", "aeroplane", "tvmonitor"),
        ("bccd", "RBC", "Platelets"),
        ("shapes", "square", "cross"),
    ],
)
def test_own_names(name: str, first: str, last: str) -> None:
    names = load_data_config(name).names
    assert names[0] == first and names[len(names) - 1] == last and len(set(names.values())) == len(names)


def test_own_sets_have_a_way_to_be_had() -> None:
    for name in OFFICIAL:
        config = load_data_config(name)
        assert (config.shapes is not None) == (name == "shapes")
        assert (config.recipe is not None) == (name != "shapes")
        assert config.root == ROOT / "datasets" / name or config.root.is_dir()
    recipe = load_data_config("VOC").recipe
    assert recipe is not None and recipe.voc is not None and len(recipe.voc.sets) == 5
    assert recipe.voc.corner_base == 1 and not recipe.voc.keep_difficult
    assert all(len(remote.md5) == 32 for remote in recipe.files)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("names: [cat, dog]", {0: "cat", 1: "dog"}),
        ("names: {1: dog, 0: cat}", {0: "cat", 1: "dog"}),
        ("nc: 2\nnames: [cat, 7]", {0: "cat", 1: "7"}),
        ("nc: 2", {0: "class0", 1: "class1"}),
        ("names:\n- größe\nroboflow: {license: x}", {0: "größe"}),
    ],
)
def test_names(tmp_path: Path, text: str, names: dict[int, str]) -> None:
    folders(tmp_path, "t", "v")
    assert load_data_config(write(tmp_path / "d.yaml", f"train: t\nval: v\n{text}\n")).names == names


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("train: t\nval: v\n", None, "'names:' is missing"),
        ("train: t\nnames: {0: a, 2: b}\n", 2, "number 1 is missing"),
        ("train: t\nnames: {1: a, 2: b}\n", 2, "number 0 is missing"),
        ("train: t\nnames: {a: 0, b: 1}\n", 2, "'a' is not a class number"),
        ("train: t\nnames: cat\n", 2, "a list or a mapping"),
        ("train: t\nnames: []\n", 2, "a list or a mapping"),
        ("train: t\nnames: [a, ]\nnc: 2\n", 3, "nc is 2, but there are 1 names"),
        ("train: t\nnames: [a, null]\n", 2, "class 1 is None"),
        ("train: t\nnc: many\n", 2, "nc is 'many'"),
        ("train: t\nnames: [a]\nnc: 0\n", 3, "nc is 0"),
        ("train: t\n\nnmaes: [a]\nnames: [a]\n", 3, "unknown key 'nmaes'; did you mean 'names'?"),
        ("train: t\nzzzzzz: 1\nnames: [a]\n", 2, "unknown key 'zzzzzz'; known keys are path, train"),
        ("train: {a: 7}\nnames: [a]\n", 1, "train is {'a': 7}; a folder"),
        ("train: [a, [3]]\nnames: [a]\n", 1, "a folder"),
        ("train: t\nnames: [a]\npath: [x]\n", 3, "path is ['x']"),
        ("names: [a]\n", None, "names no split"),
        ("train: t\nnames: [circle]\ngenerate: squares\n", 3, "'shapes' or a mapping"),
        ("train: t\nnames: [blob]\ngenerate: shapes\n", 3, "no shape is called 'blob'"),
        ("train: t\nnames: [a]\ndownload: [x]\n", 3, "a table with 'files:'"),
        (
            "train: t\nnames: [a]\ndownload: {files: [{url: u, sha: x}]}\n",
            3,
            "unknown key 'sha'; did you mean 'sha256'?",
        ),
        ("train: t\nnames: [a]\ndownload: {files: [{md5: x}]}\n", 3, "'url'"),
        ("train: t\nnames: [a]\ndownload: {files: [{url: u, strip: x}]}\n", 3, "strip is 'x'"),
        ("train: t\nnames: [a]\ndownload: {files: [{url: u}], voc: {corner_base: 1}}\n", 3, "'sets:' is missing"),
        ("train: t\nnames: [a]\nnames: [b]\n", 3, "given twice"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, text: str, line: int | None, problem: str) -> None:
    path = write(tmp_path / "d.yaml", text)
    with pytest.raises(DataError) as caught:
        load_data_config(path)
    message = str(caught.value)
    assert problem in message and "\n" not in message
    assert message.startswith(f"{path}:{line}: " if line else f"{path}: ")


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_data_config(write(tmp_path / "d.yaml", "trian: t\nnames: {1: a}\nnc: 3\n"))
    assert all(f"d.yaml:{line}: " in str(caught.value) for line in (1, 2, 3))


def test_missing_yaml_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"coco12\.yaml: no such file .*did you mean 'coco128\.yaml'"):
        load_data_config("coco12.yaml")


@pytest.mark.parametrize(
    ("yaml", "path", "root"),
    [
        ("set/d.yaml", "path: .", "set"),  # beside the YAML
        ("set/d.yaml", "", "set"),
        ("other/d.yaml", "path: ../set", "set"),
        ("other/d.yaml", "path: set", "set"),  # below the current folder
        ("other/deep/d.yaml", "path: sets/../set", "set"),
        ("other/d.yaml", "path: {tmp}/set", "set"),  # absolute
    ],
)
def test_where_path_leads(tmp_path: Path, monkeypatch, yaml: str, path: str, root: str) -> None:
    folders(tmp_path, "set/images/train", "set/images/val", "other/deep")
    monkeypatch.chdir(tmp_path)
    text = f"{path.format(tmp=tmp_path)}\ntrain: images/train\nval: images/val\nnames: [a]\n"
    config = load_data_config(write(tmp_path / yaml, text))
    assert config.root == tmp_path / root
    assert config.split("train") == (tmp_path / "set/images/train",)


def test_path_below_the_project(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("data.config.ROOT", tmp_path / "project")
    folders(tmp_path, "datasets/coco128/images/train", "project", "elsewhere")
    text = "path: ../datasets/coco128\ntrain: images/train\nnames: [a]\n"
    config = load_data_config(write(tmp_path / "home/me/d.yaml", text))  # YOLOv5: relative to its own root
    assert config.split("train") == (tmp_path / "datasets/coco128/images/train",)


def test_forms_of_a_split(tmp_path: Path) -> None:
    folders(tmp_path, "a/images", "b/images", "train/images")
    write(tmp_path / "list.txt", "")
    text = "train: [a/images, b/images, list.txt]\nval: ../train/images\ntest:\nnames: [x]\n"
    config = load_data_config(write(tmp_path / "d.yaml", text))
    assert config.split("train") == tuple(tmp_path / name for name in ("a/images", "b/images", "list.txt"))
    assert config.split("val") == (tmp_path / "train/images",)  # exporters write ../ for a folder beside the YAML
    with pytest.raises(DataError, match="has no split 'test'; it has train, val"):
        config.split("test")


def test_missing_folder_is_named(tmp_path: Path) -> None:
    folders(tmp_path, "images/train")
    config = load_data_config(write(tmp_path / "d.yaml", "train: images/train\nval: images/vla\nnames: [x]\n"))
    assert config.split("train")
    with pytest.raises(DataError, match=rf"d\.yaml:2: split 'val': no such .*: {tmp_path}/images/vla"):
        config.split("val")


def test_foreign_script_is_never_run(tmp_path: Path) -> None:
    script = f"download: |\n  import pathlib\n  pathlib.Path('{tmp_path}/ran').touch()\n  touch {tmp_path}/ran\n"
    config = load_data_config(write(tmp_path / "d.yaml", f"path: s\ntrain: t\nnames: [x]\n{script}"))
    with pytest.raises(DataError, match=rf"script under 'download:' \(line 4\) is never run.*{tmp_path}/s"):
        config.split("train")
    assert not (tmp_path / "ran").exists() and "touch" in (config.download or "")


def test_drawn_set_is_made_on_first_use(tmp_path: Path) -> None:
    text = "path: shapes\ntrain: images/train\nval: images/val\nnames: [star, circle]\n"
    generate = "generate: {kind: shapes, train: 3, val: 1, test: 0, imgsz: 64}\n"
    config = load_data_config(write(tmp_path / "d.yaml", text + generate))
    assert not (tmp_path / "shapes").exists()  # reading the YAML draws nothing
    (folder,) = config.split("train")
    assert len(list(folder.iterdir())) == 3
    assert load_annotations([folder], config.num_classes, progress=False).report.labelled == 3


def test_renamed_classes_do_not_change_the_drawn_set(tmp_path: Path) -> None:
    text = "path: shapes\ntrain: images/train\nnames: [star, circle]\n"
    generate = "generate: {kind: shapes, train: 3, val: 1, test: 0, imgsz: 64}\n"
    config = load_data_config(write(tmp_path / "d.yaml", text + generate))
    (folder,) = config.split("train")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    replace(config, names={0: "item"}).split("train")  # what --single-cls does
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def archive(kind: str, files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w") as out:
            for name, data in files.items():
                out.writestr(name, data)
    else:
        with tarfile.open(fileobj=stream, mode="w") as out_tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                out_tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


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


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("[02146, 21008, 2.10]", ["02146", "21008", "2.10"]),
        ("{0: no, 1: yes, 2: true}", ["no", "yes", "true"]),
        ("[12:30, 1_000, 2024-02-30]", ["12:30", "1_000", "2024-02-30"]),
        ("[0x10, 1e3, on]", ["0x10", "1e3", "on"]),
    ],
)
def test_names_are_strings_as_written(tmp_path: Path, names: str, expected: list[str]) -> None:
    config = load_data_config(write(tmp_path / "d.yaml", f"train: t\nnames: {names}\n"))
    assert list(config.names.values()) == expected


@pytest.mark.parametrize("folder", ["2024_01", "07", "1", "no"])
def test_paths_are_strings_as_written(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder / folder).mkdir(parents=True)
    text = f"path: {folder}\ntrain: {folder}\nval: [{folder}]\nnames: [a]\n"
    config = load_data_config(write(tmp_path / "d.yaml", text))
    assert config.splits == {"train": (tmp_path / folder / folder,), "val": (tmp_path / folder / folder,)}


def test_linked_folder_keeps_its_path(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "images").symlink_to(tmp_path / "pool")
    config = load_data_config(write(tmp_path / "d.yaml", "train: images\nnames: [a]\n"))
    assert config.splits["train"] == (tmp_path / "images",)


def test_paths_written_on_windows(tmp_path: Path) -> None:
    (tmp_path / "set/images/train").mkdir(parents=True)
    config = load_data_config(write(tmp_path / "d.yaml", "path: set\ntrain: images\\train\nnames: [a]\n"))
    assert config.splits["train"] == (tmp_path / "set/images/train",)


def test_duplicate_names_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_data_config(write(tmp_path / "d.yaml", "train: t\nnames: [cat, dog, cat]\n"))
    assert "the same name for different classes: 'cat' (classes 0, 2)" in caplog.text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("nc: 1000000", "nc is 1000000"),
        ("names: [a]\npath: ~nosuchuser/x", "no such user"),
        ("names: [a]\npath: 'a\\0b'", "path is"),
        ("names: [a]\nval: " + "x" * 5000, "val is 'xxx"),
        ("names: [a]\nimages: {train: 'a\\0b'}", "not valid YAML|images is"),
    ],
)
def test_values_that_are_no_path_or_out_of_range(tmp_path: Path, text: str, problem: str) -> None:
    text = text.replace("'a\\0b'", '"a\\0b"')
    with pytest.raises(DataError, match=problem) as caught:
        load_data_config(write(tmp_path / "d.yaml", f"train: t\n{text}\n"))
    assert len(str(caught.value)) < 1000


def test_mistyped_folder_of_a_dataset_yaml_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_data_config(tmp_path / "nowhere/coco128.yaml")
    assert load_data_config("coco128").file == ROOT / "data/coco128.yaml"


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
    ],
)
def test_leading_folders(tmp_path: Path, strip: int, names: list[str], expected: set[str]) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(archive("zip", dict.fromkeys(names, b"x")))
    download.unpack(path, tmp_path / "out", strip)
    assert {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.txt")} == expected


def test_broken_archive(tmp_path: Path) -> None:
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


RECIPE = ROOT / "tests" / "parity" / "data" / "yolov5" / "recipe.json.gz"
HYPS = json.loads(gzip.decompress(RECIPE.read_bytes()))["hyp_files"]


@pytest.mark.parity
@pytest.mark.parametrize("name", sorted(HYPS))
def test_hyperparameter_files_hold_the_reference_numbers(name: str) -> None:
    table = load_yaml(ROOT / "data" / "hyps" / f"{name}.yaml")
    assert dict(table) == HYPS[name]
    assert all(type(value) in (int, float) for value in table.values())


def test_sample_images_are_there() -> None:
    images, _ = list_images([ROOT / "data" / "images"])
    assert len(images) >= 3 and all(min(read(path).shape[:2]) >= 320 for path in images)
