"""Dataset YAMLs: names, splits, paths, errors."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from data.config import load_data_config
from data.images import read
from data.labels.labels import list_images, load_annotations
from tests.helpers.archives import write
from utils.errors import DataError
from utils.files import ROOT
from utils.yaml_lines import load_yaml

OFFICIAL = {"coco": 80, "coco128": 80, "VOC": 20, "bccd": 3, "shapes": 5}


def folders(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)


@pytest.mark.parametrize(("name", "count"), OFFICIAL.items())
@pytest.mark.parametrize("form", ["{}", "{}.yaml", "data/{}.yaml"])
def test_project_datasets_are_found_by_name(name: str, count: int, form: str, tmp_path: Path, monkeypatch) -> None:
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
def test_names_of_project_datasets(name: str, first: str, last: str) -> None:
    names = load_data_config(name).names
    assert names[0] == first and names[len(names) - 1] == last and len(set(names.values())) == len(names)


def test_project_datasets_are_downloaded_or_generated() -> None:
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
        ("train: t\nnames: obj.names\n", 2, "'python -m data.check FOLDER' makes one of that file"),
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


def test_missing_validation_split_is_explained(tmp_path: Path) -> None:
    config = load_data_config(write(tmp_path / "d.yaml", "train: t\nnames: [x]\n"))
    with pytest.raises(DataError, match=r"no split 'val'; it has train; 'python -m data.convert .*--split 0\.8 0\.2'"):
        config.split("val")


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


def test_dataset_is_generated_on_first_use(tmp_path: Path) -> None:
    text = "path: shapes\ntrain: images/train\nval: images/val\nnames: [star, circle]\n"
    generate = "generate: {kind: shapes, train: 3, val: 1, test: 0, imgsz: 64}\n"
    config = load_data_config(write(tmp_path / "d.yaml", text + generate))
    assert not (tmp_path / "shapes").exists()  # reading the YAML generates nothing
    (folder,) = config.split("train")
    assert len(list(folder.iterdir())) == 3
    assert load_annotations([folder], config.num_classes, progress=False).report.labeled == 3


def test_renamed_classes_do_not_change_the_generated_dataset(tmp_path: Path) -> None:
    text = "path: shapes\ntrain: images/train\nnames: [star, circle]\n"
    generate = "generate: {kind: shapes, train: 3, val: 1, test: 0, imgsz: 64}\n"
    config = load_data_config(write(tmp_path / "d.yaml", text + generate))
    (folder,) = config.split("train")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    replace(config, names={0: "item"}).split("train")  # what --single-cls does
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


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
        (f"names: [a]\npath: {'x' * 300}", r"path is 'x+\.\.\.x+', which is too long for a file name"),
        (f"names: [a]\nval: {'x' * 300}", r"val is 'x+\.\.\.x+', which is too long for a file name"),
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


@pytest.mark.parametrize(
    ("yaml", "text", "ending"),
    [
        ("d.yaml", "path: stes/blood\ntrain: images", r"{tmp} has no 'stes'; did you mean 'sets'\?"),
        ("d.yaml", "path: sets/cells\ntrain: images", r"{tmp}/sets has no 'cells'; there are 'blood'"),
        ("d.yaml", "path: sets/blood\ntrain: images/trian", r"/blood/images has no 'trian'; did you mean 'train'\?"),
        ("sets/blood/d.yaml", "path: sets/blood\ntrain: images/train", r"it is in {tmp}/sets/blood: write 'path: \.'"),
        ("sets/d.yaml", "path: data\ntrain: sets/blood/images", r"it is in {tmp}: write 'path: \.\.'"),
    ],
)
def test_missing_part_of_a_path_is_named(tmp_path: Path, yaml: str, text: str, ending: str) -> None:
    folders(tmp_path, "sets/blood/images/train")
    config = load_data_config(write(tmp_path / yaml, f"{text}\nnames: [a]\n"))
    with pytest.raises(DataError, match=ending.format(tmp=tmp_path)):
        config.split("train")


def test_names_numbered_from_one_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"number 0 is missing; .* do the labels count from 1 too\?"):
        load_data_config(write(tmp_path / "d.yaml", "train: t\nnames: {1: a, 2: b}\n"))


@pytest.mark.parametrize("name", ["folder", "annotations.json"])
def test_folder_or_annotations_instead_of_a_yaml(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=rf"'python -m data.check {tmp_path}/{name}' suggests one"):
        load_data_config(tmp_path / name)
